"""The bytes that a training step needs on one GPU, and its FLOPs. docs/plan.md has the formulas in words.

Weights, gradients and optimizer state are counted exactly. Activations are what autograd keeps for the
backward pass: per layer a sum over the tensors that the operations of Qwen2.5-VL's layers keep
(`text_layer_bytes`, `vision_layer_bytes`), which the tests compare with what autograd really keeps. What is
neither is estimated, and named so: chunks of logits, gathered layers, the reserve.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from vrthinker.train.plan.sizes import ModelSizes, Tower

Arithmetic = Literal["float32", "autocast", "bfloat16"]
"""How a layer computes: in float32; in bfloat16 by autocast over float32 weights (one process); or in
bfloat16 with weights and residual stream in bfloat16 (FSDP over several processes)."""

LOGIT_ROWS = 1024
"""The number of rows whose logits exist at a time (`policy.losses.DEFAULT_CHUNK`)."""
RESERVE_BYTES = 2 << 30
"""CUDA's context, libraries and NCCL buffers. An estimate."""
FRAGMENTATION = 0.05
"""The share of everything else that the allocator loses to fragmentation. An estimate."""


@dataclass(frozen=True)
class Load:
    """What one process computes in one step.

    Attributes:
        sequences: The number of sequences of one forward.
        tokens: The number of tokens of a sequence, those of frames included.
        frames: The number of distinct frames of a sequence, which the vision tower encodes.
        frame_patches: The number of patches of a frame.
        learned: The number of tokens of a sequence that are learned.
        forwards: The number of forwards of a step on this process.
        learns: Which of the towers that are trained learn in this step.
    """

    sequences: int
    tokens: int
    frames: int
    frame_patches: int
    learned: int
    forwards: int
    learns: Literal["both", "text", "vision"] = "both"


@dataclass(frozen=True)
class Training:
    """How a model is trained.

    Attributes:
        gpus: The number of processes, each with a GPU, over which everything is sharded.
        bfloat16: Whether the computation is in bfloat16; float32 otherwise.
        checkpointing: Whether only the inputs of layers are kept, and the rest computed again.
        train_vision: Whether the vision tower is trained.
        adapters: The number of parameters of LoRA adapters; None if the weights themselves are trained.
        orthogonal: Whether the optimizer is Muon, which keeps one mean instead of two for the weights of
            linear layers.
    """

    gpus: int = 1
    bfloat16: bool = False
    checkpointing: bool = False
    train_vision: bool = True
    adapters: int | None = None
    orthogonal: bool = False

    @property
    def arithmetic(self) -> Arithmetic:
        """How a layer computes."""
        if not self.bfloat16:
            return "float32"
        return "autocast" if self.gpus == 1 else "bfloat16"

    def optimizer_values(self, sizes: ModelSizes) -> int:
        """The number of float32 values that the optimizer keeps."""
        trained = self.trained_parameters(sizes)
        if not self.orthogonal:
            return 2 * trained
        if self.adapters is not None:
            return trained
        vision = sizes.vision.linear + sizes.merger if self.train_vision else 0
        return 2 * trained - sizes.text.linear - vision

    def trained_parameters(self, sizes: ModelSizes) -> int:
        """The number of parameters that learn."""
        if self.adapters is not None:
            return self.adapters
        return sizes.parameters - (0 if self.train_vision else sizes.vision_parameters)


# Memory


def memory_bytes(sizes: ModelSizes, training: Training, load: Load) -> dict[str, int]:
    """What is in a GPU's memory when a step needs the most, part by part."""
    gpus = training.gpus
    held = sizes.parameters + (training.adapters or 0)
    parts = {
        "weights, float32": _share(4 * held, gpus),
        "gradients, float32": _share(4 * _learning_parameters(sizes, training, load), gpus),
        "optimizer state, float32": _share(4 * training.optimizer_values(sizes), gpus),
        "working copies of weights": _working_bytes(sizes, training),
        "activations of the text layers": _text_bytes(sizes, training, load),
        "activations of the vision tower": _vision_bytes(sizes, training, load),
        "one chunk of logits": _logit_bytes(sizes, training, load),
    }
    lost = round(FRAGMENTATION * sum(parts.values()))
    return {**parts, "reserve (CUDA, fragmentation)": RESERVE_BYTES + lost}


def _learning_parameters(sizes: ModelSizes, training: Training, load: Load) -> int:
    """The number of parameters that get a gradient."""
    trained = training.trained_parameters(sizes)
    if load.learns == "both" or training.adapters is not None or not training.train_vision:
        return trained
    return sizes.vision_parameters if load.learns == "vision" else trained - sizes.vision_parameters


def _tower_learns(training: Training, load: Load) -> bool:
    return training.train_vision and load.learns != "text"


def text_layer_bytes(tower: Tower, arithmetic: Arithmetic) -> int:
    """What autograd keeps per token of one text layer.

    Two RMSNorms keep their input, the normed value and a scale. The linear layers keep their inputs: under
    autocast, q, k, v, gate and up each keep a copy in bfloat16. Attention keeps q, k, v, its output and a
    log-sum-exp per head. The gated MLP keeps four tensors of its inner size.
    """
    hidden, heads = tower.hidden, tower.heads
    attended, inner = 2 * (tower.query + tower.key), 4 * tower.intermediate
    scales = 2 * 4 + 4 * heads
    if arithmetic == "float32":
        return 4 * (6 * hidden + attended + inner) + scales
    normed = 2 * (4 + 4) * hidden + 5 * 2 * hidden if arithmetic == "autocast" else 2 * (4 + 2 + 2) * hidden
    return normed + 2 * (attended + inner) + scales


