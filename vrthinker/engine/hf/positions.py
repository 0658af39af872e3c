"""M-RoPE positions of a context, which we compute and always pass explicitly.

transformers derives positions from the cache's length and one mutable `rope_deltas`, which does not work for
a context that loses frames in the middle. A text token takes one position on all three rows (temporal,
height, width). An image of h x w merged patches takes its start position on the temporal row, and its start
plus the patch's row or column on the other two. The token after it is at the start plus max(h, w).

Source: Qwen2-VL, arXiv 2409.12191, section 2.1. Qwen3-VL does the same for single frames.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import numpy.typing as npt

Positions = npt.NDArray[np.int64]


def mrope_positions(parts: Iterable[int | tuple[int, int]], start: int = 0) -> Positions:
    """Contiguous positions of a sequence of parts.

    Args:
        parts: The parts: a text's number of tokens, or an image's (height, width) in merged patches.
        start: The position of the first token.

    Returns:
        int64 `[3, tokens]`: temporal, height, width.
    """
    columns = [np.empty((3, 0), np.int64)]
    position = start
    for part in parts:
        if isinstance(part, tuple):
            height, width = part
            rows, cols = np.divmod(np.arange(height * width), width)
            columns.append(np.stack([np.zeros_like(rows), rows, cols]) + position)
            position += max(height, width)
        else:
            columns.append(np.broadcast_to(np.arange(position, position + part), (3, part)))
            position += part
    return np.concatenate(columns, axis=1)
