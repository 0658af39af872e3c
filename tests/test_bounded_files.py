"""Files that somebody else wrote: limits before work, one line of error, nothing but plain values."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vrthinker.bounded_files import (
    MAX_DEPTH,
    parse_json,
    read_file,
    read_json,
    read_lines,
    read_yaml,
)
from vrthinker.errors import InputError, one_line
from vrthinker.limits import MAX_YAML_BYTES

CASES = Path(__file__).resolve().parents[2] / "shared" / "cases"
DEEP = MAX_DEPTH + 1


def refused(caught: pytest.ExceptionInfo[InputError]) -> str:
    """The message, which is one short printable line."""
    message = str(caught.value)
    assert message.isprintable()
    assert len(message) < 1000
    return message


# Bytes


def test_a_file_is_read_up_to_its_limit(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"x" * 10)
    assert read_file(path, 10) == b"x" * 10
    with pytest.raises(InputError, match="got 10 bytes, allowed: up to 9"):
        read_file(path, 9)


def test_a_file_that_states_no_size_is_bounded_too() -> None:
    path = Path("/proc/self/maps")
    assert path.stat().st_size == 0
    with pytest.raises(InputError, match="got more than 20 bytes"):
        read_file(path, 20)


@pytest.mark.parametrize("what", ["pipe", "/dev/zero", "folder", "missing", "long", "nul"])
def test_what_is_no_regular_file_is_refused_without_waiting(what: str, tmp_path: Path) -> None:
    path = {"long": "x" * 5000, "nul": "a\0b", "/dev/zero": what}.get(what, str(tmp_path / what))
    if what == "pipe":
        os.mkfifo(path)
    if what == "folder":
        os.mkdir(path)
    with pytest.raises(InputError) as caught:
        read_file(path, 100)
    assert ("not a file" if what in ("pipe", "/dev/zero", "folder") else "cannot be read") in refused(caught)


def test_lines_are_read_one_at_a_time_and_bounded(tmp_path: Path) -> None:
    path = tmp_path / "lines"
    path.write_bytes(b"ab\ncde\r\n\nf")
    assert list(read_lines(path, 3)) == [(1, b"ab\n"), (2, b"cde\r\n"), (3, b"\n"), (4, b"f")]
    path.write_bytes(b"ab\n" + b"c" * 1_000_000)
    lines = read_lines(path, 3)
    assert next(lines) == (1, b"ab\n")
    with pytest.raises(InputError, match=r"lines:2: got more than 3 bytes, allowed in a line: up to 3"):
        next(lines)


# JSON

PLAIN = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**64 - 1)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


@given(PLAIN)
def test_json_is_read_as_python_reads_it(value: Any) -> None:
    assert parse_json(json.dumps(value), "here") == value
    assert parse_json(json.dumps(value).encode(), "here") == value


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        ("[" * DEEP + "]" * DEEP, "more than 64 levels"),
        ('{"a":' * DEEP + "1" + "}" * DEEP, "more than 64 levels"),
        ("[" * 100_000, "more than 64 levels"),
        ("[NaN]", "NaN is no JSON"),
        ("-Infinity", "-Infinity is no JSON"),
        ("1e999", "1e999 is not finite"),
        ("1" + "0" * 25, "beyond 64 bits"),
        ("9" * 5000, "a number of 5000 characters"),
        ('{"a": 1, "a": 2}', "the key 'a' twice"),
        (b"\xff", "byte 0xff at 0 is not UTF-8"),
        ("", "Expecting value at line 1, column 1"),
        ('{"a"\n1}', "at line 2, column 1"),
    ],
)
def test_what_is_no_json_is_one_line(content: str | bytes, problem: str) -> None:
    with pytest.raises(InputError, match="here: not JSON that can be used") as caught:
        parse_json(content, "here")
    assert problem in refused(caught)


def test_the_deepest_allowed_json_is_read(tmp_path: Path) -> None:
    path = tmp_path / "deep.json"
    path.write_text("[" * MAX_DEPTH + "]" * MAX_DEPTH)
    value = read_json(path)
    for _ in range(MAX_DEPTH - 1):
        (value,) = value
    assert value == []
    with pytest.raises(InputError, match=r"deep\.json: got 128 bytes, allowed: up to 100"):
        read_json(path, 100)


# YAML


def yaml_of(text: str | bytes, folder: Path) -> Any:
    path = folder / "file.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return read_yaml(path)


def test_yaml_is_read_as_settings(tmp_path: Path) -> None:
    text = (
        "a: &x [1, 2.5, true, null, 'word', 0x10]\n"
        "b: {c: *x, d: 1.0e-6}\n"
        "day: 2001-02-03\nmoment: 2001-99-99\nsum: =\nn: !!str 1\n"
        "base: &y {e: 1, f: 2}\nmore: &z {<<: *y, g: 3}\n"
        "merged: {<<: [*z, {f: 4, h: 5}], e: 6}\n"
    )
    listed = [1, 2.5, True, None, "word", 16]
    assert yaml_of(text, tmp_path) == {
        "a": listed,
        "b": {"c": listed, "d": 1e-6},
        "day": "2001-02-03",
        "moment": "2001-99-99",
        "sum": "=",
        "n": "1",
        "base": {"e": 1, "f": 2},
        "more": {"e": 1, "f": 2, "g": 3},
        "merged": {"e": 6, "f": 2, "g": 3, "h": 5},
    }
    assert yaml_of("", tmp_path) is None


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("a: " + "[" * 5000, "more than 64 levels"),
        ("- " * 50_000, "more than 64 levels"),
        ("? " * 50_000, "more than 64 levels"),
        ("a: &a [*a, *a]", "recursive"),
        ("a: &a {<<: *a}", "recursive"),
        ("a: &a {<<: [1]}", "wanted a mapping or a list of them in line 1"),
        ("a: {<<: b}", "wanted a mapping or a list of them in line 1"),
        (
            "a: &a {" + ", ".join(f"k{i}: 1" for i in range(1000)) + "}\nb: [" + "{<<: *a}, " * 1000 + "]",
            "more than 10000 values",
        ),
        (
            "\n".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9 if i else '1')}]" for i in range(12)),
            "values",
        ),
        ("a: [" + "1, " * 20_000 + "]", "more than 10000 values"),
        ("seed: " + "9" * 5000, "a number of 5000 characters"),
        ("seed: 1" + "0" * 25, "beyond 64 bits"),
        ("a: " + ":".join(["1"] * 50_000), "a number of 99999 characters"),
        ("a: " + ":".join(["1"] * 50_000) + ".0", "a number of"),
        ("a: .nan", ".nan is not finite"),
        ("a: -.inf", "-.inf is not finite"),
        ("seed: !!int 'x'", "invalid literal"),
        ("a: !!timestamp 2001-01-01", "the tag tag:yaml.org,2002:timestamp in line 1"),
        ("a: !!python/object/apply:os.system ['true']", "the tag tag:yaml.org,2002:python"),
        ("!!binary aGk=", "the tag tag:yaml.org,2002:binary"),
        ("!!map [1]", "wanted a mapping in line 1"),
        ("a: 1\nb: 2\na: 3", "the key 'a' twice in line 3"),
        ("1: 2", "a key that is not text in line 1"),
        ("{[1]: 2}", "a key that is not text in line 1"),
        ("a: 1\n---\nb: 2", "another document in line 2"),
        ("a: *nothing", "undefined alias 'nothing' in line 1"),
        ("a: \0", "special characters are not allowed"),
        (b"a: \xff", "byte 0xff at 3 is not UTF-8"),
        (
            "a: " + "b" * MAX_YAML_BYTES.default,
            f"allowed: up to {MAX_YAML_BYTES.default}; set VRTHINKER_MAX_YAML_BYTES to allow more",
        ),
    ],
)
def test_what_is_no_yaml_is_one_line(text: str | bytes, problem: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"file\.yaml: ") as caught:
        yaml_of(text, tmp_path)
    assert problem in refused(caught)


def test_merging_twice_again_and_again_stays_small(tmp_path: Path) -> None:
    text = "\n".join(f"a{i}: &a{i} {{<<: [*a{i - 1}, *a{i - 1}]}}" for i in range(1, 60))
    assert yaml_of(f"a0: &a0 {{x: 1}}\n{text}", tmp_path)["a59"] == {"x": 1}


@given(text=st.text("[]{}:,-&*!?|>'\"# \n\tab1.%@", max_size=60))
def test_no_text_is_another_error(text: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = tmp_path_factory.getbasetemp()
    try:
        value = yaml_of(text, folder)
    except InputError:
        return
    json.dumps(value, allow_nan=False)


@pytest.mark.skipif(not CASES.is_dir(), reason="the cases are not there")
@pytest.mark.parametrize("name", ["y_bigint.yaml", "y_deep.yaml", "y_floatbad.yaml"])
def test_yaml_that_ended_in_a_traceback(name: str) -> None:
    with pytest.raises(InputError) as caught:
        read_yaml(CASES / name)
    refused(caught)


def test_a_quoted_text_is_one_printable_line() -> None:
    assert one_line("a\nb\x1b[31m") == "a\\nb\\x1b[31m"
    assert len(one_line("x" * 10_000)) == 300
