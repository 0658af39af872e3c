"""Files that somebody else may have written, read within limits: bytes, JSON, JSON lines and YAML.

Whatever such a file holds, reading it takes bounded time and memory, runs nothing, and ends in a value of
bounded depth or in an `InputError` of one line. It never waits for a pipe or reads a device without end.

Values are plain: dicts with string keys, lists, strings, integers, finite floats, booleans and None. A key
may be there once. Integers fit into 64 bits, so that they can be printed and passed on to any library.

This module imports nothing else of the package but errors and limits, and PyYAML only when YAML is read.
"""

from __future__ import annotations

import contextlib
import functools
import json
import math
import os
import stat
from collections.abc import Hashable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vrthinker.errors import InputError, one_line
from vrthinker.limits import MAX_JSON_BYTES, MAX_YAML_BYTES, Limit

if TYPE_CHECKING:
    import yaml

MAX_DEPTH = 64
"""The most levels of objects and lists inside one another."""
MAX_YAML_VALUES = 10_000
"""The most values of a YAML file, counting what aliases repeat."""
_INT_BITS = 64
_MAX_DIGITS = 80
"""The most characters of a whole number in its file."""
_READ_BYTES = 1 << 20


def read_file(path: Path | str, limit: int | Limit) -> bytes:
    """The content of a regular file of bounded size.

    Args:
        path: The file.
        limit: The most bytes that it may have, as a number or as a limit that a user can raise.

    Raises:
        InputError: The file is missing, is no regular file, is too large, or cannot be read.
    """
    most_bytes = limit.value if isinstance(limit, Limit) else limit
    allowed = f"allowed: up to {most_bytes}" + (f"; {limit.how_to_raise}" if isinstance(limit, Limit) else "")
    with opened(path) as descriptor:
        size = os.fstat(descriptor).st_size
        if size > most_bytes:
            raise InputError(f"{path}: got {size} bytes, {allowed}")
        parts, total = [], 0
        # Files of /proc have content although their size is 0, and a file may grow while it is read.
        while part := os.read(descriptor, min(_READ_BYTES, most_bytes + 1 - total)):
            parts.append(part)
            total += len(part)
            if total > most_bytes:
                raise InputError(f"{path}: got more than {most_bytes} bytes, {allowed}")
    return b"".join(parts)


