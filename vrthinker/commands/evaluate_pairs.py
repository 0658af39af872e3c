"""`vrthinker eval pairs` and the public benchmarks: labelled pairs, by one protocol, into one folder."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from vrthinker.commands.judge_options import ModelOptions
from vrthinker.commands.judges import JudgeSource
from vrthinker.commands.options import Flag, announce, check_writable, option
from vrthinker.errors import InputError

if TYPE_CHECKING:
    from vrthinker.evals.baselines import Baseline
    from vrthinker.evals.labelled_data import LabelledData
    from vrthinker.evals.labelled_run import Judged, Lengths
    from vrthinker.evals.protocols import Protocol


@dataclass(frozen=True, kw_only=True)
class _Asked:
    """What is judged, by which protocol, and where the results go."""

    out: Annotated[Path, option("RUN")]
    """The folder for verdicts, episodes, items and eval.json. The same command continues a killed run."""
    limit: Annotated[int | None, option("N")] = None
    """Judge only N of the labelled pairs, drawn by --seed. All by default."""
    both_orders: Flag = False
    """Judge each pair in both orders of its clips. The verdict is their mean; a pair counts once."""
    votes: Annotated[int, option("K")] = 1
    """Up to K sampled verdicts a pair; what most of them say counts. Stops as soon as nothing can change."""
    retrieval: Literal["own", "random", "uniform", "none"] = "own"
    """The frames that a tool call shows. none takes the first round's recommended answer as the verdict."""
    redundant: Flag = False
    """Repeat random frames of each clip, until it is twice as long, without writing clips."""
    first_answer_from: Annotated[Literal["high", "middle", "low"] | None, option("CF")] = None
    """Take the first round's answer if it is at least that sure: high, middle, low."""
    subsets: Flag = False
    """Look up how long the clips are, for the tables by length: the longest tenth, and the rest."""
    retry_failed: Flag = False
    """Judge pairs again that have no verdict yet because of an error or of what was written."""
    json: Flag = False
    """Print JSON instead of a table."""
    row: Annotated[Path | None, option("FILE")] = None
    """Append a result row (measures, machine, versions, commit, command) to this JSONL file."""


