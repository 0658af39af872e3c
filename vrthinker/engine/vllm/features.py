"""Pictures and weights in vLLM's own forms: what its processors make of frames, and a file of tensors."""

from __future__ import annotations

import contextlib
import shutil
import tempfile
from collections.abc import Collection, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from vrthinker.engine.vllm.generation import Picture


def image_items(pictures: Sequence[Picture]) -> list[Any]:
    """The `MultiModalKwargsItem` of each picture."""
    from vllm.multimodal.inputs import MultiModalFieldConfig, MultiModalKwargsItems

    items = []
    for picture in pictures:
        sizes = torch.tensor([picture.patches.shape[0]])
        inputs: Any = {"pixel_values": picture.patches, "image_grid_thw": torch.tensor([picture.grid])}
        fields = {
            "pixel_values": MultiModalFieldConfig.flat_from_sizes("image", sizes),
            "image_grid_thw": MultiModalFieldConfig.batched("image", keep_on_cpu=True),
        }
        items.append(MultiModalKwargsItems.from_hf_inputs(inputs, fields)["image"][0])
    return items


def placeholders(pictures: Sequence[Picture]) -> list[Any]:
    """The `PlaceholderRange` of each picture."""
    from vllm.multimodal.inputs import PlaceholderRange

    return [PlaceholderRange(offset=picture.offset, length=picture.length) for picture in pictures]


def encoded_items(pictures: Sequence[Picture], known: Collection[str]) -> list[str | None]:
    """The pictures as a server takes them; None for those that it knows by their names."""
    from vllm.entrypoints.scale_out.token_in_token_out.mm_serde import encode_mm_kwargs_item

    return [
        None if picture.uuid in known else encode_mm_kwargs_item(image_items([picture])[0])
        for picture in pictures
    ]


@contextlib.contextmanager
def as_checkpoint(named_tensors: Iterable[tuple[str, Any]]) -> Iterator[Path]:
    """A folder with the weights as safetensors, which is removed again."""
    from safetensors.torch import save_file

    folder = Path(tempfile.mkdtemp(prefix="vrthinker-weights-"))
    try:
        weights = {name: tensor.detach().cpu().contiguous() for name, tensor in named_tensors}
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
