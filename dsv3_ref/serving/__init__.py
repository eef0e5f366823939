"""Serving: text generation, chat, and an OpenAI-compatible server."""
