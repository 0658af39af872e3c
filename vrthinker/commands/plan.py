"""`vrthinker train plan` says before a run what it will need: memory, tokens, FLOPs, time."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

from vrthinker.commands.options import Flag, announce, option

if TYPE_CHECKING:
    from vrthinker.train.plan.plan import Plan


@dataclass(frozen=True)
class TrainPlanCommand:
    """Say what a training run will need before it is started: memory of a GPU, tokens, FLOPs and time.

    vrthinker train plan nano --model qwen2.5-vl-7b --gpus 8
    """

    recipe: Annotated[tyro.conf.Positional[str], option("RECIPE")]
    """The settings: a YAML file, or a recipe that ships with the package. Its data are not needed."""
    model: Annotated[str | None, option("M")] = None
    """A checkpoint's folder, or qwen2.5-vl-3b, -7b, -72b. The recipe's own by default."""
    set: Annotated[tuple[str, ...], option("KEY=VALUE")] = ()
    """Replace settings of the recipe: --set gradient_checkpointing=true precision=bfloat16"""
    gpus: Annotated[int, option("N")] = 1
    """The number of GPUs, over which weights, gradients and optimizer state are sharded. 1 by default."""
    gpu_memory: Annotated[float, option("GIB")] = 80.0
    """The memory of a GPU, in GiB. 80 by default."""
    gpu_tflops: Annotated[float | None, option("TFLOPS")] = None
    """The speed of a GPU by its data sheet. By default an A100's: 312 in bfloat16, 19.5 in float32."""
    utilisation: Annotated[float, option("SHARE")] = 0.35
    """The share of that speed that training reaches. 0.35 by default."""
    context: Annotated[int | None, option("TOKENS")] = None
    """The tokens of a sequence. By default they follow from the six options below."""
    rounds: Annotated[int, option("N")] = 2
    """The rounds of an episode. 2 by default."""
    frames: Annotated[int, option("N")] = 8
    """The frames of the first input. 8 by default."""
    retrieved_frames: Annotated[int, option("N")] = 8
    """The frames that a round's call shows. 8 by default."""
    window: Annotated[int | Literal["all"], option("ROUNDS")] = 1
    """How many rounds a retrieved frame stays visible, or "all". 1 by default."""
    frame_tokens: Annotated[int, option("N")] = 512
    """The tokens of a frame. 512 by default, which is the default max_pixels."""
    round_tokens: Annotated[int, option("N")] = 400
    """The tokens that a round writes. 400 by default."""
    json: Flag = False
    """Print JSON instead of text."""

    def run(self) -> int:
        """Prints the plan; returns 1 if some phase does not fit."""
        announce("counting parameters: torch is loading")
        from vrthinker.train.plan.plan import A100_TFLOPS, Assumptions, plan_recipe
        from vrthinker.train.settings import load_recipe, with_overrides

        values = with_overrides(load_recipe(self.recipe), self.set)
        precision = "bfloat16" if values.get("precision") == "bfloat16" else "float32"
        assumptions = Assumptions(
            gpus=self.gpus,
            gpu_memory_gib=self.gpu_memory,
            gpu_tflops=A100_TFLOPS[precision] if self.gpu_tflops is None else self.gpu_tflops,
            utilisation=self.utilisation,
            context=self.context,
            rounds=self.rounds,
            initial_frames=self.frames,
            retrieved_frames=self.retrieved_frames,
            window=None if self.window == "all" else self.window,
            frame_tokens=self.frame_tokens,
            round_tokens=self.round_tokens,
        )
        plans = plan_recipe(values, assumptions, model=self.model)
        if self.json:
            import json

            sys.stdout.write(json.dumps([plan.as_json() for plan in plans], indent=2) + "\n")
        else:
            sys.stdout.write("\n\n".join(_spelled(plan) for plan in plans) + "\n")
        return 0 if all(plan.fits for plan in plans) else 1


def _spelled(plan: Plan) -> str:
    """A plan as text."""
    from vrthinker.progress import counted

    gib = 1 << 30
    load, training, a = plan.load, plan.training, plan.assumptions
    trained = training.trained_parameters(plan.model)
    how = [training.arithmetic, "gradient checkpointing" if training.checkpointing else "no checkpointing"]
    towers = {"both": "vision tower trained", "text": "vision tower frozen", "vision": "vision tower alone"}
    how.append(towers[load.learns if training.train_vision else "text"])
    how += ["LoRA"] if training.adapters is not None else []
    count = f"{plan.model.parameters:,} parameters"
    learned = f", {trained:,} of them trained" if training.adapters is None else f", {trained:,} of adapters"
    lines = [
        f"{plan.phase}: {plan.model.name}, {count}{learned}",
        f"{', '.join(how)}; {counted(a.gpus, 'GPU')} of {a.gpu_memory_gib:g} GiB",
        "",
    ]
    lines += [f"  {name:34} {size / gib:8.2f} GiB" for name, size in plan.memory.items()]
    lines.append(f"  {'on one GPU':34} {plan.total_bytes / gib:8.2f} GiB")
    lines.append("")
    if plan.fits:
        lines.append(f"fits: {a.gpu_memory_gib - plan.total_bytes / gib:.1f} GiB are left")
    else:
        ways = plan.ways_to_fit()
        remedy = f"; it would with {', or '.join(ways)}" if ways else "; shorter sequences or LoRA may help"
        lines.append(f"does not fit{remedy}")
    if load.learns == "vision":
        lines.append(f"a step of one process: {counted(load.frames, 'frame')} of {a.frame_tokens} tokens")
    else:
        lines.append(
            f"a sequence: {load.tokens:,} tokens with {load.frames} frames of {a.frame_tokens}, "
            f"{load.learned:,} of them learned"
        )
    lines.append(
        f"a step: {plan.step_tokens:,} tokens, {plan.flops / 1e15:.3g} PFLOP, {plan.step_seconds:.3g} s at "
        f"{a.utilisation:.0%} of {a.gpu_tflops:g} TFLOPS"
    )
    if plan.steps is not None:
        hours = plan.steps * plan.step_seconds / 3600
        lines.append(f"{counted(plan.steps, 'step')}: {hours:.3g} hours")
    return "\n".join(lines)
