"""Trials: the episodes that are sampled to learn from, several per pair, in both orders of the clips.

Whether a trial judges (video 1, video 2) or (video 2, video 1) is drawn at random, and its labels are turned
with its clips, so that no position is the better one more often and a model cannot learn a habit for one.

Invariant: a trial follows from the seed, the pair and the sample's number alone, so that a resumed run draws
the same trials.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from vrthinker.data.pairs import Pair
from vrthinker.errors import InputError, one_line
from vrthinker.records.files import replace_file

_SHOWN_MISSING = 3


@dataclass(frozen=True)
class Trial:
    """One episode to sample.

    Attributes:
        source: The pair as its file has it.
        sample: The number of the sample of this pair, from 1.
        swapped: Whether the clips are judged in the other order.
    """

    source: Pair
    sample: int
    swapped: bool

    @property
    def id(self) -> str:
        """The id of its episode, `<pair>#<sample>`. Different trials have different ids."""
        return f"{self.source.id}#{self.sample}"

    @property
    def group_id(self) -> str:
        """The id of the trials that share its first input: those of its pair that have its order."""
        return f"{'2, 1' if self.swapped else '1, 2'}: {self.source.id}"

    @cached_property
    def pair(self) -> Pair:
        """What is judged: clips and labels in the trial's order, under the trial's id."""
        judged = self.source.swapped() if self.swapped else self.source
        return judged.model_copy(update={"id": self.id})


def make_trials(pairs: Sequence[Pair], *, samples: int, seed: int, swap: bool = True) -> list[Trial]:
    """The trials of pairs, in the order of the pairs. Trials of one group are neighbours.

    Args:
        pairs: The pairs.
        samples: The number of trials per pair.
        seed: The seed of the orders.
        swap: Draw the order of each trial. Otherwise all have the order of the file.
    """
    return [
        Trial(pair, sample, swapped)
        for pair in pairs
        for swapped, sample in sorted(
            (swap and _is_swapped(seed, pair.id, sample), sample) for sample in range(1, samples + 1)
        )
    ]


def _is_swapped(seed: int, pair_id: str, sample: int) -> bool:
    """A coin of (seed, pair, sample)."""
    drawn = hashlib.sha256(f"order:{seed}:{sample}:{pair_id}".encode("utf-8", "surrogatepass")).digest()
    return bool(drawn[0] & 1)


def check_clips(pairs: Sequence[Pair], pairs_file: Path) -> None:
    """Refuses pairs whose clips are not there, before hours of work come to the first of them.

    Raises:
        InputError: A clip is missing.
    """
    missing = [path for pair in pairs for path in (pair.video_1, pair.video_2) if not path.exists()]
    if missing:
        named = ", ".join(one_line(str(path)) for path in missing[:_SHOWN_MISSING])
        more = f" and {len(missing) - _SHOWN_MISSING} more" if len(missing) > _SHOWN_MISSING else ""
        raise InputError(
            f"{pairs_file}: clips that are not there: {named}{more}; put them back or leave their pairs out"
        )


def write_pairs_file(path: Path, pairs: Sequence[Pair]) -> None:
    """Writes a pairs file with absolute paths, atomically.

    Raises:
        VRThinkerError: The file could not be written. An older one is unchanged.
    """
    lines = []
    for pair in pairs:
        value = pair.model_dump(mode="json", exclude_none=True)
        value |= {name: str(Path(value[name]).absolute()) for name in ("video_1", "video_2")}
        lines.append(json.dumps(value) + "\n")
    replace_file(path, "".join(lines).encode())
