"""What writes a round: transformers, an OpenAI-compatible endpoint, a script for tests."""
