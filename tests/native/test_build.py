"""What the build says to someone who asks for something impossible, and that both kinds of build work."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("cmake") is None, reason="needs cmake (pip install cmake)"),
    pytest.mark.skipif(not (ROOT / "CMakeLists.txt").exists(), reason="needs the source tree"),
]


def configure(build: Path, *options: str, without_nvcc: bool = False) -> subprocess.CompletedProcess[str]:
    environment = dict(os.environ)
    if without_nvcc:
        folders = environment["PATH"].split(os.pathsep)
        environment["PATH"] = os.pathsep.join(f for f in folders if not Path(f, "nvcc").exists())
        environment.pop("CUDACXX", None)
        environment.pop("CUDA_PATH", None)
    command = [sys.executable, "-m", "cmake", "-S", str(ROOT), "-B", str(build)]
    return subprocess.run(
        [*command, f"-DPython_EXECUTABLE={sys.executable}", *options],
        env=environment,
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )


def one_line(text: str) -> str:
    return " ".join(text.split())


def test_cuda_on_without_nvcc_fails_with_what_to_do(tmp_path: Path) -> None:
    done = configure(tmp_path, "-DVRTHINKER_CUDA=ON", without_nvcc=True)
    if "CUDA kernels ON" in done.stdout:
        pytest.skip("CMake finds an nvcc outside the PATH")
    assert done.returncode != 0
    assert "VRTHINKER_CUDA=ON, but no CUDA compiler was found. Put nvcc on the PATH" in one_line(done.stderr)


def test_auto_without_nvcc_builds_for_the_cpu(tmp_path: Path) -> None:
    done = configure(tmp_path, without_nvcc=True)
    if "CUDA kernels ON" in done.stdout:
        pytest.skip("CMake finds an nvcc outside the PATH")
    assert done.returncode == 0, done.stderr
    assert "vrthinker: CUDA kernels OFF (VRTHINKER_CUDA=AUTO)" in done.stdout


HAS_GPU = any(Path("/dev").glob("nvidia[0-9]*")) or Path("/dev/dxg").exists()


@pytest.mark.skipif(HAS_GPU, reason="there is a GPU")
def test_auto_without_a_gpu_builds_for_the_cpu_and_says_how_to_get_cuda(tmp_path: Path) -> None:
    done = configure(tmp_path)
    assert "vrthinker: CUDA kernels OFF (VRTHINKER_CUDA=AUTO)" in done.stdout
    assert "no GPU here, so the CUDA kernels are not built; -DVRTHINKER_CUDA=ON builds them" in done.stdout


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="needs nvcc")
def test_on_with_nvcc_builds_cuda_and_off_does_not_look(tmp_path: Path) -> None:
    on = configure(tmp_path / "on", "-DVRTHINKER_CUDA=ON").stdout
    assert "CUDA kernels ON (VRTHINKER_CUDA=ON)" in on
    off = configure(tmp_path / "off", "-DVRTHINKER_CUDA=OFF").stdout
    assert "CUDA kernels OFF (VRTHINKER_CUDA=OFF)" in off
    assert "CUDA compiler" not in off


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("-DVRTHINKER_CUDA=MAYBE", "VRTHINKER_CUDA: got 'MAYBE', allowed: ON, OFF, AUTO"),
        (
            "-DVRTHINKER_SANITIZE=adress",
            "VRTHINKER_SANITIZE: got 'adress', allowed: address, undefined, leak",
        ),
        ("-DVRTHINKER_SANITIZE=address,thread", "address and thread can't be combined"),
    ],
)
def test_bad_options_are_refused(tmp_path: Path, option: str, message: str) -> None:
    done = configure(tmp_path, option)
    assert done.returncode != 0
    assert message in one_line(done.stderr)


def test_a_build_for_the_cpu_alone_works_and_says_so(tmp_path: Path) -> None:
    assert configure(tmp_path, "-DVRTHINKER_CUDA=OFF").returncode == 0
    build = [sys.executable, "-m", "cmake", "--build", str(tmp_path), "--parallel", "2"]
    subprocess.run(build, check=True, capture_output=True, timeout=280)
    code = "import json, _core; print(json.dumps([_core.build_info(), hasattr(_core, 'patchify_cuda')]))"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=280, check=True
    )
    info, has_cuda = json.loads(done.stdout)
    assert info["cuda_version"] is None
    assert info["cuda_architectures"] == []
    assert info["optimized"] is True
    assert has_cuda is False
