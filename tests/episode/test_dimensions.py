"""Preferences and judgments: numbers in files, words for people, and a tie is not nothing."""

from __future__ import annotations

import json

import pytest

from vrthinker.episode.dimensions import Dimension, Judgments, Preference


@pytest.mark.parametrize("preference", Preference)
def test_every_preference_is_true_and_none_is_not(preference: Preference) -> None:
    assert preference, "a tie is a verdict"
    assert preference.swapped().swapped() is preference


def test_a_preference_is_printed_in_words() -> None:
    assert [str(preference) for preference in Preference] == ["tie", "video 1", "video 2"]
    assert f"{Preference.TIE}, {Preference.VIDEO_2:>8}" == "tie,  video 2"


def test_files_hold_numbers_and_preferences_equal_them() -> None:
    assert json.dumps(list(Preference)) == "[0, 1, 2]"
    assert list(Preference) == [0, 1, 2]
    assert {0: "a", 2: "b"}[Preference.VIDEO_2] == "b"
    assert int(Preference.TIE) == 0


def test_judgments_are_written_as_numbers_and_read_again() -> None:
    judgments = Judgments(TA=0, VQ=1, MQ=2, OA=0)
    line = judgments.model_dump_json()
    assert line == '{"TA":0,"VQ":1,"MQ":2,"OA":0}'
    again = Judgments.model_validate_json(line)
    assert again == judgments
    assert all(isinstance(getattr(again, dimension), Preference) for dimension in Dimension)
    assert judgments.as_dict() == json.loads(line)
    assert all(type(value) is int for value in judgments.as_dict().values())


def test_judgments_are_printed_in_words() -> None:
    assert str(Judgments(TA=0, VQ=1, MQ=2, OA=0)) == "TA: tie, VQ: video 1, MQ: video 2, OA: tie"
