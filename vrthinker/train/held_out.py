"""Held-out pairs on which a policy is judged now and then while it is trained; the best one is kept.

    held_out = HeldOut(policy, pairs, every=100, run=run, ...)
    run_loop(..., measure=held_out.measure)

Decoding is greedy (method section 6) unless a temperature is set, by the engine that judges everywhere else,
over the very weights that are being trained.

Invariants: an evaluation changes neither the weights nor what training draws, so that a run ends in the same
bits with and without it. What it measures depends on the weights alone. Every evaluation goes into the
metrics file, as a part of its step's line; the best step is read from there, so that a resumed run keeps the
best one of all of its steps.

A run's folder gets `evaluations/step-00000100/` (`eval.json` with intervals, `verdicts.jsonl` and
`trajectories.jsonl`) for each evaluation, and `best/`, a checkpoint folder of the judge with the highest
score so far. The score is OA tau. If no pair has an overall label, it is the mean accuracy of the dimensions
that have labels.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch

from vrthinker.data.pairs import Pair, load_pairs
from vrthinker.engine.hf.engine import HFEngine
from vrthinker.engine.hf.model import VisionLanguageModel
from vrthinker.episode.prompts import PromptTemplates
from vrthinker.episode.settings import JudgeSettings
from vrthinker.episode.trajectory import Trajectory, dump_line
from vrthinker.errors import InputError, VRThinkerError, unwritable
from vrthinker.evals.pairs import (
    ALL,
    TRAJECTORIES_FILE,
    VERDICTS_FILE,
    PairsReport,
    labelled,
    report_of,
    write_report,
)
from vrthinker.judge import Judge
from vrthinker.judge_file import record_of
from vrthinker.progress import Progress, counted
from vrthinker.records.files import replace_file
from vrthinker.records.metrics_file import METRICS_FILE, read_metrics
from vrthinker.train.model import TrainedPolicy
from vrthinker.train.settings import HeldOutSettings

EVALUATIONS_FOLDER, BEST_FOLDER = "evaluations", "best"
SCORE = "eval/score"
"""The metric by which the best step is chosen."""
_DIMENSIONS = ("ta/accuracy", "vq/accuracy", "mq/accuracy")
_LOGGED = ("oa/tau", "oa/diff", *_DIMENSIONS, "tool_calls/mean", "format/well_formed", "verdicts/share")


class HeldOut:
    """Judges held-out pairs with the policy that is being trained.

    Args:
        trained: The policy. It is used between two steps, as it is. All its processes call `measure`.
        pairs: The pairs, each with a label.
        settings: When to judge, and how many episodes together.
        steps: The number of steps of the whole run. After the last one there is always an evaluation.
        run: The run's folder.
        judge_settings: The judge's settings. The temperature is that of `settings`.
        templates: The judge's prompts.
        export: A function that writes the policy to a checkpoint folder, atomically.
    """

    def __init__(
        self,
        trained: TrainedPolicy,
        pairs: Sequence[Pair],
        settings: HeldOutSettings,
        *,
        steps: int,
        run: Path,
        judge_settings: JudgeSettings,
        templates: PromptTemplates,
        export: Callable[[Path], object],
    ) -> None:
        decoding = {"temperature": settings.temperature, "top_p": 1.0}
        episode = judge_settings.episode.model_copy(update=decoding)
        self._trained, self._policy = trained, trained.policy
        self._pairs, self._settings = list(pairs), settings
        self._steps, self._run, self._export = steps, run, export
        self._judge_settings = judge_settings.model_copy(update={"episode": episode})
        self._templates = templates

    def measure(self, step: int) -> dict[str, float]:
        """Judges the pairs if an evaluation is due, and keeps the policy if it is the best so far.

        Args:
            step: The number of finished steps.

        Returns:
            The metrics, `eval/…`; empty if no evaluation is due.

        Raises:
            VRThinkerError: A file could not be written.
        """
        if step % self._settings.every and step != self._steps:
            return {}
        began = time.perf_counter()
        with _undisturbed(self._policy):
            with self._trained.whole():
                metrics, is_best = self._trained.ranks.first(lambda: self._measured(step))
            if is_best:
                self._export(self._run / BEST_FOLDER)
        return {**metrics, "eval/seconds": time.perf_counter() - began}

    def _measured(self, step: int) -> tuple[dict[str, float], bool]:
        """The metrics of this step, and whether its score is the highest so far. One process judges."""
        report = self._judge(step)
        metrics = metrics_of(report)
        before = best_score(self._run / METRICS_FILE, before=step)
        is_best = before is None or metrics[SCORE] > before[1]
        best = (step, metrics[SCORE]) if before is None or is_best else before
        Progress().say(
            f"held-out pairs after step {step}: score {metrics[SCORE]:.3f} on {counted(report.pairs, 'pair')}"
            f"; the best is {best[1]:.3f}, after step {best[0]}"
        )
        return metrics, is_best

    def _judge(self, step: int) -> PairsReport:
        folder = self._run / EVALUATIONS_FOLDER / f"step-{step:08d}"
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise unwritable(folder, error, "make room, then resume", failed="cannot be made") from None
        engine = HFEngine(self._policy, max_sessions=self._settings.batch_size)
        records, episodes = [], []
        with Judge(engine, self._judge_settings, templates=self._templates) as judge:
            for finished in judge.judge_pairs(self._pairs):
                records.append(record_of(finished, judge=judge, seed=0))
                if finished.trajectory is not None:
                    episodes.append(finished.trajectory)
        places = {pair.id: place for place, pair in enumerate(self._pairs)}
        records.sort(key=lambda record: places[record.id])  # they ended in any order
        episodes.sort(key=lambda episode: places[episode.id])
        report = report_of(self._pairs, records)
        for name, lines in (
            (TRAJECTORIES_FILE, [dump_line(episode) for episode in episodes]),
            (VERDICTS_FILE, [record.model_dump_json() + "\n" for record in records]),
        ):
            replace_file(folder / name, "".join(lines).encode())
        write_report(folder, report, {"evaluation": "held-out pairs", "step": step})
        return report


def metrics_of(report: PairsReport) -> dict[str, float]:
    """The metrics of an evaluation, by the names under which they stand in the metrics file."""
    judged = report.judged[ALL]
    values = {name: judged[name].value for name in _LOGGED if name in judged}
    metrics = {f"eval/{name.replace('/', '_')}": value for name, value in values.items() if value is not None}
    for name in ("rounds", "sampled_tokens_per_round"):
        if name in report.episodes:
            metrics[f"eval/{name}"] = report.episodes[name]
    overall = values.get("oa/tau")
    if overall is None:
        known = [value for name in _DIMENSIONS if (value := values.get(name)) is not None]
        overall = sum(known) / len(known)
    return {SCORE: overall, **metrics}


def load_held_out(settings: HeldOutSettings, traces: Iterable[Trajectory], *, seed: int) -> list[Pair]:
    """The pairs that a policy is judged on. If some of them are learned from, a line on stderr says so.

    Args:
        settings: Which pairs.
        traces: What the policy learns from.
        seed: The seed of the draw, if only some of the pairs are used.

    Raises:
        InputError: The file cannot be read, or no pair has a label.
    """
    try:
        pairs = labelled(load_pairs(settings.pairs), limit=settings.limit, seed=seed)
    except InputError as error:
        where = "" if str(settings.pairs) in str(error) else f"{settings.pairs}: "
        raise InputError(f"held-out pairs: {where}{error}") from None
    # Episodes to learn from are sampled in both orders of the clips.
    learned = {(trace.prompt, frozenset(Path(video.path).name for video in trace.videos)) for trace in traces}
    seen = sum((pair.prompt, frozenset((pair.video_1.name, pair.video_2.name))) in learned for pair in pairs)
    if seen:
        Progress().say(
            f"held-out pairs: {seen} of {counted(len(pairs), 'pair')} are learned from too (the same caption "
            "and clips), so that what is measured is no test of new pairs"
        )
    return pairs


def best_score(metrics: Path, *, before: int) -> tuple[int, float] | None:
    """The step with the highest score, and that score; the earliest of equal ones; None without any.

    Args:
        metrics: The run's metrics file.
        before: Only steps below this one count.
    """
    lines = read_metrics(metrics) if metrics.is_file() else []
    scores = [(line[SCORE], -line["step"]) for line in lines if line.get(SCORE) is not None]
    scores = [(score, negated) for score, negated in scores if -negated < before]
    if not scores:
        return None
    score, negated = max(scores)
    return -negated, score


@contextmanager
def _undisturbed(policy: VisionLanguageModel) -> Iterator[None]:
    """Leaves the policy's mode and torch's random numbers as they were."""
    was_training = policy.model.training
    devices = [policy.device] if policy.device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        try:
            policy.model.eval()
            yield
        except torch.cuda.OutOfMemoryError:
            raise VRThinkerError(
                "held-out pairs: the GPU's memory is too small to judge while training; lower the batch_size "
                "of the evaluation, or leave it out"
            ) from None
        finally:
            policy.model.train(was_training)
