"""`vrthinker eval controls`: one table that a judge has to pass."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from vrthinker.commands.judge_options import ModelOptions
from vrthinker.commands.judges import JudgeSource
from vrthinker.commands.options import Flag, announce, check_writable, option
from vrthinker.errors import InputError, unwritable

if TYPE_CHECKING:
    from vrthinker.evals.controls import Controls
    from vrthinker.evals.labelled_data import LabelledData


@dataclass(frozen=True, kw_only=True)
class _Asked:
    """What is asked about, and where the results go."""

    data: Annotated[Path, option("PAIRS")]
    """The labelled pairs: a pairs file, or a folder that has one."""
    out: Annotated[Path, option("RUN")]
    """The folder for verdicts, changed clips and controls.json. The same command continues a killed run."""
    limit: Annotated[int | None, option("N")] = 50
    """The number of pairs, drawn by --seed. 50 by default."""
    json: Flag = False
    """Print JSON instead of a table."""
    row: Annotated[Path | None, option("FILE")] = None
    """Append a result row (the table, machine, versions, commit, command) to this JSONL file."""


@dataclass(frozen=True, kw_only=True)
class EvalControlsCommand(ModelOptions, _Asked):
    """Ask a judge questions whose right answer follows from how they were made: one table to pass.

    vrthinker eval controls --model M --data PAIRS --out RUN

    Captions are shuffled, emptied, or ask for a verdict; clips are compared with themselves, replaced by
    noise or grey, or damaged in one dimension at rising strength. About 25 questions are asked a pair.
    """

    model: Annotated[str | None, option("M")] = None
    """A checkpoint folder, a hub id, or nano; with --endpoint, a name on the server. Or baseline:NAME."""
    temperature: Annotated[float | None, option("T")] = 0.0
    """The sampling temperature; 0 is greedy."""
    seed: int = 0
    """The seed of --limit, of captions that change places, and of sampling."""

    def run(self) -> int:
        """Asks and prints. The exit code is 0 whatever the judge answers, because the table is the result."""
        from vrthinker.evals.baselines import baseline_of
        from vrthinker.evals.control_rules import control_rows
        from vrthinker.evals.controls import make_controls
        from vrthinker.evals.controls_run import (
            CONTROLS_FILE,
            CONTROLS_VERSION,
            baseline_verdicts,
            print_controls,
            write_controls,
        )
        from vrthinker.evals.labelled_data import load_labelled

        self._check_options()
        source = self.source()
        baseline = baseline_of(source.model)
        judge = source.model if baseline is not None else source.configuration().model
        data = load_labelled(self.data, limit=self.limit, seed=self.seed)
        try:
            self.out.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise unwritable(self.out, error, "name another", failed="the folder cannot be made") from None
        announce("making the questions")
        controls = make_controls(data.pairs, self.out, seed=self.seed)
        if baseline is not None:
            verdicts = baseline_verdicts(baseline, controls.pairs(), data.pairs, self.seed)
        else:
            verdicts = self._asked(source, data, controls)
        rows = control_rows(controls, verdicts)
        about: dict[str, Any] = {
            "evaluation": "negative controls",
            "judge": judge,
            "data": data.name,
            "pairs": len(data.pairs),
            "limit": self.limit,
            "seed": self.seed,
            "left_out": controls.left_out,
        }
        write_controls(self.out, rows, about)
        if self.row is not None:
            from vrthinker.records.provenance import append_row

            table = {"controls_version": CONTROLS_VERSION, "rows": [row.as_json() for row in rows]}
            append_row(self.row, {**about, **table})
        if self.json:
            sys.stdout.write((self.out / CONTROLS_FILE).read_text("utf-8"))
        else:
            print_controls(
                rows, judge=judge, data=data.name, pairs=len(data.pairs), left_out=controls.left_out
            )
        return 0

    def _asked(self, source: JudgeSource, data: LabelledData, controls: Controls) -> dict[str, Any]:
        """Question id -> the model's verdict. A model is loaded only if there is something to ask."""
        from contextlib import ExitStack

        from vrthinker.evals.controls_run import QUESTIONS_VERSION
        from vrthinker.evals.labelled_run import judge_pairs, with_virtual_clips
        from vrthinker.evals.pairs import open_log
        from vrthinker.evals.protocols import Protocol
        from vrthinker.report.terminal import FileProgress

        questions = controls.pairs()
        with ExitStack() as stack:
            log = stack.enter_context(
                open_log(
                    self.out,
                    source.configuration(),
                    questions,
                    pairs_file=data.source,
                    seed=self.seed,
                    weights=source.weights(),
                    protocol={"controls": QUESTIONS_VERSION},
                )
            )
            pending = len(log.pending([question.id for question in questions]))
            progress = stack.enter_context(FileProgress(len(questions), done=len(questions) - pending))
            judge_pairs(
                lambda: with_virtual_clips(stack.enter_context(source.load())),
                questions,
                Protocol(),
                log,
                seed=self.seed,
                on_record=progress.record,
                on_wait=progress.wait,
            )
            return {record.id: record.judgment for record in log.records()}

    def _check_options(self) -> None:
        """Refuses what can be refused without pairs or a model."""
        if self.limit is not None and self.limit < 2:
            raise InputError(f"--limit: got {self.limit}, allowed: at least 2")
        if self.out.exists() and not self.out.is_dir():
            raise InputError(f"--out: {self.out}: got a file, allowed: a folder")
        if self.row is not None:
            check_writable("--row", self.row)
