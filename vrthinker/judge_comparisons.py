"""The episodes of a group's pairs, told as comparisons.

A pair has one episode, or one for each order of its clips. They finish in any order.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

from vrthinker.episode.orders import SWAPPED
from vrthinker.episode.runner import Finished
from vrthinker.ranking.comparisons import Comparison
from vrthinker.records.verdicts import VerdictRecord
from vrthinker.verdict import Verdict


def comparisons_of(
    episodes: Iterable[Finished], named: Mapping[str, tuple[int, int]], *, both_orders: bool = False
) -> Iterator[Comparison]:
    """Yields the comparison of each pair when its last episode is there.

    Args:
        episodes: The finished episodes. The second order of a pair has `SWAPPED` behind the pair's name.
        named: The name of each pair -> its clips, the one shown as video 1 first.
        both_orders: Whether each pair has two episodes.
    """
    waiting: dict[str, Finished] = {}
    for episode in episodes:
        name = episode.item.id.removesuffix(SWAPPED)
        if not both_orders:
            yield _comparison(named[name], episode)
        elif (other := waiting.pop(name, None)) is None:
            waiting[name] = episode
        else:
            first, second = (other, episode) if other.item.id == name else (episode, other)
            yield _comparison(named[name], first, second)


def recorded(pair: tuple[int, int], record: VerdictRecord) -> Comparison:
    """The comparison of a pair, as a results file has it. It holds no episode."""
    return Comparison(
        *pair,
        record.judgment,
        record.reason,
        probabilities=record.probabilities,
        consistent=record.consistent,
    )


def verdict_of(comparison: Comparison) -> Verdict | None:
    """The verdict of a comparison whose episodes are kept; None if they are not, or one could not start."""
    first, second = comparison.trajectory, comparison.other_order
    if first is None:
        return None
    return Verdict.of(first) if second is None else Verdict.of_orders(first, second)


def _comparison(pair: tuple[int, int], first: Finished, second: Finished | None = None) -> Comparison:
    a, b = first.trajectory, None if second is None else second.trajectory
    failed = first.error or (None if second is None else second.error)
    if a is None or failed is not None:
        # As in a results file, what one order cost counts only with the other.
        return Comparison(*pair, None, str(failed))
    verdict = Verdict.of(a) if b is None else Verdict.of_orders(a, b)
    judgment = None if verdict.judgments is None else verdict.judgments.as_dict()
    return Comparison(
        *pair,
        judgment,
        verdict.reason,
        a,
        b,
        verdict.probabilities,
        None if b is None else verdict.consistent,
    )
