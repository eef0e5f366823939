"""Checkpoints: native, Hugging Face and sharded formats, written atomically."""
