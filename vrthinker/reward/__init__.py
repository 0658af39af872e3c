"""Rewards of episodes and advantages within their groups, for the GRPO stage."""
