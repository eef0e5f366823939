"""A cluster: which rank holds what, what travels between ranks, and when (§3.1, §3.2)."""
