"""The op `decode_attention`. It checks its arguments, picks a version, and registers it with `torch.library`.

It is what an engine on a CPU spends most of its time on: one query per sequence, and a long cache. There is
no CUDA version: on a GPU, an engine of its own (vLLM) decodes faster than any op inside a Python loop. The op
has no gradient.
"""

from __future__ import annotations

import torch

from vrthinker.errors import InputError
from vrthinker.kernels import choose_version, native_obstacles
from vrthinker.kernels.arguments import require_number, require_tensors, require_whole
from vrthinker.kernels.decode_attention.reference import decode_attention_reference

FAST_HEAD_SIZES = (32, 64, 128)
"""The head sizes that the C++ version is compiled for. Others work, but PyTorch's attention may be faster."""
_LARGEST = torch.finfo(torch.float32).max


def decode_attention(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    lengths: torch.Tensor,
    *,
    scale: float | None = None,
    num_threads: int | None = None,
) -> torch.Tensor:
    """Attention of one query per row over the first keys and values of that row of a cache.

    What stands in the cache behind a row's length is never read, so it may be NaN.

    Args:
        query: The queries, float32 `[rows, heads, head_dim]`.
        keys: The cache's keys, float32 `[rows, kv_heads, capacity, head_dim]`. `kv_heads` divides `heads`,
            and query heads share key heads in order. Views of a larger cache are read in place, if the
            elements of a head are next to each other.
        values: The cache's values, in the form of `keys`.
        lengths: How many keys each row's query sees, int64 `[rows]`, 0 to `capacity`. A row of length 0 gets
            zeros.
        scale: The factor of the scores; 1 / sqrt(head_dim) by default.
        num_threads: The number of threads of the C++ version; `torch.get_num_threads()` if None. It does not
            change any bit of the result.

    Returns:
        The attended values, float32 `[rows, heads, head_dim]`, contiguous.

    Raises:
        InputError: An argument is not as described, or `VRTHINKER_KERNELS` names a version that cannot run.
    """
    _check(query, keys, values, lengths, scale, num_threads)
    factor = query.shape[-1] ** -0.5 if scale is None else float(scale)
    result: torch.Tensor = torch.ops.vrthinker.decode_attention(
        query, keys, values, lengths, factor, num_threads or 0
    )
    return result


def _check(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    lengths: torch.Tensor,
    scale: float | None,
    num_threads: int | None,
) -> None:
    op = "decode_attention"
    require_tensors(op, query=query, keys=keys, values=values, lengths=lengths)
    if scale is not None:
        require_number(op, "scale", scale, "a number that is finite in float32")
        if not abs(scale) <= _LARGEST:
            raise InputError(f"{op}: scale: got {scale}, wanted a number that is finite in float32")
    if num_threads is not None:
        require_whole(op, "num_threads", num_threads, "1 to 1024")
        if not 1 <= num_threads <= 1024:
            raise InputError(f"{op}: num_threads: got {num_threads}, wanted 1 to 1024")
    for name, value, dtype, ndim, dimensions in (
        ("query", query, torch.float32, 3, "[rows, heads, head_dim]"),
        ("keys", keys, torch.float32, 4, "[rows, kv_heads, capacity, head_dim]"),
        ("values", values, torch.float32, 4, "[rows, kv_heads, capacity, head_dim]"),
        ("lengths", lengths, torch.int64, 1, "[rows]"),
    ):
        if value.dtype != dtype:
            raise InputError(f"{op}: {name}: got dtype {value.dtype}, wanted {dtype}")
        if value.ndim != ndim:
            raise InputError(f"{op}: {name}: got shape {list(value.shape)}, wanted {dimensions}")
        if value.device != query.device:
            raise InputError(f"{op}: {name}: got a tensor on {value.device}, wanted one on {query.device}")
    rows, heads, size = query.shape
    kv_heads = keys.shape[1]
    if keys.shape[0] != rows or keys.shape[3] != size or size == 0:
        raise InputError(
            f"{op}: keys: got shape {list(keys.shape)}, wanted the query's rows ({rows}) and a head_dim of "
            f"at least 1, as the query's ({size})"
        )
    if kv_heads == 0 or heads % kv_heads:
        raise InputError(
            f"{op}: keys: got {kv_heads} heads, wanted a number that divides the query's {heads}"
        )
    if values.shape != keys.shape:
        raise InputError(f"{op}: values: got shape {list(values.shape)}, wanted {list(keys.shape)}, as keys")
    if lengths.shape[0] != rows:
        raise InputError(f"{op}: lengths: got shape {list(lengths.shape)}, wanted [{rows}]")


@torch.library.custom_op("vrthinker::decode_attention", mutates_args=())
def _decode_attention_op(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    lengths: torch.Tensor,
    scale: float,
    num_threads: int,
) -> torch.Tensor:
    if len(lengths) and query.device.type == "cpu":
        _check_lengths(lengths, keys.shape[2])
    obstacles = native_obstacles(query.device)
    del obstacles["cuda"]
    if choose_version("decode_attention", obstacles) == "reference":
        return decode_attention_reference(query, keys, values, lengths, scale)
    import vrthinker._core as _core

    # DLPack does not accept tensors that require a gradient.
    query, keys, values = query.detach().contiguous(), _rows(keys.detach()), _rows(values.detach())
    out = torch.empty_like(query)
    threads = num_threads or torch.get_num_threads()
    _core.decode_attention_cpu(query, keys, values, lengths.contiguous(), out, scale, threads)
    return out


def _check_lengths(lengths: torch.Tensor, capacity: int) -> None:
    """Checks lengths on a CPU only, because on a GPU it would wait for the device."""
    least, most = int(lengths.min()), int(lengths.max())
    if least < 0 or most > capacity:
        raise InputError(
            f"decode_attention: lengths: got {least} to {most}, wanted 0 to the capacity, {capacity}"
        )


def _rows(cache: torch.Tensor) -> torch.Tensor:
    """The cache, copied only if the elements of a head are not next to each other."""
    return cache if cache.stride(-1) == 1 else cache.contiguous()


@_decode_attention_op.register_fake
def _decode_attention_fake(query: torch.Tensor, *_others: object) -> torch.Tensor:
    return query.new_empty(query.shape)
