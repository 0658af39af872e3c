"""What a training run will need before it is started: memory, tokens, FLOPs and time."""
