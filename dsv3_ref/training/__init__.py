"""Training: the loop, its settings, resume, spike guard, EMA, metrics and the report."""