def vision_layer_bytes(tower: Tower, arithmetic: Arithmetic) -> int:
    """What autograd keeps per patch of one layer of the vision tower.

    As in a text layer; q, k and v come from one linear layer and are kept once, stacked, and the attention's
    output twice (as it was computed, and in the order of the patches).
    """
    hidden, inner = tower.hidden, 4 * tower.intermediate
    attended, scales = 5 * hidden, 2 * 4 + 4 * tower.heads
    if arithmetic == "float32":
        return 4 * (6 * hidden + attended + inner) + scales
    copies = 3 if arithmetic == "autocast" else 2
    return 2 * (4 + 2) * hidden + copies * 2 * hidden + 2 * (attended + inner) + scales


def _text_bytes(sizes: ModelSizes, training: Training, load: Load) -> int:
    tower, tokens = sizes.text, load.sequences * load.tokens
    layer = text_layer_bytes(tower, training.arithmetic)
    residual = 2 if training.arithmetic == "bfloat16" else 4
    # The embedded sequence, the last norm, and the cosines and sines that all layers share.
    rest = (residual + 4) * tower.hidden + 2 * 4 * sizes.head_dim
    if training.checkpointing:
        # In the backward pass, one layer at a time is whole again.
        return tokens * (tower.layers * residual * tower.hidden + layer + rest)
    return tokens * (tower.layers * layer + rest)


def _vision_bytes(sizes: ModelSizes, training: Training, load: Load) -> int:
    patches = load.sequences * load.frames * load.frame_patches
    tower, wide = sizes.vision, 2 if training.bfloat16 else 4
    layer = vision_layer_bytes(tower, training.arithmetic)
    rest = wide * sizes.patch_values + 2 * 4 * (tower.hidden // tower.heads) + (4 + 4 * wide) * tower.hidden
    if not _tower_learns(training, load):
        # Without a gradient nothing is kept but a layer at work, of which the inner MLP is the largest part.
        return patches * (2 * wide * tower.intermediate + wide * sizes.patch_values)
    if training.checkpointing:
        return patches * (tower.layers * wide * tower.hidden + layer + rest)
    return patches * (tower.layers * layer + rest)


def _working_bytes(sizes: ModelSizes, training: Training) -> int:
    """Weights in the dtype of the computation beside the sharded float32 ones."""
    text, vision = sizes.text, sizes.vision
    largest = max(text.parameters // text.layers, vision.parameters // vision.layers)
    if training.gpus == 1:
        if not training.bfloat16:
            return 0
        # Autograd keeps the bfloat16 copy that each linear layer was computed with.
        linear = text.linear + (vision.linear + sizes.merger if training.train_vision else 0)
        return 2 * (largest if training.checkpointing else linear)
    wide = 2 if training.bfloat16 else 4
    # The group of embeddings and head stays gathered, with its gradient until that is summed over the
    # processes; of the layers, the one at work with its gradient, and the next one.
    gradient = 4 if training.adapters is None else 0
    return (2 * wide + gradient) * sizes.rest + (3 * wide + gradient) * largest


def _logit_bytes(sizes: ModelSizes, training: Training, load: Load) -> int:
    """Logits in the dtype of the head, in float32, their softmax, and the gradients of the two."""
    rows = min(LOGIT_ROWS, load.sequences * load.learned)
    wide = 2 if training.bfloat16 else 4
    return rows * sizes.vocabulary * (2 * wide + 3 * 4)


def _share(total: int, gpus: int) -> int:
    return -(-total // gpus)


# FLOPs


def step_flops(sizes: ModelSizes, training: Training, load: Load) -> int:
    """The FLOPs of a step on one process. A multiplication and an addition are two.

    A forward costs two per weight and token. The backward pass costs two more for the gradient of the
    activations and two for that of the weights, where they are trained. Gradient checkpointing computes the
    layers' forward once more.
    """
    full = training.adapters is None
    passes = 2 if full else 1  # of the backward pass, in units of a forward
    again = 1 if training.checkpointing else 0
    text = (1 + passes + again) * text_forward_flops(sizes, load.tokens)
    # Frames come first in the graph: a frozen tower needs no backward pass, and no gradient reaches it.
    vision_passes = 1 + passes + again if _tower_learns(training, load) else 1
    vision = vision_passes * vision_forward_flops(sizes, load.frames, load.frame_patches)
    head = (2 + passes) * 2 * load.learned * sizes.text.hidden * sizes.vocabulary
    adapters = 6 * (training.adapters or 0) * load.tokens
    return load.forwards * load.sequences * (text + vision + head + adapters)


def text_forward_flops(sizes: ModelSizes, tokens: int) -> int:
    """The forward of the text layers over one sequence: linear layers, and causal attention."""
    tower = sizes.text
    attention = 2 * tower.layers * tower.query * tokens * (tokens + 1)
    return 2 * tower.linear * tokens + attention


def vision_forward_flops(sizes: ModelSizes, frames: int, frame_patches: int) -> int:
    """The forward of the vision tower over frames, each of which attends to itself, mostly in windows."""
    tower = sizes.vision
    window = min(frame_patches, (sizes.window_side // sizes.patch_side) ** 2)
    windowed = (tower.layers - sizes.full_layers) * window + sizes.full_layers * frame_patches
    per_patch = 2 * (tower.linear + sizes.patch_embedding) + 4 * tower.hidden * windowed
    merged = 2 * sizes.merger * frame_patches // sizes.merge_side**2
    return frames * (per_patch * frame_patches + merged)
