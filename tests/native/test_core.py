"""`vrthinker._core`: what it tells of itself, how it refuses bad tensors, that it lets other threads run."""

from __future__ import annotations

import ctypes
import importlib.metadata
import json
import os
import re
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from vrthinker import _core

LAYOUT: dict[str, Any] = {
    "patch_size": 14,
    "merge_size": 2,
    "temporal_patch_size": 2,
    "mean": (0.5, 0.5, 0.5),
    "std": (0.5, 0.5, 0.5),
}
MARK = 7.0  # what `out` holds before a call; a refused call must leave it there


def run(frames: Any, out: Any, **changes: Any) -> None:
    _core.patchify_cpu(frames, out, **{"num_threads": 1, **LAYOUT, **changes})


def good_frames() -> torch.Tensor:
    return torch.zeros(1, 28, 28, 3, dtype=torch.uint8)


def good_out() -> torch.Tensor:
    return torch.full((4, 1176), MARK)


def python_says(code: str, **environment: str) -> Any:
    """Runs `code` in a fresh interpreter, with `environment` added, and reads the JSON that it prints."""
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_build_info_describes_an_optimised_build() -> None:
    info = _core.build_info()
    assert info["version"] == _core.__version__ == importlib.metadata.version("vrthinker")
    assert re.fullmatch(r"\w+ \d+\.\d+.*", info["compiler"])
    assert info["cxx_standard"] == "C++20"
    if not info["sanitizers"]:
        assert info["build_type"] == "Release"
        assert info["optimized"] is True


def test_build_info_names_cuda_and_its_architectures_together() -> None:
    info = _core.build_info()
    if info["cuda_version"] is None:
        assert info["cuda_architectures"] == []
        assert not hasattr(_core, "patchify_cuda")
    else:
        assert re.fullmatch(r"\d+\.\d+\.\d+", info["cuda_version"])
        assert {"80-real", "90-real", "120-virtual"} <= set(info["cuda_architectures"])
        assert hasattr(_core, "patchify_cuda")


def test_the_module_imports_alone_and_without_a_driver() -> None:
    code = """
import json, sys
import vrthinker._core
print(json.dumps(sorted({"torch", "numpy"} & set(sys.modules))))
"""
    assert python_says(code, CUDA_VISIBLE_DEVICES="") == []


def test_probe_says_why_there_is_no_device_or_lists_them() -> None:
    probe = _core.cuda_probe()
    assert probe["device_count"] == len(probe["devices"])
    assert (probe["reason"] is None) == (probe["device_count"] > 0)
    for device in probe["devices"]:
        assert device["memory_bytes"] > 2**30
        assert re.fullmatch(r"\d+\.\d+", device["compute_capability"])


DRIVER = """
int cuDriverGetVersion(int* version) { *version = 13010; return 0; }
int cuInit(unsigned flags) { return INIT_STATUS + (int)flags; }
int cuDeviceGetCount(int* count) { *count = 2; return 0; }
int cuDeviceGet(int* device, int index) { *device = 40 + index; return 0; }
int cuDeviceGetName(char* name, int size, int device) {
    const char* text = device == 40 ? "First GPU" : "Second GPU";
    int i = 0;
    for (; text[i] && i < size - 1; ++i) name[i] = text[i];
    name[i] = 0;
    return 0;
}
int cuDeviceTotalMem_v2(unsigned long* bytes, int device) { *bytes = (unsigned long)device << 30; return 0; }
int cuDeviceGetAttribute(int* value, int attribute, int device) {
    *value = attribute == 75 ? device - 31 : attribute == 76 ? 0 : -1;
    return 0;
}
int cuGetErrorString(int status, const char** text) {
    *text = "all devices are on strike";
    return status != 999;
}
"""


