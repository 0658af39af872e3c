"""Encoded frames, kept under a byte limit, so that a frame shared by rounds or episodes is encoded once.

The key of an entry is what makes the pixels distinct (file, frame index, size). The cache is emptied when the
weights change, so every entry was encoded with the current weights.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable, Sequence

import torch

from vrthinker.engine.base import FrameSegment
from vrthinker.engine.hf.model import FrameFeatures, VisionLanguageModel

_FRAMES_PER_FORWARD = 16


class FeatureCache:
    """A cache of encoded frames that drops the least recently used frames first.

    Args:
        model: The model that encodes missing frames.
        max_bytes: The most bytes of features that are kept between calls.
    """

    def __init__(self, model: VisionLanguageModel, max_bytes: int) -> None:
        self._model, self._max_bytes = model, max_bytes
        self._kept: OrderedDict[Hashable, FrameFeatures] = OrderedDict()
        self.size_bytes = 0
        self.hits = 0
        self.misses = 0

    def get(self, segments: Sequence[FrameSegment], *, counted: bool = True) -> list[FrameFeatures]:
        """Features of frames, in order; each distinct missing frame is loaded and encoded once.

        Args:
            segments: The frames.
            counted: Whether the call counts in `hit_rate`. False for a second call about the same frames.

        Raises:
            VideoError: A frame does not decode.
        """
        features_by_key = {}
        missing: dict[Hashable, FrameSegment] = {}
        for segment in segments:
            if segment.key in self._kept:
                self._kept.move_to_end(segment.key)
                features_by_key[segment.key] = self._kept[segment.key]
                self.hits += counted
            elif segment.key in missing:
                self.hits += counted
            else:
                missing[segment.key] = segment
                self.misses += counted
        todo = list(missing.values())
        for start in range(0, len(todo), _FRAMES_PER_FORWARD):
            part = todo[start : start + _FRAMES_PER_FORWARD]
            pixels = [segment.load() for segment in part]
            with torch.inference_mode():
                encoded = [features.copied() for features in self._model.encode(pixels)]
            for segment, features in zip(part, encoded, strict=True):
                features_by_key[segment.key] = features
                self._keep(segment.key, features)
        return [features_by_key[segment.key] for segment in segments]

    @property
    def hit_rate(self) -> float:
        """The share of requested frames that did not have to be encoded; 0 before the first request."""
        asked = self.hits + self.misses
        return self.hits / asked if asked else 0.0

    def clear(self) -> None:
        """Drops all features, for instance because the weights changed. The counts of `hit_rate` are kept."""
        self._kept.clear()
        self.size_bytes = 0

    def _keep(self, key: Hashable, features: FrameFeatures) -> None:
        self._kept[key] = features
        self.size_bytes += features.size_bytes
        while self.size_bytes > self._max_bytes and self._kept:
            _, oldest = self._kept.popitem(last=False)
            self.size_bytes -= oldest.size_bytes
