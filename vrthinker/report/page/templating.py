"""How every page of the package is filled in: escaped, invisible characters shown, nothing undefined.

Invariant: no page has an environment of its own, so that untrusted text (captions, ids, what a model wrote)
is made safe in one place.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from vrthinker.report.page.text import shortened, visible_markup, visible_text


@cache
def page_template(path: Path) -> Any:
    """A page's template, with the filters `shown` (`visible_markup`) and `shortened`.

    Args:
        path: The template. Its folder is where it includes others from.
    """
    environment = Environment(
        loader=FileSystemLoader(path.parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=_tame,
    )
    environment.filters["shown"] = visible_markup
    environment.filters["shortened"] = shortened
    return environment.get_template(path.name)


def asset(path: Path) -> Markup:
    """A style or script of the package, for a page."""
    return Markup(path.read_text("utf-8"))


def _tame(value: object) -> object:
    """What is applied to every expression of a template before it is escaped."""
    return visible_text(value) if isinstance(value, str) and not isinstance(value, Markup) else value
