"""What a round boundary costs in each memory mode, and what sharing a group's first input saves.

    python benchmarks/evicting_rollouts.py boundary [--out benchmarks/results/evicting_rollouts_cpu.jsonl]
    python benchmarks/evicting_rollouts.py groups [--out ...]

`boundary`: the time from submitting a round, at whose beginning frames expire and new ones come, to its first
token, at p = 1 and p = 2. Beside `evict` and `renumber` stand `rerender` with its reused prefix, `rerender`
that prefills every round whole, and the floor: prefilling the same new tokens over a cache of the same length
from which nothing had to leave. Frames are encoded beforehand for all.

`groups`: 64 episodes, 8 of each of 8 pairs, with rounds of fixed lengths (random weights). Independent
episodes prefill 64 first inputs, groups 8. The bound takes the measured time of the first inputs that groups
do not compute off the measured time of the independent episodes.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parent))

from midsize import FRAMES, RESIZE, ROUND_TOKENS, SIDE, Stage, make_midsize

from vrthinker.engine.base import (
    Choice,
    FrameSegment,
    Free,
    Message,
    RoundLimits,
    RoundRequest,
    RoundResult,
    Session,
    TextSegment,
    write_rounds,
)
from vrthinker.engine.hf.engine import HFEngine
from vrthinker.episode.runner import EpisodeRunner
from vrthinker.episode.settings import EpisodeSettings
from vrthinker.records.provenance import append_row
from vrthinker.visibility import MemoryMode, ShownFrame
from vrthinker.world.nano import nano_templates

# The boundary


class Talk:
    """A session whose rounds are fixed: a first input, then retrievals, `window` of them live at once.

    Without `shown` the first retrieval's frames, which are the ones that expire, never come: its cache is
    what another's is after they left.
    """

    def __init__(self, engine: HFEngine, memory: MemoryMode, window: int, seed: int, *, shown: bool) -> None:
        self.engine, self.window, self.shown = engine, window, shown
        self.rng = np.random.default_rng(seed)
        self.text = _text(engine, ROUND_TOKENS)
        self.outcome = 0
        self.begun = False
        self.session = engine.open([self._message()], memory=memory)

    def _message(self) -> Message:
        """The next retrieval, or the first input."""
        segments: list[TextSegment | FrameSegment] = [TextSegment(f"Outcome {self.outcome}. ")]
        for number in range(FRAMES):
            segments.append(TextSegment(f"Frame {number}: "))
            if self.shown or self.outcome != 1:
                segments.append(self._frame(self.outcome, number))
        self.outcome += 1
        return Message("user", tuple(segments))

    def _frame(self, outcome: int, number: int) -> FrameSegment:
        pixels = np.random.default_rng([outcome, number]).integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8)
        key = ("clip", outcome * 100 + number, SIDE, SIDE)
        return FrameSegment(ShownFrame(outcome, number), key, (SIDE, SIDE), lambda: pixels)

    def request(self, *, first_token_only: bool = False) -> RoundRequest:
        """The next round; its outcome's frames are new, and those of `window` rounds ago expire."""
        new: tuple[Message, ...] = ()
        expired: tuple[ShownFrame, ...] = ()
        if self.begun:
            new = (self._message(),)
            gone = self.outcome - 1 - self.window
            if gone >= 1 and self.shown:
                expired = tuple(ShownFrame(gone, number) for number in range(FRAMES))
        self.begun = True
        limits = RoundLimits(1) if first_token_only else RoundLimits(100, form=(Choice((self.text,)),))
        return RoundRequest(self.session, new, expired, limits)


def _text(engine: HFEngine, tokens: int) -> str:
    """A text of so many tokens."""
    words = "x"
    while len(engine.markup.encode(words)) < tokens:
        words += f" {len(words)}"
    return words


