"""Memories that a memory is compared with: without retrieval, shuffled, or made of less text.

They are packs that differ in what the blend reads and in nothing on disk.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from knnmoe.runtime.blend import GateMemory
from knnmoe.runtime.memory import MemoryPack
from knnmoe.runtime.pack_parts import PackGate
from knnmoe.runtime.routing import RoutingRule
from knnmoe.runtime.stored_values import dense

SHARES = (1 / 8, 1 / 4, 1 / 2, 1.0)

# Which entries [N] of each gate are of background text; None where none is, or nobody knows.
Background = Mapping[int, NDArray[np.bool_]] | None
Change = Callable[[int, GateMemory], GateMemory]


@dataclass(frozen=True)
class ChangedPack(MemoryPack):
    """A pack whose memories are changed when a model takes them."""

    change: Change = lambda gate, memory: memory

    def gate_memory(
        self,
        gate: PackGate,
        rule: RoutingRule,
        selection_bias: NDArray[np.float32] | None = None,
    ) -> GateMemory:
        """See `MemoryPack.gate_memory`."""
        return self.change(gate.gate, super().gate_memory(gate, rule, selection_bias))

    def compressed_memory(
        self,
        gate: PackGate,
        rule: RoutingRule,
        selection_bias: NDArray[np.float32] | None = None,
    ) -> None:
        """None: what is changed is the memory in full."""


def changed(pack: MemoryPack, change: Change) -> ChangedPack:
    """The pack with that change."""
    return ChangedPack(**vars(pack), change=change)


def without_retrieval(
    pack: MemoryPack, background: Background, *, same_variant: bool = False
) -> ChangedPack:
    """As confident as the memory, but with one correction a gate, the mean residual.

    What this gains is a constant bias of the router, for which nobody has to search. Entries of
    background text keep their residual of zero. With `same_variant` it is the mean value of
    whatever variant the pack has: interpolating towards mean logits is no retrieval either.
    """

    def change(gate: int, memory: GateMemory) -> GateMemory:
        learned = ~_marked(background, gate, memory)
        mean = memory.values[learned].mean(axis=0)
        return replace(memory, values=np.where(learned[:, None], mean, dense(memory.values)))

    if not same_variant:
        numbers = {g.gate: g.calibration.with_variant("residual") for g in pack.gates}
        pack = pack.with_settings(variant="residual", calibration=numbers)
    return changed(pack, change)


def shuffled(pack: MemoryPack, background: Background, seed: int = 0) -> ChangedPack:
    """Every entry with another one's values; entries of background text keep theirs."""

    def change(gate: int, memory: GateMemory) -> GateMemory:
        order = np.arange(len(memory.values))
        learned = np.flatnonzero(~_marked(background, gate, memory))
        order[learned] = np.random.default_rng(seed).permutation(learned)
        return replace(memory, values=memory.values[order])

    return changed(pack, change)


def first_share(pack: MemoryPack, share: float, background: Background) -> ChangedPack:
    """The memory of the first part of its texts, reference and background alike."""

    def change(gate: int, memory: GateMemory) -> GateMemory:
        marked = _marked(background, gate, memory)
        parts = [np.flatnonzero(marked == kind) for kind in (False, True)]
        kept = np.concatenate([part[: math.ceil(share * len(part))] for part in parts])
        evidence = memory.evidence_weights
        return replace(
            memory, keys=memory.keys[kept], key_scales=memory.key_scales[kept],
            values=memory.values[kept], n_valid=len(kept),
            evidence_weights=None if evidence is None else evidence[kept],
        )  # fmt: skip

    return changed(pack, change)


def background_of(pack: MemoryPack) -> Background:
    """By gate, as the pack states it."""
    if pack.origins is None:
        return None
    found = {gate.gate: pack.background(gate) for gate in pack.gates}
    return found if any(some.any() for some in found.values()) else None


def _marked(background: Background, gate: int, memory: GateMemory) -> NDArray[np.bool_]:
    return np.zeros(len(memory.values), np.bool_) if background is None else background[gate]


@dataclass(frozen=True)
class GainLaw:
    """Change of NLL by the size of a memory: Δ = level + slope · ln(reference tokens).

    Attributes:
        tokens: Reference tokens of the memories measured.
        changes: What each changes, nats a token.
    """

    tokens: Sequence[int]
    changes: Sequence[float]

    def fit(self) -> tuple[float, float]:
        """(level, slope) by least squares."""
        slope, level = np.polyfit(np.log(self.tokens), self.changes, 1)
        return float(level), float(slope)

    def needed(self, change: float) -> int | None:
        """Reference tokens that the law says make that change; None where more make no gain."""
        level, slope = self.fit()
        if slope >= 0:
            return None
        exponent = (change - level) / slope
        # Nobody has more; and e^exponent would not be a number.
        return math.ceil(math.exp(exponent)) if exponent < math.log(1e12) else None

    def to_json(self) -> dict[str, Any]:
        """By name."""
        level, slope = self.fit()
        return {
            "tokens": list(self.tokens), "changes": list(self.changes),
            "level": level, "slope": slope,
        }  # fmt: skip
