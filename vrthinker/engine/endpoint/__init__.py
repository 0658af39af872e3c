"""Rounds written by an OpenAI-compatible server."""