def _boundary(
    engine: HFEngine, memory: MemoryMode, window: int, batch: int, *, shown: bool = True
) -> tuple[float, int]:
    """Seconds from submitting to the first token of a round at which frames expire, and its prefill."""
    talks = [Talk(engine, memory, window, seed, shown=shown) for seed in range(batch)]
    for _ in range(window + 1):
        _written(engine, [talk.request() for talk in talks])
    requests = [talk.request(first_token_only=True) for talk in talks]
    assert bool(requests[0].expired) == shown
    engine.features.get([f for request in requests for message in request.new for f in message.frames])
    start = time.perf_counter()
    results = _written(engine, requests)
    seconds = time.perf_counter() - start
    for talk in talks:
        engine.close(talk.session)
    return seconds, results[0].prefilled_tokens or 0


def _written(engine: HFEngine, requests: Sequence[RoundRequest]) -> list[RoundResult]:
    results = write_rounds(engine, requests)
    for result in results:
        if result.error is not None:
            raise SystemExit(result.error)
    return results


def boundary(folder: Path, rounds: int, batch: int) -> list[dict[str, Any]]:
    """Rows at p = 1 and p = 2."""
    options: dict[str, Any] = {"device": "cpu", "max_sessions": batch, "prefill_tokens": 4096}
    engine, whole = HFEngine(folder, **options), HFEngine(folder, prefix_reuse=False, **options)
    rows = []
    for window in (1, 2):
        competitors: dict[str, tuple[HFEngine, MemoryMode, bool]] = {
            "floor: the new frames alone": (engine, "evict", False),
            "evict": (engine, "evict", True),
            "renumber": (engine, "renumber", True),
            "rerender, prefix reused": (engine, "rerender", True),
            "rerender, whole": (whole, "rerender", True),
        }
        times: dict[str, list[float]] = {name: [] for name in competitors}
        prefilled = {}
        for number in range(rounds + 1):
            for name, (runner, memory, shown) in competitors.items():
                seconds, prefilled[name] = _boundary(runner, memory, window, batch, shown=shown)
                if number:  # the first makes caches and warms up
                    times[name].append(seconds)
        floor = times["floor: the new frames alone"]
        rows.append(
            {
                "benchmark": "round boundary",
                "model": "random Qwen2.5-VL, 6 layers of 384",
                "window": window,
                "sessions": batch,
                "prefilled_tokens": prefilled,
                "seconds": {name: round(statistics.median(own), 4) for name, own in times.items()},
                "seconds_p20_p80": {
                    name: [round(float(np.quantile(own, q)), 4) for q in (0.2, 0.8)]
                    for name, own in times.items()
                },
                "times_the_floor": {
                    name: round(statistics.median(a / b for a, b in zip(own, floor, strict=True)), 3)
                    for name, own in times.items()
                },
            }
        )
    return rows


# Groups


class FixedRounds(HFEngine):
    """The transformers engine with rounds of fixed length and ending: two retrievals, then an answer."""

    def __init__(self, folder: Path, sessions: int) -> None:
        super().__init__(folder, device="cpu", max_sessions=sessions)
        self._begun: dict[int, int] = {}
        self._seeds: dict[int, int] = {}

    def open(self, messages: Sequence[Message], *, seed: int = 0, memory: MemoryMode = "rerender") -> Session:
        """As the engine's; the seed decides which frames the rounds ask for."""
        session = super().open(messages, seed=seed, memory=memory)
        self._seeds[session.id] = seed
        return session

    def fork(self, session: Session, seeds: Sequence[int]) -> list[Session]:
        """As the engine's, with the seeds remembered."""
        sessions = super().fork(session, seeds)
        self._seeds.update(zip((copy.id for copy in sessions), seeds, strict=True))
        return sessions

    def submit(self, request: RoundRequest) -> None:
        """As the engine's, with the round's own form."""
        number = self._begun[request.session.id] = self._begun.get(request.session.id, 0) + 1
        seed = self._seeds[request.session.id]
        frames = [1 + (7 * seed + 5 * number + n) % 50 for n in range(FRAMES)]
        call = (
            f'<tool_call>{{"name": "select_frames", "arguments": {{"target_frames": {frames}}}}}</tool_call>'
        )
        end = call if number < 3 else "<answer>TA=1, VQ=0, MQ=2, OA=1</answer>"
        limits = RoundLimits(200, temperature=1.0, form=(Free(10), Choice((end,))))
        super().submit(RoundRequest(request.session, request.new, request.expired, limits))