@pytest.mark.skipif(shutil.which("cc") is None, reason="needs a C compiler")
@pytest.mark.parametrize("init_status", [0, 999])
def test_probe_reads_what_a_driver_says(tmp_path: Path, init_status: int) -> None:
    source = tmp_path / "driver.c"
    source.write_text(DRIVER.replace("INIT_STATUS", str(init_status)))
    command = ["cc", "-shared", "-fPIC", "-o", str(tmp_path / "libcuda.so.1"), str(source)]
    subprocess.run(command, check=True, timeout=280)
    probe = python_says(
        "import json, vrthinker._core as core; print(json.dumps(core.cuda_probe()))",
        LD_LIBRARY_PATH=str(tmp_path),
    )
    assert probe["driver_version"] == "13.1"
    if init_status:
        assert probe["devices"] == []
        assert probe["reason"] == "cuInit: all devices are on strike (error 999)"
        return
    assert probe["reason"] is None
    assert probe["device_count"] == 2
    assert probe["devices"] == [
        {"index": 0, "name": "First GPU", "compute_capability": "9.0", "memory_bytes": 40 << 30},
        {"index": 1, "name": "Second GPU", "compute_capability": "10.0", "memory_bytes": 41 << 30},
    ]


@pytest.mark.skipif(shutil.which("nm") is None, reason="needs nm")
def test_only_the_module_entry_is_visible() -> None:
    if _core.build_info()["sanitizers"]:
        pytest.skip("sanitizers export symbols of their own")
    listing = subprocess.run(
        ["nm", "-D", "--defined-only", str(_core.__file__)],
        capture_output=True,
        text=True,
        check=True,
        timeout=280,
    ).stdout
    assert [line.split()[-1] for line in listing.splitlines()] == ["PyInit__core"]


