"""Memories that keep everything but what they should be good for."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np

from knnmoe.runtime.memory import MemoryPack
from knnmoe.runtime.pack_parts import GateEntries
from knnmoe.runtime.pack_writing import write_pack

Change = Callable[[GateEntries, np.random.Generator], GateEntries]


def shuffled(entries: GateEntries, rng: np.random.Generator) -> GateEntries:
    """Every entry's values moved to another entry: the values are right, their places are not."""
    order = rng.permutation(len(entries.keys))
    return replace(
        entries, residuals=entries.residuals[order], router_logits=entries.router_logits[order]
    )


def constant(entries: GateEntries, rng: np.random.Generator) -> GateEntries:
    """The mean residual for every entry: what a correction that retrieves nothing would add."""
    mean = entries.residuals.astype(np.float64).mean(axis=0)
    residuals = np.broadcast_to(mean.astype(entries.residuals.dtype), entries.residuals.shape)
    return replace(entries, residuals=np.ascontiguousarray(residuals))


def changed_pack(pack: MemoryPack, path: Path, change: Change, control: str) -> MemoryPack:
    """Write `pack` to `path` with each gate's entries changed and its settings kept."""
    rng = np.random.default_rng(0)
    return write_pack(
        path,
        model=pack.model,
        gates={gate.gate: change(pack.read(gate), rng) for gate in pack.gates},
        variant=pack.variant,
        neighbors=pack.neighbors,
        similarity=pack.similarity,
        calibration={gate.gate: gate.calibration for gate in pack.gates},
        origins=None,
        provenance={"control": control},
    )
