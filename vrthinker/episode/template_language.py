"""The part of jinja2 that prompt templates may use: enough for prompts, too little to do harm.

Templates come with checkpoints, so they are untrusted. jinja2's sandbox blocks Python's internals, but it
does not stop a template from running for hours or filling the memory, and it lets a template call any public
method of the values that it is given. For that reason templates are checked against a list of allowed
constructs before they are compiled, and they are given plain data only (strings, numbers, lists, dicts).

Allowed are text, `{{ … }}`, `{% if %}`, `{% for %}` over the lists that prompts have (not nested), tests for
none and defined, comparisons, and/or/not, + and - of numbers, keys and attributes, and the filters below,
whose arguments are checked too. Nothing can be called, set or included. Invariant: the number of steps of a
render is at most the template's size times the length of one list; filters have a budget of characters; the
length of the output is limited.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from contextvars import ContextVar
from typing import Any

from jinja2 import StrictUndefined, Template, TemplateError, TemplateSyntaxError, Undefined, nodes
from jinja2.sandbox import ImmutableSandboxedEnvironment

from vrthinker.errors import InputError

MAX_RENDERED_CHARS = 1_000_000
MAX_FILTERED_CHARS = 20_000_000
MAX_DEPTH = 40
MAX_FILTERS_NESTED = 3
MAX_FORMATTED = 4
FILTERS = ("format", "int", "length", "lower", "round", "tojson", "trim", "upper")
TESTS = ("defined", "none")
LISTS = ("dimensions", "frames", "tools")
_FORMAT = re.compile(r"(?:[^%]|%%|%\.?[0-9]?[dfs])*")
_ALLOWED = (
    *(
        nodes.Template,
        nodes.Output,
        nodes.TemplateData,
        nodes.Name,
        nodes.Const,
        nodes.Getattr,
        nodes.Getitem,
    ),
    *(nodes.For, nodes.If, nodes.CondExpr, nodes.Compare, nodes.Operand, nodes.And, nodes.Or, nodes.Not),
    *(nodes.Filter, nodes.Test, nodes.Add, nodes.Sub),
)


class PromptTemplate:
    """One compiled template.

    Args:
        name: The template's name, for messages.
        source: The template's text.

    Raises:
        InputError: The template is not valid jinja2, or uses something that is not allowed.
    """

    def __init__(self, name: str, source: str) -> None:
        self._name = name
        environment = _environment()
        try:
            tree = environment.parse(source)
            _check(tree)
            self._template: Template = environment.from_string(source)
        except TemplateSyntaxError as error:
            raise self._error(f"line {error.lineno}: {error.message}") from None
        except Exception as error:  # the template is untrusted, and Python's compiler has limits too
            raise self._error(f"cannot be compiled ({type(error).__name__}: {error})") from None

    def render(self, values: Mapping[str, Any]) -> str:
        """Renders with plain data.

        Raises:
            InputError: A name is undefined, an operation fails, or the result is too long.
        """
        parts: list[str] = []
        length = 0
        _budget.set([MAX_FILTERED_CHARS])
        try:
            for part in self._template.generate(dict(values)):
                parts.append(part)
                length += len(part)
                if length > MAX_RENDERED_CHARS:
                    raise self._error(f"got over {MAX_RENDERED_CHARS} characters; write less")
        except InputError:
            raise
        except Exception as error:  # the template is untrusted and may provoke any error
            raise self._error(f"{type(error).__name__}: {error}") from None
        return "".join(parts)

    def _error(self, message: str) -> InputError:
        line = " ".join(message.split())[:200]
        return InputError(f"prompt template {self._name}.jinja: {line}")


_budget: ContextVar[list[int]] = ContextVar("budget")
"""The number of characters that filters may still process in the current render (in any thread)."""


def _environment() -> ImmutableSandboxedEnvironment:
    # The optimiser is off, because it would run filters on literals while the template is compiled.
    environment = _NumbersOnly(
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        autoescape=False,
        optimized=False,
        finalize=_plain,
    )
    environment.globals.clear()
    # jinja2's own tojson escapes for HTML, but a prompt needs plain JSON.
    filters = {name: environment.filters[name] for name in FILTERS} | {"tojson": _to_json}
    environment.filters = {name: _counted(function) for name, function in filters.items()}
    environment.tests = {name: environment.tests[name] for name in TESTS}
    return environment


def _counted(function: Callable[..., Any]) -> Callable[..., Any]:
    def counted(value: Any, *arguments: Any) -> Any:
        result = function(value, *arguments)
        left = _budget.get()
        left[0] -= 1 + sum(len(v) for v in (value, result, *arguments) if isinstance(v, str))
        if left[0] < 0:
            raise TemplateError(f"filters work on over {MAX_FILTERED_CHARS} characters; write less")
        return result

    return counted


def _plain(value: Any) -> Any:
    if isinstance(value, Undefined):
        str(value)  # raises an error that says which name is undefined
    if not isinstance(value, str | int | float):
        raise TemplateError(f"a {type(value).__name__} cannot be printed; texts and numbers can")
    return value


class _NumbersOnly(ImmutableSandboxedEnvironment):
    """A sandbox in which + and - accept only numbers, because adding texts could fill the memory."""

    intercepted_binops = frozenset(("+", "-"))

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        if not (isinstance(left, int | float) and isinstance(right, int | float)):
            raise TemplateError(f"{operator} is for numbers")
        return super().call_binop(context, operator, left, right)


def _to_json(value: object) -> str:
    return json.dumps(value, ensure_ascii=False)


def _check(tree: nodes.Template) -> None:
    _visit(tree, depth=0, in_loop=False, filters=0)


def _visit(node: nodes.Node, *, depth: int, in_loop: bool, filters: int) -> None:
    if not isinstance(node, _ALLOWED):
        raise TemplateSyntaxError(f"{type(node).__name__.lower()} is not allowed in prompts", node.lineno)
    check: Callable[[Any], None] | None = _CHECKS.get(type(node))
    if check is not None:
        check(node)
    if isinstance(node, nodes.For) and in_loop:
        raise TemplateSyntaxError("loops do not nest", node.lineno)
    filters += isinstance(node, nodes.Filter)
    if filters > MAX_FILTERS_NESTED:
        raise TemplateSyntaxError(f"at most {MAX_FILTERS_NESTED} filters in one another", node.lineno)
    if depth > MAX_DEPTH:
        raise TemplateSyntaxError(f"nested over {MAX_DEPTH} deep", node.lineno)
    for child in node.iter_child_nodes():
        _visit(child, depth=depth + 1, in_loop=in_loop or isinstance(node, nodes.For), filters=filters)


def _check_for(node: nodes.For) -> None:
    named = isinstance(node.iter, nodes.Name) and node.iter.name in LISTS
    if not named or node.recursive:
        raise TemplateSyntaxError(f"loops go over {', '.join(LISTS)}", node.lineno)
    if not isinstance(node.target, nodes.Name) or node.target.name in LISTS:
        raise TemplateSyntaxError("a loop's variable is one new name", node.lineno)


def _check_filter(node: nodes.Filter) -> None:
    if node.name not in FILTERS:
        raise TemplateSyntaxError(f"filter {node.name}: allowed: {', '.join(FILTERS)}", node.lineno)
    if node.kwargs or node.dyn_args is not None or node.dyn_kwargs is not None:
        raise TemplateSyntaxError(f"filter {node.name}: plain arguments only", node.lineno)
    if node.name == "format":
        text = node.node.value if isinstance(node.node, nodes.Const) else None
        if not isinstance(text, str) or not _FORMAT.fullmatch(text) or len(node.args) > MAX_FORMATTED:
            raise TemplateSyntaxError('format wants a literal such as "%.2f"', node.lineno)
    elif node.name == "round":
        digits = [arg.value if isinstance(arg, nodes.Const) else None for arg in node.args]
        if len(digits) > 1 or not all(isinstance(d, int) and 0 <= d <= 9 for d in digits):
            raise TemplateSyntaxError("round takes a literal from 0 to 9", node.lineno)
    elif node.args:
        raise TemplateSyntaxError(f"filter {node.name} takes no arguments", node.lineno)


def _check_test(node: nodes.Test) -> None:
    if node.name not in TESTS:
        raise TemplateSyntaxError(f"test {node.name}: allowed: {', '.join(TESTS)}", node.lineno)


_CHECKS: dict[type[nodes.Node], Callable[[Any], None]] = {
    nodes.For: _check_for,
    nodes.Filter: _check_filter,
    nodes.Test: _check_test,
}
