"""An engine whose rounds are written by an OpenAI-compatible server."""
