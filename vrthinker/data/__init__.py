"""Preference data: the pairs that are judged and trained on."""
