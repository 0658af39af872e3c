"""Converts rewards of grouped episodes to advantages. The public name is `op.group_advantage`."""
