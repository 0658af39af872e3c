"""The op `patchify`. It checks its arguments, picks a version, and is registered with `torch.library`.

The op is registered as `vrthinker::patchify` with a fake implementation, so that
`torch.compile(fullgraph=True)` and `opcheck` work. It has no gradient, because its input is bytes. Every
argument is checked before anything is allocated or written. A message names the op, what was got and what is
wanted.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from vrthinker.errors import InputError
from vrthinker.kernels import choose_version, native_obstacles
from vrthinker.kernels.arguments import items_of, require_number, require_tensors, require_whole
from vrthinker.kernels.patchify.reference import patchify_reference

OUT_DTYPES = (torch.float32, torch.bfloat16)


def patchify(
    frames: torch.Tensor,
    *,
    patch_size: int,
    merge_size: int,
    temporal_patch_size: int,
    mean: Sequence[float],
    std: Sequence[float],
    out_dtype: torch.dtype = torch.float32,
    num_threads: int | None = None,
) -> torch.Tensor:
    """Normalises resized frames and lays them out as the rows that a Qwen vision tower takes.

    In float32 the result is bit-equal to `pixel_values` of the Hugging Face Qwen2-VL image processor (PIL
    backend, `do_resize=False`). `reference.py` is the specification.

    Args:
        frames: The frames, uint8 `[n, height, width, 3]`, RGB, any strides, on a CPU or a CUDA device. Height
            and width are multiples of `patch_size * merge_size`. n may be 0.
        patch_size: The side of a patch in pixels (Qwen2.5-VL 14, Qwen3-VL 16).
        merge_size: The side, in patches, of the block that becomes one token (2).
        temporal_patch_size: The number of copies of the frame in a patch (2).
        mean: The mean of each channel, for values scaled to 0..1.
        std: The standard deviation of each channel, for values scaled to 0..1; above 0.
        out_dtype: The dtype of the result, float32 or bfloat16.
        num_threads: The number of threads of the C++ version; `torch.get_num_threads()` if None.

    Returns:
        The patches, `[n * (height / patch_size) * (width / patch_size), 3 * temporal_patch_size *
        patch_size**2]`, contiguous, on the frames' device.

    Raises:
        InputError: An argument is not as described, or `VRTHINKER_KERNELS` names a version that
            cannot run.
    """
    _check(frames, patch_size, merge_size, temporal_patch_size, mean, std, out_dtype, num_threads)
    result: torch.Tensor = torch.ops.vrthinker.patchify(
        frames,
        patch_size,
        merge_size,
        temporal_patch_size,
        list(mean),
        list(std),
        out_dtype,
        0 if num_threads is None else num_threads,
    )
    return result


def _check(
    frames: torch.Tensor,
    patch_size: int,
    merge_size: int,
    temporal_patch_size: int,
    mean: Sequence[float],
    std: Sequence[float],
    out_dtype: torch.dtype,
    num_threads: int | None,
) -> None:
    sizes = {
        "patch_size": patch_size,
        "merge_size": merge_size,
        "temporal_patch_size": temporal_patch_size,
        "num_threads": 1 if num_threads is None else num_threads,
    }
    require_tensors("patchify", frames=frames)
    for name, value in sizes.items():
        require_whole("patchify", name, value, "1 to 1024")
        if not 1 <= value <= 1024:
            raise InputError(f"patchify: {name}: got {value}, wanted 1 to 1024")
    for name, values in (("mean", mean), ("std", std)):
        for value in items_of("patchify", name, values, "3 finite numbers"):
            require_number("patchify", name, value, "3 finite numbers")
    if len(mean) != 3 or not all(abs(value) < float("inf") for value in mean):
        raise InputError(f"patchify: mean: got {mean}, wanted 3 finite numbers")
    if len(std) != 3 or not all(0 < value < float("inf") for value in std):
        raise InputError(f"patchify: std: got {std}, wanted 3 finite numbers above 0")
    if out_dtype not in OUT_DTYPES:
        raise InputError(f"patchify: out_dtype: got {out_dtype}, wanted torch.float32 or torch.bfloat16")
    if frames.dtype != torch.uint8:
        raise InputError(f"patchify: frames: got dtype {frames.dtype}, wanted torch.uint8")
    if frames.device.type not in ("cpu", "cuda"):
        raise InputError(f"patchify: frames: got a tensor on {frames.device}, wanted cpu or cuda")
    if frames.ndim != 4 or frames.shape[3] != 3:
        raise InputError(f"patchify: frames: got shape {list(frames.shape)}, wanted [n, height, width, 3]")
    factor = patch_size * merge_size
    height, width = frames.shape[1], frames.shape[2]
    if height % factor != 0 or width % factor != 0 or height == 0 or width == 0:
        raise InputError(
            f"patchify: frames: got height {height} and width {width}, wanted multiples of "
            f"patch_size * merge_size = {factor}"
        )


def _out_shape(frames: torch.Tensor, patch_size: int, temporal_patch_size: int) -> tuple[int, int]:
    n, height, width = frames.shape[0], frames.shape[1], frames.shape[2]
    rows = n * (height // patch_size) * (width // patch_size)
    return rows, 3 * temporal_patch_size * patch_size * patch_size


@torch.library.custom_op("vrthinker::patchify", mutates_args=())
def _patchify_op(
    frames: torch.Tensor,
    patch_size: int,
    merge_size: int,
    temporal_patch_size: int,
    mean: Sequence[float],
    std: Sequence[float],
    out_dtype: torch.dtype,
    num_threads: int,
) -> torch.Tensor:
    version = choose_version("patchify", native_obstacles(frames.device))
    if version == "reference":
        return patchify_reference(
            frames,
            patch_size=patch_size,
            merge_size=merge_size,
            temporal_patch_size=temporal_patch_size,
            mean=mean,
            std=std,
            out_dtype=out_dtype,
        )
    import vrthinker._core as _core

    out = frames.new_empty(_out_shape(frames, patch_size, temporal_patch_size), dtype=out_dtype)
    arguments = (frames, out, patch_size, merge_size, temporal_patch_size, tuple(mean), tuple(std))
    if version == "cuda":
        _core.patchify_cuda(*arguments, torch.cuda.current_stream(frames.device).cuda_stream)
    else:
        _core.patchify_cpu(*arguments, num_threads or torch.get_num_threads())
    return out


@_patchify_op.register_fake
def _patchify_fake(
    frames: torch.Tensor,
    patch_size: int,
    merge_size: int,
    temporal_patch_size: int,
    mean: Sequence[float],
    std: Sequence[float],
    out_dtype: torch.dtype,
    num_threads: int,
) -> torch.Tensor:
    return frames.new_empty(_out_shape(frames, patch_size, temporal_patch_size), dtype=out_dtype)
