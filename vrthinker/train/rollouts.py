"""Rollouts of GRPO: groups of episodes that the policy samples, until enough of them say something.

A *refresh* is what is sampled between two updates of the sampler's weights: the groups for the next few
optimizer steps. With dynamic sampling (DAPO; method section 5), a group whose final answers are all equally
accurate is dropped, and the next pair is drawn in its place, up to a bound.

A refresh is a folder of draws. Each draw is a collection (`teacher.py`), so that a finished episode is never
lost or sampled again, however the process ends, and so that several processes share one draw.

Invariants: which pairs are drawn, in which order of their clips, and with which seeds, follows from the run's
seed, the refresh and the pair alone. All episodes of a group see the clips in one order.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from pydantic import Field

from vrthinker.bounded_files import read_json
from vrthinker.data.pairs import Pair
from vrthinker.episode.settings import EpisodeSettings
from vrthinker.episode.trajectory import Trajectory, load_trajectories
from vrthinker.errors import InputError
from vrthinker.judge import Judge
from vrthinker.judge_configuration import LocalEngine
from vrthinker.progress import Progress, counted
from vrthinker.records.files import replace_file
from vrthinker.records.verdicts import read_verdicts
from vrthinker.reward.group import EpisodeTruth, is_failed
from vrthinker.reward.scoring import GroupRewards, mean_metrics, score_group
from vrthinker.reward.settings import RewardSettings
from vrthinker.train.loop.interrupts import StepInterrupted, signal_seen
from vrthinker.train.loop.ranks import Ranks
from vrthinker.train.settings import StageSettings
from vrthinker.train.teacher import EPISODES, VERDICTS, collect
from vrthinker.train.trials import Trial

ROLLOUTS = "rollouts"
"""The folder of the sampled episodes in a run's folder."""
REFRESH_FILE = "refresh.json"
_MAX_REFRESH_BYTES = 1 << 30
_SAME = 1e-9
"""Accuracies that differ by less are the same."""


class RolloutSettings(StageSettings):
    """How groups of episodes are sampled. Defaults are the paper's where it says something."""

    group_size: int = Field(8, ge=2, le=1024)
    """Number of episodes per group: of one pair, in one order of its clips."""
    temperature: float = Field(1.0, ge=1e-3, le=10.0)
    dynamic: bool = True
    """Drop groups whose final answers are all equally accurate, and draw others in their place."""
    most_draws: float = Field(3.0, ge=1.0, le=100.0)
    """The most groups that are drawn, as a multiple of those wanted. Then it trains on what it has."""
    swap: bool = True
    """Draw for each group whether its clips are judged in the other order, with the labels turned too."""
    batch_size: int = Field(64, ge=1, le=4096)
    """Number of episodes that advance together."""
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    """The dtype of sampling: by default bfloat16 on a GPU, float32 on a CPU."""
    engine: LocalEngine = "hf"
    """What samples: transformers, or vLLM (docs/engines.md)."""
    vllm_process: bool = False
    """Whether vLLM runs in a process of its own. Under torchrun it has to."""


@dataclass(frozen=True)
class Group:
    """The episodes of one pair.

    Attributes:
        id: The pair's id, and how often the pairs were gone through when it was drawn.
        trials: What was sampled.
        trajectories: The episode of each trial; None if it could not start.
        rewards: The reward of each episode; None for one that failed.
    """

    id: str
    trials: tuple[Trial, ...]
    trajectories: tuple[Trajectory | None, ...]
    rewards: GroupRewards

    @property
    def is_telling(self) -> bool:
        """Whether its valid episodes differ in how accurate their final answers are."""
        found = [accuracy for accuracy in self.rewards.accuracy if accuracy is not None]
        return len(found) > 1 and max(found) - min(found) > _SAME

    @property
    def has_reward(self) -> bool:
        """Whether some of its episodes have a reward."""
        return any(total is not None for total in self.rewards.totals)


@dataclass(frozen=True)
class Refresh:
    """What was sampled between two updates of the sampler's weights.

    Attributes:
        number: Its number, from 0.
        groups: The groups to train on.
        drawn: All groups that were drawn, in order.
        metrics: Metrics over all groups that were drawn: what the policy does, whatever is trained on.
    """

    number: int
    groups: tuple[Group, ...]
    drawn: tuple[Group, ...]
    metrics: Mapping[str, float]


