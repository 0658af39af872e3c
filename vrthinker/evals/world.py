"""Evaluation on the synthetic world: how well a judge judges, and how much it gains by choosing its frames.

The same pairs are judged with the frames that the model requests, with random frames, with a uniform grid of
the same number of frames, and without any (the judgment of the first round). For each, a perfect reader who
counts what the same frames show is given for comparison. The numbers are about the synthetic world, not about
real video.

An evaluation can be resumed: every episode is recorded as it ends, and recorded episodes are not run again.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

from vrthinker.bounded_files import read_json
from vrthinker.data.pairs import load_pairs
from vrthinker.episode.trajectory import WRITTEN_STOPS, Trajectory, dump_line, load_trajectories
from vrthinker.errors import InputError, VRThinkerError, one_line, unwritable
from vrthinker.evals.intervals import Estimate
from vrthinker.evals.metrics import ScoredPair, by_group, difference, from_trajectory, measure
from vrthinker.evals.retrieval import Retrieval, tools_for
from vrthinker.judge import Judge
from vrthinker.records.files import replace_file
from vrthinker.records.run_folder import adopt_run
from vrthinker.world.files import PAIRS_FILE, make_world, sample_world
from vrthinker.world.truth_reader import count, seen_indices
from vrthinker.world.world import PRESETS, ClipTruth, Difficulty, Event, PairTruth, WorldConfig

RUN_FILE = "run.json"


@dataclass(frozen=True)
class WorldReport:
    """The result of an evaluation.

    Attributes:
        judged: Retrieval -> the judge's measures with intervals.
        perfect: Retrieval -> the measures of a perfect reader of the frames that those episodes showed.
        gains: Retrieval -> the OA tau of `OWN` minus that of this retrieval, paired over pairs.
        calls: The number of hidden events in the pair's clips (the larger of the two) -> the mean number of
            tool calls, with `OWN`.
        failures: `id: reason` of every episode that has no verdict.
        errors: Those of the failures that an error caused (a clip, the engine, the machine), or whose episode
            is missing. The others are due to what the judge wrote.
        episodes: The number of episodes, with those that are missing.
    """

    judged: Mapping[str, Mapping[str, Estimate]]
    perfect: Mapping[str, Mapping[str, Estimate]]
    gains: Mapping[str, Estimate]
    calls: Mapping[str, Estimate]
    failures: tuple[str, ...]
    errors: tuple[str, ...]
    episodes: int

    def as_json(self) -> dict[str, Any]:
        """The report as JSON values."""

        def spell(columns: Mapping[str, Mapping[str, Estimate]]) -> dict[str, Any]:
            return {c: {m: vars(e) for m, e in measures.items()} for c, measures in columns.items()}

        return {
            "judged": spell(self.judged),
            "perfect_reader": spell(self.perfect),
            "oa_tau_gain_of_own_over": {name: vars(e) for name, e in self.gains.items()},
            "tool_calls_by_hidden_events": {name: vars(e) for name, e in self.calls.items()},
            "failures": list(self.failures),
            "errors": list(self.errors),
            "episodes": self.episodes,
        }


def evaluate_world(
    judge: Judge,
    out: Path,
    *,
    difficulty: Difficulty = "easy",
    limit: int = 512,
    seed: int = 0,
    retrievals: Sequence[Retrieval] = (Retrieval.OWN, Retrieval.RANDOM, Retrieval.UNIFORM),
    on_episode: Callable[[str, int, int], None] = lambda retrieval, done, total: None,
) -> WorldReport:
    """Judges `limit` pairs of a world once per retrieval, and measures the results.

    Args:
        judge: The judge.
        out: The run's folder. The same call continues a run that was killed.
        difficulty: The name of a preset.
        limit: The number of pairs.
        seed: The seed of the world and of the sampling.
        retrievals: The retrievals to run. `NONE` needs no run: it is scored from the episodes of `OWN`.
        on_episode: A function that is called with (retrieval, finished episodes, all episodes) as they end.

    Raises:
        InputError: The folder holds another run, or a number is out of range.
    """
    ways = [way for way in dict.fromkeys(retrievals) if way is not Retrieval.NONE]
    if Retrieval.OWN not in ways:
        raise InputError(f"retrieval: got {', '.join(retrievals) or 'none'}, wanted own among them")
    if limit < 1 or seed < 0:
        raise InputError(f"world: got {limit} pairs and seed {seed}, allowed: at least 1 pair, seed from 0")
    for name in ("max_fps", "frames_per_video"):
        if (got := getattr(judge.settings.episode, name)) is not None:
            raise InputError(
                f"{name}: got {got}, allowed on the synthetic world: none, its truth numbers every frame"
            )
    run = {
        "model": judge.engine.name,
        "weights": _weights(judge),
        "difficulty": difficulty,
        "world": PRESETS[difficulty].model_dump(mode="json"),
        "limit": limit,
        "seed": seed,
        "prompts": judge.templates.digest,
        "settings": judge.settings.model_dump(mode="json"),
    }
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise unwritable(out, error, "name another", failed="the folder cannot be made") from None
    adopt_run(out / RUN_FILE, run, (), out)
    truths = make_world(out / "world", PRESETS[difficulty], pairs=limit, seed=seed, prefix=difficulty)
    trajectories: dict[Retrieval, dict[str, Trajectory]] = {}
    failures: dict[str, str] = {}
    for way in ways:
        path = out / f"{way.value}.jsonl"
        trajectories[way] = _run(judge, out, path, way, seed, on_episode, failures)
    report = report_of(truths, trajectories, failures)
    replace_file(out / "table.json", (json.dumps(report.as_json(), indent=2) + "\n").encode())
    return report


def load_report(out: Path) -> tuple[WorldReport, dict[str, Any]]:
    """The measures of a run's recorded episodes, and the run's settings. Nothing is judged.

    Raises:
        InputError: The folder does not hold a run, or no episode yet.
    """
    truths, own, run = load_episodes(out)
    found = {Retrieval.OWN: own}
    for way in (Retrieval.RANDOM, Retrieval.UNIFORM):
        if (path := out / f"{way.value}.jsonl").is_file():
            found[way] = _recorded(path)
    return report_of(truths, found), run


def load_episodes(out: Path) -> tuple[list[PairTruth], dict[str, Trajectory], dict[str, Any]]:
    """The pairs of a run, pair id -> its recorded episode of `OWN`, and the run's settings.

    Raises:
        InputError: The folder does not hold a run, or no episode yet.
    """
    try:
        run = read_json(out / RUN_FILE)
        config = WorldConfig.model_validate(run["world"])
        truths = sample_world(config, int(run["limit"]), int(run["seed"]), str(run["difficulty"]))
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"{out}: no run of `vrthinker eval world` ({one_line(str(error))})") from None
    path = out / f"{Retrieval.OWN.value}.jsonl"
    if not path.is_file():
        raise InputError(f"{out}: has no episode yet; `vrthinker eval world` goes on with it")
    return truths, _recorded(path), run


def load_scores(out: Path) -> list[ScoredPair]:
    """The scored pairs of a run's own retrieval, for comparisons between two runs over the same world.

    Raises:
        InputError: The folder does not hold a run, or not all of its pairs are judged yet.
    """
    truths, recorded, _ = load_episodes(out)
    if missing := len(truths) - len(recorded):
        raise InputError(f"{out}: {missing} of {len(truths)} pairs are not judged yet; run it again to go on")
    return [_score(truth, recorded.get(truth.id), first_round=False)[0] for truth in truths]


def report_of(
    truths: Sequence[PairTruth],
    found: Mapping[Retrieval, Mapping[str, Trajectory]],
    failures: Mapping[str, str] | None = None,
) -> WorldReport:
    """The measures of recorded episodes. A missing episode counts as one without a verdict."""
    scored: dict[str, list[ScoredPair]] = {}
    perfect: dict[str, list[ScoredPair]] = {}
    reasons = dict(failures or {})
    errors = set(reasons)
    views = [(way, False) for way in found]
    if Retrieval.OWN in found:
        views.append((Retrieval.OWN, True))
    for way, first_round in views:
        name = Retrieval.NONE.value if first_round else way.value
        scored[name], perfect[name] = [], []
        for truth in truths:
            trajectory = found[way].get(truth.id)
            score, reader = _score(truth, trajectory, first_round=first_round)
            scored[name].append(score)
            perfect[name].append(reader)
            if trajectory is None:
                reasons.setdefault(f"{way.value}/{truth.id}", "not judged yet")
                errors.add(f"{way.value}/{truth.id}")
            elif trajectory.outcome.judgments is None:
                reasons[f"{way.value}/{truth.id}"] = str(trajectory.outcome.reason)
                if trajectory.outcome.stop_reason not in WRITTEN_STOPS:
                    errors.add(f"{way.value}/{truth.id}")
    own = scored[Retrieval.OWN.value]
    return WorldReport(
        judged={name: measure(pairs) for name, pairs in scored.items()},
        perfect={name: measure(pairs) for name, pairs in perfect.items()},
        gains={
            name: difference(own, pairs, "oa/tau")
            for name, pairs in scored.items()
            if name != Retrieval.OWN.value
        },
        calls={group: measure(pairs)["tool_calls/mean"] for group, pairs in by_group(own).items()},
        failures=tuple(f"{name}: {reason}" for name, reason in sorted(reasons.items())),
        errors=tuple(f"{name}: {reasons[name]}" for name in sorted(errors)),
        episodes=len(truths) * len(found),
    )


def _weights(judge: Judge) -> str | None:
    """A fingerprint of the judge's weights; None if they are not local files."""
    from vrthinker.engine.hf.checkpoint import weights_fingerprint
    from vrthinker.engine.hf.engine import HFEngine
    from vrthinker.engine.vllm.engine import VLLMEngine

    if isinstance(judge.engine, HFEngine):
        return weights_fingerprint(judge.engine.model.folder)
    return weights_fingerprint(judge.engine.folder) if isinstance(judge.engine, VLLMEngine) else None


