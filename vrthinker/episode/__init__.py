"""The thinking-with-image procedure: rounds, tool calls, verdicts. No tensor library in here."""
