"""Where a number came from: machine, versions, commit, date, command.

Every committed result row carries it (`benchmarks/results/*.jsonl`), and every run that writes results
writes it beside them. It loads no tensor library.

Invariant: nothing in it is guessed. What cannot be found out is None.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import shlex
import subprocess
import sys
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from vrthinker.errors import VRThinkerError
from vrthinker.records.files import append_line

PACKAGES = ("vrthinker", "torch", "transformers", "av", "numpy")
COMMIT_VARIABLE = "VRTHINKER_COMMIT"
_SELF = "vrthinker/records/provenance.py"


def provenance(command: str | Sequence[str] | None = None) -> dict[str, Any]:
    """Describes this run.

    Args:
        command: What was run, as a line or as arguments; this process's own command line when None.

    Returns:
        A JSON-ready dict: `date` (UTC, ISO 8601), `command`, `commit` and `dirty` (see `git_state`),
        `machine` (`cpu`, `cores` available to this process, `memory_bytes`, `gpus` by name), `versions`
        (python and the packages that results depend on; None for one that is not installed).
    """
    if command is None:
        command = sys.orig_argv
    commit, dirty = git_state()
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": command if isinstance(command, str) else shlex.join(_relative(command)),
        "commit": commit,
        "dirty": dirty,
        "machine": {
            "cpu": _cpu_model(),
            "cores": len(os.sched_getaffinity(0)),
            "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
            "gpus": _gpu_names(),
        },
        "versions": {"python": platform.python_version(), **{name: _version(name) for name in PACKAGES}},
    }


def append_row(path: str | os.PathLike[str], row: Mapping[str, Any], command: str | None = None) -> None:
    """Appends one result row to a JSONL file, with the provenance merged in.

    Rows of two processes never mix. A last line that a killed writer left unfinished is kept, and closed
    first (see `append_line` for why).

    Args:
        path: The file; it and its folder are made when missing.
        row: The result. Its keys may not be those of `provenance`.
        command: See `provenance`.

    Raises:
        ValueError: `row` has a key of the provenance, or holds NaN or an infinity.
        VRThinkerError: The file could not be written (a full disk); it is as it was.
    """
    facts = provenance(command)
    if taken := sorted(facts.keys() & row.keys()):
        raise ValueError(f"row: got the keys {taken}, which the provenance writes; name them otherwise")
    line = json.dumps({**row, **facts}, allow_nan=False) + "\n"
    file = Path(path)
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        append_line(file, line, unfinished="close")
    except OSError as error:
        raise VRThinkerError(
            f"{file}: cannot be written ({error.strerror}); make room or grant writing, then run again"
        ) from None


def git_state() -> tuple[str | None, bool | None]:
    """The commit that the running code was checked out from, and whether the tree differs from it.

    The package's own folder is asked, then the working directory (an installed copy that is run from its
    checkout); a repository counts only if it tracks this very file with this content or an edit of it in
    place. `VRTHINKER_COMMIT` overrides it where the code travels without its repository. Changes under
    `benchmarks/results` don't make a tree dirty: rows are appended there one after another.

    Returns:
        `(commit, dirty)`, each None when unknown.
    """
    if named := os.environ.get(COMMIT_VARIABLE):
        return named, None
    own = Path(__file__).resolve()
    for start in (own.parent, Path.cwd()):
        top = _git(start, "rev-parse", "--show-toplevel")
        if top is None:
            continue
        candidate = Path(top) / _SELF
        same = candidate == own or (candidate.is_file() and candidate.read_bytes() == own.read_bytes())
        if not same or _git(Path(top), "ls-files", "--error-unmatch", _SELF) is None:
            continue
        commit = _git(Path(top), "rev-parse", "HEAD")
        status = _git(Path(top), "status", "--porcelain", "--", ".", ":(exclude)benchmarks/results")
        return commit, None if commit is None or status is None else bool(status)
    return None, None


def _git(folder: Path, *arguments: str) -> str | None:
    try:
        done = subprocess.run(
            ["git", "-C", str(folder), *arguments], capture_output=True, text=True, timeout=20, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _relative(arguments: Sequence[str]) -> list[str]:
    """Absolute paths of this machine say nothing elsewhere: the interpreter becomes `python`."""
    shortened = [os.path.relpath(a) if os.path.isabs(a) and os.path.exists(a) else a for a in arguments]
    return ["python", *shortened[1:]]


def _cpu_model() -> str | None:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return None
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine() or None


def _gpu_names() -> list[str]:
    """Names as nvidia-smi gives them: asking the driver from this process would start it here."""
    try:
        done = subprocess.run(
            ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"],
            capture_output=True,
            text=True,
            timeout=20,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return []
    return [line.strip() for line in done.stdout.splitlines() if line.strip()]
