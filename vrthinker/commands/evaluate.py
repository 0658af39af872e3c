"""`vrthinker eval` measures how good a judge is, with confidence intervals."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from vrthinker.commands.evaluate_controls import EvalControlsCommand
from vrthinker.commands.evaluate_files import (
    EvalCompareCommand,
    EvalExportCommand,
    EvalPageCommand,
    EvalScoreCommand,
)
from vrthinker.commands.evaluate_pairs import (
    EvalGenaiBenchCommand,
    EvalMjBenchVideoCommand,
    EvalPairsCommand,
    EvalVideogenRewardbenchCommand,
    print_run,
)
from vrthinker.commands.options import Flag, announce, check_device, check_writable, option
from vrthinker.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from vrthinker.evals.pairs import PairsReport
    from vrthinker.evals.world import WorldReport
    from vrthinker.evals.world_errors import Diagnosis

_MAX_EVAL_BYTES = 1 << 28


@dataclass(frozen=True)
class EvalWorldCommand:
    """Judge held-out pairs of the synthetic world, and measure how much the judge gains by choosing frames.

    vrthinker eval world --model M --difficulty easy --limit 512 --seed 1 --out RUN
    """

    model: Annotated[str, option("M")]
    """A checkpoint folder, a hub id, or nano."""
    out: Annotated[Path, option("RUN")]
    """The run's folder: the world, every episode, table.json. The same command continues a killed run."""
    difficulty: Literal["easy", "medium", "hard"] = "easy"
    """The difficulty of the world."""
    limit: Annotated[int, option("N")] = 512
    """The number of pairs. 512 by default."""
    seed: int = 0
    """The seed of the world's pairs and of sampling."""
    retrieval: tuple[Literal["own", "random", "uniform"], ...] = ("own", "random", "uniform")
    """How retrieved frames are picked. own is always included; "none" is scored from its first rounds."""
    temperature: Annotated[float | None, option("T")] = None
    """The sampling temperature; 0 is greedy. The checkpoint's own by default."""
    window: Annotated[int | Literal["all"] | None, option("ROUNDS")] = None
    """The number of rounds a retrieved frame stays visible, or all. The checkpoint's own by default."""
    memory: Annotated[Literal["rerender", "evict", "renumber"] | None, option("MODE")] = None
    """How expired frames are removed from the context (docs/memory.md). The checkpoint's own by default."""
    batch_size: int = 64
    """The number of episodes that advance together."""
    engine: Annotated[Literal["hf", "vllm"], option("hf|vllm")] = "hf"
    """What runs the model: transformers, or vLLM. hf by default."""
    device: Annotated[str | None, option("DEVICE")] = None
    """cpu, cuda, cuda:1. By default a GPU if there is one."""
    json: Flag = False
    """Print JSON instead of tables."""
    row: Annotated[Path | None, option("FILE")] = None
    """Append a result row (measures, machine, versions, commit, command) to this JSONL file."""
    errors: Flag = False
    """Count what went wrong, per cause, and write the pages of the worst episodes into the run's folder."""
    error_pages: Annotated[int, option("N")] = 8
    """The most pages that --errors writes. 8 by default."""

    def run(self) -> int:
        """Evaluates and prints; returns 1 if an error ended an episode.

        A judge that gives no verdict is a result of the evaluation and no failure of the command.
        """
        from vrthinker.evals.retrieval import Retrieval
        from vrthinker.evals.world import evaluate_world
        from vrthinker.evals.world_table import EvalProgress
        from vrthinker.judge import Judge

        if self.limit < 1:
            raise InputError(f"--limit: got {self.limit}, allowed: at least 1")
        if "own" not in self.retrieval:
            raise InputError(
                f"--retrieval: got {' '.join(self.retrieval) or 'nothing'}, wanted own among them"
            )
        if self.batch_size < 1:
            raise InputError(f"--batch-size: got {self.batch_size}, allowed: at least 1")
        for name, value in (("--seed", self.seed), ("--error-pages", self.error_pages)):
            if value < 0:
                raise InputError(f"{name}: got {value}, allowed: 0 and above")
        if self.out.exists() and not self.out.is_dir():
            raise InputError(f"--out: {self.out}: got a file, allowed: a folder")
        check_device(self.device)
        if self.row is not None:
            check_writable("--row", self.row)
        options = {"temperature": self.temperature, "window": self.window, "memory": self.memory}
        overrides: dict[str, Any] = {name: value for name, value in options.items() if value is not None}
        if self.window == "all":
            overrides["window"] = None
        # Refused before torch loads, if it cannot be used.
        Judge.configuration_of(self.model, engine=self.engine, **overrides)
        announce(f"loading {self.model}")
        with (
            Judge.from_pretrained(
                self.model,
                engine=self.engine,
                device=self.device,
                batch_size=self.batch_size,
                **overrides,
            ) as judge,
            EvalProgress() as progress,
        ):
            report = evaluate_world(
                judge,
                self.out,
                difficulty=self.difficulty,
                limit=self.limit,
                seed=self.seed,
                retrievals=[Retrieval(way) for way in self.retrieval],
                on_episode=progress.episode,
            )
        if self.row is not None:
            from vrthinker.engine.hf.checkpoint import resolve_checkpoint, weights_fingerprint
            from vrthinker.records.provenance import append_row

            about = {
                "evaluation": "synthetic world",
                "model": self.model,
                "weights": weights_fingerprint(resolve_checkpoint(self.model)),
                "difficulty": self.difficulty,
                "pairs": self.limit,
                "seed": self.seed,
                "temperature": judge.settings.episode.temperature,
                "window": judge.settings.episode.window,
                "memory": judge.settings.episode.memory,
                "engine": self.engine,
            }
            append_row(self.row, {**about, **report.as_json()})
        found = _diagnosed(self.out, self.error_pages) if self.errors else None
        _print(report, found, difficulty=self.difficulty, model=judge.engine.name, as_json=self.json)
        return 1 if report.errors else 0


