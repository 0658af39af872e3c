"""Steps of any model: the loop, its checkpoints, optimizers, schedules, interrupts and progress."""
