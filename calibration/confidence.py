"""Choosing how far a memory is trusted, from what held-out text becomes with it.

Everything here is arithmetic on numbers measured elsewhere.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from knnmoe.runtime.calibration import Calibration, Variant
from knnmoe.runtime.memory import MemoryPack, PackGate
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
class Way:
    """One row of the grid: λ = scale · s̄ · gate, or scale · s̄² without a gate."""

    variant: Variant
    neighbors: int
    scale: float
    gate: Literal["sequence", "token", "none"]

    @property
    def name(self) -> str:
        """As people read it."""
        measure = "s̄²" if self.gate == "none" else f"s̄·{self.gate} gate"
        return f"{self.variant}, K {self.neighbors}, {self.scale:g}·{measure}"


GRID = (
    Way("residual", 8, 0.5, "sequence"),
    Way("residual", 8, 1.0, "sequence"),
    Way("residual", 32, 1.0, "sequence"),
    Way("logits", 8, 0.5, "sequence"),
    Way("logits", 8, 1.0, "sequence"),
    Way("logits", 32, 1.0, "sequence"),
    Way("residual", 8, 1.0, "token"),
    Way("residual", 8, 0.5, "none"),
)


def candidate(
    pack: MemoryPack, way: Way, by_neighbors: Mapping[int, Mapping[int, Separation]]
) -> Candidate:
    """A way of the grid with this memory's numbers.

    Args:
        pack: For its gates and their weighting and γ, which stay.
        way: The way.
        by_neighbors: Separations by K and gate.
    """

    def numbers(gate: PackGate) -> Calibration:
        found = by_neighbors[way.neighbors][gate.gate]
        growth = {"sequence": 1.0, "token": TOKEN_SHARPNESS, "none": 0.0}[way.gate]
        return replace(
            gate.calibration.with_variant(way.variant),
            mean=1.0,
            scale=way.scale,
            power=2.0 if way.gate == "none" else 1.0,
            midpoint=found.midpoint,
            sharpness=growth * found.sharpness,
            cap=CAP,
            sequence=float(way.gate == "sequence"),
        )

    calibration = {gate.gate: numbers(gate) for gate in pack.gates}
    return Candidate(way.name, way.variant, way.neighbors, calibration)


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
        index
        for index in range(len(domain.deltas))
        if general.interval(index).high <= max_general_loss
    ]
    gains = domain.deltas @ domain.tokens / domain.tokens.sum()
    return min(allowed, key=lambda index: float(gains[index]), default=None)


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