@dataclass(frozen=True)
class EvalShowCommand:
    """Print the tables of an evaluation again, from what it recorded."""

    run_folder: Annotated[tyro.conf.Positional[Path], option("RUN")]
    """The folder that an evaluation wrote."""
    json: Flag = False
    """Print JSON instead of tables."""
    errors: Flag = False
    """Count what went wrong too, as `eval world --errors` does; for runs on the synthetic world."""
    error_pages: Annotated[int, option("N")] = 8
    """The most pages that --errors writes. 8 by default."""

    def run(self) -> int:
        """Prints what is there."""
        from vrthinker.evals.pairs import EVAL_FILE, VERDICTS_FILE, PairsReport
        from vrthinker.records.eval_items import ITEMS_FILE

        if self.error_pages < 0:
            raise InputError(f"--error-pages: got {self.error_pages}, allowed: 0 and above")
        if (self.run_folder / VERDICTS_FILE).exists() or (self.run_folder / ITEMS_FILE).exists():
            if self.errors:
                raise InputError("--errors: goes with a run of `vrthinker eval world`, whose truth is known")
            from vrthinker.bounded_files import read_json

            path = self.run_folder / EVAL_FILE
            if not path.exists():
                raise InputError(
                    f"{path}: not there yet; `vrthinker eval pairs` writes it when all is judged"
                )
            about = read_json(path, _MAX_EVAL_BYTES)
            if isinstance(about, dict) and isinstance(about.get("summary"), dict):
                print_run(about, path, as_json=self.json)
                return 0
            try:
                report = PairsReport.from_json(about)
            except InputError as error:
                raise InputError(f"{path}: {error}") from None
            _print_pairs(report, about, as_json=self.json)
            return 0
        from vrthinker.evals.world import load_report

        world_report, run = load_report(self.run_folder)
        found = _diagnosed(self.run_folder, self.error_pages) if self.errors else None
        _print(world_report, found, difficulty=run["difficulty"], model=run["model"], as_json=self.json)
        return 0


def _print_pairs(report: PairsReport, about: Mapping[str, Any], *, as_json: bool) -> None:
    if as_json:
        import json

        sys.stdout.write(json.dumps(report.as_json(), indent=2) + "\n")
    else:
        from vrthinker.evals.pairs_table import print_pairs_report

        unlabelled = about.get("without_any_label")
        print_pairs_report(
            report,
            model=str(about.get("model")),
            pairs_name=str(about.get("pairs_file")),
            without_labels=unlabelled if isinstance(unlabelled, int) else 0,
        )


def _diagnosed(run_folder: Path, pages: int) -> Diagnosis:
    """The errors of a run, and the pages that were written about them."""
    from vrthinker.evals.world_errors import diagnose
    from vrthinker.progress import Progress

    with Progress() as progress:
        return diagnose(
            run_folder,
            pages=pages,
            on_page=lambda done, total: progress.show(
                "pages", done, total, line=f"pages: {done} of {total}", every=max(1, total // 4)
            ),
        )


def _print(
    report: WorldReport, diagnosis: Diagnosis | None, *, difficulty: str, model: str, as_json: bool
) -> None:
    if as_json:
        import json

        shown = report.as_json()
        if diagnosis is not None:
            shown["errors_by_cause"] = diagnosis.errors.as_json()
            shown["error_pages"] = {name: str(path) for name, path in diagnosis.pages.items()}
        sys.stdout.write(json.dumps(shown, indent=2) + "\n")
        return
    from vrthinker.evals.world_table import print_report

    print_report(report, difficulty=difficulty, model=model)
    if diagnosis is not None:
        from vrthinker.evals.world_errors_table import print_errors

        print_errors(diagnosis.errors, diagnosis.pages)


EvalCommand = (
    Annotated[EvalWorldCommand, tyro.conf.subcommand("world", prefix_name=False)]
    | Annotated[EvalPairsCommand, tyro.conf.subcommand("pairs", prefix_name=False)]
    | Annotated[
        EvalVideogenRewardbenchCommand, tyro.conf.subcommand("videogen-rewardbench", prefix_name=False)
    ]
    | Annotated[EvalGenaiBenchCommand, tyro.conf.subcommand("genai-bench", prefix_name=False)]
    | Annotated[EvalMjBenchVideoCommand, tyro.conf.subcommand("mj-bench-video", prefix_name=False)]
    | Annotated[EvalControlsCommand, tyro.conf.subcommand("controls", prefix_name=False)]
    | Annotated[EvalScoreCommand, tyro.conf.subcommand("score", prefix_name=False)]
    | Annotated[EvalCompareCommand, tyro.conf.subcommand("compare", prefix_name=False)]
    | Annotated[EvalPageCommand, tyro.conf.subcommand("page", prefix_name=False)]
    | Annotated[EvalExportCommand, tyro.conf.subcommand("export", prefix_name=False)]
    | Annotated[EvalShowCommand, tyro.conf.subcommand("show", prefix_name=False)]
)
