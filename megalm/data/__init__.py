"""Text to tokens: preparation, the memory-mapped store, sample order and n-gram baselines. Nothing here imports
torch."""
