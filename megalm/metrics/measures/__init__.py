"""Measures of predictions, computed by libraries that are well kept; what they leave undefined is 0. Free of torch."""
