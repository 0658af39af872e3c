"""Episodes per second through vLLM and through the `hf` engine, and what vLLM's caches find.

64 pairs in groups of 8: 8 pairs, 8 episodes of each, 3 rounds at an eighth of the method's sizes
(`midsize.py`). The model is random, so what it writes decides nothing: after each round the same frames are
shown, and the earlier ones expire. Equality first: greedy, `vllm` and `hf` must write the same ids with the
same log-probabilities, or the run stops. Then the arms are timed in turn, several times, with fresh frames:

- `vllm`: with its prefix cache, so that X is computed once for a group;
- `vllm, no prefix cache`: every context is computed whole, in every round;
- `hf`: groups prefilled once and copied, its own prefix reuse.

Hits are counted beside those that are possible: of context tokens, all whole blocks that an earlier context,
with what was written after it, began with; of pictures, all but the first showing of each.

    .venvs/vllm/bin/python benchmarks/vllm_throughput.py --out benchmarks/results/vllm_throughput_cpu.jsonl
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import numpy as np
import torch
from grpo_step import write_model
from midsize import FRAMES, ROUND_TOKENS, SIDE, make_midsize

from vrthinker.engine.base import (
    Engine,
    FrameSegment,
    Message,
    RoundLimits,
    RoundRequest,
    Session,
    TextSegment,
)
from vrthinker.engine.hf.engine import HFEngine
from vrthinker.engine.hf.tiny import make_tiny
from vrthinker.engine.vllm.engine import VLLMEngine
from vrthinker.engine.vllm.generation import Generated, Generation
from vrthinker.engine.vllm.library import LocalOptions, installed_version
from vrthinker.records.provenance import append_row
from vrthinker.visibility import ShownFrame, VisibilityRecord, WindowMemory

TOLERANCE = 1e-4
BLOCK = 32


@dataclass(frozen=True)
class Sizes:
    """How much is played.

    Attributes:
        pairs: The number of pairs.
        group: The number of episodes of each.
        rounds: The rounds of an episode.
        frames: The frames of the first input, and of each retrieval.
        side: The side of a frame in pixels.
        tokens: The tokens of a round.
    """

    pairs: int = 8
    group: int = 8
    rounds: int = 3
    frames: int = FRAMES
    side: int = SIDE
    tokens: int = ROUND_TOKENS


def message(pair: int, outcome: int, numbers: Sequence[int], sizes: Sizes, seed: int) -> Message:
    """A turn with frames of a pair, whose pixels follow from the seed."""
    side = (sizes.side, sizes.side)
    segments: list[TextSegment | FrameSegment] = [TextSegment(f"Pair {pair}, outcome {outcome}: ")]
    for number in numbers:

        def load(number: int = number) -> np.ndarray:
            return np.random.default_rng([seed, pair, number]).integers(0, 256, (*side, 3), np.uint8)

        key = (f"{seed}-{pair}", number, *side)
        segments += [
            TextSegment(f"Frame {number}: "),
            FrameSegment(ShownFrame(outcome, number), key, side, load),
        ]
    return Message("user", tuple(segments))


def play(engine: Engine, sizes: Sizes, seed: int, temperature: float) -> list[list[tuple[Any, Any]]]:
    """Plays all episodes together; returns the ids and log-probabilities of each round."""
    limits = RoundLimits(sizes.tokens, temperature=temperature)
    numbers = list(range(1, sizes.frames + 1))
    records: dict[int, VisibilityRecord] = {}
    owners: dict[int, tuple[Session, int, int]] = {}
    written: list[list[tuple[Any, Any]]] = []
    for pair in range(sizes.pairs):
        first = engine.open([message(pair, 0, numbers, sizes, seed)], seed=pair * sizes.group)
        seeds = [pair * sizes.group + member for member in range(1, sizes.group)]
        for session in [first, *(engine.fork(first, seeds) if seeds else [])]:
            owners[session.id] = (session, pair, len(written))
            written.append([])
            records[session.id] = VisibilityRecord(WindowMemory(1))
            records[session.id].show(0, numbers)
    for session, _, _ in owners.values():
        engine.submit(RoundRequest(session, (), records[session.id].enter().expired, limits))
    while owners:
        for result in engine.collect():
            session, pair, place = owners[result.session.id]
            if result.error is not None:
                raise SystemExit(f"{engine.name}: {result.error}")
            written[place].append((result.token_ids, result.logprobs))
            outcome = len(written[place])
            if outcome == sizes.rounds:
                engine.close(session)
                del owners[session.id]
                continue
            # Members of a group ask for the same frames now and then, as they do when they judge.
            asked = [100 * (1 + (place + k) % 4) + outcome for k in range(sizes.frames // 2)]
            records[session.id].show(outcome, sorted(set(asked)))
            new = (message(pair, outcome, sorted(set(asked)), sizes, seed),)
            engine.submit(RoundRequest(session, new, records[session.id].enter().expired, limits))
    return written


class Counting:
    """Counts what vLLM's caches could have found, from what was posted, and what its encoder computed."""

    def __init__(self, engine: VLLMEngine) -> None:
        self.possible_tokens = self.shown = self.encoded = 0
        self._seen: set[int] = set()
        self._under_way: dict[str, Generation] = {}
        self._pictures: set[str] = set()
        transport: Any = engine.transport
        self._submit: Callable[[Generation], None] = transport.submit
        self._poll: Callable[[float | None], list[Generated]] = transport.poll
        transport.submit, transport.poll = self.submit, self.poll
        core = transport.engine.engine_core.engine_core
        model = core.model_executor.driver_worker.worker.model_runner.model
        self._embed = model.embed_multimodal
        model.embed_multimodal = self.embed

    def submit(self, generation: Generation) -> None:
        """Counts the whole blocks that a context has in common with an earlier one and what followed it."""
        self.shown += len(generation.pictures)
        self._pictures.update(picture.uuid for picture in generation.pictures)
        self._under_way[generation.id] = generation
        common = 0
        for end, digest in self._blocks(generation, generation.token_ids):
            if digest not in self._seen:
                break
            common = end
        self.possible_tokens += min(common, len(generation.token_ids) - 1)
        self._seen.update(digest for _, digest in self._blocks(generation, generation.token_ids))
        self._submit(generation)

    def poll(self, timeout_seconds: float | None) -> list[Generated]:
        """Remembers the blocks of what was written too. The last token's key and value are not computed."""
        found = self._poll(timeout_seconds)
        for generated in found:
            generation = self._under_way.pop(generated.id)
            whole = [*generation.token_ids, *generated.token_ids[:-1]]
            self._seen.update(digest for _, digest in self._blocks(generation, whole))
        return found

    @staticmethod
    def _blocks(generation: Generation, token_ids: Sequence[int]) -> Iterator[tuple[int, int]]:
        """The end and a digest of every whole block, with all that stands before it."""
        digest = 0
        for start in range(0, len(token_ids) - BLOCK + 1, BLOCK):
            end = start + BLOCK
            inside = tuple(
                (picture.uuid, picture.offset - start)
                for picture in generation.pictures
                if picture.offset < end and picture.offset + picture.length > start
            )
            digest = hash((digest, tuple(token_ids[start:end]), inside))
            yield end, digest

    def embed(self, **inputs: Any) -> Any:
        """Counts the pictures that are encoded."""
        outputs = self._embed(**inputs)
        self.encoded += len(outputs)
        return outputs

    @property
    def distinct(self) -> int:
        """The number of distinct pictures."""
        return len(self._pictures)


