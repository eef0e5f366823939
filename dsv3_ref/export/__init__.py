"""Export: a run as a directory or file for other programs."""
