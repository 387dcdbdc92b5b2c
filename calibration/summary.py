"""What is in a memory pack, in numbers a person can judge it by."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from knnmoe.runtime.blend import GateMemory, inner_products, rank, token_evidence
from knnmoe.runtime.compressed_files import RESTORED
from knnmoe.runtime.memory import MemoryPack
from knnmoe.runtime.pack_parts import PackGate
from knnmoe.runtime.pack_tensors import prepare_keys

SAMPLE = 256
_NEVER = -1e30


@dataclass(frozen=True)
class GateSummary:
    """One gate's entries.

    Attributes:
        gate: Its number.
        entries: Entries.
        background: Of these, the ones from background text.
        bytes: Size on disk.
        logit_rms: Root mean square of the frozen router's logits; NaN where a compressed pack keeps
            what was learned in one piece with them.
        residual_rms: The same of what was learned, background left out.
        similarity: Mean evidence s̄ of entries drawn at random, each searched among the others of
            other documents: what text like the reference text will meet. NaN if all entries are of
            one document.
    """

    gate: int
    entries: int
    background: int
    bytes: int
    logit_rms: float
    residual_rms: float
    similarity: float


@dataclass(frozen=True)
class PackSummary:
    """A pack and its gates."""

    pack: MemoryPack
    gates: tuple[GateSummary, ...]

    def to_json(self) -> dict[str, Any]:
        """All of it as one JSON object; NaN becomes null."""
        pack = self.pack
        gates = []
        for stated, measured in zip(pack.gates, self.gates, strict=True):
            numbers = {k: None if v != v else v for k, v in asdict(measured).items()}
            gates.append({**numbers, "calibration": stated.calibration.to_json()})
        return {
            "pack": str(pack.path),
            "model": asdict(pack.model),
            "entries": pack.entries,
            "bytes": pack.bytes,
            "variant": pack.variant,
            "neighbors": pack.neighbors,
            "similarity": pack.similarity,
            "gates": gates,
            "provenance": dict(pack.provenance),
        }


def summarize(pack: MemoryPack) -> PackSummary:
    """Read a pack's tensors, one gate at a time, and measure them."""
    origins = pack.read_origins()
    return PackSummary(
        pack,
        tuple(
            _gate(pack, gate, None if origins is None else origins.documents_of(gate.gate))
            for gate in pack.gates
        ),
    )


def _gate(pack: MemoryPack, gate: PackGate, documents: NDArray[np.int32] | None) -> GateSummary:
    own_keys, center = pack.read_keys(gate)
    if documents is None:
        # Then every entry counts as a document, and only itself is left out of its neighbours.
        documents = np.arange(gate.entries, dtype=np.int32)
    background = documents < 0
    logits, residuals = float("nan"), float("nan")  # unless the pack still tells them apart
    if gate.values is None and gate.keys not in RESTORED:
        entries = pack.read(gate)
        logits, residuals = _rms(entries.router_logits), _rms(entries.residuals[~background])
    keys, scales = prepare_keys(own_keys, center, pack.similarity)
    memory = GateMemory(
        keys=keys,
        key_scales=scales,
        values=np.zeros((gate.entries, 1), np.float32),
        n_valid=gate.entries,
        k=pack.neighbors,
        center=center,
        calibration=gate.calibration,
        similarity=pack.similarity,
        rule_first=False,
    )
    return GateSummary(
        gate=gate.gate,
        entries=gate.entries,
        background=int(background.sum()),
        bytes=gate.stored.size,
        logit_rms=logits,
        residual_rms=residuals,
        similarity=_similarity(memory, own_keys, documents),
    )


def _similarity(memory: GateMemory, keys: NDArray[Any], documents: NDArray[np.int32]) -> float:
    """Mean evidence of a sample of the domain's entries among the entries of other documents."""
    if len(np.unique(documents)) == 1:
        return float("nan")
    domain = np.flatnonzero(documents >= 0)
    drawn = np.random.default_rng(0).choice(domain, min(SAMPLE, len(domain)), replace=False)
    queries = keys[drawn].astype(np.float32)
    products = inner_products(queries, memory, np.float32)
    # Low enough to be similar to nothing, for cosine as for RBF.
    products[documents[drawn][:, None] == documents[None, :]] = _NEVER
    _, similarities, found = rank(products, queries, memory, np.float32)
    return float(token_evidence(similarities, found, memory.calibration).mean())


def _rms(rows: NDArray[Any]) -> float:
    return float(np.sqrt(np.mean(rows.astype(np.float64) ** 2)))
