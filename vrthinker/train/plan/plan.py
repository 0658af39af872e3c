"""A plan of a run: what one GPU has to hold, and what a step costs, from a recipe and a few assumptions.

How long a sequence is follows from what was visible (method section 3): the first input stays, and of the
retrieved frames those of the last `window` rounds. Everything that is assumed stands in `Assumptions` and is
printed with the plan.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

from pydantic import TypeAdapter, ValidationError

from vrthinker.errors import InputError, first_problem
from vrthinker.train.frame_phase import FramePhase
from vrthinker.train.loop.optimizer import AdamWSettings, MuonSettings, OptimizerSettings
from vrthinker.train.model import LoraSettings, PolicySettings
from vrthinker.train.plan.memory import Load, Training, memory_bytes, step_flops
from vrthinker.train.plan.sizes import ModelSizes, sizes_of
from vrthinker.train.settings import NANO, SftPhase

GIB = 1 << 30
A100_TFLOPS = {"bfloat16": 312.0, "float32": 19.5}
"""The A100's speed in dense products by its data sheet. torch does not use TF32 for float32 by itself."""
_TRIED_GPUS = (2, 4, 8, 16, 32, 64)


@dataclass(frozen=True)
class Assumptions:
    """What a plan assumes about the machine and about the episodes that are learned from.

    Attributes:
        gpus: The number of GPUs, over which FSDP shards everything.
        gpu_memory_gib: The memory of one GPU, in GiB.
        gpu_tflops: The speed of one GPU by its data sheet, in 10^12 FLOPs per second, in the dtype of the
            computation. 312 is that of an A100 in bfloat16.
        utilisation: The share of that speed that training reaches.
        initial_frames: The number of frames of the first input.
        retrieved_frames: The number of frames that a round's call shows.
        window: For how many rounds they stay; None for all.
        rounds: The number of rounds of an episode.
        frame_tokens: The number of tokens of a frame. 512 is the default `max_pixels` of the settings.
        text_tokens: The number of tokens of the prompts of the first input.
        round_tokens: The number of tokens that a round writes.
        context: The number of tokens of a sequence; by default it follows from the numbers above.

    Raises:
        InputError: A number is out of range.
    """

    gpus: int = 1
    gpu_memory_gib: float = 80.0
    gpu_tflops: float = 312.0
    utilisation: float = 0.35
    initial_frames: int = 8
    retrieved_frames: int = 8
    window: int | None = 1
    rounds: int = 2
    frame_tokens: int = 512
    text_tokens: int = 600
    round_tokens: int = 400
    context: int | None = None

    def __post_init__(self) -> None:
        least: dict[str, float] = {
            "gpus": 1,
            "rounds": 1,
            "frame_tokens": 1,
            "round_tokens": 1,
            "initial_frames": 0,
            "retrieved_frames": 0,
            "text_tokens": 0,
            "window": 0,
            "context": 1,
        }
        for name, low in least.items():
            value = getattr(self, name)
            if value is not None and not low <= value <= 1 << 30:
                raise InputError(f"{name}: got {value}, allowed: {low:g} to {1 << 30}")
        for name, high in (("gpu_memory_gib", 1e6), ("gpu_tflops", 1e6), ("utilisation", 1.0)):
            if not 0 < getattr(self, name) <= high:
                raise InputError(f"{name}: got {getattr(self, name)}, allowed: above 0, up to {high:g}")

    @property
    def live_frames(self) -> int:
        """The number of frames that are visible in an episode's last round."""
        outcomes = self.rounds - 1 if self.window is None else min(self.window, self.rounds - 1)
        return self.initial_frames + outcomes * self.retrieved_frames

    @property
    def sequence_tokens(self) -> int:
        """The number of tokens of the longest training sequence: an episode up to its last round."""
        if self.context is not None:
            return self.context
        written = self.rounds * self.round_tokens
        return self.text_tokens + self.live_frames * self.frame_tokens + written

    @property
    def trace_frames(self) -> int:
        """The number of frames that an episode shows in all."""
        return self.initial_frames + (self.rounds - 1) * self.retrieved_frames

    @property
    def trace_tokens(self) -> int:
        """The number of tokens of an episode's pack: the contexts of its rounds, what they share once.

        When frames expire, what stands behind them is computed anew (`rerender`).
        """
        if self.context is not None:
            return self.context
        shown = self.retrieved_frames * self.frame_tokens
        total = self.text_tokens + self.initial_frames * self.frame_tokens + self.round_tokens
        for number in range(2, self.rounds + 1):
            live = number - 1 if self.window is None else min(self.window, number - 1)
            anew = 1 if live == number - 1 else live  # outcomes behind the last one that expired
            rounds = 1 if live == number - 1 else live + 1
            total += anew * shown + rounds * self.round_tokens
        return total