def groups(folder: Path, stage: Stage, rounds: int) -> dict[str, Any]:
    """A row: 64 independent episodes against 8 groups of 8."""
    engine = FixedRounds(folder, 64)
    settings = EpisodeSettings(
        initial_frames=FRAMES, retrieved_frames=FRAMES, memory="evict", max_rounds=3, temperature=1.0
    )
    runner = EpisodeRunner(engine, settings, templates=nano_templates())
    seeds = range(8)
    alone = [stage.item(pair, seed) for pair in range(8) for seed in seeds]
    grouped = [stage.item(pair, 0, seeds) for pair in range(8)]

    def run(items: Sequence[Any]) -> tuple[float, dict[tuple[str, int], tuple[tuple[int, ...] | None, ...]]]:
        engine.features.clear()
        engine._begun.clear()
        start = time.perf_counter()
        found = {}
        for finished in runner.run(items):
            if finished.trajectory is None:
                raise SystemExit(str(finished.error))
            ids = tuple(record.token_ids for record in finished.trajectory.rounds)
            found[finished.item.id, finished.item.seed] = ids
        return time.perf_counter() - start, found

    def first_inputs(count: int) -> float:
        """Seconds for prefilling so many first inputs, as the engine batches them, with encoded frames."""
        from vrthinker.episode.episode import Episode

        sessions: list[Session] = []
        for item in alone[:count]:
            episode = Episode(
                item, item.open_workspace(), settings, nano_templates(), runner.tools, engine.name
            )
            messages = episode.first_input()
            engine.features.get([f for m in messages for f in m.frames])
            sessions.append(engine.open(messages))
        requests = [RoundRequest(session, limits=RoundLimits(1)) for session in sessions]
        start = time.perf_counter()
        for request in requests:
            HFEngine.submit(engine, request)
        left = count
        while left:
            left -= len(engine.collect())
        seconds = time.perf_counter() - start
        for session in sessions:
            engine.close(session)
        return seconds

    times: dict[str, list[float]] = {"independent": [], "groups": [], "56 first inputs": []}
    for number in range(rounds + 1):
        one, texts = run(alone)
        other, same = run(grouped)
        spared = first_inputs(56)
        if texts != same:
            raise SystemExit("groups sample other texts than independent episodes")
        if number:
            for name, seconds in zip(times, (one, other, spared), strict=True):
                times[name].append(seconds)
    gain = statistics.median(a / b for a, b in zip(times["independent"], times["groups"], strict=True))
    bound = statistics.median(
        a / (a - c) for a, c in zip(times["independent"], times["56 first inputs"], strict=True)
    )
    return {
        "benchmark": "group-shared prefill",
        "model": "random Qwen2.5-VL, 6 layers of 384",
        "episodes": 64,
        "groups": 8,
        "seconds": {name: round(statistics.median(own), 3) for name, own in times.items()},
        "seconds_p20_p80": {
            name: [round(float(np.quantile(own, q)), 3) for q in (0.2, 0.8)] for name, own in times.items()
        },
        "speed_up": round(gain, 3),
        "bound": round(bound, 3),
        "share_of_bound": round(gain / bound, 3),
    }


def main() -> None:
    """The script."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=("boundary", "groups"))
    parser.add_argument("--out", type=Path)
    parser.add_argument("--rounds", type=int, default=7, help="timings of each competitor")
    parser.add_argument("--sessions", type=int, default=4, help="of the boundary")
    parser.add_argument("--seed", type=int, default=int(time.time()))
    parser.add_argument("--threads", type=int, default=2, help="of torch")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    assert RESIZE.max_pixels == SIDE * SIDE
    with tempfile.TemporaryDirectory() as name:
        folder = make_midsize(Path(name) / "model", given.seed % 1000)
        if given.what == "boundary":
            rows = boundary(folder, given.rounds, given.sessions)
        else:
            rows = [groups(folder, Stage(Path(name) / "world", 8, given.seed), given.rounds)]
    for row in rows:
        for key, value in row.items():
            print(f"{key}: {value}")  # noqa: T201 - a script's result
        if given.out is not None:
            append_row(given.out, {**row, "threads": given.threads})


if __name__ == "__main__":
    main()
