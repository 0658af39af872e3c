"""Where the time of GRPO goes, part by part, and how much memory it takes.

    python benchmarks/grpo_step.py [--refreshes 4] [--groups 8] [--out FILE]
    python benchmarks/grpo_step.py --model-size 3b --device cuda --packed both --refreshes 5 --groups 4

Runs of the GRPO stage are timed by their own metrics: sampling, packing, reading and encoding frames, the
log-probabilities of the old policy and of the reference, the forward and backward passes, the optimizer, and
copying the weights to the sampler. The first refresh is left out, because it opens the clips for the first
time. The vision tower is not trained, so that encoding a step's frames is a part of its own; it counts as
forward. `--packed off` gives every context a forward of its own.

`--model-size nano` is the recipe `nano-grpo` with the judge that ships. The other sizes are random models:
`3b` has the layers of Qwen2.5-VL-3B, which learns by adapters as in the recipe `qwen2.5-vl-3b`, at the
method's proportions (method section 2: 8 first frames of about 490 tokens, 3 rounds of up to 400 tokens, 8
retrieved frames each); `tiny` has small layers and proportions, to try this script. A random model would
write nonsense and never call a tool. So the grammar forces its rounds, and the run is told not to mind that
training computes other probabilities than those of forced tokens. Its losses mean nothing; its times do.

`packed_training.py` compares the packed step with other ways of computing it.
"""

from __future__ import annotations

import argparse
import collections
import dataclasses
import gc
import os
import statistics
import tempfile
from pathlib import Path
from typing import Any

PARTS = ("rollout", "logprobs", "frames", "encode", "pack", "weight_update", "optimizer")


@dataclasses.dataclass(frozen=True)
class Shape:
    """What a random model sees and writes."""

    known: str | None
    """The model of `vrthinker train plan` whose layers it has; None for the tiny ones of the tests."""
    side: int
    """Width and height of the frames in pixels; 28 x 28 are one token."""
    frames: int
    """First frames, and frames per call."""
    round_tokens: int
    rounds: int
    settings: dict[str, Any]
    """Of the policy."""


SHAPES = {
    "tiny": Shape(None, 56, 2, 230, 2, {}),
    "3b": Shape(
        "qwen2.5-vl-3b",
        616,
        8,
        400,
        3,
        {"precision": "bfloat16", "gradient_checkpointing": True, "lora": {"rank": 32, "alpha": 64}},
    ),
}


def nano_values() -> dict[str, Any]:
    """The settings of the recipe."""
    from vrthinker.train.settings import load_recipe

    return load_recipe("nano-grpo")


def random_values(size: str, folder: Path, device: str) -> dict[str, Any]:
    """Settings for a random model, which is written to `folder`. From now on, its rounds are forced."""
    from vrthinker.episode.prompts import PromptTemplates
    from vrthinker.episode.settings import EpisodeSettings, JudgeSettings
    from vrthinker.train import grpo
    from vrthinker.video.resize import ResizeSettings
    from vrthinker.world.nano import write_judge_settings

    shape = SHAPES[size]
    write_model(folder, shape.known, device)
    pixels = shape.side * shape.side
    episode = EpisodeSettings(
        initial_frames=shape.frames,
        retrieved_frames=shape.frames,
        max_rounds=shape.rounds,
        max_round_tokens=shape.round_tokens,
    )
    resize = ResizeSettings(min_pixels=pixels, max_pixels=pixels)
    write_judge_settings(folder, JudgeSettings(resize=resize, episode=episode), PromptTemplates.load())
    vars(grpo)["HFEngine"] = forced_engine(shape)
    return {
        "model": str(folder),
        "items": {"kind": "world", "seed": 11000},
        "rollouts": {"group_size": 8, "batch_size": 64, "dynamic": False},
        "loss": {"most_drift": 1e9},
        "train_vision": False,
        "learn": {"steps": 1, "steps_per_refresh": 2, "learning_rate": {"peak": 1e-6}},
        **shape.settings,
    }


def write_model(folder: Path, known: str | None, device: str, *, small_vocabulary: bool = False) -> None:
    """Writes a random Qwen2.5-VL with the layers of a known one, and the small tokenizer of the tests.

    With `small_vocabulary`, it has no more embeddings than the tokenizer has tokens.
    """
    from vrthinker.engine.hf.tiny import make_tiny

    make_tiny(folder, "qwen2.5-vl")
    if known is None:
        return
    import torch
    from transformers import AutoConfig, Qwen2_5_VLForConditionalGeneration

    from vrthinker.bounded_files import read_json
    from vrthinker.train.plan.sizes import MODELS

    config: Any = AutoConfig.from_pretrained(folder)
    wanted = read_json(MODELS / f"{known}.json")
    config.tie_word_embeddings = wanted["tie_word_embeddings"]
    for tower in ("text_config", "vision_config"):
        for name, value in wanted[tower].items():
            if name != "model_type" and not (small_vocabulary and name == "vocab_size"):
                setattr(getattr(config, tower), name, value)
        getattr(config, tower).initializer_range = 0.02
    config.text_config.layer_types = ["full_attention"] * config.text_config.num_hidden_layers
    torch.set_default_dtype(torch.bfloat16)
    with torch.device(device):
        model: Any = Qwen2_5_VLForConditionalGeneration(config)
    torch.set_default_dtype(torch.float32)
    model.save_pretrained(folder)