@dataclass(frozen=True)
class Plan:
    """The plan of one phase.

    Attributes:
        phase: The phase's name.
        model: The model's sizes.
        training: How it is trained.
        load: What one process computes in a step.
        assumptions: What was assumed.
        memory: Part -> bytes on one GPU.
        step_tokens: The number of tokens of a step, over all processes.
        flops: The FLOPs of a step, over all processes.
        steps: The number of steps of the phase; None if it follows from the data.
    """

    phase: str
    model: ModelSizes
    training: Training
    load: Load
    assumptions: Assumptions
    memory: Mapping[str, int]
    step_tokens: int
    flops: int
    steps: int | None

    @property
    def total_bytes(self) -> int:
        """The bytes on one GPU."""
        return sum(self.memory.values())

    @property
    def fits(self) -> bool:
        """Whether one GPU can hold it."""
        return self.total_bytes <= self.assumptions.gpu_memory_gib * GIB

    @property
    def step_seconds(self) -> float:
        """The time of a step by its FLOPs."""
        a = self.assumptions
        return self.flops / (a.gpus * a.gpu_tflops * 1e12 * a.utilisation)

    def ways_to_fit(self) -> list[str]:
        """Changes after which it fits, each with the memory that one GPU would hold then."""
        ways = []
        if not self.training.checkpointing:
            changed = _planned(self, replace(self.training, checkpointing=True), self.assumptions)
            if changed.fits:
                ways.append(f"gradient_checkpointing: true ({_gib(changed.total_bytes)})")
        for gpus in _TRIED_GPUS:
            for checkpointing in sorted({self.training.checkpointing, True}):
                if gpus <= self.assumptions.gpus:
                    continue
                training = replace(self.training, gpus=gpus, checkpointing=checkpointing)
                changed = _planned(self, training, replace(self.assumptions, gpus=gpus))
                if changed.fits:
                    more = checkpointing and not self.training.checkpointing
                    also = " and gradient_checkpointing: true" if more else ""
                    ways.append(f"{gpus} GPUs{also} ({_gib(changed.total_bytes)} each)")
                    return ways
        return ways

    def as_json(self) -> dict[str, Any]:
        """The plan as JSON values."""
        return {
            "phase": self.phase,
            "model": self.model.name,
            "parameters": self.model.parameters,
            "trained_parameters": self.training.trained_parameters(self.model),
            "training": asdict(self.training),
            "assumptions": asdict(self.assumptions),
            "sequence_tokens": self.load.tokens,
            "memory_bytes": dict(self.memory),
            "total_bytes": self.total_bytes,
            "fits": self.fits,
            "step_tokens": self.step_tokens,
            "step_flops": self.flops,
            "step_seconds": self.step_seconds,
            "steps": self.steps,
        }


def plan_recipe(
    values: Mapping[str, Any], assumptions: Assumptions, *, model: str | None = None
) -> list[Plan]:
    """The plan of each phase of a recipe. What a recipe says about its data is not needed and not looked at.

    Args:
        values: The recipe's settings (`load_recipe`).
        assumptions: The machine and the episodes.
        model: The model; the recipe's own by default.

    Raises:
        InputError: The recipe has no model or no phase, a setting that matters is wrong, or the model is not
            known.
    """
    name = model or values.get("model")
    if not isinstance(name, str):
        raise InputError("--model: missing; the recipe names no model")
    sizes = _nano_sizes() if name in (NANO, "nano") else sizes_of(name)
    phases = values.get("phases", values.get("learn"))
    phases = phases if isinstance(phases, list | tuple) else [phases]
    if not phases:
        raise InputError("recipe: got no phase to plan, allowed: phases, or learn")
    policy = _picked(PolicySettings, values, "recipe")
    optimizer = _optimizer(values.get("optimizer", {}))
    lora = policy.lora
    training = Training(
        gpus=assumptions.gpus,
        bfloat16=policy.precision == "bfloat16",
        checkpointing=policy.gradient_checkpointing,
        train_vision=policy.train_vision,
        adapters=None if lora is None else _adapter_parameters(sizes, lora, policy.train_vision),
        orthogonal=isinstance(optimizer, MuonSettings),
    )
    plans = []
    for number, given in enumerate(phases):
        if not isinstance(given, Mapping):
            raise InputError(f"recipe: got no phase to plan ({given!r}), allowed: phases, or learn")
        kind = FramePhase if given.get("kind") == "frames" else SftPhase
        phase = _picked(kind, given, f"recipe: phases.{number}")
        plan = _frame_plan if kind is FramePhase else _phase_plan
        plans.append(plan(phase, sizes, training, assumptions))
    return plans


