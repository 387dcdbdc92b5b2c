"""Choosing how far a memory is trusted, from what held-out text becomes with it.

Everything here is arithmetic on numbers measured elsewhere.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import NormalDist
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from knnmoe.runtime.calibration import Calibration, EvidenceFrom, Variant
from knnmoe.runtime.memory import MemoryPack
from knnmoe.runtime.pack_parts import PackGate
from knnmoe.runtime.statistics import Unit, drawn_units, paired_bootstrap

from .evidence import Evidence
from .opening import CAUTION, Opening, fit_opening

CAP = 12.0
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


@dataclass(frozen=True)
class Candidate:
    """One way of using a memory; gates that are `unused` are left to the frozen router.

    `caution` is what its gates were fitted with.
    """

    name: str
    variant: Variant
    neighbors: int
    evidence: EvidenceFrom
    calibration: Mapping[int, Calibration]
    unused: frozenset[int] = frozenset()
    caution: float = CAUTION

    def applied(self, pack: MemoryPack) -> MemoryPack:
        """The pack used this way."""
        return pack.with_settings(
            variant=self.variant,
            neighbors=self.neighbors,
            evidence=self.evidence,
            calibration=self.calibration,
            unused=self.unused,
        )

    def without(self, gate: int) -> Candidate:
        """The same with one gate more left to the frozen router."""
        name = f"{self.name}, gate {gate} frozen"
        return replace(self, name=name, unused=self.unused | {gate})


@dataclass(frozen=True)
class Way:
    """One row of the grid: λ = scale · s̄^power · gate; `caution` and `decay` are of the gate."""

    variant: Variant
    neighbors: int
    scale: float
    gate: Literal["sequence", "token", "none"]
    decay: float = 1.0
    caution: float = CAUTION
    power: float = 1.0
    evidence: EvidenceFrom = "reference"

    @property
    def name(self) -> str:
        """As people read it."""
        parts = [self.variant, f"K {self.neighbors}", self._strength]
        if self.gate == "sequence":
            parts.append(f"decay {self.decay:g}")
        if self.gate != "none":
            parts.append(f"caution {self.caution:g}")
        if self.evidence == "all":
            parts.append("background as evidence")
        return ", ".join(parts)

    @property
    def _strength(self) -> str:
        measure = _MEASURES.get(self.power, f"s̄^{self.power:g}")
        gate = "" if self.gate == "none" else f"·{self.gate} gate"
        return f"{self.scale:g}·{measure}{gate}"


_MEASURES = {1.0: "s̄", 2.0: "s̄²"}


# First how strongly, and by which variant, with one gate; then other gates for what gains most.
GRID = (
    *(Way("logits", 8, 1.0, "sequence", 0.95, 16.0, power) for power in (0.25, 1.0, 2.0)),
    Way("residual", 8, 1.0, "sequence", 0.95, 16.0),
)
# (decay, caution, share of the scale): the longer evidence is remembered the surer it is, and the
# later let go of. Half the scale is for memories that gain so much that nothing else lets go of
# them soon enough.
GATES = (
    (0.97, 4.0, 1.0),
    (0.95, 4.0, 1.0),
    (0.95, 64.0, 1.0),
    (0.9, 64.0, 1.0),
    (0.8, 64.0, 1.0),
    (0.8, 64.0, 0.5),
)
THOROUGH = (
    *GRID,
    *(Way("residual", 8, 1.0, "sequence", 0.95, 16.0, power) for power in (0.25, 2.0)),
    *(Way("logits", k, 1.0, "sequence", 0.95, 16.0) for k in (4, 16, 32)),
    Way("logits", 8, 0.5, "sequence", 0.95, 16.0),
    Way("residual", 32, 1.0, "sequence", 0.95, 16.0),
    Way("residual", 8, 1.0, "token"),
    Way("residual", 8, 0.5, "none", power=2.0),
    Way("logits", 8, 1.0, "sequence", 0.95, 16.0, evidence="all"),
    Way("residual", 8, 1.0, "sequence", 0.95, 16.0, evidence="all"),
)
MORE_GATES = (
    *GATES,
    *((decay, 16.0, 1.0) for decay in (0.8, 0.9, 0.97)),
    (0.97, 64.0, 1.0),
    (1.0, 4.0, 1.0),
)


def gates_for(way: Way, gates: Sequence[tuple[float, float, float]]) -> list[Way]:
    """A way with other gates, each a decay, a caution and a share of the way's scale."""
    return [
        replace(way, decay=decay, caution=caution, scale=way.scale * share)
        for decay, caution, share in gates
    ]


