"""From trajectories to log-probabilities with gradients: sequences, packs, forwards and losses."""
