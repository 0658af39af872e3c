"""What is wrong with data is one line, whatever the data are."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from typing import Annotated, Any, Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator
from pydantic_core import PydanticCustomError

from vrthinker.errors import (
    InputError,
    MachineError,
    UnexpectedError,
    VideoError,
    VRThinkerError,
    as_reason,
    first_problem,
    unwritable,
)


class Circle(BaseModel):
    kind: Literal["circle"]


class Square(BaseModel):
    kind: Literal["square"]


class Data(BaseModel):
    model_config = ConfigDict(extra="forbid")

    size: Annotated[int, Field(ge=1)]
    sizes: list[Annotated[int, Field(le=9)]] = []
    shape: Annotated[Circle | Square, Field(discriminator="kind")] | None = None
    either: int | bool | None = None
    named: dict[str, Data] = {}
    text: str = ""

    @field_validator("text")
    @classmethod
    def _may_be(cls, text: str) -> str:
        if text == "custom":
            raise PydanticCustomError("custom", "of my\nown")
        if text == "assert":
            raise AssertionError
        if text:
            raise ValueError(f"got {text}, allowed: nothing")
        return text

    @model_validator(mode="after")
    def _is_even(self) -> Data:
        if self.size == 13:
            raise ValueError("size: got 13\n, allowed: luck")
        return self


def refusal(data: object) -> ValidationError:
    with pytest.raises(ValidationError) as caught:
        Data.model_validate(data)
    return caught.value


def refused_json(content: bytes | str) -> ValidationError:
    with pytest.raises(ValidationError) as caught:
        Data.model_validate_json(content)
    return caught.value


class Unspeakable:
    def __repr__(self) -> str:
        raise RuntimeError("no name")


HUGE = 10**5000
NO_DATA = "Input should be a valid dictionary or instance of Data"
NO_INT = "Input should be a valid integer"
NO_TAG = "Input tag 'x' found using 'kind' does not match any of the expected tags: 'circle', 'square'"
NO_TEXT = "Input should be a valid string, unable to parse raw data as a unicode string"
TOO_MUCH = "Input should be less than or equal to 9"


@pytest.mark.parametrize(
    ("data", "line"),
    [
        ({}, "size: Field required"),
        ({"size": 0, "sizes": ["x"]}, "size: Input should be greater than or equal to 1"),
        ({"size": 1, "sizes": [1, 10]}, f"sizes.1: {TOO_MUCH}"),
        ({"size": 1, "sizes": [HUGE]}, f"sizes.0: {TOO_MUCH}"),
        ({"size": 1, "named": {"a": {"size": None}}}, f"named.a.size: {NO_INT}"),
        ({"size": 1, "either": "x"}, f"either.int: {NO_INT}, unable to parse string as an integer"),
        ({"size": 1, "either": Unspeakable()}, f"either.int: {NO_INT}"),
        ({"size": 1, "shape": {}}, "shape: Unable to extract tag using discriminator 'kind'"),
        ({"size": 1, "shape": {"kind": "x"}}, f"shape: {NO_TAG}"),
        ({"size": 1, "other": 1}, "other: Extra inputs are not permitted"),
        ({"size": 1, "a\nb\x1b\u2028": 1}, r"a\nb\x1b\u2028: Extra inputs are not permitted"),
        ({"size": 1, "\udcff": 1}, f"(file): {NO_TEXT}"),
        ({"size": 1, "text": "two\nlines"}, r"text: Value error, got two\nlines, allowed: nothing"),
        ({"size": 1, "text": "custom"}, r"text: of my\nown"),
        ({"size": 1, "text": "assert"}, "text: Assertion failed, "),
        ({"size": 13}, r"(file): Value error, size: got 13\n, allowed: luck"),
        ([], f"(file): {NO_DATA}"),
        (None, f"(file): {NO_DATA}"),
    ],
)
def test_a_problem_is_where_and_what(data: object, line: str) -> None:
    assert first_problem(refusal(data)) == line


@pytest.mark.parametrize("content", [b"", b"{", b"\xff", b"[" * 100_000, b"9" * 9000, '"\\ud"'])
def test_what_is_no_json_has_no_place_but_the_default(content: bytes | str) -> None:
    error = refused_json(content)
    assert first_problem(error).startswith("(file): Invalid JSON: ")
    assert first_problem(error, "(line)").startswith("(line): Invalid JSON: ")
    assert first_problem(error, "").startswith("Invalid JSON: ")


@pytest.mark.parametrize(
    ("data", "line"),
    [
        ({"size": 0}, "size: got 0: Input should be greater than or equal to 1"),
        ({}, "size: got {}: Field required"),
        ({"size": "a\nb"}, rf"size: got 'a\nb': {NO_INT}"),
        ({"size": 1, "sizes": [HUGE]}, f"sizes.0: got a value of type int: {TOO_MUCH}"),
        ({"size": 1, "named": {"a": Unspeakable()}}, "named.a: got <Unspeakable instance at "),
    ],
)
def test_the_refused_value_may_be_quoted(data: object, line: str) -> None:
    assert first_problem(refusal(data), quote=True).startswith(line)


@pytest.mark.parametrize(
    "data",
    [
        {"size": 1, "k" * 10_000: 1},
        {"size": "9" * 10_000},
        {"size": ["9" * 10_000] * 1000},
        {"size": {str(n): [n] * 1000 for n in range(1000)}},
        {"size": 1, "text": "\n" * 10_000},
        {"size": 1, "shape": {"kind": "\n" * 10_000}},
    ],
)
def test_what_is_quoted_is_cut_short(data: object) -> None:
    for quote in (False, True):
        line = first_problem(refusal(data), quote=quote)
        assert line.isprintable()
        assert "..." in line or not quote
        assert len(line) < 600


def test_a_place_far_inside_is_cut_short() -> None:
    data: dict[str, Any] = {}
    for _ in range(200):
        data = {"size": 1, "named": {"further": data}}
    line = first_problem(refusal(data))
    assert line.startswith("named.further.named.further.")
    assert line.endswith("...: Field required")
    assert len(line) < 200


def test_an_error_that_cannot_say_what_is_wrong_is_said_to_be_one() -> None:
    class Mute:
        def errors(self, **_: object) -> list[dict[str, object]]:
            raise RuntimeError("no")

    empty = ValidationError.from_exception_data("Data", [])
    for error in (Mute(), empty):
        assert first_problem(error) == "(file): cannot be read as what it should be"  # type: ignore[arg-type]
        assert first_problem(error, "") == "cannot be read as what it should be"  # type: ignore[arg-type]


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters()),
    lambda inner: st.lists(inner) | st.dictionaries(st.sampled_from(["size", "shape"]) | st.text(), inner),
)


@given(data=JSON, quote=st.booleans())
def test_any_data_is_one_printable_line(data: object, quote: bool) -> None:
    try:
        Data.model_validate(data)
    except ValidationError as error:
        line = first_problem(error, quote=quote)
        assert line.isprintable()
        assert 0 < len(line) < 700


def test_a_clips_name_is_one_printable_line() -> None:
    error = VideoError("a\nb\udcff.mp4", "no such file")
    assert str(error) == r"a\nb\udcff.mp4: no such file"
    assert (error.path, error.reason) == ("a\nb\udcff.mp4", "no such file")


def test_the_ground_floor_loads_no_pydantic() -> None:
    code = "import sys; import vrthinker.errors; sys.exit('pydantic' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def failure(number: int, name: str | None = None) -> OSError:
    return OSError(number, os.strerror(number), name)


@pytest.mark.parametrize(
    ("number", "kind", "remedy"),
    [
        (errno.ENOSPC, MachineError, "make room, then run again"),
        (errno.EDQUOT, MachineError, "make room, then run again"),
        (errno.EFBIG, MachineError, "raise the limit of file sizes (ulimit -f), then run again"),
        (errno.EACCES, InputError, "give another file"),
        (errno.EISDIR, InputError, "give another file"),
    ],
)
def test_another_file_is_advised_only_if_that_helps(
    number: int, kind: type[VRThinkerError], remedy: str
) -> None:
    error = unwritable("--out: a\nb", failure(number), "give another file")
    assert type(error) is kind
    assert str(error) == rf"--out: a\nb: cannot be written ({os.strerror(number)}); {remedy}"


@pytest.mark.parametrize(
    ("error", "kind", "words"),
    [
        (MemoryError(), MachineError, "out of memory"),
        (failure(errno.ENOSPC), MachineError, "a file: cannot be written"),
        (failure(errno.ENOSPC, "/disk/x"), MachineError, "/disk/x: cannot be written"),
        (failure(errno.ENAMETOOLONG, "n" * 5000), InputError, "nnn...: cannot be used (File name too long)"),
        (failure(errno.EACCES, "x"), InputError, "x: cannot be used (Permission denied)"),
        (failure(errno.EACCES), UnexpectedError, "PermissionError: "),
        (failure(errno.ENOENT, "x"), UnexpectedError, "FileNotFoundError: "),
        (KeyError("x"), UnexpectedError, "KeyError: 'x'"),
        (
            RuntimeError("I/O: No space left (os error 28)"),
            MachineError,
            "(No space left on device); make room",
        ),
        (RuntimeError("I/O: who knows (os error 9999)"), UnexpectedError, "who knows"),
    ],
)
def test_an_error_of_the_system_says_who_is_to_blame(
    error: Exception, kind: type[VRThinkerError], words: str
) -> None:
    reason = as_reason(error)
    assert type(reason) is kind
    assert words in str(reason)
    assert len(str(reason)) < 400
