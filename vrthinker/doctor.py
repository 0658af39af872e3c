"""What this machine has, what is missing, and what for: `vrthinker doctor`.

Invariant: an examination never fails. A part that breaks while it is looked at is a finding too.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING

from vrthinker.examination import CHECKS, Finding, first_line

if TYPE_CHECKING:
    from rich.table import Table

__all__ = ["Finding", "as_json", "examine", "exit_code", "main", "render"]


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
    """Looks at every part. Imports torch, transformers and PyAV; takes some seconds."""
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
    """1 when something that judging on this machine needs is missing, else 0."""
    return int(any(finding.required and finding.status == "missing" for finding in findings))


def as_json(findings: Sequence[Finding]) -> str:
    """The findings for machines: `{"schema_version", "ok", "findings": [...]}`."""
    return json.dumps(
        {
            "schema_version": 1,
            "ok": exit_code(findings) == 0,
            "findings": [asdict(finding) for finding in findings],
        },
        indent=2,
    )


def render(findings: Iterable[Finding]) -> Table:
    """The findings for people: what is fine in a line, what is not with its use and its remedy."""
    from rich.table import Table
    from rich.text import Text

    colours = {"ok": "green", "warning": "yellow", "missing": "red"}
    table = Table("part", "status", "found", show_edge=False, pad_edge=False, box=None)
    for finding in findings:
        optional = finding.status == "missing" and not finding.required
        status = Text(
            "optional" if optional else finding.status, "dim" if optional else colours[finding.status]
        )
        found = Text(finding.detail)
        if finding.status != "ok":
            found.append(f"\nfor {finding.needed_for}", "dim")
            if finding.remedy:
                found.append(f"\nto do: {finding.remedy}", "dim")
        table.add_row(Text(finding.part), status, found)
    return table


_as_json = as_json  # `main` has an argument of that name
