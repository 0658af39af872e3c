"""Settings of released checkpoints that do not bring their own, one YAML file each."""
