"""A pair's planted truth as the evidence page shows it, and how it is found beside the clips."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Literal

from vrthinker.episode.trajectory import Trajectory
from vrthinker.errors import InputError
from vrthinker.report.page.truth import PlantedEvent, Truth
from vrthinker.world.files import TRUTH_FILE, clip_paths, load_truths
from vrthinker.world.reading import read_round
from vrthinker.world.words import DEFECT_WORDS
from vrthinker.world.world import PairTruth


def page_truth(pair: PairTruth, *, swapped: bool = False) -> Truth:
    """A pair's truth for `write_page`.

    Args:
        pair: The pair.
        swapped: Whether its second clip was judged as video 1.
    """
    events = []
    for number, clip in enumerate(pair.clips):
        video: Literal[1, 2] = 2 if (number == 0) == swapped else 1
        for event in clip.events:
            what = ", ".join(DEFECT_WORDS[defect].strip() for defect in event.defects)
            if what:
                events.append(
                    PlantedEvent(video, event.first_index, event.end_index, what, hidden=event.hidden)
                )
    judgments = pair.judgments.swapped() if swapped else pair.judgments
    return Truth(judgments.as_dict(), tuple(events))


def find_truth(video_1: Path, video_2: Path) -> Truth | None:
    """The truth of two clips of the same pair of a world folder; None for other clips."""
    folder = video_1.absolute().parent.parent
    if not (folder / TRUTH_FILE).is_file():
        return None
    judged_clips = [os.path.realpath(video_1), os.path.realpath(video_2)]
    try:
        for pair in load_truths(folder):
            clips = [os.path.realpath(path) for path in clip_paths(folder, pair)]
            if judged_clips in (clips, clips[::-1]):
                return page_truth(pair, swapped=judged_clips != clips)
    except InputError:
        return None  # another file with the same name
    return None


def findings_of(trajectory: Trajectory) -> list[dict[int, str]]:
    """What each round of an episode found in the frames that it was just shown, in the world's words.

    It is read from the record's text alone. Empty where the text is not in the world's words, or names a
    frame that was not shown.
    """
    found: list[dict[int, str]] = []
    shown = [showing.frame_number for showing in trajectory.rounds[0].live] if trajectory.rounds else []
    for record in trajectory.rounds:
        findings = read_round(record.text).findings
        named = [event for video in findings for event in video.events or ()]
        found.append(
            {
                shown[name - 1]: " and ".join(DEFECT_WORDS[defect].strip() for defect in defects)
                for name, defects in named
                if 1 <= name <= len(shown) and defects
            }
        )
        shown = [number for tool in record.tools for number in tool.frame_numbers]
    return found
