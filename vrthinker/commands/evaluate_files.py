"""`vrthinker eval` on finished work: score verdicts, compare runs, write a page or a log."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from vrthinker.commands.options import Flag, announce, option
from vrthinker.errors import InputError


@dataclass(frozen=True)
class EvalScoreCommand:
    """Score anybody's verdicts by the protocol of this package.

    vrthinker eval score verdicts.csv --data DIR

    A row has an id and a verdict: TA, VQ, MQ, OA (or overall), or two scores (score_1, score_2). What cannot
    be read, and pairs without a row, count as wrong.
    """

    verdicts: Annotated[tyro.conf.Positional[Path], option("VERDICTS")]
    """The file of verdicts (.csv, .jsonl)."""
    data: Annotated[Path, option("DIR")]
    """The labelled pairs: a pairs file, or a folder that `vrthinker data import` wrote."""
    out: Annotated[Path | None, option("RUN")] = None
    """A folder for eval.json and items.jsonl, so that `eval compare` and `eval page` can read the run."""
    name: Annotated[str | None, option("NAME")] = None
    """The judge's name in tables. The file's name by default."""
    json: Flag = False
    """Print JSON instead of tables."""

    def run(self) -> int:
        """Scores and prints."""
        from vrthinker.evals.items import item_of_answer
        from vrthinker.evals.labelled_data import load_labelled
        from vrthinker.evals.run_files import check_no_model_run, write_run
        from vrthinker.evals.summary import summarise
        from vrthinker.evals.summary_table import print_summary
        from vrthinker.evals.verdict_files import read_answers

        if self.out is not None and self.out.exists() and not self.out.is_dir():
            raise InputError(f"--out: {self.out}: got a file, allowed: a folder")
        if self.out is not None:
            check_no_model_run(self.out)
        answers = read_answers(self.verdicts)
        data = load_labelled(self.data)
        items = [item_of_answer(p, answers.get(p.id), data.tie_kinds.get(p.id)) for p in data.pairs]
        known = {pair.id for pair in data.pairs}
        unknown = [name for name in answers if name not in known]
        left_out = dict(data.left_out)
        if unknown:
            left_out["verdicts about ids that are no labelled pair"] = len(unknown)
        if len(unknown) == len(answers):
            raise InputError(
                f"{self.verdicts}: none of its {len(answers)} ids is a labelled pair of {data.source}; "
                "give the pairs that were judged"
            )
        summary = summarise(items, left_out=left_out)
        judge = self.name or self.verdicts.name
        if self.out is not None:
            about = {"evaluation": "verdict file", "judge": judge, "data": data.name, "protocol": {}}
            write_run(self.out, items, summary, about)
        if self.json:
            _print_json(summary)
        else:
            print_summary(summary, judge=judge, data=data.name)
        return 0


@dataclass(frozen=True)
class EvalCompareCommand:
    """Compare runs on the items that they have in common, pair by pair.

    vrthinker eval compare RUN1 RUN2 ...

    The first run is what the others are compared with.
    """

    runs: Annotated[tyro.conf.Positional[tuple[Path, ...]], option("RUN")]
    """The folders of two or more evaluations."""
    json: Flag = False
    """Print JSON instead of tables."""

    def run(self) -> int:
        """Compares and prints."""
        from vrthinker.evals.compare import compare, print_comparisons
        from vrthinker.evals.run_files import read_run

        loaded, settings = {}, {}
        for folder in self.runs:
            if [other.resolve() for other in self.runs].count(folder.resolve()) > 1:
                raise InputError(f"compare: got {folder} twice, allowed: each run once")
            items, about = read_run(folder)
            name = folder.name if folder.name not in loaded else str(folder)
            loaded[name], settings[name] = items, about.get("summary", {}).get("protocol_version")
        if len(set(settings.values())) > 1:
            announce(f"the runs were summed up by different versions of the protocol: {settings}")
        found = compare(loaded)
        if self.json:
            _print_json([one.as_json() for one in found])
        else:
            print_comparisons(next(iter(loaded)), found)
        return 0


@dataclass(frozen=True)
class EvalPageCommand:
    """Write one page about an evaluation: tables with intervals, calibration, controls, the surest errors.

    vrthinker eval page RUN
    """

    run_folder: Annotated[tyro.conf.Positional[Path], option("RUN")]
    """The folder of an evaluation on labelled pairs, or of `eval score --out`."""
    out: Annotated[Path | None, option("FILE")] = None
    """The HTML file. RUN/report.html by default."""
    controls: Annotated[Path | None, option("RUN")] = None
    """The folder of `vrthinker eval controls` of the same judge, whose table is shown too."""
    errors: Annotated[int, option("N")] = 20
    """The most errors that are listed, each with the page of its episode if there is one. 20 by default."""

    def run(self) -> int:
        """Writes the page and prints its path."""
        from vrthinker.bounded_files import read_json
        from vrthinker.evals.controls_run import CONTROLS_FILE
        from vrthinker.evals.pairs import TRAJECTORIES_FILE
        from vrthinker.evals.run_files import MAX_EVAL_BYTES, read_run
        from vrthinker.progress import Progress
        from vrthinker.report.eval_page.page import write_eval_page

        if self.errors < 0:
            raise InputError(f"--errors: got {self.errors}, allowed: 0 and above")
        items, about = read_run(self.run_folder)
        controls = None
        if self.controls is not None:
            controls = read_json(self.controls / CONTROLS_FILE, MAX_EVAL_BYTES)
            if not isinstance(controls, dict) or not isinstance(controls.get("rows"), list):
                raise InputError(f"{self.controls / CONTROLS_FILE}: holds no table of controls")
        out = self.run_folder / "report.html" if self.out is None else self.out
        with Progress() as progress:
            write_eval_page(
                out,
                items,
                about,
                trajectories=self.run_folder / TRAJECTORIES_FILE,
                controls=controls,
                errors=self.errors,
                on_episode=lambda done, total: progress.show("evidence pages", done, total),
            )
        sys.stdout.write(f"{out}\n")
        return 0


@dataclass(frozen=True)
class EvalExportCommand:
    """Write an evaluation as a log of inspect_ai, whose viewer shows its items, rounds and frames.

    vrthinker eval export RUN --out RUN/log.eval
    inspect view --log-dir RUN
    """

    run_folder: Annotated[tyro.conf.Positional[Path], option("RUN")]
    """The folder of an evaluation on labelled pairs, or of `eval score --out`."""
    out: Annotated[Path | None, option("FILE")] = None
    """The log (.eval). RUN/log.eval by default."""
    pictures: Annotated[int, option("N")] = 20
    """The most items whose frames are in the log as pictures, the surest errors first. 20 by default."""

    def run(self) -> int:
        """Writes the log and prints its path."""
        from vrthinker.evals.pairs import TRAJECTORIES_FILE
        from vrthinker.evals.run_files import read_run
        from vrthinker.progress import Progress
        from vrthinker.report.inspect_log import write_inspect_log

        if self.pictures < 0:
            raise InputError(f"--pictures: got {self.pictures}, allowed: 0 and above")
        items, about = read_run(self.run_folder)
        out = self.run_folder / "log.eval" if self.out is None else self.out
        with Progress() as progress:
            write_inspect_log(
                out,
                items,
                about,
                trajectories=self.run_folder / TRAJECTORIES_FILE,
                pictures=self.pictures,
                on_episode=lambda done, total: progress.show("episodes", done, total),
            )
        sys.stdout.write(f"{out}\n")
        return 0


def _print_json(value: object) -> None:
    import json

    sys.stdout.write(json.dumps(value, indent=2) + "\n")