def check_equal(vllm: Engine, hf: Engine, sizes: Sizes, seed: int) -> float:
    """Plays a small part of it greedily on both; returns the largest difference of a log-probability."""
    small = Sizes(2, 2, sizes.rounds, sizes.frames, sizes.side, min(8, sizes.tokens))
    got, wanted = (play(engine, small, seed, 0.0) for engine in (vllm, hf))
    if [[ids for ids, _ in e] for e in got] != [[ids for ids, _ in e] for e in wanted]:
        raise SystemExit("vllm and hf write different ids; nothing is reported")
    found = [torch.tensor([p for e in part for _, logprobs in e for p in logprobs]) for part in (got, wanted)]
    largest = float((found[0] - found[1]).abs().max())
    if largest > TOLERANCE:
        raise SystemExit(f"vllm and hf differ by {largest:.2g} in a log-probability; nothing is reported")
    return largest


def main() -> None:
    """Runs the benchmark; `--out` appends a row."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, help="JSONL file to append the row to")
    parser.add_argument("--model", default="midsize", help="midsize, 3b, tiny, or a checkpoint folder")
    parser.add_argument("--pairs", type=int, default=8)
    parser.add_argument("--group", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=ROUND_TOKENS)
    parser.add_argument("--frames", type=int, default=FRAMES)
    parser.add_argument("--side", type=int, default=SIDE)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--dtype", default=None)
    parser.add_argument("--weights", action="store_true", help="time a weight update too")
    parser.add_argument("--seed", type=int, default=time.time_ns() % 2**31)
    options = parser.parse_args()
    sizes = Sizes(options.pairs, options.group, 3, options.frames, options.side, options.tokens)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(options.model)
        if options.model in ("midsize", "tiny", "3b"):
            folder = Path(scratch) / options.model
            if options.model == "midsize":
                make_midsize(folder)
            elif options.model == "tiny":
                make_tiny(folder, "qwen2.5-vl")
            else:
                write_model(folder, "qwen2.5-vl-3b", "cuda", small_vocabulary=True)
        row = measure(folder, sizes, options)
    row = {"benchmark": "vllm_throughput", "model": options.model, "seed": options.seed, **row}
    sys.stdout.write("".join(f"{key}: {value}\n" for key, value in row.items()))
    if options.out is not None:
        append_row(options.out, row)


def measure(folder: Path, sizes: Sizes, options: argparse.Namespace) -> dict[str, Any]:
    """The row."""
    episodes = sizes.pairs * sizes.group
    # Several engines share the machine, so each has a fixed part of its memory.
    local = LocalOptions(
        own_process=False,
        kv_cache_bytes=(16 << 30) if torch.cuda.is_available() else (1 << 30),
        block_size=BLOCK,
        encoder_cache_tokens=200_000,
    )
    bare = replace(local, prefix_caching=False)
    pictures = 2 * sizes.frames * (sizes.side // 28) ** 2
    limit = pictures + sizes.rounds * (sizes.tokens + 200) + 1000
    common = {"dtype": options.dtype, "max_sessions": episodes, "max_context_tokens": limit}
    engines: dict[str, Engine] = {"hf": HFEngine(folder, **common)}
    engines["vllm"] = cached = VLLMEngine(folder, local=local, **common)
    if options.dtype in (None, "float32") and not torch.cuda.is_available():
        largest = check_equal(cached, engines["hf"], sizes, options.seed)
    else:
        largest = None
    engines["vllm, no prefix cache"] = VLLMEngine(folder, local=bare, **common)
    counting = Counting(cached)
    seconds: dict[str, list[float]] = {name: [] for name in engines}
    before = (cached.usage.prompt_tokens, cached.usage.cached_tokens)
    for repeat in range(options.repeats + 1):
        for name, engine in engines.items():
            begun = time.perf_counter()
            play(engine, sizes, options.seed + 1 + repeat, 1.0)
            if repeat:  # the first one warms up
                seconds[name].append(time.perf_counter() - begun)
    prompt, found = (cached.usage.prompt_tokens - before[0], cached.usage.cached_tokens - before[1])
    row: dict[str, Any] = {
        "vllm": installed_version(),
        "device": "cuda" if torch.cuda.is_available() else "cpu",
        "threads": torch.get_num_threads(),
        "sizes": vars(sizes),
        "episodes": episodes,
        "repeats": options.repeats,
        "largest_logprob_difference": largest,
        "prefix_hit_rate": found / prompt,
        "prefix_hit_rate_possible": counting.possible_tokens / prompt,
        "encoder_hit_rate": 1 - counting.encoded / counting.shown,
        "encoder_hit_rate_possible": 1 - counting.distinct / counting.shown,
    }
    for name, times in seconds.items():
        row[f"episodes_per_second, {name}"] = episodes / statistics.median(times)
        row[f"seconds, {name}"] = [min(times), statistics.median(times), max(times)]
    for other in ("hf", "vllm, no prefix cache"):
        ratios = [b / a for a, b in zip(seconds["vllm"], seconds[other], strict=True)]
        row[f"speed_up_over, {other}"] = [min(ratios), statistics.median(ratios), max(ratios)]
    if options.weights:
        weights = {name: t.clone() for name, t in engines["hf"].model.model.state_dict().items()}  # type: ignore[attr-defined]
        begun = time.perf_counter()
        cached.update_weights(weights, 1)
        row["seconds, weight update"] = time.perf_counter() - begun
    for engine in engines.values():
        engine.shutdown()
    return row


if __name__ == "__main__":
    main()