@dataclass(frozen=True, kw_only=True)
class _Evaluation(ModelOptions, _Asked):
    """The options of every evaluation on labelled pairs."""

    model: Annotated[str | None, option("M")] = None
    """A checkpoint folder, a hub id, or nano; with --endpoint, a name on the server. Or a judge that is no
    model: baseline:always-1, always-2, always-tie, commonest, coin, oracle, sharpness, steadiness, motion."""
    temperature: Annotated[float | None, option("T")] = None
    """The sampling temperature. 0 (greedy), which the measures are defined for; with --votes 0.7."""
    seed: int = 0
    """The seed of --limit, of sampling, of --redundant and of the coin."""

    def _data(self) -> LabelledData:
        """The labelled pairs."""
        raise NotImplementedError

    def run(self) -> int:
        """Evaluates and prints; returns 1 if an error kept a pair from being judged."""
        from dataclasses import replace

        from vrthinker.evals.baselines import SCORERS, baseline_of
        from vrthinker.evals.labelled_run import lengths_of, redundant_pairs
        from vrthinker.evals.pairs import EVAL_FILE
        from vrthinker.evals.run_files import check_no_model_run, read_run, write_run
        from vrthinker.evals.summary import summarise
        from vrthinker.records.eval_items import ItemStatus

        self._check_options()
        source = self.source()
        protocol, baseline = self._protocol(), baseline_of(source.model)
        if baseline is not None:
            self._check_baseline(scores=baseline in SCORERS)
            check_no_model_run(self.out)
        configuration = None if baseline is not None else source.configuration()
        data = self._data()
        if protocol.redundant:
            data = replace(data, pairs=redundant_pairs(data.pairs, self.out, self.seed))
        lengths: Lengths | None = None
        if self.subsets:
            announce("looking up how long the clips are")
            lengths = lengths_of(data.pairs)
        if configuration is None:
            assert baseline is not None
            judged, judge = self._judged_by_baseline(baseline, data, protocol, lengths), source.model
            about: dict[str, Any] = {}
        else:
            judged, judge = self._judged_by_model(source, data, protocol, lengths), configuration.model
            about = {"settings": configuration.settings.model_dump(mode="json")}
        summary = summarise(judged.items, left_out=data.left_out)
        about = {
            "evaluation": "labelled pairs",
            "judge": judge,
            "data": data.name,
            "benchmark": data.benchmark if self.limit is None else None,
            "protocol": protocol.as_json(),
            "model": judge,
            "pairs_file": data.source.name,
            "limit": self.limit,
            "seed": self.seed,
            **about,
            **({} if judged.report is None else judged.report.as_json()),
        }
        write_run(self.out, judged.items, summary, about)
        if self.row is not None:
            from vrthinker.records.provenance import append_row

            append_row(self.row, {**about, "summary": summary})
        print_run(read_run(self.out)[1], self.out / EVAL_FILE, as_json=self.json)
        kept_out = (ItemStatus.FAILED, ItemStatus.MISSING)
        return 1 if any(item.status in kept_out for item in judged.items) else 0

    def _judged_by_model(
        self, source: JudgeSource, data: LabelledData, protocol: Protocol, lengths: Lengths | None
    ) -> Judged:
        """Judges what is not recorded. A model is loaded only if there is something to judge."""
        from contextlib import ExitStack

        from vrthinker.evals.labelled_run import (
            asked_protocol,
            judge_pairs,
            judged_by_model,
            with_virtual_clips,
        )
        from vrthinker.evals.pairs import TRAJECTORIES_FILE, open_log
        from vrthinker.evals.protocols import presentations
        from vrthinker.report.terminal import FileProgress

        with ExitStack() as stack:
            log = stack.enter_context(
                open_log(
                    self.out,
                    source.configuration(),
                    data.pairs,
                    pairs_file=data.source,
                    seed=self.seed,
                    weights=source.weights(),
                    protocol=asked_protocol(protocol),
                )
            )
            if self.retry_failed:
                log.drop_failed()
            ids = [one.id for pair in data.pairs for one in presentations(pair, protocol)]
            pending = len(log.pending(ids))
            progress = stack.enter_context(FileProgress(len(ids), done=len(ids) - pending))
            judge_pairs(
                lambda: with_virtual_clips(stack.enter_context(source.load())),
                data.pairs,
                protocol,
                log,
                seed=self.seed,
                on_record=progress.record,
                on_wait=progress.wait,
            )
            trajectories = self.out / TRAJECTORIES_FILE
            return judged_by_model(data, protocol, log.records(), trajectories, lengths)

    def _judged_by_baseline(
        self, baseline: Baseline, data: LabelledData, protocol: Protocol, lengths: Lengths | None
    ) -> Judged:
        from vrthinker.errors import unwritable
        from vrthinker.evals.baselines import SCORERS
        from vrthinker.evals.labelled_run import judged_by_baseline, judged_by_scorer
        from vrthinker.progress import Progress

        try:
            self.out.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise unwritable(self.out, error, "name another", failed="the folder cannot be made") from None
        if baseline not in SCORERS:
            return judged_by_baseline(baseline, data, protocol, seed=self.seed, lengths=lengths)
        with Progress() as progress:

            def show(done: int, total: int) -> None:
                line = f"{done} of {total} clips"
                progress.show("measuring", done, total, line=line, every=max(1, total // 10))

            return judged_by_scorer(baseline, data, self.out, lengths=lengths, on_clip=show)

    def _check_options(self) -> None:
        """Refuses what can be refused without pairs or a model."""
        for name, value, least in (
            ("--limit", self.limit, 1),
            ("--votes", self.votes, 1),
        ):
            if value is not None and value < least:
                raise InputError(f"{name}: got {value}, allowed: at least {least}")
        if self.votes > 1 and self.temperature == 0:
            raise InputError("--votes: goes with a --temperature above 0; greedy votes are all the same")
        if self.out.exists() and not self.out.is_dir():
            raise InputError(f"--out: {self.out}: got a file, allowed: a folder")
        if self.row is not None:
            check_writable("--row", self.row)

    def _check_baseline(self, *, scores: bool) -> None:
        """Refuses what no baseline can do."""
        episodes = {
            "--endpoint": self.endpoint is not None,
            "--retrieval": self.retrieval != "own",
            "--first-answer-from": self.first_answer_from is not None,
            "--votes": self.votes > 1,
            "--both-orders": scores and self.both_orders,
        }
        for name, given in episodes.items():
            if given:
                raise InputError(f"{name}: goes with a model, not with {self.model}")

    def _protocol(self) -> Protocol:
        from vrthinker.evals.protocols import Protocol
        from vrthinker.evals.retrieval import Retrieval

        return Protocol(
            both_orders=self.both_orders,
            votes=self.votes,
            retrieval=Retrieval(self.retrieval),
            redundant=self.redundant,
            first_answer_from=self.first_answer_from,
        )

    def _episode_settings(self) -> dict[str, Any]:
        usual = 0.7 if self.votes > 1 else 0.0
        return {"temperature": usual, **super()._episode_settings()}


@dataclass(frozen=True, kw_only=True)
class EvalPairsCommand(_Evaluation):
    """Judge labelled pairs, and say how often the judge says what people said.

    vrthinker eval pairs --pairs pairs.jsonl --model M --out RUN
    """

    pairs: Annotated[Path, option("FILE")]
    """The labelled pairs (.jsonl, .csv, .parquet): id, prompt, video_1, video_2, labels, ..."""

    def _data(self) -> LabelledData:
        from vrthinker.evals.labelled_data import load_labelled

        return load_labelled(self.pairs, limit=self.limit, seed=self.seed)


@dataclass(frozen=True, kw_only=True)
class _Benchmark(_Evaluation):
    """A public benchmark, from files on disk."""

    benchmark: ClassVar[str]

    data: Annotated[Path, option("DIR")]
    """The folder of the benchmark's clips, with its annotation file."""
    annotations: Annotated[Path | None, option("FILE")] = None
    """The annotation file. The only table in --data by default."""

    def _data(self) -> LabelledData:
        from vrthinker.evals.labelled_data import load_benchmark

        return load_benchmark(
            self.benchmark,
            self.data,
            self.out / "data",
            annotations=self.annotations,
            limit=self.limit,
            seed=self.seed,
        )


@dataclass(frozen=True, kw_only=True)
class EvalVideogenRewardbenchCommand(_Benchmark):
    """Judge VideoGen-RewardBench: TA, VQ, MQ and overall labels.

    vrthinker eval videogen-rewardbench --data DIR --model M --out RUN
    """

    benchmark = "videogen-rewardbench"


@dataclass(frozen=True, kw_only=True)
class EvalGenaiBenchCommand(_Benchmark):
    """Judge GenAI-Bench's videos: overall labels, a third of them ties of two kinds.

    vrthinker eval genai-bench --data DIR --model M --out RUN
    """

    benchmark = "genai-bench"


@dataclass(frozen=True, kw_only=True)
class EvalMjBenchVideoCommand(_Benchmark):
    """Judge MJ-Bench-Video: TA, VQ, MQ and overall labels, most of them ties.

    vrthinker eval mj-bench-video --data DIR --model M --out RUN
    """

    benchmark = "mj-bench-video"


def print_run(about: Mapping[str, Any], path: Path, *, as_json: bool) -> None:
    """Prints a run: its `eval.json` without what can be looked up there, or its tables.

    Args:
        about: The content of `eval.json`.
        path: The file, for messages.
        as_json: Whether to print JSON.

    Raises:
        InputError: The file is no evaluation.
    """
    if as_json:
        import json

        shown = {name: value for name, value in about.items() if name != "provenance"}
        sys.stdout.write(json.dumps(shown, indent=2) + "\n")
        return
    from vrthinker.evals.published import print_published
    from vrthinker.evals.summary_table import print_summary

    try:
        print_summary(
            about["summary"],
            judge=str(about["judge"]),
            data=str(about["data"]),
            protocol=about.get("protocol") or {},
            failures=about.get("failures") or (),
            errors=about.get("errors") or (),
            notes=about.get("notes") or {},
        )
    except (KeyError, TypeError, ValueError, AttributeError):
        raise InputError(f"{path}: holds no summary; give the command of the evaluation again") from None
    print_published(about.get("benchmark"))
