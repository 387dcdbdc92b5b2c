"""Routing and blends of a few numbers, with results that were worked out by hand."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from ..blend import GateMemory
from ..calibration import Calibration
from ..routing import RoutingRule


@dataclass(frozen=True)
class RoutingCase:
    """A rule, logits of one token, and what comes of them."""

    name: str
    rule: RoutingRule
    logits: tuple[float, ...]
    expert_ids: tuple[int, ...]
    expert_weights: tuple[float, ...]
    bias: tuple[float, ...] | None = None


# Logits that are logarithms, so that a softmax gives fractions.
LN = tuple(math.log(n) for n in (1, 4, 2, 3))
# σ of these is 1/2, 3/4, 1/4, 9/10.
ODDS = tuple(math.log(odds) for odds in (1, 3, 1 / 3, 9))

ROUTING = (
    RoutingCase("softmax", RoutingRule(top_k=2), LN, (1, 3), (0.4, 0.3)),
    RoutingCase("softmax, renormalised", RoutingRule(top_k=2, renormalize=True), LN, (1, 3),
                (4 / 7, 3 / 7)),
    RoutingCase("softmax over the chosen", RoutingRule(top_k=2, score="softmax-topk"), LN, (1, 3),
                (4 / 7, 3 / 7)),
    RoutingCase("sigmoid, scaled", RoutingRule(top_k=2, score="sigmoid", scale=2.0), ODDS, (3, 1),
                (1.8, 1.5)),
    # The bias lifts expert 2 into the choice; its weight is without it.
    RoutingCase("sigmoid with a selection bias",
                RoutingRule(top_k=2, score="sigmoid", selection_bias=True), ODDS, (2, 3),
                (0.25, 0.9), bias=(0.0, 0.0, 0.7, 0.0)),
    # The group of experts 2 and 3 has the best expert; 1 is out though it is second.
    RoutingCase("one group of two, by its best",
                RoutingRule(top_k=2, score="sigmoid", groups=2, top_groups=1), ODDS, (3, 2),
                (0.9, 0.25)),
    # By the sum of two, the first group wins: 1/2 + 3/4 above 1/4 + 9/10.
    RoutingCase("one group of two, by its two best",
                RoutingRule(top_k=2, score="sigmoid", groups=2, top_groups=1, group_score="top2"),
                ODDS, (1, 0), (0.75, 0.5)),
    RoutingCase("of equals the lower", RoutingRule(top_k=2), (0.0, 0.0, 0.0, 0.0), (0, 1),
                (0.25, 0.25)),
)  # fmt: skip


@dataclass(frozen=True)
class BlendCase:
    """A memory, one token's x and r, and what comes of them."""

    name: str
    memory: GateMemory
    x: tuple[float, ...]
    rows: tuple[float, ...]
    blended: tuple[float, ...]
    confidence: float
    neighbors: tuple[int, ...]
    similarities: tuple[float, ...]


def _memory(calibration: Calibration, rbf: bool = False, n_valid: int = 3) -> GateMemory:
    """Two neighbours of three entries and one that is capacity, in the plane."""
    keys = np.array([[0.6, 0.8], [1, 0], [-1, 0], [1, 0]], np.float32)
    squares = (keys**2).sum(axis=1)
    return GateMemory(
        keys=keys,
        key_scales=np.stack([np.ones_like(squares), squares], axis=1),
        values=np.array([[0, 1], [1, 0], [9, 9], [9, 9]], np.float32),
        n_valid=n_valid,
        k=2,
        center=np.zeros(2, np.float32),
        calibration=calibration,
        similarity="rbf" if rbf else "cosine",
        rule_first=False,
    )


BLEND = (
    # Similarities 1 and 0.6: their mean is λ = 0.8, their shares are the weights 5/8 and 3/8.
    BlendCase("as the paper", _memory(Calibration()), (2.0, 0.0), (0.0, 1.0), (0.5, 0.5), 0.8,
              (1, 0), (1.0, 0.6)),
    # exp(β · 0.4) = 3, so weights 3/4 and 1/4; λ = 0.5 · 0.8².
    BlendCase("residual, softmax weights",
              _memory(Calibration(interpolate=0.0, weight_power=0.0, scale=0.5, power=2.0,
                                  inverse_temperature=math.log(3) / 0.4)),
              (2.0, 0.0), (0.0, 1.0), (0.24, 1.08), 0.32, (1, 0), (1.0, 0.6)),
    # Squared distances 0 and 0.8, so similarities 1 and 1/2; λ is their sum, cut off at 1.
    BlendCase("rbf, summed evidence",
              _memory(Calibration(mean=0.0, gamma=math.log(2) / 0.8), rbf=True),
              (1.0, 0.0), (0.0, 1.0), (2 / 3, 1 / 3), 1.0, (1, 0), (1.0, 0.5)),
    # Nothing is similar: λ = 0, and the router's logits stay, bit for bit.
    BlendCase("far from the memory", _memory(Calibration(), n_valid=2), (0.0, -1.0), (0.1, 0.7),
              (0.1, 0.7), 0.0, (1, 0), (0.0, 0.0)),
)  # fmt: skip
