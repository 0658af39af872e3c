"""The provenance of a number: machine, versions, commit, date, command.

Every committed result row has it (`benchmarks/results/*.jsonl`), and every run that writes results writes it
beside them. This module loads no tensor library.

Invariant: nothing in it is guessed. What cannot be found out is None.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from vrthinker.errors import VRThinkerError
from vrthinker.records.files import append_line

PACKAGES = ("vrthinker", "torch", "transformers", "av", "numpy")
COMMIT_VARIABLE = "VRTHINKER_COMMIT"
_DEPTH = 2
"""The number of folders between the root of a checkout and this file."""
_COUNTED = (".", ":(exclude)benchmarks/results")
_HASH = re.compile(r"[0-9a-f]{40}|[0-9a-f]{64}")


def provenance(command: str | Sequence[str] | None = None) -> dict[str, Any]:
    """Describes this run.

    Args:
        command: The command, as a line or as arguments. None takes this process's command line.

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

    Rows of two processes never mix. If a killed writer wrote an unfinished last line, it is kept, and its
    newline is added first (`append_line` says why).

    Args:
        path: The file. It is made, with its folder, if it is missing.
        row: The result. Its keys may not be those of `provenance`.
        command: The command, as a line; None takes this process's command line.

    Raises:
        ValueError: `row` has a key of the provenance, or holds NaN or an infinity.
        VRThinkerError: The file could not be written (a full disk). It is unchanged.
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

    Only the checkout that contains this file is examined, never the working directory, because an unpacked
    folder may have a `.git/config` that names programs to run. For the same reason git never reads the
    checkout's own configuration (see `_is_dirty`). If the code is used without its repository,
    `VRTHINKER_COMMIT` names the commit. Changes under `benchmarks/results` do not make a tree dirty, because
    rows are appended there one after another.

    Returns:
        `(commit, dirty)`, each None if it is unknown.
    """
    if named := os.environ.get(COMMIT_VARIABLE):
        return named, None
    root = Path(__file__).resolve().parents[_DEPTH]
    try:
        git_folder = _git_folder(root)
        commit = _head(git_folder)
        if commit is None:
            return None, None
        return commit, _is_dirty(root, git_folder, commit)
    except (OSError, ValueError):
        return None, None


def _git_folder(root: Path) -> Path:
    """The folder with the repository's data: `.git`, or what a worktree's `.git` file points to."""
    path = root / ".git"
    if not path.is_file():
        return path
    pointer = path.read_text("utf-8").removeprefix("gitdir:").strip()
    return (root / pointer).resolve()


def _common_folder(git_folder: Path) -> Path:
    """The folder with objects and references, which worktrees share."""
    pointer = git_folder / "commondir"
    return (git_folder / pointer.read_text("utf-8").strip()).resolve() if pointer.is_file() else git_folder


def _head(git_folder: Path) -> str | None:
    """The commit that is checked out; None if the repository has none or does not have this file."""
    if not (git_folder / "HEAD").is_file():
        return None
    name = (git_folder / "HEAD").read_text("utf-8").strip()
    if not name.startswith("ref: "):
        return name if _HASH.fullmatch(name) else None
    reference = name.removeprefix("ref: ")
    common = _common_folder(git_folder)
    for folder in (git_folder, common):
        if (folder / reference).is_file():
            commit = (folder / reference).read_text("utf-8").strip()
            return commit if _HASH.fullmatch(commit) else None
    packed = common / "packed-refs"
    lines = packed.read_text("utf-8").splitlines() if packed.is_file() else []
    return next((line.split()[0] for line in lines if line.endswith(f" {reference}")), None)


def _is_dirty(root: Path, git_folder: Path, commit: str) -> bool | None:
    """Whether the working tree differs from a commit; None if git cannot tell.

    Git runs in a temporary repository, which borrows the objects and a copy of the index and has no
    configuration, so that no hook, file monitor or filter that the checkout names can run.

    Raises:
        ValueError: The repository does not track this file, so it is not the repository of this code.
    """
    with tempfile.TemporaryDirectory(prefix="vrthinker-git-") as folder:
        borrowed = Path(folder)
        (borrowed / "refs").mkdir()
        (borrowed / "objects" / "info").mkdir(parents=True)
        objects = _common_folder(git_folder) / "objects"
        (borrowed / "objects" / "info" / "alternates").write_text(f"{objects}\n", "utf-8")
        (borrowed / "HEAD").write_text(f"{commit}\n", "utf-8")
        shutil.copyfile(git_folder / "index", borrowed / "index")

        def git(*arguments: str) -> subprocess.CompletedProcess[bytes]:
            command = ["git", f"--git-dir={borrowed}", f"--work-tree={root}", *arguments]
            environment = {"PATH": os.environ.get("PATH", ""), "GIT_CONFIG_NOSYSTEM": "1", "HOME": folder}
            return subprocess.run(
                command, cwd=root, env=environment, capture_output=True, timeout=60, check=False
            )

        try:
            tracked = git("ls-files", "--error-unmatch", "--", str(Path(__file__).resolve()))
            git("update-index", "-q", "--refresh")
            changed = git("diff-index", "--quiet", "HEAD", "--", *_COUNTED)
            new = git("ls-files", "--others", "--exclude-standard", "--", *_COUNTED)
        except (OSError, subprocess.SubprocessError):
            return None
        if tracked.returncode == 1:
            raise ValueError(f"{root}: another project's repository")
        if tracked.returncode or changed.returncode not in (0, 1) or new.returncode:
            return None
        return bool(changed.returncode or new.stdout)


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _relative(arguments: Sequence[str]) -> list[str]:
    """The arguments with `python` for the interpreter, whose absolute path is meaningless elsewhere."""
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
    """The names that nvidia-smi reports. Asking the driver here would start it in this process."""
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
