"""The operations a round may call: one file an operation, the registry, and what they share."""
