"""A gate's memory as a compressed pack holds it: keys as stored, and projected ones to scan.

The keys may be mapped from their file: of 100,000 entries a step reads some dozen. Without full
keys projected ones stand for them: a key is then Pᵀ times its code, and still divided by the
length that the key itself had, so that what the projection left out counts as dissimilar. These are
the ones that are scanned, or graded ones: two projections to directions of their own, the widest
in 8 bits and others in 4, whose sum is the key.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .blend import GateMemory
from .calibration import Calibration, Similarity
from .projection import ProjectedKeys, decode
from .stored_values import StoredValues, Values, dense


@dataclass(frozen=True)
class CompressedMemory:
    """One gate's memory for the gate `two-stage`.

    Attributes:
        keys: [N, D] as stored: fp16 or fp32 router inputs, or int8 steps from the centre; None
            where projected keys stand for them.
        multipliers: [N, 1] fp32: what a centred key (int8: a row of steps; projected: a row of
            code steps) is multiplied with to be what queries are compared with.
        norms: [N] fp32: squared length of that.
        scan: The projection; its scales are those of the centred keys.
        candidates: R, which the projection was made for.
        lengths: [N] fp32: of the centred keys.
        values: [N, E] fp32, or as they are stored.
        n_valid, k, center, calibration, similarity, rule_first, evidence_weights: As in
            `GateMemory`.
        parts: Of graded keys: projections whose sum is the key but for its multiplier; empty where
            there are none.
    """

    keys: NDArray[Any] | None
    multipliers: NDArray[np.float32]
    norms: NDArray[np.float32]
    lengths: NDArray[np.float32]
    scan: ProjectedKeys
    candidates: int
    values: Values
    n_valid: int
    k: int
    center: NDArray[np.float32]
    calibration: Calibration
    similarity: Similarity
    rule_first: bool
    evidence_weights: NDArray[np.float32] | None = None
    parts: tuple[ProjectedKeys, ...] = ()

    @property
    def entries(self) -> int:
        """N, capacity included."""
        return len(self.scan.codes)

    @property
    def size(self) -> int:
        """D."""
        return len(self.center)

    def rows(self, entries: Any) -> NDArray[np.float32]:
        """Keys of some entries as they are compared, fp32."""
        kept: NDArray[np.float32] = self._shifted(entries) * self.multipliers[entries]
        return kept

    def centred(self, entries: NDArray[np.int64]) -> NDArray[np.float32]:
        """Keys of some entries minus the centre, fp32."""
        kept = self.rows(entries)
        if self.similarity == "cosine":
            kept *= self.lengths[entries, None]
        return kept

    def _shifted(self, entries: Any) -> NDArray[np.float32]:
        if self.parts:
            rows = [part.restored(entries) for part in self.parts]
            return sum(rows[1:], start=rows[0])
        if self.keys is None:
            steps = decode(
                self.scan.codes[entries].reshape(-1, self.scan.codes.shape[1]), self.scan.bits
            )
            restored: NDArray[np.float32] = steps.astype(np.float32) @ self.scan.matrix()
            return restored.reshape(*self.multipliers[entries].shape[:-1], self.size)
        kept: NDArray[np.float32] = self.keys[entries].astype(np.float32)
        return kept if self.keys.dtype == np.int8 else kept - self.center

    def widened(self) -> GateMemory:
        """The same memory with all keys in fp32, as exact search takes it."""
        return self._as_gate_memory(self.rows(slice(None)), self.norms, dense(self.values))

    def without_keys(self) -> GateMemory:
        """The same memory without its keys: what blending found neighbours takes.

        Its values are as they are stored, so that those of the neighbours alone are widened.
        """
        none = np.zeros((0, self.size), np.float32)
        return self._as_gate_memory(none, self.norms[:0], self.values)

    def scan_scales(self) -> NDArray[np.float32]:
        """[N]: what a product of a projected query with a row of codes is multiplied with."""
        if self.similarity == "rbf":
            return self.scan.scales
        divisors = np.where(self.lengths > 0, self.lengths, np.float32(1))
        return (self.scan.scales / divisors).astype(np.float32)

    def _as_gate_memory(
        self, keys: NDArray[np.float32], norms: NDArray[np.float32], values: Values
    ) -> GateMemory:
        return GateMemory(
            keys=keys,
            key_scales=np.stack([np.ones_like(norms), norms], axis=1),
            values=values,
            n_valid=self.n_valid,
            k=self.k,
            center=self.center,
            calibration=self.calibration,
            similarity=self.similarity,
            rule_first=self.rule_first,
            evidence_weights=self.evidence_weights,
        )


Memory = GateMemory | CompressedMemory


def widened(memory: Memory | None) -> GateMemory | None:
    """A memory as every gate takes it."""
    return memory.widened() if isinstance(memory, CompressedMemory) else memory


def first_entries(memory: Memory | None, count: int) -> Memory | None:
    """The memory with its first `count` entries, as views; None if that is none.

    What a search costs does not depend on which entries these are.
    """
    if memory is None or count < 1:
        return None
    kept = slice(0, count)
    weights = memory.evidence_weights
    common: dict[str, Any] = {
        "values": _first_values(memory.values, kept),
        "n_valid": min(memory.n_valid, count),
        "evidence_weights": None if weights is None else weights[kept],
    }
    if isinstance(memory, CompressedMemory):
        return replace(
            memory,
            **common,
            keys=None if memory.keys is None else memory.keys[kept],
            multipliers=memory.multipliers[kept],
            norms=memory.norms[kept],
            lengths=memory.lengths[kept],
            scan=memory.scan.of(kept),
            parts=tuple(part.of(kept) for part in memory.parts),
        )
    return replace(memory, **common, keys=memory.keys[kept], key_scales=memory.key_scales[kept])


def _first_values(values: Values, kept: slice) -> Values:
    if not isinstance(values, StoredValues):
        return values[kept]
    return replace(
        values,
        codes=values.codes[kept],
        steps=None if values.steps is None else values.steps[kept],
        lows=None if values.lows is None else values.lows[kept],
    )
