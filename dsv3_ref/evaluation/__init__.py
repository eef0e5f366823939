"""Evaluation: pass@k and maj@k on built-in tasks, and an adapter for lm-eval."""
