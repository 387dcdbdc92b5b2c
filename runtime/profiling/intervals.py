"""Median and tail of measured times, and how sure the median is."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike


def median(milliseconds: ArrayLike) -> float:
    """The median of some times."""
    return float(np.median(np.asarray(milliseconds)))


def percentiles(milliseconds: ArrayLike) -> dict[str, float]:
    """Median, tail and longest of some times: `p50_ms`, `p90_ms`, `p99_ms`, `max_ms`."""
    found = np.percentile(np.asarray(milliseconds), [50, 90, 99, 100]).tolist()
    return dict(zip(("p50_ms", "p90_ms", "p99_ms", "max_ms"), found, strict=True))


def interval(
    samples: Sequence[float],
    rounds: Sequence[int],
    *,
    draws: int = 500,
    seed: int = 0,
) -> tuple[float, float]:
    """95 % interval of the median of samples, by drawing whole rounds (cluster bootstrap).

    Steps of one round share what the machine did at that moment, so they are no independent
    samples; rounds are nearly so.

    Args:
        samples: [n].
        rounds: [n], the round of each.
        draws: Bootstrap samples.
        seed: Of the draws.

    Returns:
        (low, high); (-inf, inf) of a single round, which says nothing about others.
    """
    times, groups = np.asarray(samples, np.float64), np.asarray(rounds)
    members = [times[groups == group] for group in np.unique(groups)]
    if len(members) < 2:
        return -np.inf, np.inf
    rng = np.random.default_rng(seed)
    drawn = rng.integers(len(members), size=(draws, len(members)))
    if all(len(part) == len(members[0]) for part in members):
        pool = np.stack(members)[drawn].reshape(draws, -1)
        found = np.median(pool, axis=1)
    else:
        found = np.array([np.median(np.concatenate([members[i] for i in row])) for row in drawn])
    low, high = np.percentile(found, [2.5, 97.5])
    return float(low), float(high)