def usable(ways: Sequence[Way], *, background: bool) -> list[Way]:
    """The ways that differ for a pack: without background entries all of them are evidence."""
    if background:
        return list(ways)
    # Once each, in their order.
    return list(dict.fromkeys(replace(way, evidence="reference") for way in ways))


def candidate(
    pack: MemoryPack, way: Way, domain: Evidence, general: Evidence, *, background: bool
) -> Candidate:
    """A way of the grid with this memory's numbers.

    Args:
        pack: For its gates and their weighting and γ, which stay.
        way: The way.
        domain: Evidence of the domain's text, to fit the gate by.
        general: The same of general text.
        background: Whether the pack has entries of background text.
    """
    evidence: EvidenceFrom = way.evidence if background else "all"

    def numbers(gate: PackGate) -> Calibration:
        opening = Opening(0.5, 0.0)
        if way.gate != "none":
            opening = fit_opening(
                domain.tokens(gate.gate, way.neighbors, evidence),
                general.tokens(gate.gate, way.neighbors, evidence),
                decay=way.decay,
                cap=CAP,
                sequence=way.gate == "sequence",
                caution=way.caution,
            )
        return replace(
            gate.calibration.with_variant(way.variant),
            mean=1.0,
            scale=way.scale,
            power=way.power,
            midpoint=opening.midpoint,
            sharpness=opening.sharpness,
            cap=CAP,
            sequence=float(way.gate == "sequence"),
            decay=way.decay,
        )

    calibration = {gate.gate: numbers(gate) for gate in pack.gates}
    return Candidate(
        way.name, way.variant, way.neighbors, evidence, calibration, caution=way.caution
    )


def separations(
    pack: MemoryPack, domain: Evidence, general: Evidence, chosen: Candidate
) -> dict[int, Separation]:
    """Each gate's separation, of the evidence that a candidate uses."""

    def mean(evidence: Evidence, gate: int) -> float:
        rows = evidence.tokens(gate, chosen.neighbors, chosen.evidence)
        return float(np.mean([row.mean() for row in rows]))

    return {g.gate: Separation(mean(domain, g.gate), mean(general, g.gate)) for g in pack.gates}


@dataclass(frozen=True)
class Interval:
    """A mean difference of NLL in nats a token and its 95 % interval; below zero is a gain.

    Or a share of such a difference, with its interval.
    """

    mean: float
    low: float
    high: float

    def text(self, digits: int = 4) -> str:
        """As people read it: `-0.0749 [-0.0897, -0.0598]`."""
        mean, low, high = (f"{n:+.{digits}f}" for n in (self.mean, self.low, self.high))
        return f"{mean} [{low}, {high}]"

    def percent(self) -> str:
        """Of a share, as people read it: `97.5 % [93, 102]`."""
        mean, low, high = (100 * n for n in (self.mean, self.low, self.high))
        known = math.isfinite(low) and low < high
        return f"{mean:.1f} %" + (f" [{low:.0f}, {high:.0f}]" if known else "")

    def __str__(self) -> str:
        return self.text()


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
        return interval_of(self.deltas[candidate], self.tokens, self.documents)

    @property
    def drawn(self) -> Unit:
        """What the intervals' bootstrap draws."""
        return drawn_units(self.documents)[1]

    def leader(self, among: Sequence[int]) -> int:
        """The candidate with the least mean change."""
        means = self.deltas @ self.tokens
        return min(among, key=lambda index: float(means[index]))

    def more(self, deltas: NDArray[np.float64]) -> Measured:
        """With the changes [n, sequences] of further candidates."""
        return replace(self, deltas=np.concatenate([self.deltas, deltas]))

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


