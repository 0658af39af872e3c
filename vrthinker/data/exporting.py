"""Pairs written back to the layouts in which others publish them.

Invariant: importing an export gives the same pairs, as far as the layout can hold them: a layout with an
overall label only loses the others, and captions lose blanks and line ends around them. What is lost is
counted. So is a caption `nan`, which tools write for a missing one, and which an import takes for that. Ids
and datasets go into fields of their own, which other readers pass over.
"""

from __future__ import annotations

import csv
import io
import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vrthinker.data.datasets.genai_bench import VOTES
from vrthinker.data.datasets.rows import DATASET, is_missing_caption
from vrthinker.data.datasets.unifiedreward import MARK, SENTENCES
from vrthinker.data.datasets.videoalign import OVERALL
from vrthinker.data.pairs import Pair, written_path
from vrthinker.episode.dimensions import Dimension
from vrthinker.errors import InputError

_SIDES = {1: "A", 2: "B", 0: "same"}
_QUESTION = (
    "Two videos were made from the same caption. Compare how well they follow the caption and how good they "
    "look, then say which one is better: 'Video 1 is better.', 'Video 2 is better.' or 'Both videos are "
    "equally good.'"
)


@dataclass(frozen=True)
class Exported:
    """What an export gives.

    Attributes:
        content: The content of the file.
        pairs: The number of pairs in it.
        lost: What the layout cannot hold -> how often that was met.
    """

    content: bytes
    pairs: int
    lost: Mapping[str, int] = field(default_factory=dict)


def check_export(name: str, file: Path) -> None:
    """Refuses a layout that is unknown, or a file whose name does not fit it.

    Raises:
        InputError: One of the two.
    """
    if name not in EXPORTS:
        raise InputError(f"data export: got {name!r}, allowed: {', '.join(EXPORTS)}")
    ending = EXPORTS[name][2]
    if file.suffix.lower() != ending:
        raise InputError(f"--out: got {file.name}, allowed for {name}: a file that ends in {ending}")


def export_pairs(name: str, pairs: Sequence[Pair], file: Path) -> Exported:
    """Pairs in another layout.

    Args:
        name: The layout, a key of `EXPORTS`.
        pairs: The pairs.
        file: The file that they are for. Clips below its folder get relative paths, others absolute ones.

    Raises:
        InputError: The layout is unknown or does not fit the file's name, or can hold none of the pairs.
    """
    check_export(name, file)
    write, codes, _ = EXPORTS[name]
    folder = Path(os.path.abspath(file.parent))
    kept = [pair for pair in pairs if any(code in (pair.labels or {}) for code in codes)]
    if not kept:
        raise InputError(
            f"{name}: got {len(pairs)} pairs, none of which has a label for {', '.join(codes)}; the layout "
            "holds nothing else"
        )
    lost = {f"pairs without a label for {', '.join(codes)}": len(pairs) - len(kept)}
    for code in Dimension:
        if code not in codes:
            lost[f"{code.value} labels"] = sum(code in (pair.labels or {}) for pair in kept)
    lost["blanks or line ends around captions"] = sum(pair.prompt != pair.prompt.strip() for pair in kept)
    lost["blanks around ids"] = sum(pair.id != pair.id.strip() for pair in kept)
    lost["captions nan, which an import reads as none"] = sum(
        is_missing_caption(pair.prompt) for pair in kept
    )
    return Exported(write(kept, folder), len(kept), {what: count for what, count in lost.items() if count})


def _videoalign(pairs: Sequence[Pair], folder: Path) -> bytes:
    text = io.StringIO()
    writer = csv.writer(text)  # its line end is that of RFC 4180, with which it quotes a lone \r too
    three = ("VQ", "MQ", "TA")
    writer.writerow(["path_A", "path_B", "prompt", *three, OVERALL, "id", DATASET])
    for pair in pairs:
        labels = pair.labels or {}
        sides = [_SIDES[labels[code]] if code in labels else "" for code in (*three, "OA")]
        clips = [written_path(clip, folder) for clip in (pair.video_1, pair.video_2)]
        writer.writerow([*clips, pair.prompt, *sides, pair.id, pair.dataset or ""])
    return text.getvalue().encode()


def _genai_bench(pairs: Sequence[Pair], folder: Path) -> bytes:
    return _json(
        {
            "id": pair.id,
            "prompt": pair.prompt,
            "video_left": written_path(pair.video_1, folder),
            "video_right": written_path(pair.video_2, folder),
            "vote_type": VOTES[(pair.labels or {})["OA"]],
            DATASET: pair.dataset,
        }
        for pair in pairs
    )


def _unifiedreward(pairs: Sequence[Pair], folder: Path) -> bytes:
    return _json(
        {
            "id": pair.id,
            "conversations": [
                {"from": "human", "value": f"<video>\n<video>\n{_QUESTION}\n{MARK}{pair.prompt}]"},
                {"from": "gpt", "value": SENTENCES[(pair.labels or {})["OA"]]},
            ],
            "videos": [written_path(clip, folder) for clip in (pair.video_1, pair.video_2)],
            DATASET: pair.dataset,
        }
        for pair in pairs
    )


def _json(values: Any) -> bytes:
    return (json.dumps(list(values), ensure_ascii=False, indent=1) + "\n").encode()


EXPORTS: Mapping[str, tuple[Callable[[Sequence[Pair], Path], bytes], tuple[str, ...], str]] = {
    "videoalign": (_videoalign, tuple(code.value for code in Dimension), ".csv"),
    "genai-bench": (_genai_bench, ("OA",), ".json"),
    "unifiedreward": (_unifiedreward, ("OA",), ".json"),
}
"""Layout -> its writer, the dimensions that it can hold, and the ending of its file."""
