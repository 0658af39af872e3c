"""The limits that a user may have a reason to raise: name, value, unit and what each bounds.

A limit keeps an input that nobody trusts (a clip, a checkpoint) from taking all of a machine's memory or
time. It is not a statement about what is sensible: whoever trusts an input raises the limit by an environment
variable of the same name with `VRTHINKER_` before it, such as `VRTHINKER_MAX_FRAMES=2000000`. The variable is
read whenever the limit is needed. docs/limits.md lists all limits.

Invariant: an error that a limit causes names the limit's variable (`Limit.how_to_raise`), so that a user who
meets it knows what to do.
"""

from __future__ import annotations

import os
from dataclasses import dataclass

from vrthinker.errors import InputError

_PREFIX = "VRTHINKER_"
_MAX_DIGITS = 18


@dataclass(frozen=True)
class Limit:
    """The largest allowed value of something.

    Attributes:
        name: The limit's name. `VRTHINKER_` and this name is the environment variable that changes it.
        default: The value without that variable.
        unit: The unit of the value, in the plural.
        bounds: What the limit bounds, as the end of the sentence "The limit bounds ...".
    """

    name: str
    default: int
    unit: str
    bounds: str

    @property
    def variable(self) -> str:
        """The environment variable that changes the limit."""
        return _PREFIX + self.name

    @property
    def value(self) -> int:
        """The limit that holds now.

        Raises:
            InputError: The environment variable is not a whole number of at least 1.
        """
        text = os.environ.get(self.variable)
        if text is None:
            return self.default
        number = text.strip()
        if not (number.isascii() and number.isdigit() and len(number) <= _MAX_DIGITS and int(number) >= 1):
            raise InputError(
                f"{self.variable}: got {text[:40]!r}, allowed: a whole number of {self.unit} from 1 on; "
                f"without the variable it is {self.default}"
            )
        return int(number)

    @property
    def how_to_raise(self) -> str:
        """What a user who trusts the input does, as the end of an error's message."""
        return f"set {self.variable} to allow more"


MAX_SIDE_PIXELS = Limit(
    "MAX_SIDE_PIXELS", 8192, "pixels", "the width and the height of a clip's pictures, before resizing"
)
MAX_FRAMES = Limit("MAX_FRAMES", 100_000, "frames", "the number of frames of one clip")
MAX_CLIP_PIXELS = Limit(
    "MAX_CLIP_PIXELS",
    16_000_000_000,
    "pixels",
    "the pixels of all frames of one clip together (width x height x frames), and so the longest time that "
    "decoding the clip can take",
)
MAX_READ_SECONDS = Limit(
    "MAX_READ_SECONDS",
    60,
    "seconds",
    "the time that opening a clip, or reading one packet of it from the disk, may take",
)

MAX_MEMORY_BYTES = Limit(
    "MAX_MEMORY_BYTES",
    2 << 30,
    "bytes",
    "the size of a clip that is given as bytes or as an open file, and of the frames that are taken from an "
    "iterator",
)

MAX_FRAME_PIXELS = Limit(
    "MAX_FRAME_PIXELS",
    16_777_216,
    "pixels",
    "the pixels of one frame as the model sees it: a checkpoint's `resize.max_pixels`",
)
MAX_CHECKPOINT_LAYERS = Limit(
    "MAX_CHECKPOINT_LAYERS", 1024, "layers", "the depth of a checkpoint's text tower and of its vision tower"
)
MAX_CHECKPOINT_WIDTH = Limit(
    "MAX_CHECKPOINT_WIDTH", 1 << 18, "numbers", "the width of a checkpoint's layers: its hidden sizes"
)
MAX_TOKENIZER_BYTES = Limit(
    "MAX_TOKENIZER_BYTES",
    128 << 20,
    "bytes",
    "the size of a checkpoint's tokenizer.json, and of every other file beside the weights",
)
MAX_JSON_BYTES = Limit(
    "MAX_JSON_BYTES",
    16 << 20,
    "bytes",
    "the size of a JSON file of a run: its settings or a checkpoint's state",
)
MAX_YAML_BYTES = Limit("MAX_YAML_BYTES", 256 << 10, "bytes", "the size of a recipe of a training run")
MAX_ANNOTATION_BYTES = Limit(
    "MAX_ANNOTATION_BYTES",
    256 << 20,
    "bytes",
    "the size of a JSON file of preference data or traces that is imported",
)
MAX_TRACE_TOKENS = Limit(
    "MAX_TRACE_TOKENS", 1 << 22, "tokens", "the tokens that the frames of one trace take, in all its messages"
)

LIMITS = (
    *(MAX_SIDE_PIXELS, MAX_FRAMES, MAX_CLIP_PIXELS, MAX_READ_SECONDS, MAX_MEMORY_BYTES),
    *(MAX_FRAME_PIXELS, MAX_CHECKPOINT_LAYERS, MAX_CHECKPOINT_WIDTH, MAX_TOKENIZER_BYTES),
    *(MAX_JSON_BYTES, MAX_YAML_BYTES, MAX_ANNOTATION_BYTES, MAX_TRACE_TOKENS),
)
"""All limits, in the order of docs/limits.md."""
