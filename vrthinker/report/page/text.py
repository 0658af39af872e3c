"""Makes text of a model or a caption safe for a page: it cannot run, be invisible, or change its direction.

Invariant: the result is HTML-escaped, can be encoded as UTF-8, and has no control characters but tab and
newline. Invisible characters that change what is seen (controls, bidirectional overrides, tags, lone
surrogates) are shown by their code. A run of the same one is shown once, with a count.
"""

from __future__ import annotations

import re

from markupsafe import Markup, escape

_ODD = re.compile(
    "(?P<odd>["
    "\x00-\x08\x0b-\x1f\x7f-\x9f"  # controls
    "\u2028\u2029"  # line and paragraph separators
    "\u202a-\u202e\u2066-\u206f"  # embeddings, overrides, isolates; deprecated format characters
    "\u2060-\u2064\ufeff\ufff9-\ufffb"  # invisible operators, byte order mark, annotations
    "\ud800-\udfff\ufdd0-\ufdef\ufffe\uffff"  # not characters
    "\U000e0000-\U000e007f"  # tags, which are invisible text
    "])(?P=odd)*"
)


def visible_text(text: str) -> str:
    """Plain text for attributes and titles, with odd characters as `[U+202E]`. It is not escaped."""
    return _ODD.sub(lambda match: f"[{_named(match)}]", _newlines(text))


def visible_markup(text: str) -> Markup:
    """Escaped text for an element's content, with odd characters in a `span` of class `odd`."""
    parts: list[Markup] = []
    position = 0
    text = _newlines(text)
    for match in _ODD.finditer(text):
        parts.append(escape(text[position : match.start()]))
        parts.append(Markup('<span class="odd">{}</span>').format(_named(match)))
        position = match.end()
    parts.append(escape(text[position:]))
    return Markup("").join(parts)


def shortened(text: str, limit: int) -> str:
    """The text on one line, cut with an ellipsis if it has more than `limit` characters."""
    line = " ".join(text[: 4 * limit].split())
    return line if len(line) <= limit else line[: limit - 1].rstrip() + "…"


def _newlines(text: str) -> str:
    return text.replace("\r\n", "\n")


def _named(match: re.Match[str]) -> str:
    count = match.end() - match.start()
    return f"U+{ord(match['odd']):04X}" + (f", {count} times" if count > 1 else "")
