"""The native module (csrc/). See `build_info` and `cuda_probe` for what it tells of itself."""

from typing import Any, TypedDict

__version__: str

class BuildInfo(TypedDict):
    version: str
    compiler: str
    cxx_standard: str
    build_type: str
    optimized: bool
    cuda_version: str | None
    cuda_architectures: list[str]
    sanitizers: list[str]

class CudaDevice(TypedDict):
    index: int
    name: str
    compute_capability: str
    memory_bytes: int

class CudaProbe(TypedDict):
    driver_version: str | None
    device_count: int
    devices: list[CudaDevice]
    reason: str | None

def build_info() -> BuildInfo: ...
def cuda_probe() -> CudaProbe: ...

# Tensors are anything that exports DLPack.
def group_advantage_cpu(
    rewards: Any,
    group_offsets: Any,
    valid: Any,
    token_offsets: Any,
    advantages: Any,
    zero_variance: Any,
    method: str,
    ddof: int,
    eps: float,
    num_threads: int,
) -> None: ...
def decode_attention_cpu(
    query: Any,
    keys: Any,
    values: Any,
    lengths: Any,
    out: Any,
    scale: float,
    num_threads: int,
) -> None: ...
def patchify_cpu(
    frames: Any,
    out: Any,
    patch_size: int,
    merge_size: int,
    temporal_patch_size: int,
    mean: tuple[float, ...],
    std: tuple[float, ...],
    num_threads: int,
) -> None: ...
def patchify_cuda_emulated(
    frames: Any,
    out: Any,
    patch_size: int,
    merge_size: int,
    temporal_patch_size: int,
    mean: tuple[float, ...],
    std: tuple[float, ...],
) -> None: ...

# Tensors are anything that exports DLPack. `fixed_length` and `normalizer` are 0 for none.
def grpo_loss_cpu(
    policy_logprobs: Any,
    old_logprobs: Any,
    ref_logprobs: Any | None,
    advantages: Any,
    loss_mask: Any,
    episode_offsets: Any,
    loss: Any,
    token_loss: Any,
    gradient: Any,
    scale: Any,
    metrics: Any,
    lowest_ratio: float,
    highest_ratio: float,
    kl_weight: float,
    aggregation: str,
    fixed_length: int,
    normalizer: float,
    num_threads: int,
) -> None: ...
def grpo_loss_workspace_bytes(tokens: int, episodes: int) -> int: ...

# Only in builds with CUDA (`build_info()["cuda_version"]`).
def group_advantage_cuda(
    rewards: Any,
    group_offsets: Any,
    valid: Any,
    token_offsets: Any,
    advantages: Any,
    zero_variance: Any,
    status: Any,
    method: str,
    ddof: int,
    eps: float,
    stream: int,
) -> None: ...
def patchify_cuda(
    frames: Any,
    out: Any,
    patch_size: int,
    merge_size: int,
    temporal_patch_size: int,
    mean: tuple[float, ...],
    std: tuple[float, ...],
    stream: int,
) -> None: ...

# Tensors are anything that exports DLPack. `targets` is empty in place.
def evict_cpu(
    sources: list[Any],
    targets: list[Any],
    batch_dims: list[int],
    token_dims: list[int],
    runs: Any,
    rotations: Any | None,
    n_rotated: int,
    block_tables: Any | None,
    block_size: int,
    out_tokens: int,
    num_threads: int,
) -> None: ...

# Only in builds with CUDA.
def evict_pack(
    sources: list[Any],
    targets: list[Any],
    batch_dims: list[int],
    token_dims: list[int],
    runs: Any,
    rotations: Any | None,
    n_rotated: int,
    block_tables: Any | None,
    block_size: int,
    out_tokens: int,
    processors: int,
) -> bytearray: ...
def yuv_to_rgb_cpu(
    y: Any, u: Any, v: Any, out: Any, black: int, factors: list[int], right: int, down: int
) -> None: ...
def evict_cuda(packed: bytearray, on_device: Any, stream: int) -> None: ...
def grpo_loss_cuda(
    policy_logprobs: Any,
    old_logprobs: Any,
    ref_logprobs: Any | None,
    advantages: Any,
    loss_mask: Any,
    episode_offsets: Any,
    loss: Any,
    token_loss: Any,
    gradient: Any,
    scale: Any,
    metrics: Any,
    lowest_ratio: float,
    highest_ratio: float,
    kl_weight: float,
    aggregation: str,
    fixed_length: int,
    normalizer: float,
    workspace: Any,
    stream: int,
) -> None: ...
