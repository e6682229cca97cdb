"""What is done to documents before they are tokenised, and which of them are left out."""
