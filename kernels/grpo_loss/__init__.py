"""The clipped policy loss over packed episodes. The public name is `op.grpo_loss`."""
