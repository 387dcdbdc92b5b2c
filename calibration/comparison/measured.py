"""What a row measured, and how sure that is."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from knnmoe.runtime.statistics import paired_bootstrap
from knnmoe.runtime.texts import TokenText

Base = Literal["runtime", "torch"]

FEWEST_CLUSTERS = 8  # documents; of fewer, resampling tells nothing


@dataclass(frozen=True)
class Measured:
    """What one row did to the test texts.

    Attributes:
        nll: By text, summed NLL of each sequence, [n] float64.
        base: Whose frozen router it is compared with: quantised weights differ from the checkpoint.
        extra_bytes: What has to be stored or shipped besides the model; None where that makes no
            sense.
        chosen: Settings that validation text chose.
        facts: Further figures of this row.
    """

    nll: Mapping[str, NDArray[np.float64]]
    base: Base
    extra_bytes: int | None
    chosen: Mapping[str, Any] = field(default_factory=dict)
    facts: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Change:
    """Change of NLL in nats a token against the frozen router, with its 95 % interval.

    Bounds are infinite where there is nothing to resample.
    """

    mean: float
    low: float
    high: float

    def to_json(self) -> dict[str, float | None]:
        """The numbers; null for infinite bounds."""
        named = {"mean": self.mean, "low": self.low, "high": self.high}
        return {name: value if math.isfinite(value) else None for name, value in named.items()}


def clusters(text: TokenText) -> tuple[NDArray[np.int64], str]:
    """What is resampled whole: the cluster of each sequence [n], and what clusters are.

    Documents, since sequences of one are not independent; sequences where documents are too few.
    """
    documents = np.array([sequence.document for sequence in text.sequences], np.int64)
    _, numbers = np.unique(documents, return_inverse=True)
    if numbers.max() + 1 >= FEWEST_CLUSTERS:
        return numbers, "documents"
    return np.arange(len(documents)), "sequences"


def change(
    nll: NDArray[np.float64], base: NDArray[np.float64], text: TokenText, *, samples: int = 2000
) -> Change:
    """Paired cluster bootstrap of summed NLLs [n] against the frozen router's on the same text."""
    numbers, _ = clusters(text)
    tokens = np.bincount(numbers, [sequence.targets for sequence in text.sequences])
    sums = np.bincount(numbers, nll - base)
    return Change(*paired_bootstrap(sums / tokens, tokens, samples=samples))
