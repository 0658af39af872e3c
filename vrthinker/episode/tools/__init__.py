"""The tools that a round may call, with one file per tool, their registry, and their common types."""
