"""The rotary embedding: how fast each pair of a head turns, and how YaRN slows some of them down.

YaRN (arXiv 2309.00071) stretches the context by a factor: pairs that turn often within the original
context keep their speed, those that turn less than once go slower by the factor, and those between
go from one to the other along a ramp. All cosines and sines grow a little.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]


@dataclass(frozen=True)
class Yarn:
    """What stretches the context.

    Attributes:
        factor: By how much.
        positions: Of the original context.
        magnitude: Factor of all cosines and sines.
        fast, slow: Turns within the original context from which on a pair keeps its speed, and up
            to which it goes slower by the whole factor.
        whole: Whether the ramp begins and ends at whole pairs.
    """

    factor: float
    positions: int
    magnitude: float
    fast: float = 32.0
    slow: float = 1.0
    whole: bool = True


@dataclass(frozen=True)
class Rope:
    """The rotary embedding of a model.

    Attributes:
        theta: The base.
        yarn: What stretches its context, or None.
    """

    theta: float
    yarn: Yarn | None = None

    @property
    def magnitude(self) -> float:
        """Factor of all cosines and sines."""
        return 1.0 if self.yarn is None else self.yarn.magnitude

    def frequencies(self, head_size: int) -> Floats:
        """Angle by which each pair of a head turns a position: fp32 [head size / 2]."""
        exponents = np.arange(0, head_size, 2, dtype=np.float32) / np.float32(head_size)
        # The power is rounded once, from float64, as torch's is; NumPy's own in fp32 is an ulp off
        # here and there, which is 2e-4 rad at position 4096.
        powers = np.power(self.theta, exponents.astype(np.float64)).astype(np.float32)
        frequencies = np.float32(1) / powers
        if self.yarn is None:
            return frequencies
        slowed = np.float32(1) / (np.float32(self.yarn.factor) * powers)
        kept = np.float32(1) - self._ramp(self.yarn, head_size)
        return slowed * (1 - kept) + frequencies * kept

    def _ramp(self, yarn: Yarn, head_size: int) -> Floats:
        """0 for pairs that keep their speed, 1 for those that lose the whole factor."""

        def pair(turns: float) -> float:
            """The pair that turns so often within the original context."""
            logarithm = math.log(yarn.positions / (turns * 2 * math.pi))
            return head_size * logarithm / (2 * math.log(self.theta))

        first, last = pair(yarn.fast), pair(yarn.slow)
        if yarn.whole:
            first, last = math.floor(first), math.ceil(last)
        first, last = max(first, 0), min(last, head_size - 1)
        if first == last:
            last += 0.001
        pairs = np.arange(head_size // 2, dtype=np.float32)
        ramp: Floats = np.clip((pairs - np.float32(first)) / np.float32(last - first), 0, 1)
        return ramp
