"""megalm: a plugin-based training engine for language models. Importing it is cheap and needs no torch."""

__version__ = "0.1.0"
