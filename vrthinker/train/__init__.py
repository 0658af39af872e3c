"""Training: trajectories as batches, losses, and the loop that the three stages share."""
