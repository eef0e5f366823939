"""Training on many ranks: placement of parameters, communication and execution (§3.1, §3.2)."""
