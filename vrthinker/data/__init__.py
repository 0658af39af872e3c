"""Preference data: the pairs to judge and to train on, and the tables that they may come in."""
