"""Command line: the table of `dsv3` commands."""
