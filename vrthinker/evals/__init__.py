"""What a judge is worth: measures over labelled pairs, with confidence intervals."""
