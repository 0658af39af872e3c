"""Trajectories to log-probabilities with gradients: sequences, packs, the forwards, the losses."""
