"""Routing rules: how a family turns router logits into experts and their weights."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .errors import SettingError

Floats = NDArray[np.floating[Any]]
Ints = NDArray[np.integer[Any]]

SCORES = ("softmax",)


@dataclass(frozen=True)
class RoutingRule:
    """Score all experts, select the `top_k` best, weigh them.

    Attributes:
        score: How logits become scores; `softmax` over all experts in fp32.
        top_k: Experts selected a token.
        renormalize: Whether the selected weights are divided by their sum.
        scale: Factor applied to the weights at the end.
    """

    top_k: int
    score: str = "softmax"
    renormalize: bool = False
    scale: float = 1.0

    def __post_init__(self) -> None:
        if self.score not in SCORES:
            raise SettingError("routing.score", "unknown", expected=SCORES, found=self.score)
        if self.top_k < 1:
            raise SettingError("routing.top_k", "out of range", expected=">= 1", found=self.top_k)

    def apply(self, router_logits: Floats) -> tuple[NDArray[np.int32], Floats]:
        """Select experts: logits [T, E] → (expert_ids int32 [T, k], expert_weights [T, k]).

        Computes in the dtype of the logits. Of experts with equal scores the lower id comes first,
        as ONNX TopK has it.
        """
        scores = self._scores(router_logits)
        ids = top_indices(scores, self.top_k)
        weights = np.take_along_axis(scores, ids, axis=1)
        if self.renormalize:
            weights = weights / weights.sum(axis=1, keepdims=True)
        if self.scale != 1.0:
            weights = weights * weights.dtype.type(self.scale)
        return ids.astype(np.int32), weights

    def assignments(self, router_logits: Floats) -> Floats:
        """The rule's result as dense rows: logits [T, E] → weights [T, E], 0 where not selected."""
        ids, weights = self.apply(router_logits)
        dense = np.zeros_like(router_logits)
        np.put_along_axis(dense, ids.astype(np.int64), weights, axis=1)
        return dense

    def to_json(self) -> dict[str, Any]:
        """The rule as a bundle's manifest states it."""
        return asdict(self)

    @staticmethod
    def _scores(router_logits: Floats) -> Floats:
        shifted = np.exp(router_logits - router_logits.max(axis=1, keepdims=True))
        scores: Floats = shifted / shifted.sum(axis=1, keepdims=True)
        return scores


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
