"""What the native module links, and what scripts/check_wheel.py refuses."""

from __future__ import annotations

import importlib.util
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from types import ModuleType

import pytest

from vrthinker import _core

SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "check_wheel.py"
CORE = Path(_core.__file__)

pytestmark = [
    pytest.mark.skipif(shutil.which("readelf") is None, reason="needs readelf (binutils)"),
    pytest.mark.skipif(not SCRIPT.exists(), reason="needs the source tree"),
]


@pytest.fixture(scope="module")
def check_wheel() -> ModuleType:
    spec = importlib.util.spec_from_file_location("check_wheel", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def write_wheel(folder: Path, members: dict[str, Path], tag: str = "manylinux_2_28_x86_64") -> Path:
    wheel = folder / f"vrthinker-0.1.0-cp311-cp311-{tag}.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        for name, file in members.items():
            archive.write(file, name)
    return wheel


@pytest.mark.skipif(bool(_core.build_info()["sanitizers"]), reason="a sanitizer build links its runtime")
def test_the_native_module_links_the_runtimes_and_nothing_else(check_wheel: ModuleType) -> None:
    needed = check_wheel.needed_libraries(CORE)
    assert "libc.so.6" in needed  # it was read
    assert needed <= check_wheel.RUNTIMES, needed - check_wheel.RUNTIMES


def test_a_sound_wheel_passes_and_its_size_is_printed(check_wheel: ModuleType, tmp_path: Path) -> None:
    wheel = write_wheel(tmp_path, {f"vrthinker/{CORE.name}": CORE})
    done = subprocess.run([sys.executable, SCRIPT, wheel], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"{wheel} {wheel.stat().st_size / 1e6:.1f} MB\n"


@pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")
def test_a_library_that_is_not_a_runtime_is_refused_by_name(check_wheel: ModuleType, tmp_path: Path) -> None:
    source = tmp_path / "foreign.cpp"
    source.write_text('extern "C" int omp_get_max_threads(); int threads() { return omp_get_max_threads(); }')
    foreign = tmp_path / "foreign.so"
    subprocess.run(["g++", "-shared", "-fPIC", "-fopenmp", source, "-o", foreign], check=True)
    wheel = write_wheel(
        tmp_path, {f"vrthinker/{CORE.name}": CORE, "vrthinker.libs/libforeign-1a2b.so.1": foreign}
    )
    assert check_wheel.faults(wheel) == ["vrthinker.libs/libforeign-1a2b.so.1 links libgomp.so.1"]


def test_what_else_is_refused(check_wheel: ModuleType, tmp_path: Path) -> None:
    bare = write_wheel(tmp_path, {"vrthinker/data.bin": CORE}, "linux_x86_64")
    command = [sys.executable, SCRIPT, bare, "0.001"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    megabytes = bare.stat().st_size / 1e6
    assert done.stderr.splitlines() == [
        f"{bare.name}: its platform tag is not a manylinux one; auditwheel repair gives it one",
        f"{bare.name}: got {megabytes:.1f} MB, allowed: 0.001 MB",
        f"{bare.name}: it holds no vrthinker/_core*.so",
    ]
