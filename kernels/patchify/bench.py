"""The comparisons of `vrthinker bench patchify`, on fresh random frames.

Every result is bit-equal to the reference's, also the Hugging Face processor's. Each call allocates its
output, as the engine's calls do. For this reason, besides the usual copy into memory that was touched before,
a copy into fresh memory is timed, which page faults slow down in the same way.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from vrthinker.kernels.measure import Comparison
from vrthinker.kernels.patchify.op import patchify
from vrthinker.kernels.patchify.reference import patchify_reference

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
FRESH_COPY = "copy_ into fresh memory"


@dataclass(frozen=True)
class Case:
    """One case to measure: a model's patch layout, and the number and size of the frames."""

    name: str
    frames: int
    height: int
    width: int
    patch_size: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    merge_size: int = 2
    temporal_patch_size: int = 2

    @property
    def layout(self) -> dict[str, Any]:
        """The op's keyword arguments."""
        return {
            "patch_size": self.patch_size,
            "merge_size": self.merge_size,
            "temporal_patch_size": self.temporal_patch_size,
            "mean": self.mean,
            "std": self.std,
        }


CASES = (
    Case("qwen2.5-vl, 8 frames of 448x784", 8, 448, 784, 14, CLIP_MEAN, CLIP_STD),
    Case("qwen3-vl, 8 frames of 448x768", 8, 448, 768, 16, (0.5,) * 3, (0.5,) * 3),
    Case("qwen2.5-vl, 8 frames of 112x112", 8, 112, 112, 14, CLIP_MEAN, CLIP_STD),
)


def comparisons(device: str, seed: int) -> Iterator[Callable[[], Comparison]]:
    """Yields a function per case, which makes the case's frames from `seed` on `device` when it is called."""
    for case in CASES:
        yield partial(compare, case, device, seed)


def compare(case: Case, device: str, seed: int) -> Comparison:
    """A case with its competitors: the reference, the op, and on a CPU the Hugging Face processor's code."""
    generator = torch.Generator().manual_seed(seed)
    shape = (case.frames, case.height, case.width, 3)
    frames = torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator).to(device)
    versions: dict[str, Callable[[], torch.Tensor]] = {
        "reference": lambda: patchify_reference(frames, **case.layout),
        "cpp" if device == "cpu" else "cuda": lambda: patchify(frames, **case.layout),
    }
    if device == "cpu":
        versions["transformers"] = _hugging_face(case, frames)

    def check() -> None:
        expected = patchify_reference(frames, **case.layout)
        for name, run in versions.items():
            if not torch.equal(run(), expected):
                raise RuntimeError(f"{name} differs from the reference")

    out_bytes = patchify_reference(frames[:1], **case.layout).nbytes * case.frames
    source = torch.empty((frames.nbytes + out_bytes) // 2, dtype=torch.uint8, device=device).fill_(1)
    return Comparison(
        op="patchify",
        case=case.name,
        bytes_moved=frames.nbytes + out_bytes,
        competitors={**versions, FRESH_COPY: lambda: torch.empty_like(source).copy_(source)},
        check=check,
        facts={"frames": list(shape), "out_dtype": "float32"},
    )


def _hugging_face(case: Case, frames: torch.Tensor) -> Callable[[], torch.Tensor]:
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    processor = Qwen2VLImageProcessorPil(
        do_resize=False,
        patch_size=case.patch_size,
        merge_size=case.merge_size,
        temporal_patch_size=case.temporal_patch_size,
        image_mean=list(case.mean),
        image_std=list(case.std),
    )
    images = list(frames.numpy())

    def run() -> torch.Tensor:
        result: torch.Tensor = processor(images, return_tensors="pt")["pixel_values"]
        return result

    return run
