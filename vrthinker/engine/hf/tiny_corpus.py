"""The text that the tiny checkpoints' tokenizer learns from: judging videos, in the rounds' own syntax.

The corpus is generated and the same on every machine. Only its word frequencies matter: the tags, the JSON of
a tool call and the common words of a judgment should take few tokens each, as they do in a real vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator

_SUBJECTS = (
    "a cat", "a red car", "the dancer", "an old man", "two children", "the boat", "a drone", "the city",
)  # fmt: skip
_ACTIONS = (
    "walks across the street", "turns around slowly", "jumps over the water", "moves through the frame",
    "holds a cup of coffee", "looks at the camera", "falls from the table", "runs along the beach at sunset",
)  # fmt: skip
_OBSERVATIONS = (
    "the motion is smooth and consistent", "the hands flicker and melt between frames",
    "the background stays sharp", "the picture is blurry and noisy", "the colours are natural",
    "the object from the prompt is missing", "the limbs are distorted", "nothing happens until the end",
)  # fmt: skip
_SENTENCES = (
    "You are a careful judge of generated videos. Compare video 1 with video 2 for the given caption.",
    "The workspace holds all frames of both videos, numbered from 1 to N.",
    "The first frames were sampled evenly.",
    "Judge text alignment (TA), visual quality (VQ), motion quality (MQ) and the overall preference (OA).",
    "1 means that video 1 is better, 2 means that video 2 is better, 0 means a tie.",
    "CF is your confidence: 1 is high, 2 is middle, 3 is low.",
    "Write a snapshot of what the new frames tell, because they will be forgotten; then think.",
    "If you need more frames, recommend an answer and call the tool; otherwise give the final answer.",
    "This was your last round: give the final answer now.",
    "The frames that you asked for follow. Frame 12 (video 1): frame 48 (video 2):",
    "The call could not be run: frame numbers must be integers between 1 and the number of frames.",
    "Here is what was wrong with the call; ask again, or answer. Only known tools may be called.",
    "Both videos follow the caption, so that alignment is a tie, but the second one has better quality.",
    "I would like to look at the middle of each video, where the movement happens, before I answer.",
)


def tiny_corpus() -> Iterator[str]:
    """Yields the corpus, one text at a time (about 44 kB)."""
    yield from _SENTENCES
    for number, subject in enumerate(_SUBJECTS):
        for step, action in enumerate(_ACTIONS):
            first = _OBSERVATIONS[(number + step) % len(_OBSERVATIONS)]
            second = _OBSERVATIONS[(number + 3 * step + 1) % len(_OBSERVATIONS)]
            yield f'Caption: "{subject} {action}". {_SENTENCES[(number + step) % len(_SENTENCES)]}'
            yield (
                f"<snapshot>In frame {4 * step + 1} of video 1 {subject} {action}; {first}. "
                f"In frame {4 * number + 33} of video 2 {second}.</snapshot>\n"
                f"<think>Video 1: {first}. Video 2: {second}. "
                f"The caption says that {subject} {action}.</think>\n"
            )
            scores = [(number + step) % 3, (number * step) % 3, (number + 2 * step) % 3, step % 3]
            judgment = ", ".join(
                f"{code}={score}" for code, score in zip(("TA", "VQ", "MQ", "OA"), scores, strict=True)
            )
            frames = ", ".join(str(8 * step + number + 4 * k + 1) for k in range(8))
            yield f"<recommend answer>{judgment}, CF={1 + step % 3}</recommend answer>\n"
            yield (
                '<tool_call>{"name": "select_frames", "arguments": {"target_frames": '
                f"[{frames}]}}}}</tool_call>"
            )
            yield f"<answer>{judgment}</answer>"