def _run(
    judge: Judge,
    out: Path,
    path: Path,
    way: Retrieval,
    seed: int,
    on_episode: Callable[[str, int, int], None],
    failures: dict[str, str],
) -> dict[str, Trajectory]:
    """Runs the episodes that are not recorded, and returns all of them."""
    _cut_unfinished(path)
    recorded = _recorded(path)
    pairs = load_pairs(out / "world" / PAIRS_FILE)
    todo = [pair for pair in pairs if pair.id not in recorded]
    done = len(pairs) - len(todo)
    on_episode(way.value, done, len(pairs))
    if not todo:
        return recorded
    if path.is_fifo():  # opening it would wait for a reader
        raise InputError(f"{path}: got a pipe, allowed: a file of episodes")
    with path.open("ab") as stream:
        for finished in judge.judge_pairs(todo, seed=seed, tools=tools_for(way)):
            done += 1
            on_episode(way.value, done, len(pairs))
            if finished.trajectory is None:
                failures[f"{way.value}/{finished.item.id}"] = str(finished.error)
                continue
            recorded[finished.item.id] = finished.trajectory
            try:
                stream.write(dump_line(finished.trajectory).encode())
                stream.flush()
            except OSError as error:
                raise VRThinkerError(
                    f"{path}: cannot be written ({error.strerror}); make room, run again"
                ) from None
        os.fsync(stream.fileno())
    return recorded