@pytest.mark.parametrize(
    ("frames", "out", "changes", "message"),
    [
        (good_frames().float(), good_out(), {}, "patchify: frames: got dtype float32, wanted uint8"),
        (good_frames().to(torch.int8), good_out(), {}, "patchify: frames: got dtype int8, wanted uint8"),
        (good_frames().bool(), good_out(), {}, "patchify: frames: got dtype bool, wanted uint8"),
        (
            good_frames()[0],
            good_out(),
            {},
            r"frames: got shape \[28, 28, 3\], wanted \[n, height, width, 3\]",
        ),
        (good_frames()[..., :2], good_out(), {}, r"frames: got shape \[1, 28, 28, 2\], wanted"),
        (
            good_frames()[:, :27],
            good_out(),
            {},
            "frames: got height 27 and width 28, wanted multiples of .* 28",
        ),
        (
            good_frames()[:, :0],
            good_out(),
            {},
            "frames: got height 0 and width 28, wanted multiples of .* 28",
        ),
        (good_frames(), good_out()[:3], {}, r"out: got shape \[3, 1176\], wanted \[4, 1176\]"),
        (good_frames(), good_out().double(), {}, "out: got dtype float64, wanted float32 or bfloat16"),
        (good_frames(), good_out().half(), {}, "out: got dtype float16, wanted float32 or bfloat16"),
        (
            good_frames(),
            torch.full((1176, 4), MARK).T,
            {},
            r"out: got strides \[1, 4\] for shape \[4, 1176\], wanted a contiguous tensor",
        ),
        (
            good_frames(),
            torch.full((4 * 1176 + 1,), MARK)[1:].view(4, 1176),
            {},
            "out: got memory that is not aligned to four values",
        ),
        (good_frames(), good_out(), {"num_threads": 0}, "num_threads: got 0, wanted 1 or more"),
        (good_frames(), good_out(), {"patch_size": 0}, "patch_size: got 0, wanted 1 to 1024"),
        (good_frames(), good_out(), {"merge_size": 1025}, "merge_size: got 1025, wanted 1 to 1024"),
        (good_frames(), good_out(), {"temporal_patch_size": -1}, "temporal_patch_size: got -1, wanted"),
        (
            good_frames(),
            good_out(),
            {"patch_size": 1024, "temporal_patch_size": 1024},
            "got patches of 1024 x 1024 x 1024, wanted",
        ),
        (good_frames(), good_out(), {"mean": (0.0, float("inf"), 0.0)}, "mean: got inf, wanted finite"),
        (
            good_frames(),
            good_out(),
            {"std": (1.0, 1.0, 0.0)},
            "std: got 0.0.*, wanted finite numbers above 0",
        ),
        (
            good_frames(),
            good_out(),
            {"std": (1.0, 1e-60, 1.0)},
            "std: got 0.0.*, wanted finite numbers above 0",
        ),
    ],
)
def test_bad_tensors_are_refused_before_anything_is_written(
    frames: torch.Tensor, out: torch.Tensor, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        run(frames, out, **changes)
    assert bool((out == MARK).all())


def test_read_only_output_is_refused() -> None:
    out = np.full((4, 1176), MARK, dtype=np.float32)
    out.flags.writeable = False
    with pytest.raises(ValueError, match="patchify: out: got read-only memory, wanted writable memory"):
        run(good_frames(), out)
    assert (out == MARK).all()


def test_something_that_is_no_tensor_is_a_type_error() -> None:
    with pytest.raises(TypeError, match="patchify: frames: got list, wanted a tensor that exports DLPack"):
        run([[1, 2, 3]], good_out())


class FakeProducer:
    """Says that it lies on `device` and hands out whatever it was given."""

    def __init__(self, capsule: object, device: tuple[int, int] = (1, 0)) -> None:
        self.capsule = capsule
        self.device = device

    def __dlpack_device__(self) -> tuple[int, int]:
        return self.device

    def __dlpack__(self, **_arguments: object) -> object:
        return self.capsule


class DLTensor(ctypes.Structure):
    _fields_ = [
        ("data", ctypes.c_void_p),
        ("device_type", ctypes.c_int32),
        ("device_id", ctypes.c_int32),
        ("rank", ctypes.c_int32),
        ("code", ctypes.c_uint8),
        ("bits", ctypes.c_uint8),
        ("lanes", ctypes.c_uint16),
        ("shape", ctypes.POINTER(ctypes.c_int64)),
        ("strides", ctypes.POINTER(ctypes.c_int64)),
        ("byte_offset", ctypes.c_uint64),
    ]


class DLManagedTensor(ctypes.Structure):
    _fields_ = [
        ("tensor", DLTensor),
        ("context", ctypes.c_void_p),
        ("deleter", ctypes.c_void_p),
    ]


class HandMade:
    """A DLPack capsule put together by hand, so that each of its fields can lie."""

    def __init__(self, **lies: Any) -> None:
        self.memory = np.arange(28 * 28 * 3 + 5).astype(np.uint8)
        shape = lies.pop("shape", (1, 28, 28, 3))
        self.shape = (ctypes.c_int64 * max(len(shape), 32))(*shape)
        fields: dict[str, Any] = {
            "data": self.memory.ctypes.data,
            "device_type": 1,
            "device_id": 0,
            "rank": len(shape),
            "code": 1,
            "bits": 8,
            "lanes": 1,
            "shape": ctypes.cast(self.shape, ctypes.POINTER(ctypes.c_int64)),
            "strides": None,
            "byte_offset": 0,
            **lies,
        }
        self.managed = DLManagedTensor(DLTensor(**fields), None, None)
        make = ctypes.pythonapi.PyCapsule_New
        make.restype = ctypes.py_object
        make.argtypes = [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p]
        self.name = b"dltensor"
        self.producer = FakeProducer(make(ctypes.addressof(self.managed), self.name, None))


def test_a_hand_made_capsule_without_strides_is_contiguous() -> None:
    made = HandMade()
    out, expected = good_out(), good_out()
    run(made.producer, out)
    run(made.memory[:-5].reshape(1, 28, 28, 3), expected)
    assert torch.equal(out, expected)
    assert not bool((out == MARK).all())


def test_the_byte_offset_counts() -> None:
    made = HandMade(byte_offset=5)
    out, expected = good_out(), good_out()
    run(made.producer, out)
    run(made.memory[5:].reshape(1, 28, 28, 3), expected)
    assert torch.equal(out, expected)


@pytest.mark.parametrize(
    ("lies", "message"),
    [
        ({"lanes": 2}, "frames: got 2 lanes, wanted one lane"),
        ({"rank": 99}, "frames: got 99 dimensions, wanted 0 to 16"),
        ({"rank": -1}, "frames: got -1 dimensions, wanted 0 to 16"),
        ({"shape": (1, -28, 28, 3)}, r"frames: got shape \[1, -28, 28, 3\], wanted sizes of 0 or more"),
        ({"data": None}, r"frames: got no memory for shape \[1, 28, 28, 3\], wanted memory"),
        ({"device_id": 3}, "frames: got a tensor on cpu, wanted the device it names, cpu"),
        ({"device_type": 2}, "frames: got a tensor on cuda:0, wanted the device it names, cpu"),
        ({"code": 5, "bits": 64}, "frames: got dtype DLPack type code 5 of 64 bits, wanted uint8"),
    ],
)
def test_lying_capsules_are_refused(lies: dict[str, Any], message: str) -> None:
    made, out = HandMade(**lies), good_out()
    with pytest.raises(ValueError, match=message):
        run(made.producer, out)
    assert bool((out == MARK).all())


def test_a_used_capsule_is_refused() -> None:
    capsule = good_frames().__dlpack__()
    torch.utils.dlpack.from_dlpack(capsule)
    with pytest.raises(
        ValueError, match="frames: got a capsule named 'used_dltensor', wanted an unused DLPack"
    ):
        run(FakeProducer(capsule), good_out())


def test_what_is_no_capsule_is_refused() -> None:
    with pytest.raises(
        ValueError, match=r"frames: got int from __dlpack__\(\), wanted an unused DLPack capsule"
    ):
        run(FakeProducer(5), good_out())


def test_devices_that_the_kernel_cannot_reach_are_refused() -> None:
    with pytest.raises(ValueError, match="frames: got device DLPack device type 8, wanted cpu or cuda"):
        run(FakeProducer(None, device=(8, 0)), good_out())


def test_an_error_of_the_producer_comes_through() -> None:
    class Broken(FakeProducer):
        def __dlpack__(self, **_arguments: object) -> object:
            raise BufferError("exported already")

    with pytest.raises(BufferError, match="exported already"):
        run(Broken(None), good_out())


def test_an_old_producer_without_max_version_is_read() -> None:
    class Old(FakeProducer):
        def __dlpack__(self) -> object:  # type: ignore[override]
            return good_frames().__dlpack__()

    out = good_out()
    run(Old(None), out)
    assert bool((out == -1.0).all())  # (0 - 0.5) / 0.5


def memory_bytes() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def test_views_are_given_back() -> None:
    def call() -> None:
        frames = torch.zeros(4, 280, 280, 3, dtype=torch.uint8)
        run(frames, torch.empty(1600, 1176))
        with pytest.raises(ValueError, match="got dtype"):
            run(frames.int(), torch.empty(1600, 1176))

    for _ in range(5):
        call()
    before = memory_bytes()
    for _ in range(40):
        call()  # about 12 MB a time
    assert memory_bytes() - before < 60e6


def lets_others_run(work: Callable[[], None], most_calls: int) -> bool:
    """Whether a Python thread counts on while `work` runs; the interpreter itself switches to no other.

    How soon the system gives the thread a core is the system's affair: hence more than one call.
    """
    count, stop, interval = 0, False, sys.getswitchinterval()

    def tick() -> None:
        nonlocal count
        while not stop:
            count += 1
            time.sleep(0)

    thread = threading.Thread(target=tick)
    sys.setswitchinterval(1000)
    thread.start()
    try:
        for _ in range(most_calls):
            before = count
            work()
            if count > before + 1:
                return True
        return False
    finally:
        stop = True
        sys.setswitchinterval(interval)
        thread.join()


def test_compute_lets_other_threads_run() -> None:
    frames = torch.zeros(24, 448, 784, 3, dtype=torch.uint8)
    out = torch.empty(24 * 32 * 56, 1176)
    assert lets_others_run(lambda: run(frames, out), 100)


def test_work_that_keeps_the_interpreter_is_told_apart() -> None:
    def work() -> None:
        sum(range(10_000))

    assert not lets_others_run(work, 100)


def test_many_threads_may_call_at_once() -> None:
    frames = torch.arange(8 * 448 * 392 * 3, dtype=torch.int64).to(torch.uint8).view(8, 448, 392, 3)
    expected = torch.empty(8 * 32 * 28, 1176)
    run(frames, expected)
    outs = [torch.empty_like(expected) for _ in range(6)]
    threads = [threading.Thread(target=run, args=(frames, out), kwargs={"num_threads": 2}) for out in outs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(out, expected) for out in outs)
