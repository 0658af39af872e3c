"""`patchify`: equal to the real Hugging Face processor, whichever version runs."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from vrthinker import _core
from vrthinker.errors import InputError
from vrthinker.kernels import choose_version, requested_version
from vrthinker.kernels.patchify import bench
from vrthinker.kernels.patchify.op import patchify
from vrthinker.kernels.patchify.reference import patchify_reference

QWEN25: dict[str, Any] = {
    "patch_size": 14,
    "merge_size": 2,
    "temporal_patch_size": 2,
    "mean": (0.48145466, 0.4578275, 0.40821073),
    "std": (0.26862954, 0.26130258, 0.27577711),
}
QWEN3: dict[str, Any] = {**QWEN25, "patch_size": 16, "mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5)}
FAMILIES = [pytest.param(QWEN25, id="qwen2.5-vl"), pytest.param(QWEN3, id="qwen3-vl")]


def random_frames(n: int, height: int, width: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (n, height, width, 3), dtype=torch.uint8, generator=generator)


def native(frames: Any, layout: dict[str, Any], **changes: Any) -> torch.Tensor:
    """The C++ version through the bare binding (numpy arrays too)."""
    arguments = {"num_threads": 1, **layout, **changes}
    n, height, width, _ = frames.shape
    patch, temporal = arguments["patch_size"], arguments["temporal_patch_size"]
    out = torch.full((n * (height // patch) * (width // patch), 3 * temporal * patch**2), torch.nan)
    _core.patchify_cpu(frames, out, **arguments)
    return out


@pytest.mark.versions
@pytest.mark.parametrize("version", ["reference", "cpu"])
@pytest.mark.parametrize("layout", FAMILIES)
@pytest.mark.parametrize(("blocks_y", "blocks_x"), [(1, 1), (3, 2), (16, 28)])
def test_equals_the_hugging_face_processor_bit_for_bit(
    monkeypatch: pytest.MonkeyPatch, layout: dict[str, Any], blocks_y: int, blocks_x: int, version: str
) -> None:
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    monkeypatch.setenv("VRTHINKER_KERNELS", version)
    factor = layout["patch_size"] * layout["merge_size"]
    frames = random_frames(3, blocks_y * factor, blocks_x * factor)
    processor = Qwen2VLImageProcessorPil(
        do_resize=False,
        patch_size=layout["patch_size"],
        merge_size=layout["merge_size"],
        temporal_patch_size=layout["temporal_patch_size"],
        image_mean=list(layout["mean"]),
        image_std=list(layout["std"]),
    )
    expected = processor(list(frames.numpy()), return_tensors="pt")
    result = patchify(frames, **layout)
    assert expected["image_grid_thw"].prod(dim=1).sum() == result.shape[0]
    assert torch.equal(result, expected["pixel_values"])
    assert torch.equal(patchify(frames, **layout, out_dtype=torch.bfloat16), result.to(torch.bfloat16))


@pytest.mark.versions
def test_every_byte_value_is_normalised_as_the_processor_does() -> None:
    from transformers.image_transforms import normalize, rescale

    values = np.arange(256, dtype=np.uint8)
    frames = torch.from_numpy(np.broadcast_to(values.reshape(16, 16, 1), (16, 16, 3)).copy())[None]
    layout = {**QWEN25, "patch_size": 16, "merge_size": 1, "temporal_patch_size": 1}
    result = patchify(frames, **layout).reshape(3, 256)
    rescaled = rescale(np.broadcast_to(values, (3, 16, 256)).copy(), 1 / 255)
    assert np.array_equal(result.numpy(), normalize(rescaled, layout["mean"], layout["std"])[:, 0])


@given(
    n=st.integers(0, 3),
    blocks=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    patch=st.integers(1, 17),
    merge=st.integers(1, 3),
    temporal=st.integers(1, 3),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    seed=st.integers(0, 2**16),
)
def test_native_versions_equal_the_reference_for_every_layout(
    n: int,
    blocks: tuple[int, int],
    patch: int,
    merge: int,
    temporal: int,
    dtype: torch.dtype,
    seed: int,
) -> None:
    layout: dict[str, Any] = {
        **QWEN25,
        "patch_size": patch,
        "merge_size": merge,
        "temporal_patch_size": temporal,
    }
    frames = random_frames(n, blocks[0] * patch * merge, blocks[1] * patch * merge, seed)
    expected = patchify_reference(frames, **layout, out_dtype=dtype)
    assert torch.equal(patchify(frames, **layout, out_dtype=dtype), expected)
    emulated = torch.full_like(expected, torch.nan)
    _core.patchify_cuda_emulated(frames, emulated, **layout)
    assert torch.equal(emulated, expected)


def test_bfloat16_rounds_ties_to_even() -> None:
    white = torch.full((1, 1, 1, 3), 255, dtype=torch.uint8)
    layout: dict[str, Any] = {
        "patch_size": 1,
        "merge_size": 1,
        "temporal_patch_size": 1,
        "mean": (-1 / 256, -3 / 256, -1 / 256 - 2**-20),  # 1 minus it: a tie, a tie, just above a tie
        "std": (1.0, 1.0, 1.0),
        "out_dtype": torch.bfloat16,
    }
    assert patchify(white, **layout).tolist() == [[1.0, 1.015625, 1.0078125]]
    assert torch.equal(patchify(white, **layout), patchify_reference(white, **layout))


@pytest.mark.parametrize("threads", [1, 2, 3, 64])
def test_threads_do_not_change_the_result(threads: int) -> None:
    frames = random_frames(8, 448, 392)  # 34 MB of output: above the size that is worth threads
    expected = patchify_reference(frames, **QWEN25)
    assert torch.equal(patchify(frames, **QWEN25, num_threads=threads), expected)


@pytest.mark.parametrize(
    ("view", "name"),
    [
        (lambda frames: frames[:, 28:, 28:], "cropped"),
        (lambda frames: frames[::2], "every second frame"),
        (lambda frames: frames.permute(0, 2, 1, 3), "height and width swapped"),
        (lambda frames: frames.permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1), "channels first"),
        (lambda frames: frames[:1].expand(4, -1, -1, -1), "one frame repeated by a zero stride"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_strided_views_are_read_in_place(view: Any, name: str) -> None:
    frames = view(random_frames(4, 84, 112))
    assert torch.equal(patchify(frames, **QWEN25), patchify_reference(frames.contiguous(), **QWEN25)), name


def test_the_binding_reads_flipped_and_read_only_numpy_arrays() -> None:
    frames = random_frames(2, 56, 84)
    flipped = frames.numpy()[:, ::-1, ::-1]
    flipped.flags.writeable = False
    expected = patchify_reference(torch.from_numpy(flipped.copy()), **QWEN25)
    assert torch.equal(native(flipped, QWEN25), expected)


def test_no_frames_give_no_rows() -> None:
    for version_dtype in (torch.float32, torch.bfloat16):
        result = patchify(random_frames(0, 56, 28), **QWEN25, out_dtype=version_dtype)
        assert result.shape == (0, 1176)
        assert result.dtype == version_dtype


@pytest.mark.parametrize(
    ("frames", "changes", "message"),
    [
        (torch.zeros(1, 56, 56, 3), {}, r"patchify: frames: got dtype torch\.float32, wanted torch\.uint8"),
        (torch.zeros(56, 56, 3, dtype=torch.uint8), {}, r"got shape \[56, 56, 3\], wanted \[n, height"),
        (torch.zeros(1, 56, 56, 4, dtype=torch.uint8), {}, r"got shape \[1, 56, 56, 4\], wanted \[n, height"),
        (random_frames(1, 56, 42), {}, "got height 56 and width 42, wanted multiples of .* = 28"),
        (random_frames(1, 0, 28), {}, "got height 0 and width 28, wanted multiples of .* = 28"),
        (torch.zeros(1, 28, 28, 3, dtype=torch.uint8, device="meta"), {}, "got a tensor on meta, wanted cpu"),
        (random_frames(1, 28, 28), {"out_dtype": torch.float16}, r"out_dtype: got torch\.float16, wanted"),
        (random_frames(1, 28, 28), {"patch_size": 0}, "patch_size: got 0, wanted 1 to 1024"),
        (random_frames(1, 28, 28), {"merge_size": -2}, "merge_size: got -2, wanted 1 to 1024"),
        (random_frames(1, 28, 28), {"temporal_patch_size": 0}, "temporal_patch_size: got 0, wanted"),
        (random_frames(1, 28, 28), {"num_threads": 0}, "num_threads: got 0, wanted 1"),
        (random_frames(1, 28, 28), {"std": (1.0, 0.0, 1.0)}, r"std: got .*, wanted 3 finite numbers above 0"),
        (random_frames(1, 28, 28), {"std": (1.0, 1.0)}, r"std: got .*, wanted 3 finite numbers above 0"),
        (random_frames(1, 28, 28), {"mean": (float("nan"), 0, 0)}, "mean: got .*, wanted 3 finite numbers"),
    ],
)
def test_bad_arguments_are_refused_with_what_was_got_and_wanted(
    frames: torch.Tensor, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        patchify(frames, **{**QWEN25, **changes})


def test_a_named_version_that_cannot_run_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    frames = random_frames(1, 28, 28)
    monkeypatch.setenv("VRTHINKER_KERNELS", "cuda")
    with pytest.raises(InputError, match="patchify: VRTHINKER_KERNELS=cuda, but it cannot run: "):
        patchify(frames, **QWEN25)
    monkeypatch.setenv("VRTHINKER_KERNELS", "triton")
    with pytest.raises(InputError, match="no such version; it has: reference, cpu, cuda"):
        patchify(frames, **QWEN25)
    monkeypatch.setenv("VRTHINKER_KERNELS", "fastest")
    with pytest.raises(InputError, match="VRTHINKER_KERNELS: got 'fastest', allowed: auto, reference, cpu"):
        patchify(frames, **QWEN25)


def test_auto_takes_the_fastest_version_that_can_run(monkeypatch: pytest.MonkeyPatch) -> None:
    for value in ("", "auto"):
        monkeypatch.setenv("VRTHINKER_KERNELS", value)
        assert requested_version() is None
    assert choose_version("op", {"reference": None, "cpu": None, "cuda": "no"}) == "cpu"
    assert choose_version("op", {"reference": None, "cpu": "no", "cuda": None}) == "cuda"
    assert choose_version("op", {"reference": None, "cpu": "no"}) == "reference"
    with pytest.raises(InputError, match="op: no version can run: cpu: broken"):
        choose_version("op", {"cpu": "broken"})


def test_reference_runs_when_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_arguments: object) -> None:
        raise AssertionError("the C++ version ran")

    monkeypatch.setattr(_core, "patchify_cpu", refuse)
    frames = random_frames(1, 28, 28)
    with pytest.raises(AssertionError, match="ran"):
        patchify(frames, **QWEN25)
    monkeypatch.setenv("VRTHINKER_KERNELS", "reference")
    assert torch.equal(patchify(frames, **QWEN25), patchify_reference(frames, **QWEN25))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_opcheck(dtype: torch.dtype) -> None:
    layout = QWEN25
    for frames in (random_frames(2, 56, 84), random_frames(2, 84, 56).permute(0, 2, 1, 3)):
        torch.library.opcheck(
            torch.ops.vrthinker.patchify.default,
            (frames, 14, 2, 2, list(layout["mean"]), list(layout["std"]), dtype, 1),
        )


@pytest.mark.parametrize("dynamic", [pytest.param(False, marks=pytest.mark.slow), True])
def test_compiles_into_one_graph(dynamic: bool) -> None:
    def mean_patch(frames: torch.Tensor) -> torch.Tensor:
        return patchify(frames, **QWEN25).mean(dim=1) * 2

    compiled = torch.compile(mean_patch, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for n, height in ((2, 56), (3, 84)):
        frames = random_frames(n, height, 56)
        assert torch.equal(compiled(frames), mean_patch(frames))


@pytest.mark.parametrize("case", bench.CASES, ids=lambda case: case.name)
def test_benchmark_cases_count_the_bytes_that_have_to_move(case: bench.Case) -> None:
    comparison = bench.compare(replace(case, frames=1), "cpu", seed=0)
    copies = case.temporal_patch_size
    assert comparison.bytes_moved == case.height * case.width * 3 * (1 + 4 * copies)
    assert list(comparison.competitors) == ["reference", "cpp", "transformers", bench.FRESH_COPY]
    comparison.check()
    copied = comparison.competitors[bench.FRESH_COPY]()
    assert isinstance(copied, torch.Tensor)
    assert abs(2 * copied.nbytes - comparison.bytes_moved) <= 1


def test_benchmark_data_come_from_the_seed() -> None:
    tiny = bench.Case("tiny", 1, 28, 28, 14, bench.CLIP_MEAN, bench.CLIP_STD)
    results = [bench.compare(tiny, "cpu", seed).competitors["cpp"]() for seed in (1, 1, 2)]
    assert torch.equal(results[0], results[1])
    assert not torch.equal(results[0], results[2])


@pytest.mark.parametrize("competitor", ["cpp", "transformers"])
def test_benchmark_stops_at_a_version_that_differs(monkeypatch: pytest.MonkeyPatch, competitor: str) -> None:
    def wrong(frames: torch.Tensor, **layout: Any) -> torch.Tensor:
        return patchify_reference(frames, **layout) + 1

    tiny = bench.Case("tiny", 1, 28, 28, 14, bench.CLIP_MEAN, bench.CLIP_STD)
    if competitor == "cpp":
        monkeypatch.setattr(bench, "patchify", wrong)
    else:
        monkeypatch.setattr(bench, "_hugging_face", lambda case, frames: lambda: wrong(frames, **case.layout))
    with pytest.raises(RuntimeError, match=f"^{competitor} differs from the reference$"):
        bench.compare(tiny, "cpu", seed=0).check()


@pytest.mark.gpu
@pytest.mark.parametrize("layout", FAMILIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_cuda_equals_the_cpu(monkeypatch: pytest.MonkeyPatch, layout: dict[str, Any], dtype: Any) -> None:
    monkeypatch.setenv("VRTHINKER_KERNELS", "cuda")
    factor = layout["patch_size"] * layout["merge_size"]
    frames = random_frames(5, 16 * factor, 28 * factor)
    expected = patchify_reference(frames, **layout, out_dtype=dtype)
    assert torch.equal(patchify(frames.cuda(), **layout, out_dtype=dtype).cpu(), expected)
    flipped = frames.cuda().permute(0, 2, 1, 3)
    turned = patchify_reference(frames.permute(0, 2, 1, 3), **layout, out_dtype=dtype)
    assert torch.equal(patchify(flipped, **layout, out_dtype=dtype).cpu(), turned)


@pytest.mark.gpu
def test_cuda_runs_on_the_current_stream_and_takes_odd_layouts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VRTHINKER_KERNELS", "cuda")
    layout = {**QWEN25, "patch_size": 7, "merge_size": 3, "temporal_patch_size": 1}
    frames = random_frames(2, 42, 63)
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        result = patchify(frames.cuda(), **layout)
        empty = patchify(frames[:0].cuda(), **layout)
    stream.synchronize()
    assert torch.equal(result.cpu(), patchify_reference(frames, **layout))
    assert empty.shape == (0, 3 * 49)


@pytest.mark.gpu
def test_cuda_refuses_frames_on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VRTHINKER_KERNELS", "cuda")
    with pytest.raises(InputError, match="the tensors are on cpu, it takes tensors on cuda"):
        patchify(random_frames(1, 28, 28), **QWEN25)
