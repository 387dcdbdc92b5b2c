"""How sure a measured difference is."""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from .errors import SettingError

_BLOCK = 1 << 22  # draws in memory at once
MIN_DOCUMENTS = 8

Unit = Literal["documents", "sequences"]


def drawn_units(documents_of_sequences: ArrayLike) -> tuple[NDArray[np.int64], Unit]:
    """What a bootstrap should draw of some text: the unit [n] of each sequence, and its kind.

    Sequences of one document are alike, so documents are drawn, whole. Of fewer than eight
    documents the draws would say too little about others: then it is sequences.
    """
    documents = np.asarray(documents_of_sequences)
    names, units = np.unique(documents, return_inverse=True)
    if len(names) < MIN_DOCUMENTS:
        return np.arange(len(documents)), "sequences"
    return units.astype(np.int64), "documents"


def paired_bootstrap(
    deltas_per_sequence: ArrayLike,
    tokens_per_sequence: ArrayLike,
    *,
    units: ArrayLike | None = None,
    samples: int = 2000,
    seed: int = 0,
) -> tuple[float, float, float]:
    """Mean difference a token and its 95 % interval, by resampling sequences.

    Tokens of one sequence are not independent, so whole sequences are drawn, with replacement, as
    many as there are; each sample's mean weighs them by their tokens (the percentile bootstrap of
    Efron and Tibshirani, An Introduction to the Bootstrap, 1993, ch. 13).

    Args:
        deltas_per_sequence: Mean difference a token of each sequence [n], for example of its
            negative log-likelihood with a memory minus without.
        tokens_per_sequence: Tokens each mean is over [n].
        units: Which sequences are drawn together [n], as `drawn_units` has them (the cluster
            bootstrap); None draws each by itself.
        samples: Bootstrap samples.
        seed: Of the draws; the same seed gives the same interval.

    Returns:
        (mean, low, high): the mean difference a token, and the 2.5 and 97.5 percentiles. With one
        sequence or unit, which says nothing about others, the interval is from -inf to inf.

    Raises:
        SettingError: If the lengths differ, nothing is there, or a number is out of its range.
    """
    deltas = np.asarray(deltas_per_sequence, dtype=np.float64)
    tokens = np.asarray(tokens_per_sequence, dtype=np.float64)
    _check(deltas, tokens, samples)
    return _ratio(deltas * tokens, tokens, units, samples, seed)


def paired_share(
    part: ArrayLike,
    whole: ArrayLike,
    *,
    units: ArrayLike | None = None,
    samples: int = 2000,
    seed: int = 0,
) -> tuple[float, float, float]:
    """One sum as a share of another of the same sequences, and its 95 % interval.

    For example what a smaller memory gains as a share of what the whole one gains. Both sums of a
    sequence are drawn together (the bootstrap of a ratio; Efron and Tibshirani, 1993, ch. 10.3), so
    what makes both large or small does not widen the interval.

    Args:
        part, whole: Sums of each sequence [n], such as nats gained.
        units, samples, seed: See `paired_bootstrap`.

    Returns:
        (share, low, high). With one sequence or unit, or where the whole is not surely other than
        zero, so that a share of it says nothing, the interval is from -inf to inf.

    Raises:
        SettingError: If the lengths differ, nothing is there, a number is out of its range, or the
            whole is zero.
    """
    above = np.asarray(part, dtype=np.float64)
    below = np.asarray(whole, dtype=np.float64)
    _check(above, np.ones_like(above), samples)
    _check(below, np.ones_like(above), samples)
    if below.sum() == 0:
        raise SettingError("bootstrap", "a share of nothing", expected="a sum other than zero")
    _, low, high = _ratio(below, np.ones_like(below), units, samples, seed)
    if low <= 0 <= high:
        return float(above.sum() / below.sum()), -np.inf, np.inf
    return _ratio(above, below, units, samples, seed)


def _ratio(
    above: NDArray[np.float64],
    below: NDArray[np.float64],
    units: ArrayLike | None,
    samples: int,
    seed: int,
) -> tuple[float, float, float]:
    """The ratio of two sums over sequences [n], and its interval."""
    if units is not None:
        together = np.asarray(units)
        if together.shape != above.shape:
            raise SettingError(
                "bootstrap", "units do not match", expected=f"one for each of {len(above)}",
                found=f"shape {list(together.shape)}",
            )  # fmt: skip
        _, together = np.unique(together, return_inverse=True)
        above = np.bincount(together, above).astype(np.float64)
        below = np.bincount(together, below).astype(np.float64)
    count = len(above)
    ratio = float(above.sum() / below.sum())
    if count == 1:
        return ratio, -np.inf, np.inf
    rng = np.random.default_rng(seed)
    ratios = np.empty(samples)
    block = max(1, _BLOCK // count)
    for start in range(0, samples, block):
        size = min(block, samples - start)
        drawn = rng.integers(count, size=(size, count))
        ratios[start : start + size] = above[drawn].sum(axis=1) / below[drawn].sum(axis=1)
    low, high = np.quantile(ratios, [0.025, 0.975])
    return ratio, float(low), float(high)


def _check(deltas: NDArray[Any], tokens: NDArray[Any], samples: int) -> None:
    if deltas.ndim != 1 or deltas.shape != tokens.shape or not len(deltas):
        raise SettingError(
            "bootstrap",
            "sequences do not match",
            expected="two lists of the same length, not empty",
            found=f"shapes {list(deltas.shape)} and {list(tokens.shape)}",
        )
    if not (np.isfinite(deltas).all() and np.isfinite(tokens).all() and (tokens > 0).all()):
        raise SettingError(
            "bootstrap",
            "numbers out of range",
            expected="finite differences over at least one token each",
        )
    if samples < 1:
        raise SettingError("samples", "out of range", expected=">= 1", found=samples)
