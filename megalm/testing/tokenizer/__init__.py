"""What a tokenizer is held to."""
