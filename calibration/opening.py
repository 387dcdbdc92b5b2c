"""Fitting when the gate opens: a logistic regression of the domain on the evidence so far.

The gate g of docs/method.md is σ(z) with z = sharpness · growth · (m - midpoint), where m is the
(decayed) mean evidence and the growth that of the tokens it is over. It is linear in growth · m and
growth, so fitting it to tell tokens of the domain from tokens of general text is a logistic
regression of two coefficients (Hastie, Tibshirani and Friedman, The Elements of Statistical
Learning, 2009, sec. 4.4), over evidence that was traced once: whatever the decay, nothing is run.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from knnmoe.runtime.blend import decayed_sums
from knnmoe.runtime.calibration import Calibration

Floats = NDArray[np.floating[Any]]

# One confident token too many in general text costs more than one too few in the domain gains.
CAUTION = 16.0
_RIDGE = 1e-5  # keeps coefficients finite where the two texts are told apart without a mistake
_ITERATIONS = 50
_LARGEST = 1e5


@dataclass(frozen=True)
class Opening:
    """Where one gate opens, and how steeply; sharpness 0 where evidence says nothing."""

    midpoint: float
    sharpness: float


def fit_opening(
    domain: Sequence[Floats],
    general: Sequence[Floats],
    *,
    decay: float,
    cap: float,
    sequence: bool,
    caution: float = CAUTION,
) -> Opening:
    """The midpoint and sharpness that tell domain from general text, token by token.

    General text is also taken as it follows the domain, half a sequence of it after half a
    sequence of the other, so that the gate learns to let go. The first 1/(1 - decay) tokens after
    the change are passed over: their state is mostly of what was before, and no gate can tell.

    Args:
        domain: Evidence s̄ of the tokens of each sequence, [n] each.
        general: The same of general text.
        decay: Of the state.
        cap: Of the growth.
        sequence: Whether evidence is gathered over the sequence, or each token is by itself.
        caution: How many times a token of general text weighs one of the domain.
    """
    numbers = Calibration(decay=decay)
    near = [_features(rows, numbers, cap, sequence) for rows in domain]
    far = [_features(rows, numbers, cap, sequence) for rows in general]
    if sequence and decay < 1:
        blind = round(1 / (1 - decay))
        for before, after in zip(domain, general, strict=False):
            joined = np.concatenate([halved(before), halved(after)])
            far.append(_features(joined, numbers, cap, sequence)[len(halved(before)) + blind :])
    x = np.concatenate([*near, *far]).astype(np.float64)
    count, others = sum(map(len, near)), sum(map(len, far))
    label = np.repeat([1.0, 0.0], [count, others])
    weight = np.repeat([1 / count, caution / others], [count, others])
    slope, level = _logistic(x, label, weight)
    if slope <= 0:
        return Opening(0.5, 0.0)
    return Opening(float(np.clip(-level / slope, -1e6, 1e6)), float(min(slope, _LARGEST)))


def halved(rows: Floats) -> Floats:
    """The first half of a sequence, at least a token."""
    return rows[: max(1, len(rows) // 2)]


def _features(evidence: Floats, numbers: Calibration, cap: float, sequence: bool) -> Floats:
    """[n, 2]: growth · m and growth after each token."""
    if not sequence:
        return np.stack([evidence, np.ones_like(evidence)], axis=1)
    real = np.ones((1, len(evidence)), np.bool_)
    zero = np.zeros(1)
    sums = decayed_sums(evidence[None].astype(np.float64), zero, real, numbers)[0]
    seen = decayed_sums(real.astype(np.float64), zero, real, numbers)[0]
    growth = np.minimum(np.sqrt(seen), cap)
    return np.stack([growth * sums / seen, growth], axis=1)


def _logistic(x: Floats, label: Floats, weight: Floats) -> tuple[float, float]:
    """Weighted logistic regression of labels [n] on [n, 2] without a constant, by Newton's method.

    A step that does not lower the loss is halved, so it ends wherever it begins.
    """

    def loss(c: Floats) -> float:
        z = x @ c
        value = np.logaddexp(0, z) - label * z
        return float(weight @ value + 0.5 * _RIDGE * (c @ c))

    coefficients = np.zeros(2)
    best = loss(coefficients)
    for _ in range(_ITERATIONS):
        z = np.clip(x @ coefficients, -60, 60)
        odds = 1 / (1 + np.exp(-z))
        gradient = x.T @ (weight * (odds - label)) + _RIDGE * coefficients
        curve = (x * (weight * odds * (1 - odds))[:, None]).T @ x + _RIDGE * np.eye(2)
        step = np.linalg.solve(curve, gradient)
        for _ in range(20):
            lower = loss(coefficients - step)
            if lower < best:
                break
            step = step / 2
        else:
            break
        gained, best, coefficients = best - lower, lower, coefficients - step
        if gained < 1e-9 * best:
            break
    return float(coefficients[0]), float(coefficients[1])
