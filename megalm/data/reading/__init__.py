"""Input files to documents: which files, in which pieces, and what is in them."""
