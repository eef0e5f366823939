"""Command line, data, checkpoints and reports: everything that has a path or a clock."""
