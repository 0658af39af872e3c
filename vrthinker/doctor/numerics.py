"""How far training's numbers differ from sampling's: `vrthinker doctor --numerics MODEL`.

GRPO divides the probability that the packed forward gives a token by the probability that it was sampled
with. Both come from the same weights, so before the first update the ratio should be 1. Only the order of
floating-point sums and the dtype make it differ. This module measures the difference, per memory mode.

The modes show the model different things, so greedy verdicts may differ between them. That is not an error of
either mode (docs/memory.md), and the report counts such pairs separately.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import combinations
from pathlib import Path

import torch

from vrthinker.data.pairs import Pair
from vrthinker.engine.hf.engine import HFEngine
from vrthinker.episode.trajectory import Trajectory
from vrthinker.errors import InputError
from vrthinker.judge import Judge
from vrthinker.policy.batches import FrameLoader
from vrthinker.policy.packed_forward import packed_logprobs
from vrthinker.policy.packing import pack_group
from vrthinker.video.frame_cache import FrameCache
from vrthinker.video.open import open_reader
from vrthinker.visibility import MemoryMode

MODES: tuple[MemoryMode, ...] = ("rerender", "evict", "renumber")
_PACK_TOKENS = 16_384
_FRAME_BYTES = 1 << 30


@dataclass(frozen=True)
class ModeDrift:
    """The measured drift of one memory mode.

    Attributes:
        memory: The mode.
        episodes: The number of sampled episodes.
        tokens: The number of sampled tokens in them.
        largest: The largest |logprob in sampling - logprob in the packed forward|; None if the mode has no
            packed forward.
        mean: The mean of these differences.
        prefilled_share: The share of all rounds' context tokens that was computed instead of found in the
            cache.
        features_reused: The share of the requested frames whose encoding was in the cache.
        reason: The reason why there is no drift to report.
    """

    memory: MemoryMode
    episodes: int
    tokens: int
    largest: float | None
    mean: float | None
    prefilled_share: float
    features_reused: float
    reason: str | None = None


@dataclass(frozen=True)
class NumericsReport:
    """The result of `measure_numerics`.

    Attributes:
        model: The checkpoint's name.
        device: The device that the model ran on.
        dtype: The dtype that it computed in.
        pairs: The number of pairs judged in each mode.
        temperature: The temperature of the sampled episodes. Verdicts are compared greedily.
        modes: The drift of each mode that the model allows.
        disagreements: "mode/mode" -> the share of pairs whose four judgments are not all the same.
        without_verdict: The number of greedy episodes of each mode that ended without judgments. Two such
            episodes count as equal.
    """

    model: str
    device: str
    dtype: str
    pairs: int
    temperature: float
    modes: tuple[ModeDrift, ...]
    disagreements: Mapping[str, float]
    without_verdict: Mapping[str, int]

    def as_json(self) -> str:
        """The report as JSON."""
        return json.dumps({"schema_version": 1, **asdict(self)}, indent=2)


def measure_numerics(
    judge: Judge,
    pairs: Sequence[Pair],
    *,
    temperature: float = 1.0,
    seed: int = 0,
    on_mode: Callable[[MemoryMode], None] = lambda memory: None,
) -> NumericsReport:
    """Judges pairs in every memory mode, and recomputes the logprobs of the sampled tokens.

    As in training, rounds are sampled freely and from the whole distribution (no grammar, top_p 1).

    Args:
        judge: A judge with the transformers engine.
        pairs: The pairs to judge.
        temperature: The temperature of the sampled episodes.
        seed: The seed of the sampling.
        on_mode: A function that is called when a mode begins.

    Raises:
        InputError: The judge has another engine, or there are no pairs.
        VRThinkerError: An item cannot be judged.
    """
    engine = judge.engine
    if not isinstance(engine, HFEngine):
        raise InputError(f"numerics: got {engine.name}, wanted a judge that runs its model here")
    if not pairs:
        raise InputError("numerics: got no pairs, wanted at least 1")
    obstacle = engine.model.renumber_obstacle
    modes = []
    verdicts: dict[MemoryMode, list[tuple[int, ...] | None]] = {}
    for memory in MODES:
        if memory == "renumber" and obstacle:
            continue
        on_mode(memory)
        engine.features.clear()
        hits, misses = engine.features.hits, engine.features.misses
        sampled = _episodes(judge, pairs, memory, temperature, seed)
        hits, misses = engine.features.hits - hits, engine.features.misses - misses
        reused = hits / max(1, hits + misses)
        modes.append(_drift(engine, memory, sampled, temperature, reused))
        greedy = _episodes(judge, pairs, memory, 0.0, seed)
        verdicts[memory] = [
            tuple(t.outcome.judgments.as_dict().values()) if t.outcome.judgments is not None else None
            for t in greedy
        ]
    shares = {
        f"{one}/{other}": sum(a != b for a, b in zip(verdicts[one], verdicts[other], strict=True))
        / len(pairs)
        for one, other in combinations(verdicts, 2)
    }
    return NumericsReport(
        engine.name.removeprefix("hf:"),
        str(engine.model.device),
        str(engine.model.dtype).removeprefix("torch."),
        len(pairs),
        temperature,
        tuple(modes),
        shares,
        {mode: sum(verdict is None for verdict in own) for mode, own in verdicts.items()},
    )


def _episodes(
    judge: Judge, pairs: Sequence[Pair], memory: MemoryMode, temperature: float, seed: int
) -> list[Trajectory]:
    """Runs one episode per pair, in the order of the pairs."""
    changes = {"memory": memory, "temperature": temperature, "top_p": 1.0, "guided": False}
    episode = judge.settings.episode.model_copy(update=changes)
    settings = judge.settings.model_copy(update={"episode": episode})
    mode_judge = Judge(judge.engine, settings, templates=judge.templates)
    trajectories: dict[str, Trajectory] = {}
    for finished in mode_judge.judge_pairs(pairs, seed=seed):
        if finished.trajectory is None:
            assert finished.error is not None
            raise finished.error
        trajectories[finished.item.id] = finished.trajectory
    return [trajectories[pair.id] for pair in pairs]


def _drift(
    engine: HFEngine,
    memory: MemoryMode,
    trajectories: Sequence[Trajectory],
    temperature: float,
    features_reused: float,
) -> ModeDrift:
    rounds = [record for trajectory in trajectories for record in trajectory.rounds]
    tokens = sum(len(record.token_ids or ()) for record in rounds)
    prompt = sum(record.prompt_tokens or 0 for record in rounds)
    prefilled = sum(record.prefilled_tokens or 0 for record in rounds)
    largest = mean = reason = None
    if memory == "renumber":
        reason = "no packed forward: turned keys are for inference only"
    else:
        differences = torch.cat([torch.zeros(0), *_differences(engine, trajectories, temperature)])
        if len(differences):
            largest, mean = float(differences.max()), float(differences.mean())
        else:
            reason = "nothing was sampled"
    return ModeDrift(
        memory=memory,
        episodes=len(trajectories),
        tokens=tokens,
        largest=largest,
        mean=mean,
        prefilled_share=prefilled / prompt if prompt else 0.0,
        features_reused=features_reused,
        reason=reason,
    )


def _differences(
    engine: HFEngine, trajectories: Sequence[Trajectory], temperature: float
) -> Iterator[torch.Tensor]:
    """The |difference| of each sampled token, by round."""
    model, factor = engine.model, engine.model.patch_size * engine.model.merge_size
    loader = FrameLoader(open_reader(), FrameCache(_FRAME_BYTES))
    try:
        packs = pack_group(trajectories, engine.markup, (factor, factor), max_tokens=_PACK_TOKENS)
        for pack in packs:
            with torch.no_grad():
                recomputed = packed_logprobs(
                    model, pack, loader.load, temperature=temperature, banned=engine.vocabulary.banned
                )
            for owner, numbers, values in zip(pack.trajectories, pack.rounds_of, recomputed, strict=True):
                for number in dict.fromkeys(numbers.tolist()):
                    sampled = trajectories[owner].rounds[number].logprobs
                    if sampled is not None:  # None if the logprobs were not finite
                        of_round = values.cpu()[torch.from_numpy(numbers == number)]
                        yield (of_round - torch.tensor(sampled)).abs()
    finally:
        loader.close()


def default_pairs(folder: Path, limit: int, seed: int = 0) -> list[Pair]:
    """Makes pairs of the synthetic world in `folder`."""
    from vrthinker.data.pairs import load_pairs
    from vrthinker.world.files import PAIRS_FILE, make_world
    from vrthinker.world.world import PRESETS

    make_world(folder, PRESETS["easy"], pairs=limit, seed=seed, prefix="easy")
    return list(load_pairs(folder / PAIRS_FILE))