def forced_engine(shape: Shape) -> Any:
    """An engine that forces each round into the grammar: calls, and an answer in the last round."""
    from vrthinker.engine.base import Choice, RoundRequest
    from vrthinker.engine.hf.engine import HFEngine
    from vrthinker.episode.forms import round_form

    class Forced(HFEngine):
        def __init__(self, *arguments: Any, **options: Any) -> None:
            super().__init__(*arguments, **options)
            self._begun: collections.Counter[Any] = collections.Counter()

        def submit(self, request: RoundRequest) -> None:
            self._begun[request.session] += 1
            is_last = self._begun[request.session] == shape.rounds
            form = round_form(
                n_frames=64,  # of two clips of the world
                frames_per_call=shape.frames,
                last_round=is_last,
                max_tokens=shape.round_tokens,
            )
            if not is_last:
                *opening, either = form
                assert isinstance(either, Choice)
                form = (*opening, Choice(either.options[1:]), *either.then[1])
            limits = dataclasses.replace(request.limits, form=form)
            super().submit(dataclasses.replace(request, limits=limits))

    return Forced


def timed_run(values: dict[str, Any], refreshes: int, groups: int, *, packed: bool, out: Path) -> list[Any]:
    """The seconds of each refresh by part, its episodes and its tokens."""
    from vrthinker.records.metrics_file import METRICS_FILE, read_metrics
    from vrthinker.train.grpo import run_grpo
    from vrthinker.train.grpo_settings import grpo_settings

    per_refresh = values["learn"]["steps_per_refresh"]
    learn = {
        **values["learn"],
        "steps": refreshes * per_refresh,
        "groups_per_step": groups // per_refresh,
        "max_pack_tokens": None if packed else 1,
    }
    items = {**values["items"], "pairs": 64}
    run_grpo(grpo_settings({**values, "tracker": "none", "items": items, "learn": learn}), out)
    lines = [line for line in read_metrics(out / METRICS_FILE) if line["step"] > 0]
    found = []
    for first in range(0, len(lines), per_refresh):
        steps = lines[first : first + per_refresh]
        seconds = {part: sum(line.get(f"perf/{part}_seconds", 0.0) for line in steps) for part in PARTS}
        whole = sum(line["perf/step_seconds"] for line in steps)
        seconds["forward_backward"] = whole - sum(seconds.values())
        found.append(
            {
                "seconds": seconds,
                "whole": whole,
                "episodes": steps[0]["rollouts/groups_drawn"] * values["rollouts"]["group_size"],
                "computed": sum(line["perf/tokens_per_s"] * line["perf/step_seconds"] for line in steps),
                "sampled": sum(line["batch/tokens"] for line in steps),
            }
        )
    return found


def row_of(refreshes: list[Any]) -> dict[str, Any]:
    """What is told of the timed refreshes."""
    shares = {
        part: statistics.median(refresh["seconds"][part] / refresh["whole"] for refresh in refreshes)
        for part in refreshes[0]["seconds"]
    }
    speeds = sorted(refresh["episodes"] / refresh["whole"] for refresh in refreshes)
    learning = [r["seconds"]["forward_backward"] + r["seconds"]["encode"] for r in refreshes]
    inside = [shares[part] for part in ("rollout", "forward_backward", "encode")]
    return {
        "refreshes": len(refreshes),
        "shares": shares,
        "outside_rollout_and_forward_backward": 1 - sum(inside),
        "episodes_per_second": {
            "least": speeds[0],
            "median": statistics.median(speeds),
            "most": speeds[-1],
        },
        # Per second of forward and backward: tokens of the packs, and sampled tokens of all episodes. What
        # episodes share is computed once.
        "tokens_per_second": {
            kind: statistics.median(r[kind] / s for r, s in zip(refreshes, learning, strict=True))
            for kind in ("computed", "sampled")
        },
    }


class PeakMemory:
    """The most memory that was taken since it was made: of the GPU, or resident of this process."""

    def __init__(self, device: str) -> None:
        self._device = device
        gc.collect()
        if device == "cuda":
            import torch

            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        else:
            Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts anew

    def bytes(self) -> int:
        """The bytes."""
        if self._device == "cuda":
            import torch

            return torch.cuda.max_memory_allocated()
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))


def main() -> None:
    """The script."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model-size", choices=["nano", *SHAPES], default="nano")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--packed", choices=["on", "off", "both"], default="on")
    parser.add_argument("--refreshes", type=int, default=4, help="of 2 steps each; at least 2")
    parser.add_argument("--groups", type=int, default=8, help="groups per refresh, an even number")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/grpo_step.jsonl"))
    given = parser.parse_args()
    if given.refreshes < 2 or given.groups < 2 or given.groups % 2:
        parser.error("--refreshes: at least 2; --groups: an even number, at least 2")
    if given.device == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""  # a run takes a GPU where there is one
    import torch

    from vrthinker.records.provenance import append_row

    if given.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device: got cuda, and torch finds no GPU")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        size = given.model_size
        values = nano_values() if size == "nano" else random_values(size, folder / "model", given.device)
        what = "nano" if size == "nano" else f"random Qwen2.5-VL, {size}, forced rounds"
        for packed in {"on": (True,), "off": (False,), "both": (True, False)}[given.packed]:
            memory = PeakMemory(given.device)
            out = folder / f"run-{packed}"
            refreshes = timed_run(values, given.refreshes, given.groups, packed=packed, out=out)
            row = {
                "benchmark": f"a refresh of GRPO, {what} on the synthetic world (easy)",
                "model_size": size,
                "device": given.device,
                "packed": packed,
                "groups": given.groups,
                "steps": given.refreshes * values["learn"]["steps_per_refresh"],
                **row_of(refreshes[1:]),
                "peak_bytes": memory.bytes(),
            }
            append_row(given.out, row)
            print(row, flush=True)  # noqa: T201 - what the script is for


if __name__ == "__main__":
    main()
