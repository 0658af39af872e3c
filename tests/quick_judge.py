"""A tiny judge that judges seven times as fast: what it is asked and what it writes are short."""

from __future__ import annotations

from pathlib import Path

from vrthinker.commands.make_tiny import Family, make_tiny_judge
from vrthinker.episode.settings import PROMPTS_FOLDER, SETTINGS_FILE, load_judge_settings
from vrthinker.world.nano import nano_templates


def make_quick_judge(folder: Path, family: Family = "qwen2.5-vl") -> Path:
    """A judge of random weights, as `vrthinker make-tiny` writes it but for its short prompts and rounds.

    Its rounds are guided, so it always has a verdict.
    """
    make_tiny_judge(folder, family)
    nano_templates().save(folder / PROMPTS_FOLDER)
    stored = load_judge_settings(folder)
    assert stored is not None
    episode = stored.episode.model_copy(update={"max_round_tokens": 190})
    settings = stored.model_copy(update={"episode": episode})
    (folder / SETTINGS_FILE).write_text(settings.model_dump_json(indent=2) + "\n", "utf-8")
    return folder
