"""Routing rules: how a family turns router logits into experts and their weights."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .errors import SettingError

Floats = NDArray[np.floating[Any]]
Ints = NDArray[np.integer[Any]]

SCORES = ("softmax", "softmax-topk", "sigmoid")
GROUP_SCORES = ("max", "top2")

# Added to the sum of sigmoid scores before it divides them, as DeepSeek-V3 and GLM-4 do: all scores
# of a token may be 0.
SIGMOID_EPSILON = 1e-20
# Fields that a manifest may leave out, where they are as here.
_OPTIONAL: dict[str, Any] = {
    "groups": 1,
    "top_groups": 1,
    "group_score": "max",
    "selection_bias": False,
}


@dataclass(frozen=True)
class RoutingRule:
    """Score all experts, select the `top_k` best, weigh them.

    A family states its rule with these fields and nothing else; docs/design.md has the table of
    families. The one thing that is not a number of the rule is the bias of each gate, a tensor,
    which is passed beside it.

    Attributes:
        top_k: Experts selected a token.
        score: How logits become scores, in fp32. `softmax`: over all experts. `sigmoid`: of each
            logit alone. `softmax-topk`: the logits themselves select, and a softmax over the
            selected ones makes the weights.
        renormalize: Whether the selected weights are divided by their sum.
        scale: Factor applied to the weights at the end.
        groups: Equal groups of consecutive experts; 1 is no groups.
        top_groups: Groups that a token's experts are selected from.
        group_score: What ranks a group: `max`, its best expert, or `top2`, the sum of its two best.
        selection_bias: Whether each gate adds a bias [E] of its own to the scores it selects by
            (experts and groups); weights are made of the scores without it.

    Raises:
        SettingError: If a field is out of its range, or contradicts another.
    """

    top_k: int
    score: str = "softmax"
    renormalize: bool = False
    scale: float = 1.0
    groups: int = 1
    top_groups: int = 1
    group_score: str = "max"
    selection_bias: bool = False

    def __post_init__(self) -> None:
        for name, choices in (("score", SCORES), ("group_score", GROUP_SCORES)):
            found = getattr(self, name)
            if found not in choices:
                raise SettingError(f"routing.{name}", "unknown", expected=choices, found=found)
        for name, most in (("top_k", math.inf), ("groups", math.inf), ("top_groups", self.groups)):
            found = getattr(self, name)
            if not 1 <= found <= most:
                expected = ">= 1" if most == math.inf else f"1 to {most}, the number of groups"
                raise SettingError(
                    f"routing.{name}", "out of range", expected=expected, found=found
                )
        if not math.isfinite(self.scale):
            raise SettingError("routing.scale", "not a finite number", found=self.scale)
        if self.renormalize and self.score == "softmax-topk":
            raise SettingError(
                "routing.renormalize",
                "has no meaning for softmax-topk, whose weights sum to one",
                expected=False,
                found=True,
            )

    @property
    def selects_by_score(self) -> bool:
        """Whether experts are ranked by their scores alone: no groups, no bias."""
        return self.groups == 1 and not self.selection_bias

    def check_experts(self, num_experts: int) -> None:
        """Raise `SettingError` unless the rule can select among that many experts."""
        if num_experts % self.groups:
            raise SettingError(
                "routing.groups",
                "does not divide the experts",
                expected=f"a divisor of {num_experts}",
                found=self.groups,
            )
        size = num_experts // self.groups
        if self.groups > 1 and self.group_score == "top2" and size < 2:
            raise SettingError(
                "routing.group_score",
                "sums two experts of a group that has one",
                expected="max, or fewer groups",
                found=self.group_score,
            )
        if self.top_k > size * self.top_groups:
            raise SettingError(
                "routing.top_k",
                "is more than there are experts to select from",
                expected=f"at most {size * self.top_groups}",
                found=self.top_k,
            )

    def apply(
        self, router_logits: Floats, selection_bias: Floats | None = None
    ) -> tuple[NDArray[np.int32], Floats]:
        """Select experts: logits [T, E] → (expert_ids int32 [T, k], expert_weights [T, k]).

        Computes in the dtype of the logits. Of experts, and of groups, that rank equal the lower id
        comes first, as ONNX TopK has it.

        Args:
            router_logits: [T, E].
            selection_bias: [E], of this gate, where the rule has one.

        Raises:
            SettingError: If the rule does not fit E, or the bias does not fit the rule.
        """
        scores = self._scores(router_logits)
        ids = top_indices(self._ranked(scores, selection_bias), self.top_k)
        weights = np.take_along_axis(scores, ids, axis=1)
        if self.score == "softmax-topk":
            weights = _softmax(weights)
        elif self.renormalize:
            total = weights.sum(axis=1, keepdims=True)
            if self.score == "sigmoid":
                total = total + total.dtype.type(SIGMOID_EPSILON)
            weights = weights / total
        if self.scale != 1.0:
            weights = weights * weights.dtype.type(self.scale)
        return ids.astype(np.int32), weights

    def assignments(self, router_logits: Floats, selection_bias: Floats | None = None) -> Floats:
        """The rule's result as dense rows: logits [T, E] → weights [T, E], 0 where not selected.

        Arguments and errors as of `apply`.
        """
        ids, weights = self.apply(router_logits, selection_bias)
        dense = np.zeros_like(router_logits)
        np.put_along_axis(dense, ids.astype(np.int64), weights, axis=1)
        return dense

    def ranking(self, router_logits: Floats, selection_bias: Floats | None = None) -> Floats:
        """What experts are selected by, [T, E]: the highest first, -inf outside of the groups.

        Arguments and errors as of `apply`.
        """
        return self._ranked(self._scores(router_logits), selection_bias)

    def margins(self, router_logits: Floats, selection_bias: Floats | None = None) -> Floats:
        """How near each token is to another selection, [T]: 0 for a tie, inf where there is none.

        The difference between what was selected last and what was first not to be, of experts or of
        groups. In logits where those rank alike, else in scores.

        Arguments and errors as of `apply`.
        """
        by_logits = not self.selection_bias and self.score != "sigmoid"
        by_logits = by_logits and (self.groups == 1 or self.group_score == "max")
        rule = replace(self, score="softmax-topk", renormalize=False) if by_logits else self
        scores = rule._biased(rule._scores(router_logits), selection_bias)
        margins = _margins(rule._in_best_groups(scores), self.top_k)
        if self.groups > 1:
            margins = np.minimum(margins, _margins(rule._group_ranks(scores), self.top_groups))
        return margins

    def to_json(self) -> dict[str, Any]:
        """The rule as a bundle's manifest states it: without what is as in a rule without it."""
        fields = asdict(self)
        return {
            name: value
            for name, value in fields.items()
            if name not in _OPTIONAL or value != _OPTIONAL[name]
        }

    def numbers(self) -> dict[str, Any]:
        """The fields as the kernels take them; the selection bias is an array there."""
        fields = asdict(self)
        del fields["selection_bias"]
        return fields

    def _scores(self, router_logits: Floats) -> Floats:
        if self.score == "softmax":
            return _softmax(router_logits)
        if self.score == "sigmoid":
            with np.errstate(over="ignore"):  # to inf, whose inverse is the 0 it should be
                scores: Floats = 1 / (1 + np.exp(-router_logits))
            return scores
        return router_logits

    def _ranked(self, scores: Floats, selection_bias: Floats | None) -> Floats:
        return self._in_best_groups(self._biased(scores, selection_bias))

    def _biased(self, scores: Floats, selection_bias: Floats | None) -> Floats:
        experts = scores.shape[1]
        self.check_experts(experts)
        if (selection_bias is None) == self.selection_bias:
            raise SettingError(
                "selection_bias",
                "is missing" if self.selection_bias else "is given to a rule that has none",
                expected=f"a bias of {experts} experts" if self.selection_bias else None,
            )
        if selection_bias is not None:
            if selection_bias.shape != (experts,):
                raise SettingError(
                    "selection_bias",
                    "of another shape",
                    expected=[experts],
                    found=list(selection_bias.shape),
                )
            scores = scores + selection_bias.astype(scores.dtype)
        return scores

    def _in_best_groups(self, scores: Floats) -> Floats:
        """The scores [T, E] with -inf outside of the best groups."""
        if self.groups == 1:
            return scores
        chosen = np.zeros((len(scores), self.groups), bool)
        groups = top_indices(self._group_ranks(scores), self.top_groups)
        np.put_along_axis(chosen, groups, True, axis=1)
        inside = np.repeat(chosen, scores.shape[1] // self.groups, axis=1)
        ranked: Floats = np.where(inside, scores, scores.dtype.type(-np.inf))
        return ranked

    def _group_ranks(self, scores: Floats) -> Floats:
        """What the groups are selected by, [T, groups]; a NaN among the scores counts for -inf."""
        grouped = scores.reshape(len(scores), self.groups, -1)
        numbers = np.where(np.isnan(grouped), scores.dtype.type(-np.inf), grouped)
        if self.group_score == "max":
            best: Floats = numbers.max(axis=2)
            return best
        two: Floats = np.sort(numbers, axis=2)[:, :, -2:].sum(axis=2)
        return two


def select_assignments(assignments: Floats, count: int) -> tuple[NDArray[np.int32], Floats]:
    """Cut blended assignments [T, E] down to the `count` heaviest experts a token.

    The weights keep the mass of the whole row, so that a cut changes how the experts are mixed and
    not how much they contribute. Where the row has at most `count` experts nothing is rescaled.
    """
    ids = top_indices(assignments, count)
    weights = np.take_along_axis(assignments, ids, axis=1)
    kept = weights.sum(axis=1, keepdims=True)
    total = assignments.sum(axis=1, keepdims=True)
    beyond = np.count_nonzero(assignments, axis=1, keepdims=True) > count
    factor = np.where(beyond, total / np.where(kept > 0, kept, 1), 1).astype(weights.dtype)
    return ids.astype(np.int32), weights * factor


def top_indices(rows: Floats, count: int) -> NDArray[np.int64]:
    """Column indices [T, count] of the largest entries of each row, ties by lower index."""
    return np.argsort(-rows, axis=1, kind="stable")[:, :count]


def _margins(rows: Floats, count: int) -> Floats:
    """Of each row, its `count`-th largest entry minus the next; inf where there is no next."""
    if count == rows.shape[1]:
        return np.full(len(rows), np.inf, rows.dtype)
    ranked = -np.sort(-rows, axis=1)
    margins: Floats = ranked[:, count - 1] - ranked[:, count]
    return margins


def _softmax(rows: Floats) -> Floats:
    shifted = np.exp(rows - rows.max(axis=1, keepdims=True))
    scores: Floats = shifted / shifted.sum(axis=1, keepdims=True)
    return scores