class Rollouts:
    """Samples the groups of a run, refresh after refresh.

    Args:
        settings: How groups are sampled.
        reward: What their episodes earn.
        pairs: The labelled pairs.
        truth_of: A function that returns the truth about a trial's pair in the trial's order.
        seed: The run's seed.
        folder: The folder of the rollouts.
        ranks: The processes that sample together.
        run: What else the episodes depend on, such as the base's weights, as JSON values.
    """

    def __init__(
        self,
        settings: RolloutSettings,
        reward: RewardSettings,
        pairs: Sequence[Pair],
        *,
        truth_of: Callable[[Trial], EpisodeTruth],
        seed: int,
        folder: Path,
        ranks: Ranks,
        run: Mapping[str, Any] | None = None,
    ) -> None:
        self._run = {**(run or {}), "pairs_sha256": _digest(pairs), "swap": settings.swap}
        self._settings, self._reward, self._pairs = settings, reward, list(pairs)
        self._truth_of, self._seed, self._folder, self._ranks = truth_of, seed, folder, ranks

    def sample(self, number: int, judge: Judge | None, *, wanted: int, weights: str) -> Refresh:
        """Samples a refresh, or the rest of one that was begun. An episode that is recorded stays as it is.

        All processes call this; the episodes are shared among them.

        Args:
            number: The number of the refresh.
            judge: The judge, whose engine has the weights to sample from. None if these are gone: then every
                episode must be recorded already.
            wanted: The number of groups to train on.
            weights: What the weights are, such as the number of finished steps. A folder with episodes of
                other weights is refused.

        Raises:
            InputError: The folder holds episodes of other settings or weights, the judge would not sample
                freely, or there is no judge and an episode is missing.
            VRThinkerError: Nothing works any more, or something could not be written.
            StepInterrupted: A signal came.
        """
        if judge is not None:
            refuse_what_cannot_be_trained(judge.settings.episode)
        folder = self._folder / f"refresh-{number:05d}"
        position = self._ranks.together(lambda: self._position(number))
        most = max(wanted, int(wanted * self._settings.most_draws)) if self._settings.dynamic else wanted
        kept: list[Group] = []
        drawn: list[Group] = []
        while len(kept) < wanted and len(drawn) < most:
            count = min(wanted - len(kept), most - len(drawn))
            trials = self._trials(position + len(drawn), count)
            draw = folder / f"draw-{len(drawn):05d}"
            self._collect(draw, judge, trials, weights=weights, told=(len(kept), wanted))
            groups = self._ranks.together(functools.partial(self._groups, trials, draw))
            drawn += groups
            kept += [
                group
                for group in groups
                if group.is_telling or (group.has_reward and not self._settings.dynamic)
            ]
        refresh = Refresh(number, tuple(kept), tuple(drawn), _metrics(drawn, kept))
        self._ranks.first(lambda: self._record(folder, refresh))
        if len(kept) < wanted:
            Progress().say(
                f"rollouts: refresh {number}: {counted(len(drawn), 'group')} drawn, {len(kept)} of {wanted} "
                "wanted can be learned from; the steps of this refresh share these"
            )
        return refresh

    def _position(self, number: int) -> int:
        """The number of pairs that earlier refreshes have drawn."""
        found = [
            read_json(self._folder / f"refresh-{n:05d}" / REFRESH_FILE, _MAX_REFRESH_BYTES).get("drawn")
            for n in range(number)
        ]
        if not all(isinstance(drawn, int) for drawn in found):
            raise InputError(f"{self._folder}: its {REFRESH_FILE} files are not those of this run")
        return sum(found)

    def _trials(self, start: int, count: int) -> list[Trial]:
        trials = []
        for place in range(start, start + count):
            epoch, index = divmod(place, len(self._pairs))
            order = np.random.default_rng([self._seed, 53, epoch]).permutation(len(self._pairs))
            pair = self._pairs[int(order[index])]
            swapped = self._settings.swap and _coin(self._seed, epoch, pair.id)
            first = epoch * self._settings.group_size + 1
            trials += [Trial(pair, first + member, swapped) for member in range(self._settings.group_size)]
        return trials

    def _collect(
        self,
        folder: Path,
        judge: Judge | None,
        trials: Sequence[Trial],
        *,
        weights: str,
        told: tuple[int, int],
    ) -> None:
        if judge is None:
            self._ranks.together(lambda: _refuse_unfinished(folder, trials))
            return
        progress, done = Progress(), 0

        def count(_: object) -> None:
            nonlocal done
            done += 1
            if signal_seen() is not None:
                raise StepInterrupted
            line = f"rollouts: {told[0]} of {told[1]} groups; sampling: {done} of {len(trials)} episodes"
            progress.show("rollouts", done, len(trials), line=line, every=max(1, len(trials)))

        def sample_some() -> bool:
            try:
                collect(
                    judge.configuration,
                    lambda: contextlib.nullcontext(judge),
                    trials,
                    folder,
                    seed=_number(f"rollouts:{self._seed}:{folder.parent.name}:{folder.name}"),
                    run={**self._run, "weights": weights},
                    on_record=count,
                    reopen=False,
                )
            except StepInterrupted:
                return False
            return True

        with progress:
            # Every process waits here until all episodes are there.
            if not all(self._ranks.gather(self._ranks.together(sample_some))):
                raise StepInterrupted

    def _groups(self, trials: Sequence[Trial], folder: Path) -> list[Group]:
        latest = {trajectory.id: trajectory for trajectory in load_trajectories(folder / EPISODES)}
        by_id: dict[str, list[Trial]] = {}
        for trial in trials:
            # A pair that is drawn again in a later pass over the pairs is another group.
            again = (trial.sample - 1) // self._settings.group_size + 1
            by_id.setdefault(f"{trial.source.id}, pass {again}", []).append(trial)
        groups = []
        for group_id, members in by_id.items():
            trajectories = tuple(latest.get(trial.id) for trial in members)
            truths = [self._truth_of(trial) for trial in members]
            rewards = score_group(self._reward, trajectories, truths)
            groups.append(Group(group_id, tuple(members), trajectories, rewards))
        return groups

    def _record(self, folder: Path, refresh: Refresh) -> None:
        described = {
            "schema_version": 1,
            "refresh": refresh.number,
            "drawn": len(refresh.drawn),
            "kept": [group.id for group in refresh.groups],
            "metrics": dict(refresh.metrics),
            "rewards": {
                group.id: {"total": group.rewards.totals, "terms": dict(group.rewards.terms)}
                for group in refresh.drawn
            },
        }
        replace_file(folder / REFRESH_FILE, (json.dumps(described, indent=1) + "\n").encode())


