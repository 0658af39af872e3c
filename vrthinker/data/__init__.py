"""Preference data: the pairs to judge and to train on."""
