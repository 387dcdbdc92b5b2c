"""Choosing how far a memory is trusted, from what held-out text becomes with it.

Everything here is arithmetic on numbers measured elsewhere.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from knnmoe.runtime.calibration import Calibration, Variant
from knnmoe.runtime.memory import MemoryPack
from knnmoe.runtime.statistics import paired_bootstrap

from .evidence import Evidence

CAP = 12.0
TOKEN_SHARPNESS = 3.0  # a single token has no number of tokens to grow with
FOLDS = 4
MIN_SEQUENCES = 2 * FOLDS


@dataclass(frozen=True)
class Separation:
    """What one gate's evidence says about where text comes from.

    Attributes:
        domain: Mean over the domain's sequences of their mean evidence.
        general: The same of general text.
    """

    domain: float
    general: float

    @property
    def midpoint(self) -> float:
        """Half way."""
        return (self.domain + self.general) / 2

    @property
    def sharpness(self) -> float:
        """So that either mean is one unit from the midpoint.

        0, which is no gate, where the two are the wrong way round: such evidence is not asked.
        """
        half = (self.domain - self.general) / 2
        return 1 / half if half > 1e-4 else 0.0


def separations(
    pack: MemoryPack, domain: Evidence, general: Evidence, neighbors: int
) -> dict[int, Separation]:
    """Each gate's separation with K = `neighbors`."""

    def mean(evidence: Evidence, gate: int) -> float:
        return float(evidence.sequence_means(gate, neighbors).mean())

    return {g.gate: Separation(mean(domain, g.gate), mean(general, g.gate)) for g in pack.gates}


@dataclass(frozen=True)
class Candidate:
    """One way of using a memory."""

    name: str
    variant: Variant
    neighbors: int
    calibration: Mapping[int, Calibration]

    def applied(self, pack: MemoryPack) -> MemoryPack:
        """The pack used this way."""
        return pack.with_settings(
            variant=self.variant, neighbors=self.neighbors, calibration=self.calibration
        )


@dataclass(frozen=True)
class Ways:
    """What the grid is made of."""

    variants: Sequence[Variant] = ("residual", "logits")
    neighbors: Sequence[int] = (8, 32)
    scales: Sequence[float] = (0.5, 1.0)

    @property
    def count(self) -> int:
        """How many candidates it has."""
        return len(self.variants) * len(self.neighbors) * len(self.scales) + 1 + len(self.scales)


def candidates(
    pack: MemoryPack, by_neighbors: Mapping[int, Mapping[int, Separation]], ways: Ways
) -> Iterator[Candidate]:
    """The grid: every variant, K and scale with the causal sequence gate.

    Then, of the first variant with the first K, the largest scale with a gate that looks at each
    token alone, and every scale without a gate, where the square of the evidence has to do.

    Args:
        pack: For its gates and their weighting and γ, which stay.
        by_neighbors: Separations by K and gate.
        ways: The grid.
    """

    def numbers(variant: Variant, neighbors: int, **changes: Any) -> dict[int, Calibration]:
        sharpness = changes.pop("sharpness", 0.0)
        found = by_neighbors[neighbors]
        return {
            gate.gate: replace(
                gate.calibration.with_variant(variant),
                mean=1.0,
                cap=CAP,
                midpoint=found[gate.gate].midpoint,
                sharpness=sharpness * found[gate.gate].sharpness,
                **changes,
            )
            for gate in pack.gates
        }

    for variant in ways.variants:
        for k in ways.neighbors:
            for scale in ways.scales:
                gated = numbers(variant, k, scale=scale, power=1.0, sequence=1.0, sharpness=1.0)
                yield Candidate(f"{variant}, K {k}, {scale:g}·s̄·sequence gate", variant, k, gated)
    variant, k, scale = ways.variants[0], ways.neighbors[0], max(ways.scales)
    gated = numbers(variant, k, scale=scale, power=1.0, sequence=0.0, sharpness=TOKEN_SHARPNESS)
    yield Candidate(f"{variant}, K {k}, {scale:g}·s̄·token gate", variant, k, gated)
    for scale in ways.scales:
        plain = numbers(variant, k, scale=scale, power=2.0, sequence=0.0)
        yield Candidate(f"{variant}, K {k}, {scale:g}·s̄²", variant, k, plain)


@dataclass(frozen=True)
class Interval:
    """A mean difference of NLL in nats a token and its 95 % interval; below zero is a gain."""

    mean: float
    low: float
    high: float


@dataclass(frozen=True)
class Measured:
    """Change of NLL that candidates make on some text.

    Attributes:
        deltas: [candidates, sequences], mean change a token.
        tokens: [sequences] predicted tokens.
        documents: [sequences] the document of each.
    """

    deltas: NDArray[np.float64]
    tokens: NDArray[np.int64]
    documents: NDArray[np.int64]

    def interval(self, candidate: int) -> Interval:
        """Of one candidate."""
        return Interval(*paired_bootstrap(self.deltas[candidate], self.tokens))

    def part(self, chosen: NDArray[np.bool_]) -> Measured:
        """Only some of the sequences."""
        return Measured(self.deltas[:, chosen], self.tokens[chosen], self.documents[chosen])

    def folds(self) -> NDArray[np.int64]:
        """[sequences] the fold of each: whole documents, or stretches where these are too few."""
        _, numbers = np.unique(self.documents, return_inverse=True)
        if numbers.max() + 1 >= MIN_SEQUENCES:
            return numbers % FOLDS
        count = len(self.documents)
        return np.arange(count) * FOLDS // count


def choose(domain: Measured, general: Measured, max_general_loss: float) -> int | None:
    """The candidate that gains most on the domain while general text stays within its limit.

    Of general text the upper end of the interval counts. None if no candidate stays within.
    """
    allowed = [
        candidate
        for candidate in range(len(domain.deltas))
        if general.interval(candidate).high <= max_general_loss
    ]
    gains = domain.deltas @ domain.tokens / domain.tokens.sum()
    return min(allowed, key=lambda candidate: float(gains[candidate]), default=None)


def cross_fitted(
    domain: Measured, general: Measured, max_general_loss: float
) -> tuple[Interval, Interval]:
    """What choosing by `choose` is worth on text that did not take part in the choice.

    The documents are dealt into folds; each fold is scored with the candidate chosen on the others,
    the frozen router where none was allowed.

    Args:
        domain: At least `MIN_SEQUENCES` sequences.
        general: At least as many.
        max_general_loss: In nats a token.

    Returns:
        Of the domain, of general text.
    """
    parts: dict[str, list[NDArray[np.float64]]] = {"domain": [], "general": []}
    tokens: dict[str, list[NDArray[np.int64]]] = {"domain": [], "general": []}
    texts = {"domain": domain, "general": general}
    numbers = {name: text.folds() for name, text in texts.items()}
    for fold in range(FOLDS):
        rest = {name: text.part(numbers[name] != fold) for name, text in texts.items()}
        chosen = choose(rest["domain"], rest["general"], max_general_loss)
        for name, text in texts.items():
            held = text.part(numbers[name] == fold)
            zero = np.zeros(len(held.tokens))
            parts[name].append(zero if chosen is None else held.deltas[chosen])
            tokens[name].append(held.tokens)

    def joined(name: str) -> Interval:
        return Interval(
            *paired_bootstrap(np.concatenate(parts[name]), np.concatenate(tokens[name]))
        )

    return joined("domain"), joined("general")
