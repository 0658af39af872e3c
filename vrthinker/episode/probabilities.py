"""How likely each label of an answer is: P(video 1), P(tie) and P(video 2) per dimension.

Where a final answer has the label of a dimension, the model could have written another. Its probabilities of
the three labels at that place, made to add up to 1, say how sure it is: a verdict's label is the likeliest of
them under greedy decoding. What the model wrote before (its thoughts, and the labels of earlier dimensions)
counts as given. So these are the probabilities of this episode's last word, not of the judgment over all
episodes that might have been; `from_samples` estimates the latter, from several episodes.

The probabilities are the model's own, at temperature 1 and without a nucleus or a form, so that they do not
depend on how the label was drawn.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from pydantic import BaseModel, ConfigDict, Field, model_validator

from vrthinker.engine.base import RoundResult
from vrthinker.episode.dimensions import Dimension, Judgments, Preference
from vrthinker.episode.grammar import Answer

LABELS = ("0", "1", "2")
"""The labels as an answer spells them, in the order of `Preference`: tie, video 1, video 2."""
_ROUNDING = 1e-6


class LabelProbabilities(BaseModel):
    """The probabilities of the three labels of one dimension. They add up to 1."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    video_1: float = Field(ge=0, le=1)
    tie: float = Field(ge=0, le=1)
    video_2: float = Field(ge=0, le=1)

    @model_validator(mode="after")
    def _add_up_to_1(self) -> LabelProbabilities:
        total = self.video_1 + self.tie + self.video_2
        if abs(total - 1) > _ROUNDING:
            raise ValueError(f"probabilities: got a sum of {total:g}, allowed: 1")
        return self

    @classmethod
    def of(cls, weights: Mapping[Preference, float]) -> LabelProbabilities:
        """The probabilities that are proportional to these weights, of which one at least is above 0."""
        total = sum(weights.values())
        tie, video_1, video_2 = (weights.get(preference, 0.0) / total for preference in Preference)
        return cls(video_1=video_1, tie=tie, video_2=video_2)

    def __getitem__(self, preference: Preference) -> float:
        """The probability of one label."""
        return (self.tie, self.video_1, self.video_2)[preference]

    @property
    def likeliest(self) -> Preference:
        """The likeliest label. If the two videos are equally likely and no tie is likelier, it is a tie."""
        most = max(self[preference] for preference in Preference)
        found = [preference for preference in Preference if self[preference] >= most - _ROUNDING]
        return found[0] if len(found) == 1 else Preference.TIE

    def swapped(self) -> LabelProbabilities:
        """The same probabilities if the two videos change places."""
        return LabelProbabilities(video_1=self.video_2, tie=self.tie, video_2=self.video_1)


class Probabilities(BaseModel):
    """The probabilities of the labels per dimension; None where they are not known."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    TA: LabelProbabilities | None
    VQ: LabelProbabilities | None
    MQ: LabelProbabilities | None
    OA: LabelProbabilities | None

    def __getitem__(self, dimension: Dimension | str) -> LabelProbabilities | None:
        """The probabilities of one dimension."""
        found: LabelProbabilities | None = getattr(self, Dimension(dimension).value)
        return found

    def swapped(self) -> Probabilities:
        """The same probabilities if the two videos change places."""
        turned = {d.value: None if (p := self[d]) is None else p.swapped() for d in Dimension}
        return Probabilities(**turned)

    def mean(self, other: Probabilities) -> Probabilities:
        """The mean of two probabilities; None where either is not known."""
        means = {}
        for dimension in Dimension:
            a, b = self[dimension], other[dimension]
            known = a is not None and b is not None
            means[dimension.value] = (
                LabelProbabilities.of({label: a[label] + b[label] for label in Preference})
                if known and a is not None and b is not None
                else None
            )
        return Probabilities(**means)


def answer_probabilities(answer: Answer, result: RoundResult) -> tuple[Probabilities | None, str | None]:
    """The probabilities of a final answer's labels.

    Args:
        answer: The answer, as the grammar read it.
        result: The round, which was sampled with `RoundLimits.watch` set to `LABELS`.

    Returns:
        The probabilities, None if none are known; and the reason why some or all are not, None if all are.
    """
    if result.watched is None:
        return None, result.unwatched or "the engine gives no probabilities"
    if not answer.places:
        return None, "the answer was not in the right form and was repaired, so its labels have no place"
    scores_by_start = {token.start: token.scores for token in result.watched}
    found: dict[str, LabelProbabilities | None] = {}
    for dimension in Dimension:
        place, label = answer.places[dimension.value], int(getattr(answer.judgments, dimension.value))
        # The grammar reads a text without NULs. Behind one, the places are not those of the engine's text.
        is_there = result.text[place : place + 1] == LABELS[label]
        scores = scores_by_start.get(place) if is_there else None
        found[dimension.value] = None if scores is None else _renormalised(scores)
    missing = [code for code, probabilities in found.items() if probabilities is None]
    reason = f"the engine did not say how likely each label of {', '.join(missing)} is" if missing else None
    return (None if len(missing) == len(found) else Probabilities(**found)), reason


def _renormalised(scores: Sequence[float | None]) -> LabelProbabilities | None:
    known = [score for score in scores if score is not None and score < math.inf]
    if len(known) < len(LABELS) or (most := max(known)) == -math.inf:
        return None
    return LabelProbabilities.of({Preference(i): math.exp(score - most) for i, score in enumerate(known)})


def from_samples(judgments: Sequence[Judgments]) -> Probabilities:
    """The frequencies of the labels in several judgments of one pair, such as sampled ones of k seeds.

    `likeliest` of a dimension is then the label that most of them have, and a tie if several labels have
    equally many.

    Args:
        judgments: The judgments, at least one. Episodes without judgments are not among them.
    """
    return Probabilities(
        **{
            d.value: LabelProbabilities.of(
                {label: float(sum(getattr(j, d.value) == label for j in judgments)) for label in Preference}
            )
            for d in Dimension
        }
    )


def likeliest(probabilities: Probabilities) -> Judgments:
    """The likeliest label of each dimension, which must all be known (`LabelProbabilities.likeliest`)."""
    known = {d.value: p.likeliest for d in Dimension if (p := probabilities[d]) is not None}
    return Judgments(**known)


def merge_orders(
    first: Judgments, second: Judgments, first_p: Probabilities | None, second_p: Probabilities | None
) -> tuple[Judgments, Probabilities | None]:
    """One judgment of two, which were made with the clips in both orders.

    Per dimension: a label that both have stays. Where they differ, the label is the likeliest one of the mean
    of their probabilities; if those are not known, it is a tie.

    Args:
        first: The judgments in the pair's order.
        second: The judgments in the other order, already turned back (`Judgments.swapped`).
        first_p: The probabilities in the pair's order.
        second_p: The probabilities in the other order, turned back.

    Returns:
        The judgments, and the mean of the probabilities (None if either is not known).
    """
    mean = None if first_p is None or second_p is None else first_p.mean(second_p)
    labels = {}
    for dimension in Dimension:
        label, other = getattr(first, dimension.value), getattr(second, dimension.value)
        if label != other:
            known = None if mean is None else mean[dimension]
            label = Preference.TIE if known is None else known.likeliest
        labels[dimension.value] = label
    return Judgments(**labels), mean