def _phase_plan(phase: SftPhase, sizes: ModelSizes, training: Training, assumptions: Assumptions) -> Plan:
    per_forward = phase.micro_batch_size * assumptions.gpus
    tokens = assumptions.trace_tokens if phase.packed else assumptions.sequence_tokens
    frames = assumptions.trace_frames if phase.packed else assumptions.live_frames
    learned, parts = min(assumptions.rounds * assumptions.round_tokens, tokens), 1
    if phase.packed and phase.max_pack_tokens is not None:
        # A pack that is too long is split into forwards of about the same length; a context never is.
        parts = -(-tokens * phase.micro_batch_size // phase.max_pack_tokens)
        longest = min(assumptions.sequence_tokens, tokens)
        tokens, frames, learned = (-(-value // parts) for value in (tokens, frames, learned))
        tokens = max(tokens, -(-longest // phase.micro_batch_size))
    load = Load(
        sequences=phase.micro_batch_size,
        tokens=tokens,
        frames=frames,
        frame_patches=assumptions.frame_tokens * sizes.merge_side**2,
        learned=learned,
        forwards=-(-phase.batch_size // per_forward) * parts,
        learns="text" if phase.freeze_vision else "both",
    )
    return Plan(
        phase=phase.name,
        model=sizes,
        training=training,
        load=load,
        assumptions=assumptions,
        memory=memory_bytes(sizes, training, load),
        step_tokens=load.forwards * load.sequences * load.tokens * assumptions.gpus,
        flops=step_flops(sizes, training, load) * assumptions.gpus,
        steps=phase.steps,
    )


def _frame_plan(phase: FramePhase, sizes: ModelSizes, training: Training, assumptions: Assumptions) -> Plan:
    """The plan of a phase in which the tower alone learns, from all its frames in one forward."""
    frames = -(-phase.clips_per_step // assumptions.gpus) * phase.frames_per_clip
    patches = assumptions.frame_tokens * sizes.merge_side**2
    load = Load(1, tokens=0, frames=frames, frame_patches=patches, learned=0, forwards=1, learns="vision")
    return Plan(
        phase=phase.name,
        model=sizes,
        training=training,
        load=load,
        assumptions=assumptions,
        memory=memory_bytes(sizes, training, load),
        step_tokens=frames * assumptions.frame_tokens * assumptions.gpus,
        flops=step_flops(sizes, training, load) * assumptions.gpus,
        steps=phase.steps,
    )


def _planned(plan: Plan, training: Training, assumptions: Assumptions) -> Plan:
    """The same plan, trained in another way. Only its memory is computed again."""
    memory = memory_bytes(plan.model, training, plan.load)
    return replace(plan, training=training, assumptions=assumptions, memory=memory)


def _adapter_parameters(sizes: ModelSizes, lora: LoraSettings, train_vision: bool) -> int:
    """The parameters of LoRA adapters: `rank * (in + out)` for each target (`train.model`)."""
    total = 0
    for name, (rows, columns) in sizes.linear_shapes.items():
        in_text = name.startswith("model.language_model.")
        if (name.rsplit(".", 1)[-1] in lora.targets) if in_text else train_vision:
            total += lora.rank * (rows + columns)
    return total


def _nano_sizes() -> ModelSizes:
    from vrthinker.engine.hf.checkpoint import NANO_FOLDER

    return replace(sizes_of(str(NANO_FOLDER)), name="nano")


def _picked(kind: type[Any], values: Mapping[str, Any], where: str) -> Any:
    """Settings from those keys of a mapping that belong to them."""
    try:
        return kind.model_validate({key: values[key] for key in kind.model_fields if key in values})
    except ValidationError as error:
        raise InputError(f"{where}: {first_problem(error, '(settings)')}") from None


def _optimizer(values: Any) -> AdamWSettings | MuonSettings:
    try:
        settings: AdamWSettings | MuonSettings = TypeAdapter(OptimizerSettings).validate_python(values)
        return settings
    except ValidationError as error:
        raise InputError(f"recipe: optimizer: {first_problem(error, '(settings)')}") from None


def _gib(count: int) -> str:
    return f"{count / GIB:.1f} GiB"