def refuse_what_cannot_be_trained(episode: EpisodeSettings) -> None:
    """Refuses episodes of which training could not compute how probable each token was.

    Raises:
        InputError: Rounds are guided, cut to a nucleus, or sampled under `renumber`.
    """
    for name, got, allowed in (
        ("guided", episode.guided, False),
        ("top_p", episode.top_p, 1.0),
    ):
        if got != allowed:
            raise InputError(
                f"rollouts: {name}: got {got}, allowed: {allowed}; training needs the probability with which "
                "each token was really drawn"
            )
    if episode.memory == "renumber":
        raise InputError(
            "rollouts: memory: got 'renumber', allowed: rerender, evict; no packed forward reproduces it"
        )


def _refuse_unfinished(folder: Path, trials: Sequence[Trial]) -> None:
    recorded = {record.id for record in read_verdicts(folder / VERDICTS)}
    if missing := sum(trial.id not in recorded for trial in trials):
        raise InputError(
            f"{folder}: lacks {missing} of {len(trials)} episodes, and the weights that sampled it are gone; "
            "put its files back, or train into another folder"
        )


def _digest(pairs: Sequence[Pair]) -> str:
    """A SHA-256 of what is asked about each pair."""
    digest = hashlib.sha256()
    for pair in pairs:
        digest.update(pair.model_dump_json().encode("utf-8", "surrogatepass") + b"\n")
    return digest.hexdigest()


def _metrics(drawn: Sequence[Group], kept: Sequence[Group]) -> dict[str, float]:
    """What the policy does, over all episodes that were drawn and did not fail."""
    metrics = dict(mean_metrics([group.rewards for group in drawn]))
    metrics["rollouts/groups_drawn"] = float(len(drawn))
    metrics["rollouts/groups_kept"] = float(len(kept))
    metrics["rollouts/telling_share"] = sum(group.is_telling for group in drawn) / max(1, len(drawn))
    valid = [[total for total in group.rewards.totals if total is not None] for group in drawn]
    metrics["rollouts/short_groups"] = sum(len(of_group) < 2 for of_group in valid) / max(1, len(drawn))
    dead = [of_group for of_group in valid if len(of_group) > 1 and max(of_group) == min(of_group)]
    metrics["rollouts/dead_groups"] = len(dead) / max(1, len(drawn))
    judged = [t for group in drawn for t in group.trajectories if t is not None and not is_failed(t)]
    if judged:
        rounds = [record for trajectory in judged for record in trajectory.rounds]
        metrics["rollouts/tool_calls"] = sum(t.tool_calls for t in judged) / len(judged)
        metrics["rollouts/rounds"] = len(rounds) / len(judged)
        metrics["rollouts/verdicts"] = sum(t.outcome.judgments is not None for t in judged) / len(judged)
        lengths = [len(record.token_ids) for record in rounds if record.token_ids is not None]
        metrics["rollouts/sampled_tokens_per_round"] = sum(lengths) / max(1, len(lengths))
    right = [
        trajectory is not None
        and trajectory.outcome.judgments is not None
        and int(trajectory.outcome.judgments.OA) == trial.pair.labels["OA"]
        for group in drawn
        for trial, trajectory in zip(group.trials, group.trajectories, strict=True)
        if trial.pair.labels is not None
        and "OA" in trial.pair.labels
        and trajectory is not None
        and not is_failed(trajectory)
    ]
    if right:
        metrics["rollouts/oa_tau"] = sum(right) / len(right)
    return metrics


def _coin(seed: int, epoch: int, pair_id: str) -> bool:
    return bool(_number(f"order:{seed}:{epoch}:{pair_id}") & 1)


def _number(text: str) -> int:
    digest = hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()
    return int.from_bytes(digest[:6], "big")


def iter_valid(group: Group) -> Iterator[tuple[int, Trajectory]]:
    """The places and trajectories of a group's episodes that have a reward and sampled something."""
    for place, (trajectory, reward) in enumerate(zip(group.trajectories, group.rewards.totals, strict=True)):
        if trajectory is not None and reward is not None and trajectory.rounds:
            yield place, trajectory
