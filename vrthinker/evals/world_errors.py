"""The errors of a judge on the synthetic world, counted per cause, from the recorded episodes of a run.

`world_slips.py` finds the slips. Here they are counted, and written beside the run: `errors.json` with the
counts and every episode's slips, and `errors/` with the evidence pages of the worst episodes.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vrthinker.episode.trajectory import Trajectory
from vrthinker.errors import unwritable
from vrthinker.evals.world import load_episodes
from vrthinker.evals.world_gaps import new_frames
from vrthinker.evals.world_slip_kinds import READING, Slip, SlipKind
from vrthinker.evals.world_slips import Dialect, dialect_of, is_judged, slips_of
from vrthinker.evals.world_truth import page_truth
from vrthinker.records.files import replace_file
from vrthinker.report.page.page import write_page
from vrthinker.world.world import PairTruth, WorldConfig

ERRORS_FILE, PAGES_FOLDER, INDEX_FILE = "errors.json", "errors", "index.txt"


@dataclass(frozen=True)
class EpisodeSlips:
    """The slips of one episode.

    Attributes:
        id: The pair's id.
        wrong: Whether the overall verdict is wrong or missing.
        frames: The number of frames that it was shown, again if they were shown again.
        rounds: The number of its rounds.
        broken_rounds: The number of rounds with a broken form.
        slips: The slips in the order in which they were made.
    """

    id: str
    wrong: bool
    frames: int
    rounds: int
    broken_rounds: int
    slips: tuple[Slip, ...]

    @property
    def cause(self) -> SlipKind | None:
        """The kind of the first slip that matters, if the verdict is wrong and there is one."""
        if not self.wrong:
            return None
        return next((slip.kind for slip in self.slips if slip.matters), None)


@dataclass(frozen=True)
class KindCount:
    """How often a kind of slip was made.

    Attributes:
        slips: The number of slips.
        rate: That number per 100 frames, or per 100 rounds; None without any.
        per: What the rate is per.
        episodes: The number of episodes with such a slip.
        causes: The number of wrong verdicts whose cause it is.
    """

    slips: int
    rate: float | None
    per: str
    episodes: int
    causes: int


@dataclass(frozen=True)
class WorldErrors:
    """The slips of a run.

    Attributes:
        episodes: The judged episodes.
        not_judged: The number of pairs that are not judged yet, or whose episode ended by an error.
        dialect: The optional words that the judge uses.
    """

    episodes: tuple[EpisodeSlips, ...]
    not_judged: int
    dialect: Dialect

    @property
    def frames(self) -> int:
        """The number of frames that all episodes were shown."""
        return sum(episode.frames for episode in self.episodes)

    @property
    def rounds(self) -> int:
        """The number of rounds of all episodes."""
        return sum(episode.rounds for episode in self.episodes)

    @property
    def broken_rounds(self) -> int:
        """The number of rounds that cannot be read as a whole, or are not well formed."""
        return sum(episode.broken_rounds for episode in self.episodes)

    @property
    def wrong(self) -> list[EpisodeSlips]:
        """The episodes with a wrong overall verdict or none; those with the most slips first."""
        return sorted(
            (episode for episode in self.episodes if episode.wrong),
            key=lambda episode: (-len(episode.slips), episode.id),
        )

    @property
    def unexplained(self) -> int:
        """The number of wrong verdicts without a slip that matters."""
        return sum(episode.cause is None for episode in self.wrong)

    def counts(self) -> dict[SlipKind, KindCount]:
        """The counts of every kind."""
        counts = {}
        for kind in SlipKind:
            numbers = [sum(slip.kind is kind for slip in episode.slips) for episode in self.episodes]
            per, of = ("100 frames", self.frames) if kind in READING else ("100 rounds", self.rounds)
            counts[kind] = KindCount(
                slips=sum(numbers),
                rate=100 * sum(numbers) / of if of else None,
                per=per,
                episodes=sum(map(bool, numbers)),
                causes=sum(episode.cause is kind for episode in self.wrong),
            )
        return counts

    def as_json(self) -> dict[str, Any]:
        """The counts as JSON values."""
        return {
            "episodes": len(self.episodes),
            "not_judged": self.not_judged,
            "rounds": self.rounds,
            "broken_rounds": self.broken_rounds,
            "frames": self.frames,
            "wrong_verdicts": len(self.wrong),
            "wrong_verdicts_unexplained": self.unexplained,
            "dialect": vars(self.dialect),
            "kinds": {kind.value: vars(count) for kind, count in self.counts().items()},
        }

    def episodes_as_json(self) -> list[dict[str, Any]]:
        """Every episode with its slips as JSON values."""
        return [
            {
                "id": episode.id,
                "wrong": episode.wrong,
                "cause": episode.cause,
                "slips": [
                    {"round": slip.round_number, "kind": slip.kind.value, "detail": slip.detail}
                    for slip in episode.slips
                ],
            }
            for episode in self.episodes
        ]


@dataclass(frozen=True)
class Diagnosis:
    """The errors of a run, and pair id -> evidence page of its worst episodes."""

    errors: WorldErrors
    pages: Mapping[str, Path]


def errors_of(
    truths: Sequence[PairTruth], trajectories: Mapping[str, Trajectory], *, span: float
) -> WorldErrors:
    """The slips of recorded episodes.

    Args:
        truths: The pairs of the run.
        trajectories: Pair id -> the episode in which the judge picked its frames itself.
        span: The value of `WorldConfig.span[0]`.
    """
    judged = [
        (t, trajectories[t.id]) for t in truths if t.id in trajectories and is_judged(trajectories[t.id])
    ]
    dialect = dialect_of(trajectory for _, trajectory in judged)
    episodes = []
    for truth, trajectory in judged:
        slips = slips_of(trajectory, truth, span=span, dialect=dialect)
        judgments = trajectory.outcome.judgments
        episodes.append(
            EpisodeSlips(
                id=truth.id,
                wrong=judgments is None or judgments.OA != truth.judgments.OA,
                frames=sum(len(new_frames(record)) for record in trajectory.rounds),
                rounds=len(trajectory.rounds),
                broken_rounds=len({slip.round_number for slip in slips if slip.kind is SlipKind.FORM}),
                slips=tuple(slips),
            )
        )
    return WorldErrors(tuple(episodes), len(truths) - len(episodes), dialect)


def diagnose(
    out: Path, *, pages: int = 8, on_page: Callable[[int, int], None] = lambda done, total: None
) -> Diagnosis:
    """Counts the errors of a run's recorded episodes, and writes them into its folder. Nothing is judged.

    Args:
        out: The run's folder, finished or not.
        pages: The most evidence pages: of the episodes with wrong verdicts and the most slips.
        on_page: A function that is called with (written pages, all pages).

    Raises:
        InputError: The folder does not hold a run with an episode.
        VRThinkerError: A file cannot be written.
    """
    truths, trajectories, run = load_episodes(out)
    span = WorldConfig.model_validate(run["world"]).span[0]
    errors = errors_of(truths, trajectories, span=span)
    by_id = {truth.id: truth for truth in truths}
    written = {episode.id: out / PAGES_FOLDER / f"{episode.id}.html" for episode in errors.wrong[:pages]}
    _clear_pages(out / PAGES_FOLDER, by_id.keys() - written.keys(), make=bool(written))
    index = []
    for done, (episode, (name, path)) in enumerate(zip(errors.wrong, written.items(), strict=False), start=1):
        lines = slip_lines(episode)
        write_page(path, trajectories[name], notes=lines, truth=page_truth(by_id[name]))
        index.append("\n  ".join([path.name, *(lines or ("no slip was found",))]))
        on_page(done, len(written))
    if written:
        replace_file(out / PAGES_FOLDER / INDEX_FILE, ("\n".join(index) + "\n").encode("utf-8", "replace"))
    about = {name: run[name] for name in ("model", "difficulty", "limit", "seed")}
    episodes = errors.episodes_as_json()
    for line in episodes:
        line["page"] = f"{PAGES_FOLDER}/{written[line['id']].name}" if line["id"] in written else None
    content = json.dumps({**about, **errors.as_json(), "by_episode": episodes}, indent=2) + "\n"
    replace_file(out / ERRORS_FILE, content.encode())
    return Diagnosis(errors, written)


def slip_lines(episode: EpisodeSlips) -> tuple[str, ...]:
    """A line for each slip of an episode; the cause of a wrong verdict is marked."""
    first = next((slip for slip in episode.slips if slip.matters), None) if episode.wrong else None
    return tuple(
        f"round {slip.round_number}, {slip.kind.words}: {slip.detail}"
        + (" (the first slip that matters)" if slip is first else "")
        for slip in episode.slips
    )


def _clear_pages(folder: Path, names: Iterable[str], *, make: bool) -> None:
    """Removes the pages of earlier calls."""
    try:
        if make:
            folder.mkdir(exist_ok=True)
        for path in (folder / INDEX_FILE, *(folder / f"{name}.html" for name in names)):
            path.unlink(missing_ok=True)
    except OSError as error:
        raise unwritable(folder, error, "remove it or grant writing") from None