def _cut_unfinished(path: Path) -> None:
    """Removes an incomplete last line, which a killed run may have written."""
    if path.is_file():
        content = path.read_bytes()
        # The file is truncated in place, because a process that has it open goes on appending to it.
        os.truncate(path, content.rfind(b"\n") + 1)


def _recorded(path: Path) -> dict[str, Trajectory]:
    """The recorded episodes. An incomplete last line is ignored."""
    if not path.is_file():
        return {}
    whole = [line for line in path.read_bytes().split(b"\n")[:-1] if line.strip()]
    return {trajectory.id: trajectory for trajectory in islice(load_trajectories(path), len(whole))}


def _score(
    truth: PairTruth, trajectory: Trajectory | None, *, first_round: bool
) -> tuple[ScoredPair, ScoredPair]:
    """The scored pair of the judge, and that of a perfect reader of the same frames."""
    label = truth.judgments.as_dict()
    group = str(max(sum(event.hidden for event in clip.events) for clip in truth.clips))
    hidden = [range(offset + event.first_index, offset + event.end_index) for offset, event in _hidden(truth)]
    if trajectory is None:
        missing = ScoredPair(
            id=truth.id, label=label, prediction=None, hidden_events=len(hidden), group=group
        )
        return missing, missing
    score = from_trajectory(trajectory, label, first_round=first_round, hidden_frames=hidden, group=group)
    rounds = trajectory.rounds[:1] if first_round else trajectory.rounds
    numbers = {shown.frame_number for record in rounds for shown in record.live}
    reader = count(truth, seen_indices(truth, numbers))
    return score, replace(score, prediction=reader.as_dict(), well_formed=None)


def _hidden(truth: PairTruth) -> list[tuple[int, Event]]:
    """The hidden events with a defect, each with the frame number of its clip's first frame."""
    clips: list[tuple[int, ClipTruth]] = [(1, truth.clips[0]), (1 + truth.clips[0].n_frames, truth.clips[1])]
    return [(offset, e) for offset, clip in clips for e in clip.events if e.hidden and e.defects]