def interval_of(
    deltas: NDArray[np.float64], tokens: NDArray[np.int64], documents: NDArray[np.int64]
) -> Interval:
    """Of changes a token [n] over as many tokens, drawn by document (`drawn_units`)."""
    units, _ = drawn_units(documents)
    return Interval(*paired_bootstrap(deltas, tokens, units=units))


@dataclass(frozen=True)
class Limits:
    """What other text may lose, upper ends of the 95 % intervals.

    Attributes:
        general: Nats a token of general text.
        switch: Nats that a change of subject may cost in all, summed over the general text that
            follows the domain's. It is paid once, however long that text goes on.
    """

    general: float = 0.002
    switch: float = 5.0

    def allow(self, general: Interval, switch: Interval | None, candidates: int) -> bool:
        """Whether one of so many candidates spares other text.

        Of general text the upper end is that of all candidates at once (`simultaneous`): with
        every one that is looked at, it is likelier that one looks harmless by chance.
        """
        return simultaneous(general, candidates) <= self.general and (
            switch is None or switch.high <= self.switch
        )


def simultaneous(interval: Interval, candidates: int) -> float:
    """Upper end for as many intervals as there are candidates, all of them at once.

    Bonferroni's inequality (Miller, Simultaneous Statistical Inference, 1981, sec. 1.5): each
    misses with a share of the 2.5 %. A bootstrap of few documents has no such far quantiles, so
    the half interval is stretched as that of a normal distribution.
    """
    tail = 0.025 / max(candidates, 1)
    stretched = NormalDist().inv_cdf(1 - tail) / NormalDist().inv_cdf(1 - 0.025)
    return interval.mean + stretched * (interval.high - interval.mean)


def choose(
    texts: Mapping[str, Measured], limits: Limits, among: Sequence[int] | None = None
) -> int | None:
    """The candidate that gains most on the domain while other text stays within its limits.

    None if no candidate stays within.

    Args:
        texts: Of `domain`, of `general` text, and perhaps of the `switch` between them, whose
            "tokens" are whole passages.
        limits: Of general text and of the switch.
        among: Candidates to choose from; None for all.
    """
    domain, general, switch = texts["domain"], texts["general"], texts.get("switch")
    count = len(domain.deltas)
    allowed = [
        index
        for index in (range(count) if among is None else among)
        if limits.allow(
            general.interval(index), None if switch is None else switch.interval(index), count
        )
    ]
    return domain.leader(allowed) if allowed else None


@dataclass(frozen=True)
class Steps:
    """How candidates came about: a first lot, then others around the one that led.

    Attributes:
        first: Number of those that were measured first.
        leading: Those of them that could lead.
    """

    first: int
    leading: Sequence[int]

    def reached(self, all_text: Measured, some: Measured) -> Sequence[int]:
        """The candidates that would have been measured on some of the domain's text alone.

        With another leader there would be others, which nobody measured: then the first lot.
        """
        same = some.leader(self.leading) == all_text.leader(self.leading)
        return range(len(some.deltas) if same else self.first)


def cross_fitted(
    texts: Mapping[str, Measured], limits: Limits, steps: Steps | None = None
) -> dict[str, Interval]:
    """What choosing by `choose` is worth on text that did not take part in the choice, by text.

    The documents are dealt into folds; each fold is scored with the candidate chosen on the others,
    the frozen router where none was allowed. Each text has at least `MIN_SEQUENCES` sequences.
    If candidates came about in `steps`, the leader is found on the others too.
    """
    numbers = {name: text.folds() for name, text in texts.items()}
    deltas = {name: np.zeros(len(text.tokens)) for name, text in texts.items()}
    for fold in range(FOLDS):
        rest = {name: text.part(numbers[name] != fold) for name, text in texts.items()}
        among = None if steps is None else steps.reached(texts["domain"], rest["domain"])
        chosen = choose(rest, limits, among)
        if chosen is None:
            continue
        for name, text in texts.items():
            held = numbers[name] == fold
            deltas[name][held] = text.deltas[chosen, held]
    return {
        name: interval_of(deltas[name], text.tokens, text.documents) for name, text in texts.items()
    }
