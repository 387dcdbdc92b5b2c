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
    sums = deltas * tokens
    if units is not None:
        together = np.asarray(units)
        if together.shape != deltas.shape:
            raise SettingError(
                "bootstrap", "units do not match", expected=f"one for each of {len(deltas)}",
                found=f"shape {list(together.shape)}",
            )  # fmt: skip
        _, together = np.unique(together, return_inverse=True)
        sums = np.bincount(together, sums).astype(np.float64)
        tokens = np.bincount(together, tokens).astype(np.float64)
    count = len(sums)
    mean = float(sums.sum() / tokens.sum())
    if count == 1:
        return mean, -np.inf, np.inf
    rng = np.random.default_rng(seed)
    means = np.empty(samples)
    block = max(1, _BLOCK // count)
    for start in range(0, samples, block):
        size = min(block, samples - start)
        drawn = rng.integers(count, size=(size, count))
        means[start : start + size] = sums[drawn].sum(axis=1) / tokens[drawn].sum(axis=1)
    low, high = np.quantile(means, [0.025, 0.975])
    return mean, float(low), float(high)


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
