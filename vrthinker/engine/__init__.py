"""The engines that write rounds: transformers, an OpenAI-compatible endpoint, and a script for tests."""
