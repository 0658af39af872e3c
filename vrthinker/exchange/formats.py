"""Samples spelled in the formats of other trainers.

- sharegpt (LLaMA-Factory: traces.jsonl, dataset_info.json): `gpt` turns are learned; in samples of the kind
  *round* the last one only, if the trainer is given `mask_history: true`.
- ms-swift (traces.jsonl): assistant messages with `"loss": true` are learned.
- trl (traces.jsonl): the completion is learned. TRL has no mask for the kind *episode* beside pictures.
- verl (traces.parquet): messages with true in `learned`; verl's own class learns every assistant message.

Invariant: a text has as many placeholders as the sample has pictures, whatever a caption says.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from vrthinker.episode.tools.registry import ToolRegistry
from vrthinker.episode.trajectory import FrameRecord
from vrthinker.exchange.samples import Sample, Turn

DATASET = "vrthinker_traces"
"""The name of the exported set in LLaMA-Factory's dataset_info.json."""
WRAPPER = re.compile(r"<tool_response>\n(.*)\n</tool_response>", re.DOTALL)
"""An outcome that LLaMA-Factory's Qwen templates write in the same letters around an observation."""
RECORD = "vrthinker"
"""The field with what else an import needs, as a JSON text. Trainers pass over it."""


@dataclass(frozen=True)
class TraceFormat:
    """A format of traces.

    Attributes:
        file: The name of the file.
        row: A function from a sample and the paths of its pictures to a row.
        absolute: Whether pictures have absolute paths, because the trainer does not join them with a folder.
        advice: Kind of the samples -> what the trainer must be told.
    """

    file: str
    row: Callable[[Sample, Sequence[str]], dict[str, Any]]
    absolute: bool
    advice: Mapping[str, str]


def record_of(sample: Sample) -> str:
    """What an import needs beside the texts, as JSON."""
    trajectory = sample.trajectory
    first = [shown.frame_number for shown in trajectory.rounds[0].live if shown.outcome == 0]
    value = {
        "schema_version": 1,
        "id": trajectory.id,
        "seed": trajectory.seed,
        "round": sample.round_number,
        "rounds": len(trajectory.rounds),
        "first_frames": first,
        "n_frames": trajectory.n_frames,
        "n_frames_1": trajectory.n_frames_1,
        "settings": trajectory.settings.model_dump(mode="json"),
    }
    return json.dumps(value, ensure_ascii=False)


def _sharegpt(sample: Sample, images: Sequence[str]) -> dict[str, Any]:
    turns = list(sample.turns)
    system = turns.pop(0).text if turns[0].role == "system" else ""
    return {
        "conversations": [_said(turn) for turn in turns],
        "system": system,
        "tools": json.dumps(ToolRegistry().schemas(), ensure_ascii=False),
        "images": list(images),
        "id": sample.trajectory.id,
        RECORD: record_of(sample),
    }


def _said(turn: Turn) -> dict[str, str]:
    if turn.role == "assistant":
        return {"from": "gpt", "value": turn.text}
    wrapped = WRAPPER.fullmatch(turn.text) if turn.outcome else None
    if wrapped is not None and "<tool_response>" not in wrapped[1]:
        return {"from": "observation", "value": wrapped[1]}
    return {"from": "human", "value": turn.text}


def _ms_swift(sample: Sample, images: Sequence[str]) -> dict[str, Any]:
    messages: list[dict[str, Any]] = []
    for turn in sample.turns:
        message: dict[str, Any] = {"role": turn.role, "content": turn.text}
        if turn.role == "assistant":
            message["loss"] = turn.learned
        messages.append(message)
    return {
        "messages": messages,
        "images": list(images),
        "id": sample.trajectory.id,
        RECORD: record_of(sample),
    }


def _trl(sample: Sample, images: Sequence[str]) -> dict[str, Any]:
    # Pictures have places of their own here, so nothing in a text can be taken for one.
    messages = [
        {
            "role": turn.role,
            "content": [
                {"type": "image", "text": None}
                if isinstance(part, FrameRecord)
                else {"type": "text", "text": part}
                for part in turn.parts
            ],
        }
        for turn in sample.turns
    ]
    shared = {"images": list(images), "id": sample.trajectory.id, RECORD: record_of(sample)}
    if sample.round_number is None:
        return {"messages": messages, **shared}
    return {"prompt": messages[:-1], "completion": messages[-1:], **shared}


def _verl(sample: Sample, images: Sequence[str]) -> dict[str, Any]:
    messages = [{"role": turn.role, "content": turn.text} for turn in sample.turns]
    trajectory = sample.trajectory
    judgments = trajectory.outcome.judgments
    answer = None if judgments is None else json.dumps(judgments.as_dict())
    return {
        "data_source": DATASET,
        "prompt": messages[:-1],
        "messages": messages,
        "learned": [turn.learned for turn in sample.turns],
        "images": [{"image": path} for path in images],
        "ability": "video_reward",
        "reward_model": {"style": "rule", "ground_truth": answer},
        "extra_info": {"id": trajectory.id, "round": sample.round_number, RECORD: record_of(sample)},
    }


TRACE_FORMATS: Mapping[str, TraceFormat] = {
    "sharegpt": TraceFormat(
        "traces.jsonl",
        _sharegpt,
        False,
        {
            "round": f"LLaMA-Factory: dataset: {DATASET}, and mask_history: true, so that each round is "
            "learned once",
            "episode": f"LLaMA-Factory: dataset: {DATASET}, and mask_history: false",
        },
    ),
    "ms-swift": TraceFormat(
        "traces.jsonl",
        _ms_swift,
        True,
        {kind: "ms-swift: the messages' own loss flags say what is learned" for kind in ("round", "episode")},
    ),
    "trl": TraceFormat(
        "traces.jsonl",
        _trl,
        True,
        {
            "round": "TRL: completion_only_loss, its default for prompt and completion, learns the round; "
            "cast images to a list of datasets.Image",
            "episode": "TRL: refuses assistant_only_loss beside pictures, so prompts and outcomes would be "
            "learned too; use --samples round",
        },
    ),
    "verl": TraceFormat(
        "traces.parquet",
        _verl,
        True,
        {
            "round": "verl: MultiTurnSFTDataset learns every assistant turn and does not read `learned`, so "
            "earlier rounds would be learned again in contexts that they were not written in; give it a "
            "class that reads `learned`",
            "episode": "verl: MultiTurnSFTDataset learns every round once",
        },
    ),
}
"""Name on the command line -> format."""


def dataset_info() -> dict[str, Any]:
    """The entry of the exported set in LLaMA-Factory's dataset_info.json.

    The column `tools` is left out, because the system prompt describes the tools already.
    """
    return {
        "file_name": TRACE_FORMATS["sharegpt"].file,
        "formatting": "sharegpt",
        "columns": {"messages": "conversations", "system": "system", "images": "images"},
        "tags": {
            "role_tag": "from",
            "content_tag": "value",
            "user_tag": "human",
            "assistant_tag": "gpt",
            "observation_tag": "observation",
            "function_tag": "function_call",
            "system_tag": "system",
        },
    }
