"""Evaluation of a judge: measures over labelled pairs, with confidence intervals."""
