"""The settings of rewards and advantages: which terms a reward has, with their weights, and how it is scaled.

The defaults of the reward are the paper's four terms with the paper's numbers (method section 4). The other
terms are ours and off by default. `terms.py` computes the terms, `advantages.py` the advantages. Every kind
has settings of its own, so that a setting that a kind does not know is refused.
"""

from __future__ import annotations

from collections import Counter
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator

MAX_WEIGHT = 1e6
"""The largest weight of a term: sums of a few terms stay far below what an advantage can be computed of."""
_Weight = Annotated[float, Field(ge=0.0, le=MAX_WEIGHT)]


class _Settings(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False)


class TermSettings(_Settings):
    """The settings of one term of a reward."""


class FormatTerm(TermSettings):
    """The form of the episode: all of the weight or nothing."""

    kind: Literal["format"] = "format"
    weight: _Weight = 1.0
    """Reward of an episode with a verdict whose every round is well formed."""


class AccuracyTerm(TermSettings):
    """The accuracy r_acc of the final answer, from 0 to 1. The weights of all other terms are relative to it.

    Its `alpha` holds wherever r_acc is computed: also in the CoT gain, and in `GroupRewards.accuracy`.
    """

    kind: Literal["accuracy"] = "accuracy"
    alpha: float = Field(0.5, ge=0.0, le=1.0)
    """Weight of the overall judgment. The mean over the labelled dimensions has the rest."""


class CotGainTerm(TermSettings):
    """The gain in r_acc from the first answer of an episode to the last."""

    kind: Literal["cot_gain"] = "cot_gain"
    k: _Weight = 0.2
    """Weight of the gain."""


class ExplorationTerm(TermSettings):
    """A reward for looking at frames while few episodes of the group do."""

    kind: Literal["exploration"] = "exploration"
    omega: float = Field(0.2, ge=0.0, le=1.0)
    """The share of looking episodes at which the reward has fallen to 0."""
    eta: _Weight = 0.5
    """Weight of the term."""


class CallCostTerm(TermSettings):
    """Ours: a cost of every tool call that showed frames, against calls that find nothing."""

    kind: Literal["call_cost"] = "call_cost"
    cost: _Weight = 0.05
    """What one call costs."""


class AgreementTerm(TermSettings):
    """Ours: a reward for an overall judgment that agrees with what the three dimensions say together."""

    kind: Literal["agreement"] = "agreement"
    weight: _Weight = 0.1
    """Reward of a verdict that agrees with itself."""


class EvidenceTerm(TermSettings):
    """Ours: a reward for asking for the frames that show what matters, where it is known which do."""

    kind: Literal["evidence"] = "evidence"
    weight: _Weight = 0.2
    """Reward of an episode whose calls hit every range of evidence."""


class NecessityTerm(TermSettings):
    """Ours: a penalty for calls that lead to the verdict that the group reaches without calls."""

    kind: Literal["necessity"] = "necessity"
    weight: _Weight = 0.1
    """What such an episode loses."""


AnyTerm = Annotated[
    FormatTerm
    | AccuracyTerm
    | CotGainTerm
    | ExplorationTerm
    | CallCostTerm
    | AgreementTerm
    | EvidenceTerm
    | NecessityTerm,
    Field(discriminator="kind"),
]
"""The settings of a term. `kind` chooses, and a setting that the chosen kind lacks is refused."""


class RewardSettings(_Settings):
    """The reward of an episode: the sum of its terms. The default is the paper's reward."""

    terms: tuple[AnyTerm, ...] = (FormatTerm(), AccuracyTerm(), CotGainTerm(), ExplorationTerm())
    """The terms, each kind at most once."""

    @field_validator("terms")
    @classmethod
    def _has_each_kind_once(cls, terms: tuple[AnyTerm, ...]) -> tuple[AnyTerm, ...]:
        if not terms:
            raise ValueError("got no terms, wanted at least one, such as kind: accuracy")
        if twice := [kind for kind, count in Counter(term.kind for term in terms).items() if count > 1]:
            raise ValueError(f"got kind {twice[0]} twice, allowed: each kind once; give it another weight")
        return terms

    @property
    def alpha(self) -> float:
        """The alpha of r_acc: the accuracy term's, or its default if there is no such term."""
        return next((term.alpha for term in self.terms if isinstance(term, AccuracyTerm)), 0.5)


class GroupAdvantage(_Settings):
    """The settings of a way to turn the rewards of a group into advantages."""


class ScaledAdvantage(GroupAdvantage):
    """The settings of a way that divides by a standard deviation."""

    ddof: Literal[0, 1] = 1
    """The kind of standard deviation: 1 for the sample's (as TRL and verl), 0 for the population's."""
    eps: float = Field(1e-6, ge=1e-30)
    """Number that is added to the standard deviation (under `reinforce_plus_plus` to the variance)."""


class GrpoAdvantage(ScaledAdvantage):
    """The paper's: the reward minus the group's mean, divided by the group's standard deviation."""

    kind: Literal["grpo"] = "grpo"


class DrGrpoAdvantage(GroupAdvantage):
    """Dr. GRPO's: the reward minus the group's mean."""

    kind: Literal["dr_grpo"] = "dr_grpo"


class RlooAdvantage(GroupAdvantage):
    """Leave-one-out: the reward minus the mean of the group's other episodes."""

    kind: Literal["rloo"] = "rloo"


class BatchStdAdvantage(ScaledAdvantage):
    """The reward minus the group's mean, divided by the standard deviation of all rewards of the batch."""

    kind: Literal["batch_std"] = "batch_std"


class ReinforcePlusPlusAdvantage(ScaledAdvantage):
    """The reward minus the group's mean, divided by the batch's standard deviation of just that."""

    kind: Literal["reinforce_plus_plus"] = "reinforce_plus_plus"
    eps: float = Field(1e-8, ge=1e-30)
    """Number that is added to the variance."""


AdvantageSettings = Annotated[
    GrpoAdvantage | DrGrpoAdvantage | RlooAdvantage | BatchStdAdvantage | ReinforcePlusPlusAdvantage,
    Field(discriminator="kind"),
]
"""The settings of advantages. `kind` chooses, and a setting that the chosen kind lacks is refused."""
