"""Small annotation files in the layouts in which sets are published, with their traps. Nothing is copied."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

SHARED = Path(__file__).resolve().parents[2] / "shared" / "data"
"""Real files of public sets, where a checkout has them beside it."""


def write_csv(path: Path, rows: Sequence[Mapping[str, Any]]) -> Path:
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    path.write_text(text.getvalue(), "utf-8")
    return path


def write_json(path: Path, value: Any) -> Path:
    path.write_text(json.dumps(value), "utf-8")
    return path


def videoalign_row(**change: Any) -> dict[str, Any]:
    return {
        "path_A": "videos/a.mp4",
        "path_B": "./videos/b.mp4",
        "prompt": "a boat on a lake",
        "VQ": "A",
        "MQ": "same",
        "TA": "B",
        "fps_A": 24.0,
        "num_frames_A": "126.0",
        "fps_B": 30.0,
        "num_frames_B": 152.0,
    } | change


def genai_row(**change: Any) -> dict[str, Any]:
    return {
        "id": 7,
        "prompt": "一只猫在弹钢琴\n",
        "video_left": "left.mp4",
        "video_right": "right.mp4",
        "vote_type": "leftvote",
    } | change


def mj_row(**change: Any) -> dict[str, Any]:
    return {
        "caption": 'a "quoted"\ncaption',
        "video_0_path": "test/1_0.mp4",
        "video_1_path": "test/1_1.mp4",
        "video_0_label": {"object": 1, "attribute": 2},
        "video_1_label": {"object": 0, "attribute": 2},
        "category_preference": {
            "Alignment": "Same",
            "Safety": "Same",
            "Fineness": "Video 1 Better",
            "Coherence & Consistency": "Video 2 better",
            "Bias": "Same",
        },
        "overall_preference": "Video 1 better",
        "discard": False,
        "video_0_total_score": 3,
        "video_1_total_score": 1,
    } | change


def rapidata_row(**change: Any) -> dict[str, Any]:
    row = {
        "prompt": "a boat",
        "file_name1": "one.mp4",
        "file_name2": "two.mp4",
        "detailedResults_Preference": "[]",
    }
    for aspect, (first, second) in {
        "Preference": (0.7, 0.3),
        "Coherence": (0.52, 0.48),
        "Alignment": (0.2, 0.8),
    }.items():
        row |= {f"weighted_results1_{aspect}": first, f"weighted_results2_{aspect}": second}
    return row | change


def feedback_row(name: str, quality: float, **change: Any) -> dict[str, Any]:
    return {
        "id": name,
        "images": [f"frames/{name}_{index:02d}.jpg" for index in range(3)],
        "text prompt": "a boat",
        "video link": f"https://example.org/{name}.mp4",
        "visual quality": quality,
        "temporal consistency": 2,
        "dynamic degree": 3,
        "text-to-video alignment": quality,
        "factual consistency": 1,
        "conversations": [{"from": "human", "value": "rate it"}],
    } | change


def unified_row(answer: str = "Video 2 is better.", **change: Any) -> dict[str, Any]:
    question = "<image>\nWhich one is better?\nText Caption: [a boat [red]\nat sea]\nAnswer."
    return {
        "conversations": [{"from": "human", "value": question}, {"from": "gpt", "value": answer}],
        "images": [f"{clip}/{index}.jpg" for clip in ("x", "y") for index in range(2)],
    } | change
