"""Data: sources, tokenizer, token shards, deduplication, packed batches."""
