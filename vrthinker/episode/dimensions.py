"""The dimensions of a judgment, preferences, judgments, and the names of the dimensions per dataset.

The four codes are fixed (method section 1). Their names and explanations differ by dataset. The model knows
them only from the prompt.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping
from typing import Annotated, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict

from vrthinker.errors import InputError


class Dimension(enum.StrEnum):
    """The dimensions of a judgment, in the order of the answer line."""

    TA = "TA"
    """Alignment with the text."""
    VQ = "VQ"
    """Visual quality."""
    MQ = "MQ"
    """Motion quality."""
    OA = "OA"
    """Overall."""


class Preference(enum.IntEnum):
    """The preference for one of the two videos, or a tie.

    Files hold its number, which it equals. It is always true, a tie too, so that `if verdict.overall:` asks
    whether there is a verdict. Printed, it is "tie", "video 1" or "video 2".
    """

    TIE = 0
    VIDEO_1 = 1
    VIDEO_2 = 2

    def __bool__(self) -> bool:
        return True

    def __str__(self) -> str:
        return "tie" if self is Preference.TIE else f"video {int(self)}"

    def __format__(self, specification: str) -> str:
        return format(str(self), specification)

    def swapped(self) -> Preference:
        """The same preference if the two videos change places."""
        return Preference((0, 2, 1)[self])


class Confidence(enum.IntEnum):
    """The model's statement of its confidence (`CF`)."""

    HIGH = 1
    MIDDLE = 2
    LOW = 3


class Judgments(BaseModel):
    """The content of an answer: one preference per dimension."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    TA: Preference
    VQ: Preference
    MQ: Preference
    OA: Preference

    def __str__(self) -> str:
        return ", ".join(f"{dimension.value}: {getattr(self, dimension.value)}" for dimension in Dimension)

    def as_dict(self) -> dict[str, int]:
        """`{"TA": 1, "VQ": 0, "MQ": 2, "OA": 1}`, in the order of the answer line."""
        return {dimension.value: int(getattr(self, dimension.value)) for dimension in Dimension}

    def swapped(self) -> Judgments:
        """The same judgments if the two videos change places."""
        return Judgments(**{d.value: getattr(self, d.value).swapped() for d in Dimension})


def _known(name: object) -> object:
    if isinstance(name, str) and name not in DATASETS:
        allowed = ", ".join(sorted(DATASETS))
        raise ValueError(f"dataset: got {name!r}, allowed: {allowed}")
    return name


DatasetName = Annotated[str, BeforeValidator(_known)]


class DimensionText(BaseModel):
    """How the prompt names and explains one dimension."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    code: Literal["TA", "VQ", "MQ", "OA"]
    name: str
    explanation: str


_OVERALL = DimensionText(
    code="OA",
    name="Overall",
    explanation="which video a careful viewer would keep, all dimensions weighed together",
)


def _texts(
    alignment: tuple[str, str], visual: tuple[str, str], motion: tuple[str, str]
) -> tuple[DimensionText, ...]:
    named = zip(("TA", "VQ", "MQ"), (alignment, visual, motion), strict=True)
    return (
        *(DimensionText(code=code, name=name, explanation=text) for code, (name, text) in named),
        _OVERALL,
    )


_ALIGNMENT = (
    "how well what happens in the video matches the caption: subjects, attributes, actions, place, camera"
)

DATASETS: Mapping[str, tuple[DimensionText, ...]] = {
    "videogen-reward": _texts(
        ("Text Alignment", _ALIGNMENT),
        (
            "Visual Quality",
            "clarity, detail, lighting and freedom from noise, blur and artefacts, frame by frame",
        ),
        (
            "Motion Quality",
            "whether movement is smooth, stable, physically plausible and of a fitting amount",
        ),
    ),
    "rapidata": _texts(
        ("Alignment", _ALIGNMENT),
        ("Preference", "visual appeal: which video is nicer to look at, apart from the caption"),
        ("Coherence", "whether objects keep their shape and identity and movement makes sense over time"),
    ),
    "mj-bench-video": _texts(
        ("Alignment", _ALIGNMENT),
        ("Fineness", "sharpness, detail and freedom from visual artefacts"),
        (
            "Coherence & Consistency",
            "whether subjects, background and movement stay consistent and plausible over time",
        ),
    ),
    "genai-bench": _texts(
        ("Text Alignment", _ALIGNMENT),
        (
            "Visual Quality",
            "clarity, detail, lighting and freedom from noise, blur and artefacts, frame by frame",
        ),
        (
            "Motion Quality",
            "whether movement is smooth, stable, physically plausible and of a fitting amount",
        ),
    ),
}
"""Dataset -> the four dimensions as its annotators knew them (method section 1). GenAI-Bench has only an
overall label. Its other three dimensions have VideoGen-Reward's wording, so that the model still considers
them."""

DEFAULT_DATASET = "videogen-reward"


def dimension_texts(dataset: str | None) -> tuple[DimensionText, ...]:
    """The four dimensions' names and explanations for a dataset (None: the default dataset).

    Raises:
        InputError: The dataset is unknown.
    """
    name = dataset or DEFAULT_DATASET
    if name not in DATASETS:
        raise InputError(f"dataset: got {name!r}, allowed: {', '.join(sorted(DATASETS))}")
    return DATASETS[name]
