"""The rotary embedding: how fast each pair of a head turns, and how YaRN slows some of them down.

YaRN (arXiv 2309.00071) stretches the context by a factor: pairs that turn often within the original
context keep their speed, those that turn less than once go slower by the factor, and those between
go from one to the other along a ramp. All cosines and sines grow a little.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .config import Config

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
        softmax: Factor of the scale of latent attention's softmax (`mscale_all_dim`, squared).
    """

    factor: float
    positions: int
    magnitude: float
    fast: float = 32.0
    slow: float = 1.0
    whole: bool = True
    softmax: float = 1.0


@dataclass(frozen=True)
class Rope:
    """The rotary embedding of a model.

    Attributes:
        theta: The base.
        yarn: What stretches its context, or None.
        share: Of a head that is turned, its first numbers.
    """

    theta: float
    yarn: Yarn | None = None
    share: float = 1.0

    @property
    def magnitude(self) -> float:
        """Factor of all cosines and sines."""
        return 1.0 if self.yarn is None else self.yarn.magnitude

    @property
    def softmax(self) -> float:
        """Factor of the scale of latent attention's softmax."""
        return 1.0 if self.yarn is None else self.yarn.softmax

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


def read_rope(
    config: Config, default_theta: float, max_positions: str, share: str | None = None
) -> Rope:
    """The rotary embedding, in the old form of config or the new.

    Old: `rope_theta`, `rope_scaling`; new: `rope_parameters` with both.

    Args:
        config: Of the checkpoint.
        default_theta: The base where the config leaves it out.
        max_positions: Name of the entry that holds the longest context.
        share: Name of the entry that says how much of a head is turned, in the new form of config
            or beside it; None where it must be the whole.

    Raises:
        CheckpointError: If an entry is malformed or asks for what is not supported.
    """
    yarn: Yarn | None = None
    for name in ("rope_parameters", "rope_scaling"):
        found = config.raw(name)
        if found is None:
            continue
        if not isinstance(found, dict):
            raise config.wrong(name, "malformed", "an object or null")
        if any(isinstance(value, dict) for value in found.values()):
            raise config.wrong(name, "is not the same for all layers", "one set of numbers")
        kind = found.get("rope_type", found.get("type", "default"))
        if kind == "yarn":
            yarn = _yarn(config, config.inside(name), max_positions)
        elif kind == "default":
            yarn = None
        else:
            raise config.wrong(
                name, "asks for a scaling that is not supported", "rope_type default or yarn"
            )
        if share is None and found.get("partial_rotary_factor", 1.0) != 1.0:
            raise config.wrong(name, "rotates only a part of each head", "the whole head")
    parameters = config.raw("rope_parameters") or {}
    theta = parameters.get("rope_theta", config.raw("rope_theta"))
    part = 1.0 if share is None else _share(config, share, parameters)
    if theta is None:
        return Rope(default_theta, yarn, part)
    if isinstance(theta, bool) or not isinstance(theta, int | float) or not 1 < theta < 1e12:
        raise config.wrong("rope_theta", "malformed", "a number above 1")
    return Rope(float(theta), yarn, part)


def _share(config: Config, name: str, parameters: dict[str, Any]) -> float:
    """How much of a head is turned: what the new form says goes first."""
    inner = config.inside("rope_parameters") if name in parameters else config
    found = inner.positive(name)
    if found > 1:
        raise inner.wrong(name, "out of range", "at most 1")
    return found


def _yarn(config: Config, inside: Config, max_positions: str) -> Yarn:
    """YaRN's numbers, with what transformers assumes where the config leaves them out."""

    def number(name: str, default: float) -> float:
        return default if inside.raw(name) is None else inside.positive(name)

    def growth(weight: float) -> float:
        return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0

    original = "original_max_position_embeddings"
    stated = config if config.raw(original) is not None else inside
    positions = stated.count(original, default=config.count(max_positions))
    factor = inside.positive("factor")
    magnitude = growth(1.0)
    if inside.raw("mscale") and inside.raw("mscale_all_dim"):
        magnitude = growth(inside.positive("mscale")) / growth(inside.positive("mscale_all_dim"))
    every = inside.positive("mscale_all_dim") if inside.raw("mscale_all_dim") else 0.0
    truncate = inside.raw("truncate")
    return Yarn(
        factor=factor,
        positions=positions,
        magnitude=number("attention_factor", magnitude),
        fast=number("beta_fast", Yarn.fast),
        slow=number("beta_slow", Yarn.slow),
        whole=True if truncate is None else inside.flag("truncate"),
        softmax=growth(every) ** 2,
    )
