"""How similar text is to a memory: the evidence s̄ of docs/method.md, measured by sequence."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from knnmoe.runtime.calibration import EvidenceFrom
from knnmoe.runtime.memory import MemoryPack
from knnmoe.runtime.model import Model

Advance = Callable[[int], None]


@dataclass(frozen=True)
class Evidence:
    """The similarities that every token of some text finds, the router left frozen.

    Attributes:
        similarities: By gate, one array [n, K'] a sequence, nearest first.
        counted: The same, 0 where the neighbour is of background text.
    """

    similarities: Mapping[int, Sequence[NDArray[np.float32]]]
    counted: Mapping[int, Sequence[NDArray[np.float32]]]

    def tokens(
        self, gate: int, neighbors: int, evidence: EvidenceFrom
    ) -> list[NDArray[np.float64]]:
        """s̄ of each sequence's tokens with K = `neighbors`, [n] each."""
        source = self.similarities if evidence == "all" else self.counted
        return [rows[:, :neighbors].mean(axis=1, dtype=np.float64) for rows in source[gate]]


def measure_evidence(
    model: Model,
    pack: MemoryPack,
    sequences: Sequence[NDArray[np.int64]],
    neighbors: int,
    advance: Advance,
    background: Mapping[int, NDArray[np.bool_]] | None = None,
) -> Evidence:
    """Trace token sequences against a memory without letting it correct anything.

    Args:
        model: Whose router inputs to look up; its memory is replaced.
        pack: The memory.
        sequences: Token ids, each [n].
        neighbors: How many similarities to keep; fewer where the memory has fewer entries.
        advance: Called with the tokens just traced, but for the last of a sequence.
        background: Which entries [N] of each gate are of background text; None: none is.
    """
    still = {gate.gate: replace(gate.calibration, scale=0.0) for gate in pack.gates}
    model.swap_memory(pack.with_settings(neighbors=neighbors, calibration=still))
    found: dict[int, list[NDArray[np.float32]]] = {gate.gate: [] for gate in pack.gates}
    counted: dict[int, list[NDArray[np.float32]]] = {gate.gate: [] for gate in pack.gates}
    for sequence in sequences:
        records = model.routing_trace(sequence.tolist()).gates
        for gate, rows in found.items():
            trace = records[gate].trace
            rows.append(trace.similarities)
            known = True if background is None else ~background[gate][trace.neighbors]
            counted[gate].append(np.where(known, trace.similarities, np.float32(0)))
        advance(len(sequence) - 1)
    return Evidence(found, counted)
