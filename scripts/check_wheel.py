"""Refuses a wheel that would not run everywhere, or that grew too large.

    check_wheel.py WHEEL [MEGABYTES]

A wheel carries a manylinux tag (auditwheel found that the symbols it needs are that old), its native module
links the C and C++ runtimes and nothing else (no libtorch: one wheel for every torch; no libgomp: a second
thread pool beside torch's; no libcudart.so: it is inside), and it stays under the size that pip users bear.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

RUNTIMES = frozenset(
    {
        "ld-linux-x86-64.so.2",
        "ld-linux-aarch64.so.1",
        "libc.so.6",
        "libdl.so.2",
        "libgcc_s.so.1",
        "libm.so.6",
        "libpthread.so.0",
        "librt.so.1",
        "libstdc++.so.6",
    }
)
"""What every Linux with a manylinux Python has."""

MAX_MEGABYTES = 20.0


def needed_libraries(library: Path) -> set[str]:
    """The shared libraries that `library` asks the loader for (its NEEDED entries), without their own."""
    done = subprocess.run(["readelf", "-d", str(library)], capture_output=True, text=True, check=True)
    return set(re.findall(r"\(NEEDED\).*\[(.+)\]", done.stdout))


def faults(wheel: Path, max_megabytes: float = MAX_MEGABYTES) -> list[str]:
    """What is wrong with a wheel, in words; nothing where it is fine."""
    found = []
    if "manylinux" not in wheel.stem.split("-")[-1]:
        found.append("its platform tag is not a manylinux one; auditwheel repair gives it one")
    megabytes = wheel.stat().st_size / 1e6
    if megabytes > max_megabytes:
        found.append(f"got {megabytes:.1f} MB, allowed: {max_megabytes:g} MB")
    with zipfile.ZipFile(wheel) as archive, tempfile.TemporaryDirectory() as folder:
        natives = [name for name in archive.namelist() if re.search(r"\.so(\.|$)", name)]
        if not any(re.fullmatch(r"vrthinker/_core\..+\.so", name) for name in natives):
            found.append("it holds no vrthinker/_core*.so")
        for name in natives:
            foreign = needed_libraries(Path(archive.extract(name, folder))) - RUNTIMES
            if foreign:
                found.append(f"{name} links {', '.join(sorted(foreign))}")
    return found


def main(arguments: list[str]) -> int:
    """Prints the wheel's name and size; 1 with the reasons on stderr if it is refused."""
    wheel = Path(arguments[0])
    limit = float(arguments[1]) if len(arguments) > 1 else MAX_MEGABYTES
    sys.stdout.write(f"{wheel} {wheel.stat().st_size / 1e6:.1f} MB\n")
    found = faults(wheel, limit)
    for fault in found:
        sys.stderr.write(f"{wheel.name}: {fault}\n")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
