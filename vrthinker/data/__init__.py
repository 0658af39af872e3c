"""Preference data: the pairs that are judged, and the file that the verdicts go to."""
