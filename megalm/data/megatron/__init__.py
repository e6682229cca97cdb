"""Megatron-LM's indexed datasets: reading them as they are, training on them in place, and writing them."""
