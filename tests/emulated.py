"""CUDA kernels on a CPU: compiles a driver against a kernel header and the emulator, plants bugs, runs it.

A driver is a C++ program that includes kernel headers as the package does (`"evict/evict_kernel.h"`), runs
them through `vrthinker::emulator::launch` under many seeds and exits with 0 when every result was right, with
1 when one was wrong. A test of an op builds it twice:

    program = build(DRIVER, tmp_path / "right")  # once per module
    assert run(program).returncode == 0
    bug = plant("evict/evict_kernel.h", "__syncthreads();", "", tmp_path / "bug")
    assert run(build(DRIVER, tmp_path / "bug", kernels=bug)).returncode == WRONG

`WRONG`, `FAULT` and `SANITIZER` are the exit codes of the three ways in which a bug is seen.
"""

from __future__ import annotations

import functools
import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
EMULATOR = ROOT / "tests" / "native" / "emulator"
KERNELS = ROOT / "kernels"

WRONG = 1
"""A result differs: a missing barrier, an overlap, memory read before it was written."""
FAULT = 70
"""The emulator stopped: a divergent barrier, lanes that never all arrive, a deadlock."""
SANITIZER = 71
"""AddressSanitizer stopped: an access out of range; or an address that is not aligned for its type."""

_FLAGS = (
    "-std=c++20",
    "-O0",  # compiling costs more than running
    "-g1",
    "-Wall",
    "-Wextra",
    "-fsanitize=address,alignment",
    "-fno-sanitize-recover=all",
    "-fno-omit-frame-pointer",
    "-ffp-contract=off",
    "-DVRTHINKER_EMULATE",
)


@functools.cache
def why_not() -> str | None:
    """What keeps the emulator from working here; None where nothing does."""
    if not KERNELS.is_dir():
        return "needs the source tree"
    compiler = _compiler()
    if compiler is None:
        return "needs g++ (Debian, Ubuntu: apt install g++)"
    link = [compiler, "-x", "c++", "-", "-fsanitize=address,alignment", "-o", os.devnull]
    done = subprocess.run(link, input="int main() {}", capture_output=True, text=True, check=False)
    return None if done.returncode == 0 else f"{compiler} cannot link AddressSanitizer: {done.stderr.strip()}"


def _compiler() -> str | None:
    """GCC: which variables get AddressSanitizer's red zones differs between compilers (see emulator.h)."""
    return shutil.which("g++")


def build(driver: Path, folder: Path, *, kernels: Path = KERNELS) -> Path:
    """Compiles a driver.

    Args:
        driver: The C++ file. What it includes lies in `kernels` or in the emulator's folder, not beside it.
        folder: Where the program goes; made when missing.
        kernels: The folder of kernel headers: the package's, or what `plant` returned.

    Returns:
        The program.
    """
    if (reason := why_not()) is not None:
        pytest.skip(reason)
    folder.mkdir(parents=True, exist_ok=True)
    # A copy: what stands beside a file is found before what -I names, a planted bug would not be included.
    source = folder / driver.name
    shutil.copyfile(driver, source)
    program = folder / driver.stem
    compiler = _compiler()
    assert compiler is not None
    # The package's kernels come last: device.h for the samples, which have a folder of their own.
    include = [f"-I{path}" for path in (kernels, EMULATOR, KERNELS)]
    command = [compiler, *_FLAGS, *include, str(source), "-o", str(program)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=280, check=False)
    assert done.returncode == 0, done.stderr
    return program


def run(program: Path, *arguments: object, timeout: float = 280) -> subprocess.CompletedProcess[str]:
    """Runs a driver; its exit code says how it ended (see the module)."""
    options = f"detect_leaks=0:halt_on_error=1:exitcode={SANITIZER}"
    environment = {**os.environ, "ASAN_OPTIONS": options, "UBSAN_OPTIONS": options}
    return subprocess.run(
        [str(program), *map(str, arguments)],
        env=environment,
        capture_output=True,
        text=True,
        errors="replace",
        timeout=timeout,
        check=False,
    )


def plant(header: str, find: str, replace: str, folder: Path, *, kernels: Path = KERNELS) -> Path:
    """Copies the kernel headers with one bug in them.

    Args:
        header: Which header gets the bug, relative to `kernels`, as it is included.
        find: The text that is replaced. It must stand there exactly once: a test whose bug was not planted,
            or was planted elsewhere, would prove nothing.
        replace: The bug.
        folder: Where the copy goes (into `kernels/` under it), with the same layout.
        kernels: The folder of headers to copy.

    Returns:
        The folder to pass to `build` as `kernels`.
    """
    text = (kernels / header).read_text()
    count = text.count(find)
    assert count == 1, f"{header}: {find!r} stands there {count} times, wanted exactly once"
    copy = folder / "kernels"
    for source in kernels.rglob("*.h"):
        target = copy / source.relative_to(kernels)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source, target)
    (copy / header).write_text(text.replace(find, replace))
    return copy
