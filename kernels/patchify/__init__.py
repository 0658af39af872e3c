"""Converts frames to the patch layout of the Qwen vision towers. The public name is `op.patchify`."""
