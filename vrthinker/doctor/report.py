"""The report of `vrthinker doctor`: what this machine has, what is missing, and what that is needed for.

Invariant: an examination never fails. If examining a part raises an error, that is a finding too.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

from vrthinker.doctor.examination import CHECKS, Finding, first_line
from vrthinker.progress import counted

if TYPE_CHECKING:
    from rich.table import Table

    from vrthinker.doctor.numerics import NumericsReport

__all__ = ["Finding", "as_json", "examine", "exit_code", "main", "numerics", "print_numerics", "render"]


def main(*, as_json: bool = False) -> int:
    """Writes the report to stdout; returns the exit code."""
    findings = examine()
    if as_json:
        sys.stdout.write(_as_json(findings) + "\n")
    else:
        from rich.console import Console

        Console().print(render(findings))
    return exit_code(findings)


def examine() -> list[Finding]:
    """Examines every part. This imports torch, transformers and PyAV, and takes some seconds."""
    findings: list[Finding] = []
    for part, check in CHECKS:
        try:
            findings.extend(check())
        except Exception as error:
            findings.append(
                Finding(part, "warning", f"could not be examined: {first_line(error)}", "this report")
            )
    return findings


def exit_code(findings: Iterable[Finding]) -> int:
    """The exit code: 1 if something is missing that judging on this machine needs, else 0."""
    return int(any(finding.required and finding.status == "missing" for finding in findings))


def as_json(findings: Sequence[Finding]) -> str:
    """The findings as JSON: `{"schema_version", "ok", "findings": [...]}`."""
    return json.dumps(
        {
            "schema_version": 1,
            "ok": exit_code(findings) == 0,
            "findings": [asdict(finding) for finding in findings],
        },
        indent=2,
    )


def render(findings: Iterable[Finding]) -> Table:
    """The findings as a table: a line for what is fine; with use and remedy for what is not."""
    from rich.table import Table
    from rich.text import Text

    colours = {"ok": "green", "warning": "yellow", "missing": "red"}
    table = Table("part", "status", "found", show_edge=False, pad_edge=False, box=None)
    for finding in findings:
        optional = finding.status == "missing" and not finding.required
        status = Text(
            "optional" if optional else finding.status, "dim" if optional else colours[finding.status]
        )
        detail = Text(finding.detail)
        if finding.status != "ok":
            detail.append(f"\nfor {finding.needed_for}", "dim")
            if finding.remedy:
                detail.append(f"\nto do: {finding.remedy}", "dim")
        table.add_row(Text(finding.part), status, detail)
    return table


def numerics(
    model: str, pairs: Path | None, limit: int, *, device: str | None = None, dtype: str | None = None
) -> NumericsReport:
    """Measures how far training's numbers differ from sampling's, per memory mode (`doctor.numerics`).

    Args:
        model: A checkpoint folder, a hub id, or nano.
        pairs: A pairs file; by default pairs of the synthetic world are made.
        limit: The most pairs to judge.
        device: The device that the model runs on (`Judge.from_pretrained`).
        dtype: The dtype that it computes in (`Judge.from_pretrained`).

    Raises:
        InputError: The model or the pairs cannot be used.
        VRThinkerError: A pair cannot be judged.
    """
    import tempfile

    from vrthinker.data.pairs import load_pairs
    from vrthinker.doctor.numerics import default_pairs, measure_numerics
    from vrthinker.judge import Judge

    with (
        Judge.from_pretrained(model, device=device, dtype=dtype) as judge,
        tempfile.TemporaryDirectory(prefix="vrthinker-numerics-") as folder,
    ):
        if pairs is None:
            chosen = default_pairs(Path(folder), limit)
        else:
            chosen = list(islice(load_pairs(pairs), limit))
        return measure_numerics(
            judge, chosen, on_mode=lambda memory: _note(f"numerics: judging in memory mode {memory}")
        )


def _note(text: str) -> None:
    sys.stderr.write(text + "\n")


def print_numerics(report: NumericsReport) -> None:
    """Prints the report as a table."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console(highlight=False)
    about = (
        f"{report.model} on {report.device} in {report.dtype}: {counted(report.pairs, 'pair')}, sampled at "
    )
    console.print(Text(f"{about}temperature {report.temperature:g}"))
    columns = ("memory", "tokens", "largest |Δ logprob|", "mean", "context computed", "frames reused")
    table = Table(*columns, show_edge=False, pad_edge=False, box=None)
    for mode in report.modes:
        known = mode.largest is not None and mode.mean is not None
        table.add_row(
            mode.memory,
            f"{mode.tokens:,}",
            f"{mode.largest:.1e}" if known else "-",
            f"{mode.mean:.1e}" if known else "-",
            f"{mode.prefilled_share:.0%}",
            f"{mode.features_reused:.0%}",
        )
    console.print(table)
    for mode in report.modes:
        if mode.reason is not None:
            console.print(Text(f"{mode.memory}: {mode.reason}"))
    for modes, share in report.disagreements.items():
        first, second = modes.split("/")
        console.print(Text(f"greedy judgments differ between {first} and {second}: {share:.0%} of the pairs"))
    for mode_name, count in report.without_verdict.items():
        if count:
            console.print(Text(f"{mode_name}: {counted(count, 'greedy episode')} without a verdict"))
    console.print(
        Text(
            "Δ is between sampling and the packed forward: rounding, and nothing else, should show in it. "
            "Differences between modes are real: the model sees other things (docs/memory.md)."
        )
    )


_as_json = as_json  # because `main` has an argument named `as_json`
