"""Frames as the patches that vLLM's vision tower takes, each made once while it is kept."""

from __future__ import annotations

import hashlib
import secrets
from collections import OrderedDict
from collections.abc import Hashable

import torch

from vrthinker.engine.base import FrameSegment
from vrthinker.engine.hf.context import Context, FramePiece
from vrthinker.engine.hf.frontend import Frontend
from vrthinker.engine.vllm.generation import Picture
from vrthinker.errors import EngineError


class Pictures:
    """Patches by what makes a frame's pixels distinct, under a byte limit; the least recently used go first.

    Args:
        frontend: How pixels become patches.
        dtype: The dtype of the patches: that of the vision tower, if patches can have it.
        max_bytes: The most bytes of patches that are kept. Rounds under way hold theirs besides.
    """

    def __init__(self, frontend: Frontend, dtype: torch.dtype, max_bytes: int) -> None:
        self._frontend, self._max_bytes = frontend, max_bytes
        self._dtype = torch.bfloat16 if dtype == torch.bfloat16 else torch.float32
        # A server keeps pictures longer than this engine lives, and serves others: no two engines share a
        # name.
        self._salt = secrets.token_hex(16)
        self._kept: OrderedDict[Hashable, torch.Tensor] = OrderedDict()
        self._size_bytes = 0
        self.shown = 0
        self.made = 0

    def of(self, context: Context) -> tuple[Picture, ...]:
        """The live frames of a context, in order.

        Raises:
            EngineError: A frame has another size than its placeholders stand for.
            Exception: Whatever loading a frame raises.
        """
        return tuple(self._picture(offset, piece) for offset, piece in context.frames())

    def clear(self) -> None:
        """Forgets all patches."""
        self._kept.clear()
        self._size_bytes = 0

    def _picture(self, offset: int, piece: FramePiece) -> Picture:
        segment = piece.segment
        patches, grid = self._patches(segment), self._frontend.grid(segment.size)
        length = len(piece) - 2
        made = patches.shape[0] // self._frontend.merge_size**2
        if made != length or grid[1] * grid[2] != patches.shape[0]:
            raise EngineError(
                f"{segment.shown}: got a picture of {made} tokens for {length} placeholders; frames have to "
                "be "
                f"on the patch grid of {self._frontend.factor[0]} pixels"
            )
        self.shown += 1
        named = f"{self._salt}:{tuple(segment.key)!r}".encode("utf-8", "surrogatepass")
        return Picture(hashlib.sha256(named).hexdigest(), offset, length, grid, patches)

    def _patches(self, segment: FrameSegment) -> torch.Tensor:
        found = self._kept.get(segment.key)
        if found is not None:
            self._kept.move_to_end(segment.key)
            return found
        pixels = torch.as_tensor(segment.load())[None]
        patches = self._frontend.patches(pixels, self._dtype).cpu()
        self.made += 1
        self._kept[segment.key] = patches
        self._size_bytes += patches.nbytes
        while self._size_bytes > self._max_bytes and len(self._kept) > 1:
            _, oldest = self._kept.popitem(last=False)
            self._size_bytes -= oldest.nbytes
        return patches
