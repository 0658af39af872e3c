"""Thinking traces in the formats of other trainers, out and back in."""
