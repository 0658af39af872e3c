"""The parts of rounds that can be learned. This module loads no torch, so that settings may name them."""

from __future__ import annotations

from typing import Literal

LearnedPart = Literal["rounds", "snapshots", "calls"]
"""The part of each round that is learned: all of it; what new frames show (reading lessons); or how it asks
for frames, if it does: the last line of the thinking, the recommended answer and the call."""
