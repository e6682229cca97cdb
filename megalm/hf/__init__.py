"""Checkpoints from and to Hugging Face folders."""
