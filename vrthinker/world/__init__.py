"""The synthetic world with planted truth: clips, words, perfect readers, the oracle and the nano judge."""
