"""How similar text is to a memory: the evidence s̄ of docs/method.md, measured by sequence."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from knnmoe.runtime.memory import MemoryPack
from knnmoe.runtime.model import Model

Advance = Callable[[int], None]


@dataclass(frozen=True)
class Evidence:
    """The similarities that every token of some text finds, the router left frozen.

    Attributes:
        similarities: By gate, one array [n, K'] a sequence, nearest first.
    """

    similarities: Mapping[int, Sequence[NDArray[np.float32]]]

    def sequence_means(self, gate: int, neighbors: int) -> NDArray[np.float64]:
        """Each sequence's mean over its tokens of s̄ with K = `neighbors`, [sequences]."""
        return np.array([rows[:, :neighbors].mean() for rows in self.similarities[gate]], float)


def measure_evidence(
    model: Model,
    pack: MemoryPack,
    sequences: Sequence[NDArray[np.int64]],
    neighbors: int,
    advance: Advance,
) -> Evidence:
    """Trace token sequences against a memory without letting it correct anything.

    Args:
        model: Whose router inputs to look up; its memory is replaced.
        pack: The memory.
        sequences: Token ids, each [n].
        neighbors: How many similarities to keep; fewer where the memory has fewer entries.
        advance: Called with the tokens just traced.
    """
    still = {gate.gate: replace(gate.calibration, scale=0.0) for gate in pack.gates}
    model.swap_memory(pack.with_settings(neighbors=neighbors, calibration=still))
    found: dict[int, list[NDArray[np.float32]]] = {gate.gate: [] for gate in pack.gates}
    for sequence in sequences:
        records = model.routing_trace(sequence.tolist()).gates
        for gate, rows in found.items():
            rows.append(records[gate].trace.similarities)
        advance(len(sequence))
    return Evidence(found)
