"""Studies: programs that produce the numbers in notebooks/results."""
