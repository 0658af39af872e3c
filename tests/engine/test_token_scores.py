"""Log-probabilities in a server's reply: what is read of them, and what is left unknown."""

from __future__ import annotations

import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vrthinker.engine.endpoint.token_scores import token_scores, watched_tokens

WATCH = ("0", "1", "2")


def entry(token: str, *top: tuple[str, float]) -> dict[str, Any]:
    listed = [{"token": name, "logprob": score} for name, score in top]
    return {"token": token, "logprob": top[0][1] if top else 0.0, "top_logprobs": listed}


def test_a_label_of_a_reply_has_the_scores_of_all_three() -> None:
    content = [
        entry("é="),
        entry("1", ("1", -0.1), ("0", -3.0), ("2", -4.0)),
        entry(" 2", (" 2", 0.0)),
    ]
    (token,) = watched_tokens(token_scores({"content": content}), "é=1 2", WATCH)[0] or ()
    assert (token.start, token.scores) == (2, (-3.0, -0.1, -4.0))


def test_a_character_of_two_tokens_shifts_nothing() -> None:
    halves = [{**entry("\ufffd"), "bytes": [byte]} for byte in "é".encode()]
    content = [*halves, entry("1", ("1", -0.1), ("0", -3.0), ("2", -4.0))]
    (token,) = watched_tokens(token_scores({"content": content}), "é1", WATCH)[0] or ()
    assert token.start == 1


@pytest.mark.parametrize(("ahead", "left"), [("<think>a</think>", 0), ("", 3)])
def test_thoughts_that_were_sent_apart_move_the_places(ahead: str, left: int) -> None:
    content = [entry("abc"), entry("1", ("1", -0.1), ("0", -3.0), ("2", -4.0)), entry("d")]
    text = ahead + "abc1d"[left:]
    (token,) = watched_tokens(token_scores({"content": content}), text, WATCH)[0] or ()
    assert text[token.start] == "1"


def test_a_label_that_is_not_listed_is_impossible_or_unknown() -> None:
    surely = entry("1", ("1", -0.001), ("0", -7.0), ("x", -9.0))
    maybe = entry("1", ("1", -0.5), ("x", -1.5), ("0", -2.5))
    tokens = watched_tokens(token_scores({"content": [surely, maybe]}), "11", WATCH)[0]
    assert tokens is not None
    assert [token.scores[2] for token in tokens] == [-math.inf, None]


def test_scores_of_another_text_are_not_used() -> None:
    content = [entry("1", ("1", -0.1), ("0", -3.0), ("2", -4.0))]
    assert watched_tokens(token_scores({"content": content}), "2", WATCH) == (
        None,
        "the server's log-probabilities are those of another text than its message",
    )
    assert watched_tokens((), "1", WATCH)[1] == "the server sent no log-probabilities"
    assert watched_tokens((), "1", ()) == (None, None)


JSON = st.recursive(
    st.none() | st.booleans() | st.floats(allow_nan=True) | st.text(max_size=3) | st.integers(-5, 300),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["content", "token", "logprob", "bytes", "top_logprobs"]), inner, max_size=4
        )
    ),
    max_leaves=12,
)


@given(JSON)
def test_whatever_a_server_sends_is_read_without_an_error(said: object) -> None:
    tokens = token_scores(said)
    watched_tokens(tokens, "".join(token.content.decode("utf-8", "replace") for token in tokens), WATCH)
