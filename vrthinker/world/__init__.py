"""The synthetic world with planted truth: clips, words, perfect readers, the oracle, the nano judge."""