@contextlib.contextmanager
def opened(path: Path | str) -> Iterator[int]:
    """The descriptor of a regular file, opened for reading. Pipes and devices are refused without waiting.

    Raises:
        InputError: The file is missing, is no regular file, or reading it fails.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        try:
            if not stat.S_ISREG(os.fstat(descriptor).st_mode):
                raise InputError(f"{one_line(str(path))}: not a file; give a regular file")
            yield descriptor
        finally:
            os.close(descriptor)
    except (OSError, ValueError) as error:
        if isinstance(error, InputError):
            raise
        reason = (isinstance(error, OSError) and error.strerror) or str(error)
        raise InputError(f"{one_line(str(path))}: cannot be read ({reason})") from None


def read_lines(path: Path | str, most_bytes_per_line: int) -> Iterator[tuple[int, bytes]]:
    """The lines of a regular file, each with its 1-based number and its line end, one at a time.

    Raises:
        InputError: The file is missing, is no regular file, cannot be read, or has a line that is too long.
    """
    with opened(path) as descriptor, open(descriptor, "rb", closefd=False) as stream:
        number = 0
        while line := stream.readline(most_bytes_per_line + 2):
            number += 1
            if len(line.rstrip(b"\r\n")) > most_bytes_per_line:
                raise InputError(
                    f"{path}:{number}: got more than {most_bytes_per_line} bytes, allowed in a line: up to "
                    f"{most_bytes_per_line}"
                )
            yield number, line


def read_json(path: Path | str, limit: int | Limit = MAX_JSON_BYTES) -> Any:
    """The value of a JSON file.

    Args:
        path: The file.
        limit: The most bytes that it may have, as a number or as a limit that a user can raise.

    Raises:
        InputError: The file cannot be read, or does not hold JSON within the limits of this module.
    """
    return parse_json(read_file(path, limit), str(path))


def parse_json(content: bytes | str, where: str, *, allow_nan: bool = False) -> Any:
    """Reads one JSON value. Unlike Python's own reader, it refuses what JSON does not have.

    Args:
        content: The JSON, of bounded length. Bytes are UTF-8.
        where: The place that an error names: a file, or a file and a line.
        allow_nan: Whether `NaN`, which some tools write for a missing value, is read as a float. Infinities
            are refused all the same.

    Raises:
        InputError: The content is no JSON, is nested too deeply, names a key twice in one object, or has a
            number that is too large or not finite.
    """
    try:
        text = content.decode("utf-8") if isinstance(content, bytes) else content
        value = json.loads(
            text,
            parse_constant=_nan if allow_nan else _no_constant,
            parse_int=_bounded_int,
            parse_float=_bounded_float,
            object_pairs_hook=_distinct_keys,
        )
        _check(value)
        return value
    except UnicodeDecodeError as error:
        problem = f"byte 0x{error.object[error.start]:02x} at {error.start} is not UTF-8"
    except json.JSONDecodeError as error:
        problem = f"{error.msg} at line {error.lineno}, column {error.colno}"
    except RecursionError:
        problem = f"more than {MAX_DEPTH} levels"
    except ValueError as error:
        problem = str(error)
    raise InputError(f"{where}: not JSON that can be used ({problem})")


def read_yaml(path: Path | str) -> Any:
    """The value of a YAML file. Dates are read as text.

    Aliases and merge keys (`<<`) are allowed, within a limit. Tags of other types than JSON's are refused.

    Raises:
        InputError: The file cannot be read, or does not hold YAML within the limits of this module.
    """
    content = read_file(path, MAX_YAML_BYTES)
    import yaml

    try:
        return _load_yaml(content.decode("utf-8"))
    except UnicodeDecodeError as error:
        problem = f"byte 0x{error.object[error.start]:02x} at {error.start} is not UTF-8"
    except RecursionError:
        problem = f"more than {MAX_DEPTH} levels"
    except yaml.MarkedYAMLError as error:
        place = "" if error.problem_mark is None else f" in line {error.problem_mark.line + 1}"
        problem = f"{error.problem or error.context}{place}"
    except (yaml.YAMLError, ValueError) as error:
        problem = str(error)
    raise InputError(f"{path}: not YAML that can be used ({one_line(problem)})")


# JSON


def _no_constant(name: str) -> object:
    raise ValueError(f"{name} is no JSON")


def _nan(name: str) -> object:
    return math.nan if name == "NaN" else _no_constant(name)


def _bounded_int(digits: str) -> int:
    _check_digits(digits)
    return _within_bits(int(digits))


def _check_digits(digits: str) -> None:
    # Longer numbers take long to convert, and Python refuses to print them.
    if len(digits) > _MAX_DIGITS:
        raise ValueError(f"a number of {len(digits)} characters")


def _within_bits(number: int) -> int:
    if number.bit_length() > _INT_BITS:
        raise ValueError(f"a whole number beyond {_INT_BITS} bits")
    return number


def _bounded_float(digits: str) -> float:
    return _finite(float(digits), digits)


def _finite(number: float, digits: str) -> float:
    if not math.isfinite(number):
        raise ValueError(f"{one_line(digits)} is not finite")
    return number


def _distinct_keys(items: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(items)
    if len(values) < len(items):
        seen: set[str] = set()
        twice = next(key for key, _ in items if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise ValueError(f"the key {one_line(twice)!r} twice in one object")
    return values


def _check(value: object, most_values: int | None = None) -> None:
    """Checks the depth of nested lists and dicts, and their values.

    Args:
        value: The value. The same list or dict may be in it several times.
        most_values: The most values, counting repeated ones each time; None if nothing is repeated.

    Raises:
        ValueError: A limit is exceeded.
    """
    count = 0
    pending = [(value, 1)]
    while pending:
        inner, depth = pending.pop()
        count += 1
        if most_values is not None and count > most_values:
            raise ValueError(f"more than {most_values} values")
        if isinstance(inner, dict | list):
            if depth > MAX_DEPTH:
                raise ValueError(f"more than {MAX_DEPTH} levels")
            pending += ((part, depth + 1) for part in (inner.values() if isinstance(inner, dict) else inner))


# YAML


def _load_yaml(text: str) -> Any:
    loader = _yaml_loader()(text)
    loader.deep_construct = True  # a value is whole before another one can merge it
    try:
        value = loader.get_single_data()
    finally:
        loader.dispose()
    _check(value, MAX_YAML_VALUES)
    return value


@functools.cache
def _yaml_loader() -> type[yaml.SafeLoader]:
    """The class that loads YAML. It is made here, because PyYAML is imported only when it is needed."""
    from yaml import MappingNode, Node, SafeLoader, ScalarNode, SequenceNode
    from yaml.constructor import ConstructorError

    prefix = "tag:yaml.org,2002:"
    merge = f"{prefix}merge"
    plain = {prefix + kind for kind in ("str", "int", "float", "bool", "null", "seq", "map", "merge")}

    class Loader(SafeLoader):
        """PyYAML's loader without dates and tags, and with limits."""

        depth = 0
        count = 0

        def compose_node(self, parent: Node | None, index: int) -> Node | None:
            self.depth += 1
            if self.depth > MAX_DEPTH:
                raise ValueError(f"more than {MAX_DEPTH} levels")
            self.add(1)
            node: Node | None = super().compose_node(parent, index)
            self.depth -= 1
            if node is not None and node.tag not in plain:
                raise ConstructorError(None, None, f"the tag {node.tag}", node.start_mark)
            return node

        def construct_mapping(self, node: Node, deep: bool = False) -> dict[Hashable, Any]:
            if not isinstance(node, MappingNode):
                raise ConstructorError(None, None, "wanted a mapping", node.start_mark)
            values: dict[Hashable, Any] = {}
            inherited: dict[Hashable, Any] = {}
            for key_node, value_node in node.value:
                if key_node.tag == merge:
                    for merged in self.merged_mappings(value_node):
                        inherited = merged | inherited
                        self.add(len(merged))
                    continue
                key = self.construct_object(key_node) if isinstance(key_node, ScalarNode) else None
                if not isinstance(key, str):
                    raise ConstructorError(None, None, "a key that is not text", key_node.start_mark)
                if key in values:
                    raise ConstructorError(None, None, f"the key {key!r} twice", key_node.start_mark)
                values[key] = self.construct_object(value_node)
            return inherited | values

        def merged_mappings(self, node: Node) -> list[dict[Hashable, Any]]:
            nodes = node.value if isinstance(node, SequenceNode) else [node]
            if not all(isinstance(one, MappingNode) for one in nodes):
                raise ConstructorError(None, None, "<<: wanted a mapping or a list of them", node.start_mark)
            return [self.construct_object(one) for one in nodes]

        def add(self, number: int) -> None:
            self.count += number
            if self.count > MAX_YAML_VALUES:
                raise ValueError(f"more than {MAX_YAML_VALUES} values")

        def construct_yaml_int(self, node: ScalarNode) -> int:
            _check_digits(node.value)
            return _within_bits(super().construct_yaml_int(node))

        def construct_yaml_float(self, node: ScalarNode) -> float:
            _check_digits(node.value)
            return _finite(super().construct_yaml_float(node), node.value)

    Loader.yaml_implicit_resolvers = {
        first: [(tag, pattern) for tag, pattern in resolvers if tag in plain]
        for first, resolvers in SafeLoader.yaml_implicit_resolvers.items()
    }
    Loader.add_constructor(f"{prefix}int", Loader.construct_yaml_int)
    Loader.add_constructor(f"{prefix}float", Loader.construct_yaml_float)
    return Loader
