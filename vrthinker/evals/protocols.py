"""How often and in which form each pair is put to the judge, and how the answers become one verdict.

A *presentation* is one question to the judge: a pair in one order of its clips, under an id of its own. By
default each pair has one. With both orders it has two, with k votes up to k.

Invariants:

- However many presentations it has, a pair is one item: it counts once.
- If one of the orders, or too many votes, have no verdict, the pair has none.
- Votes that cannot change the verdict any more are not asked for (`votes_needed`), so that stopping early
  gives the verdict of all votes.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal

from vrthinker.data.pairs import Pair
from vrthinker.episode.dimensions import Dimension
from vrthinker.episode.orders import turned_notes
from vrthinker.episode.trajectory import Trajectory
from vrthinker.errors import InputError, one_line
from vrthinker.evals.items import cost_of, item_of_record
from vrthinker.evals.retrieval import Retrieval
from vrthinker.records.eval_items import EvalItem
from vrthinker.records.verdicts import VerdictRecord

SWAPPED = (0, 2, 1)
"""A label, read with the clips in the other order."""
_CODES = tuple(code.value for code in Dimension)
_MAX_VOTES = 64


@dataclass(frozen=True)
class Protocol:
    """How pairs are judged, besides the judge's own settings. The defaults are the method's evaluation.

    Attributes:
        both_orders: Whether each pair is judged in both orders of its clips. The verdict is their mean.
        votes: The most votes on each pair, sampled independently.
        retrieval: The frames that a tool call shows.
        redundant: Whether random frames of each clip are repeated, until it is twice as long.
        first_answer_from: The least confidence from which the recommended answer of the first round counts
            as the verdict; None to let every episode go on.
    """

    both_orders: bool = False
    votes: int = 1
    retrieval: Retrieval = Retrieval.OWN
    redundant: bool = False
    first_answer_from: Literal["high", "middle", "low"] | None = None

    def __post_init__(self) -> None:
        if not 1 <= self.votes <= _MAX_VOTES:
            raise InputError(f"votes: got {self.votes}, allowed: 1 to {_MAX_VOTES}")
        if self.both_orders and self.votes > 1:
            raise InputError("votes: got both orders and several votes, allowed: one of the two")

    def as_json(self) -> dict[str, Any]:
        """What departs from the default, as JSON values."""
        values, usual = asdict(self), Protocol()
        return {
            field.name: values[field.name]
            for field in fields(self)
            if values[field.name] != getattr(usual, field.name)
        }

    @property
    def needs_trajectories(self) -> bool:
        """Whether verdicts are read from the first rounds."""
        return self.retrieval is Retrieval.NONE or self.first_answer_from is not None


def swapped_presentation(pair: Pair) -> Pair:
    """The pair with its clips and its labels in the other order, under an id of its own."""
    labels = None if pair.labels is None else {code: SWAPPED[label] for code, label in pair.labels.items()}
    changes = {"id": f"{pair.id}#2,1", "video_1": pair.video_2, "video_2": pair.video_1, "labels": labels}
    return pair.model_copy(update=changes)


def presentations(pair: Pair, protocol: Protocol) -> list[Pair]:
    """All presentations that a pair may have. The first one is the pair itself."""
    if protocol.both_orders:
        return [pair, swapped_presentation(pair)]
    return [
        pair,
        *(pair.model_copy(update={"id": f"{pair.id}#{vote}"}) for vote in range(2, protocol.votes + 1)),
    ]


def check_ids(pairs: Sequence[Pair], protocol: Protocol) -> None:
    """Refuses pairs whose ids are those of other pairs' presentations.

    Raises:
        InputError: Two presentations would have the same id.
    """
    ids = {pair.id for pair in pairs}
    for pair in pairs:
        for other in presentations(pair, protocol)[1:]:
            if other.id in ids:
                raise InputError(
                    f"pairs: got the id {one_line(other.id)}, which a further question about "
                    f"{one_line(pair.id)} would have; rename it"
                )


def waves(
    pairs: Sequence[Pair], protocol: Protocol, records: Mapping[str, VerdictRecord]
) -> Iterator[list[Pair]]:
    """The presentations that have to be judged next, again and again until all verdicts are known.

    Args:
        pairs: The pairs.
        protocol: How they are judged.
        records: Presentation id -> its record, which the caller fills while it judges.
    """
    while True:
        todo = [one for pair in pairs for one in _next(presentations(pair, protocol), records)]
        if not todo:
            return
        yield todo


def _next(asked: Sequence[Pair], records: Mapping[str, VerdictRecord]) -> list[Pair]:
    done = [records[one.id] for one in asked if one.id in records]
    missing = [one for one in asked if one.id not in records]
    if len(asked) == 1 or asked[1].id.endswith("#2,1"):
        return missing
    return missing[: votes_needed([record.judgment for record in done], len(asked))]


def votes_needed(votes: Sequence[Mapping[str, int] | None], most: int) -> int:
    """The least number of further votes that could settle the verdict; 0 if it is settled.

    Args:
        votes: The votes so far; None for one without a verdict.
        most: The number of votes that there are at most.
    """
    left = most - len(votes)
    return next((more for more in range(left) if _could_be_settled(votes, left, more)), left)


def _could_be_settled(votes: Sequence[Mapping[str, int] | None], left: int, more: int) -> bool:
    """Whether `more` of the `left` votes can settle the verdict, if they all say the likeliest thing."""
    most = len(votes) + left
    readable = sum(vote is not None for vote in votes)
    if len(votes) - readable + more >= most - most // 2:
        return True  # half of all votes, or more, may be unreadable then
    if readable + more <= most // 2:
        return False
    for code in _CODES:
        counts = sorted(Counter(vote[code] for vote in votes if vote is not None).values(), reverse=True)
        first, second = (*counts, 0, 0)[:2]
        if first + more - second <= left - more:
            return False
    return True


def vote(votes: Sequence[Mapping[str, int] | None], most: int) -> dict[str, int] | None:
    """The verdict of votes: in each dimension what most of them say, and a tie if two things are as frequent.

    Args:
        votes: The votes; None for one without a verdict.
        most: The number of votes that there are at most. More than half of them have to be readable.
    """
    readable = [one for one in votes if one is not None]
    if len(readable) <= most // 2:
        return None
    verdict = {}
    for code in _CODES:
        ((first, count), *others) = Counter(one[code] for one in readable).most_common()
        verdict[code] = 0 if others and others[0][1] == count else first
    return verdict


def mean_of_orders(
    first: Mapping[str, int] | None, second: Mapping[str, int] | None
) -> dict[str, int] | None:
    """The mean of two verdicts about one order of the clips: opposite preferences are a tie.

    A preference in one order and a tie in the other one is that preference.
    """
    if first is None or second is None:
        return None
    verdict = {}
    for code in _CODES:
        votes = (first[code], second[code])
        balance = votes.count(1) - votes.count(2)
        verdict[code] = 0 if balance == 0 else 1 if balance > 0 else 2
    return verdict


def first_answer(record: VerdictRecord, trajectory: Trajectory, protocol: Protocol) -> VerdictRecord:
    """The record of an episode that ended with its first round, if the protocol says that it did.

    Args:
        record: The record of the whole episode.
        trajectory: The episode.
        protocol: The protocol. With `Retrieval.NONE` every episode ends with its first round; with
            `first_answer_from` those that are as sure as that.
    """
    rounds = trajectory.rounds
    if not rounds or (recommended := rounds[0].recommendation) is None:
        return record  # the first round answered, or failed: the episode went no further
    level = {"high": 1, "middle": 2, "low": 3, None: 0}[protocol.first_answer_from]
    confidence = None if recommended.confidence is None else int(recommended.confidence)
    if protocol.retrieval is not Retrieval.NONE and (confidence is None or confidence > level):
        return record
    tokens = rounds[0].token_ids
    return record.model_copy(
        update={
            "judgment": recommended.judgments.as_dict(),
            "confidence": confidence,
            "reason": None,
            "stop_reason": "answered",
            "rounds": 1,
            "tool_calls": 0,
            "frames_seen": sorted({shown.frame_number for shown in rounds[0].live}),
            "well_formed": rounds[0].well_formed,
            "repairs": len(rounds[0].repairs),
            "prompt_tokens": rounds[0].prompt_tokens,
            "sampled_tokens": None if tokens is None else len(tokens),
            "latency_seconds": None,
        }
    )


def combined(
    pair: Pair, protocol: Protocol, records: Mapping[str, VerdictRecord]
) -> tuple[VerdictRecord | None, dict[str, Any]]:
    """The record of a pair, from those of all its presentations, and what its item says besides.

    Args:
        pair: The pair.
        protocol: How it was judged.
        records: Presentation id -> its record.

    Returns:
        A record under the pair's own id, whose counts are sums; None if there is nothing yet. Of both orders
        its frames are those of the pair's own order, because a record does not say how many frames a clip
        has, so that the other order's numbers cannot be turned. Then fields of `EvalItem`: `cost`, and
        `orders` or `agreement`.
    """
    asked = presentations(pair, protocol)
    done = [records[one.id] for one in asked if one.id in records]
    if len(asked) == 1 or not done:
        return records.get(pair.id), {}
    if protocol.both_orders:
        verdict, more = _of_orders([records.get(one.id) for one in asked])
        sure = max(levels) if verdict and (levels := _levels(done)) else None
    else:
        (verdict, more), sure = _of_votes(done, protocol.votes), None
    failed = next((record for record in done if record.judgment is None), None)
    if verdict is None and failed is None:
        return None, more  # an order is not judged yet
    notes = [
        turned_notes(records[one.id].notes) if protocol.both_orders and place else records[one.id].notes
        for place, one in enumerate(asked)
        if one.id in records
    ]
    cost, well_formed = cost_of(done), [record.well_formed for record in done]
    own_order = [record for record in done if record.id == pair.id]
    seen = own_order if protocol.both_orders else done
    base = done[0] if failed is None or verdict is not None else failed
    record = base.model_copy(
        update={
            "id": pair.id,
            "judgment": verdict,
            "confidence": sure,
            "rounds": cost.rounds,
            "tool_calls": cost.tool_calls,
            "frames_seen": sorted({frame for record in seen for frame in record.frames_seen}),
            "prompt_tokens": cost.prompt_tokens,
            "sampled_tokens": cost.sampled_tokens,
            "latency_seconds": cost.latency_seconds,
            "repairs": sum(record.repairs for record in done),
            "well_formed": None if None in well_formed else all(well_formed),
            "notes": list(dict.fromkeys(note for given in notes for note in given)),
            **({} if verdict is None else {"reason": None, "stop_reason": "answered"}),
        }
    )
    return record, {"cost": cost, **more}


def item_of_presentations(
    pair: Pair,
    protocol: Protocol,
    records: Mapping[str, VerdictRecord],
    tie_kind: str | None = None,
    **more: Any,
) -> EvalItem:
    """The item of a pair, from the records of all its presentations.

    Args:
        pair: The pair.
        protocol: How it was judged.
        records: Presentation id -> its record.
        tie_kind: The kind of its tie, where a set has several.
        **more: Further fields of the item.
    """
    record, found = combined(pair, protocol, records)
    return item_of_record(pair, record, tie_kind, **{**found, **more})


def _levels(records: Sequence[VerdictRecord]) -> list[int]:
    """The stated confidences, if every record has one. The least sure one counts, which is the largest."""
    levels = [record.confidence for record in records if record.confidence is not None]
    return levels if len(levels) == len(records) else []


def _of_orders(records: Sequence[VerdictRecord | None]) -> tuple[dict[str, int] | None, dict[str, Any]]:
    first, second = (None if record is None else record.judgment for record in records)
    turned = None if second is None else {code: SWAPPED[label] for code, label in second.items()}
    return mean_of_orders(first, turned), {"orders": (first, turned)}


def _of_votes(records: Sequence[VerdictRecord], most: int) -> tuple[dict[str, int] | None, dict[str, Any]]:
    votes = [record.judgment for record in records]
    verdict = vote(votes, most)
    if verdict is None:
        return None, {}
    agreeing = sum(one is not None and one["OA"] == verdict["OA"] for one in votes)
    return verdict, {"agreement": agreeing / len(votes)}
