"""The thinking-with-images procedure: rounds, tool calls, verdicts. It uses no tensor library."""
