"""Training steps of any model: the loop, checkpoints, optimizers, schedules, interrupts and progress."""
