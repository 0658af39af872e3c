"""A verdict as a small piece of HTML, which notebooks show beside the cell that made it.

No text of a model, a caption or a file name can run: every text is escaped, and odd characters are shown by
their codes (`page/text.py`).
"""

from __future__ import annotations

from collections.abc import Sequence

from markupsafe import Markup

from vrthinker.episode.dimensions import Dimension, dimension_texts
from vrthinker.episode.orders import MergedOrders
from vrthinker.episode.trajectory import Trajectory
from vrthinker.report.names import distinct_names
from vrthinker.report.page.text import shortened, visible_markup
from vrthinker.report.story import told_story

_MAX_CAPTION = 200


def verdict_html(trajectory: Trajectory, notes: Sequence[str], *, both: MergedOrders | None = None) -> str:
    """The verdict as an HTML fragment: caption, clips, a table of the dimensions, the story, notes.

    Args:
        trajectory: The record of the episode.
        notes: What the reader of the verdict should know.
        both: What both orders of the clips say together, if both were judged. The table is theirs.
    """
    outcome = trajectory.outcome if both is None else both
    judgments = outcome.judgments
    names = distinct_names([video.path for video in trajectory.videos])
    caption = visible_markup(shortened(trajectory.prompt, _MAX_CAPTION))
    clips = Markup(" and ").join(
        Markup("video {}: <code>{}</code>").format(number, visible_markup(name))
        for number, name in enumerate(names, start=1)
    )
    parts = [Markup("<p><b>{}</b><br>{}</p>").format(caption, clips)]
    if judgments is None:
        reason = visible_markup(outcome.reason or "")
        parts.append(Markup("<p>no verdict ({}): {}</p>").format(outcome.stop_reason.value, reason))
    else:
        rows = Markup("").join(
            _row(text.name, text.code, str(getattr(judgments, text.code)))
            for text in dimension_texts(trajectory.dataset)
        )
        head = Markup("<tr><th>dimension</th><th></th><th>better</th></tr>")
        parts.append(Markup("<table>{}{}</table>").format(head, rows))
        parts.append(Markup("<p>{}</p>").format(visible_markup(told_story(trajectory, both=both))))
    parts += [Markup("<p><i>note: {}</i></p>").format(visible_markup(note)) for note in notes]
    return str(Markup("<div>{}</div>").format(Markup("").join(parts)))


def _row(name: str, code: str, better: str) -> Markup:
    cell = Markup("<b>{}</b>").format(better) if code == Dimension.OA else better
    return Markup("<tr><td>{}</td><td>{}</td><td>{}</td></tr>").format(name, code, cell)
