"""How sure a figure of a run is whose samples follow each other in time.

Steps of one run are alike: a slow moment of the machine lasts for many of them. So whole rounds of
steps, or blocks of steps in a row, are drawn (the block bootstrap of Carlstein, The use of
subseries values for estimating the variance of a general statistic from a stationary sequence,
1986).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray

BLOCKS = 12  # of a run; as long as they can be, so that they hold what drifts slowly
MIN_ROUNDS = 6  # of fewer rounds, blocks of steps are drawn
MOST_ALIKE = 0.9
SEVERAL = 5
TINY_MS = 1e-6  # a clock that did not tick

Doubles = NDArray[np.float64]
Parts = Sequence[Sequence[float]]


def block_starts(rounds: Sequence[int]) -> NDArray[np.int64]:
    """Where the blocks of a run begin [blocks]: twelve at most, of whole rounds where there are.

    Args:
        rounds: [n], the round of each sample, in the order they were taken.
    """
    steps = np.asarray(rounds)
    begins = np.flatnonzero(np.r_[True, steps[1:] != steps[:-1]])
    if len(begins) < MIN_ROUNDS:
        begins = np.arange(len(steps))
    count = min(len(begins), BLOCKS)
    chosen: NDArray[np.int64] = begins[(np.arange(count) * len(begins)) // count]
    return chosen


def block_correlation(
    runs: Sequence[tuple[Parts, Sequence[int]]],
    *,
    quantile: float = 0.5,
    beside: bool = False,
) -> float:
    """How much a quantile of neighbouring blocks is alike, 0 to 0.9: drift that outlasts a block.

    The mean over all parts. A short series seems less correlated than it is, by about (1 + 4ρ) / B
    (Kendall, Note on bias in the estimation of autocorrelation, 1954), which is put back.

    Args:
        runs: Samples of the parts of each point of a record, and the rounds of its steps.
        quantile: 0.5 is the median.
        beside: Take away what the parts of a point have in common (`common`), if it has several.
    """
    found = []
    for parts, rounds in runs:
        starts = block_starts(rounds)
        count = len(starts)
        if count < MIN_ROUNDS:
            continue
        blocks = np.split(np.asarray(parts, np.float64), starts[1:], axis=1)
        levels = logs(np.array([np.quantile(block, quantile, axis=1) for block in blocks]))
        levels -= levels.mean(axis=0)
        if beside and len(parts) >= SEVERAL:
            levels -= common(levels)
            levels -= levels.mean(axis=0)
        for level in levels.T:
            if (power := float(level @ level)) > 0:
                seen = float(level[1:] @ level[:-1]) / power
                found.append((seen + 1 / count) / (1 - 4 / count))
    return min(max(float(np.mean(found)), 0.0), MOST_ALIKE) if found else 0.0


def logs(milliseconds: Doubles) -> Doubles:
    """Logarithms; of what a clock did not see tick, that of a nanosecond."""
    found: Doubles = np.log(np.maximum(milliseconds, TINY_MS))
    return found


def common(levels: Doubles) -> Doubles:
    """What parts have in common: the median of their logarithms [..., parts], [..., 1]."""
    found: Doubles = np.median(levels, axis=-1, keepdims=True)
    return found


def resampled_quantiles(
    parts: Parts,
    rounds: Sequence[int],
    *,
    quantile: float = 0.5,
    draws: int = 1000,
    seed: int = 0,
) -> Doubles:
    """A quantile of each part in resampled runs [draws, parts].

    The spread is that of a run like this one, but for what `widening` says.

    Args:
        parts: Samples [n] of each part of the same n steps, which are drawn together.
        rounds: [n], the round of each step.
        quantile: 0.5 is the median.
        draws: Resampled runs.
        seed: Of the draws.
    """
    starts = block_starts(rounds)
    count, steps = len(starts), len(rounds)
    block_of_step = np.searchsorted(starts, np.arange(steps), side="right") - 1
    rng = np.random.default_rng(seed)
    drawn = rng.multinomial(count, np.full(count, 1 / count), size=draws).T.astype(np.int32)
    found = np.empty((draws, len(parts)))
    for number, part in enumerate(parts):
        samples = np.asarray(part, np.float64)
        order = np.argsort(samples, kind="stable")
        ranks = np.cumsum(drawn[block_of_step[order]], axis=0, dtype=np.int32)  # [steps, draws]
        wanted = quantile * ranks[-1]
        first = (ranks < wanted).sum(axis=0)
        second = np.minimum((ranks <= wanted).sum(axis=0), steps - 1)
        ranked = samples[order]
        found[:, number] = (ranked[first] + ranked[second]) / 2
    return found


def widening(rounds: Sequence[int], correlation: float) -> float:
    """By what the spread of resampled runs is multiplied.

    √(B / (B - 1)), which drawing from B blocks instead of from all that could be takes away, and
    √((1 + ρ) / (1 - ρ)) where blocks resemble the ones before them.

    Args:
        rounds: [n], the round of each step.
        correlation: ρ, from `block_correlation`.
    """
    count = len(block_starts(rounds))
    return math.sqrt(count / max(count - 1, 1) * (1 + correlation) / (1 - correlation))


def student_factor(normal: float, degrees: int) -> float:
    """By what a normal quantile is multiplied where the spread itself has so many degrees.

    Expansion of Student's quantile in the normal one (Abramowitz and Stegun, 26.7.5).
    """
    z, n = normal, float(degrees)
    terms = (
        (z**2 + 1) / 4,
        (5 * z**4 + 16 * z**2 + 3) / 96,
        (3 * z**6 + 19 * z**4 + 17 * z**2 - 15) / 384,
    )
    return 1 + sum(term / n ** (power + 1) for power, term in enumerate(terms))


def joint_quantile(deviations: Doubles, spread: Doubles, confidence: float) -> float:
    """How many spreads hold the deviations [draws, parts] of all parts in that share of the draws.

    The quantile of the largest standardised deviation (the maximum statistic of Romano and Wolf,
    Exact and approximate stepdown methods for multiple hypothesis testing, 2005): it accounts for
    many parts being looked at, and parts that move together count less than as many that do not.
    Never less than the normal quantile of one part.
    """
    moving = spread > 0
    single = NormalDist().inv_cdf((1 + confidence) / 2)
    if not moving.any():
        return single
    largest = np.abs(deviations[:, moving] / spread[moving]).max(axis=1)
    return max(float(np.quantile(largest, confidence)), single)
