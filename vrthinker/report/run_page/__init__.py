"""The page of a training run: one self-contained HTML file with its curves, settings and evaluations."""
