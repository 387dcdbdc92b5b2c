"""Memory packs written whole, and their settings rewritten in place."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from .atomic import new_directory
from .calibration import Calibration, EvidenceFrom, Similarity, Variant, check_neighbors
from .errors import MemoryPackError
from .memory import MemoryPack
from .pack_files import ENTRIES, link_tensors, write_manifest, write_tensors
from .pack_manifest import KIND, SCHEMA
from .pack_parts import EntryOrigins, GateEntries, ModelIdentity, StoredTensors


def write_pack(
    path: str | Path,
    *,
    model: ModelIdentity,
    gates: Mapping[int, GateEntries] | Mapping[int, StoredTensors],
    variant: Variant,
    neighbors: int,
    similarity: Similarity,
    calibration: Calibration | Mapping[int, Calibration],
    origins: EntryOrigins | StoredTensors | None,
    provenance: Mapping[str, Any],
    evidence: EvidenceFrom = "all",
    overwrite: bool = False,
) -> MemoryPack:
    """Write a memory pack and return it opened.

    Args:
        gates: Entries by gate, in memory or in files; gates without any are left to the frozen
            router. What is in a file is not looked at.
        calibration: For all gates, or by gate.
        evidence: Which entries are; `reference` needs `origins`.

    Raises:
        MemoryPackError: If a gate is empty, or holds NaN or infinite numbers.
        OutputError: If the directory cannot be written.
    """
    if not gates:
        raise MemoryPackError(path, "no gate has entries", fix="Use a longer reference text.")
    check_neighbors(neighbors)
    written: Mapping[int, GateEntries | StoredTensors] = dict(gates)
    for gate, entries in written.items():
        if isinstance(entries, StoredTensors):
            continue
        if len(entries.keys) == 0:
            raise MemoryPackError(
                path, f"gate {gate} has no entries", fix="Use a longer reference text."
            )
        for name, tensor in vars(entries).items():
            if not np.isfinite(tensor).all():
                raise MemoryPackError(
                    path,
                    f"{name} of gate {gate} has NaN or infinite numbers",
                    fix="Store with more precision, or build with a lower rate.",
                )
    with new_directory(Path(path), overwrite=overwrite) as target:
        stated = []
        for gate, entries in sorted(written.items()):
            numbers = calibration if isinstance(calibration, Calibration) else calibration[gate]
            name = f"gate-{gate:02d}.safetensors"
            if isinstance(entries, StoredTensors):
                stored, count = link_tensors(target, name, entries.path), entries.rows
            else:
                stored, count = write_tensors(target, name, vars(entries)), len(entries.keys)
            stated.append(
                {
                    "gate": gate,
                    **asdict(stored),
                    "entries": count,
                    "calibration": numbers.to_json(),
                    "used": True,
                }
            )
        write_manifest(
            target,
            {
                "schema": SCHEMA,
                "model": asdict(model),
                "variant": variant,
                "neighbors": neighbors,
                "similarity": similarity,
                "evidence": evidence,
                "calibrated": False,
                "gates": stated,
                "entries": write_origins(target, origins),
                "provenance": dict(provenance),
            },
        )
    return MemoryPack.open(path)


def write_origins(
    target: Path, origins: EntryOrigins | StoredTensors | None
) -> dict[str, Any] | None:
    """Write where the entries came from into a pack's directory; what its manifest says of that."""
    if origins is None:
        return None
    if isinstance(origins, StoredTensors):
        linked = link_tensors(target, ENTRIES, origins.path)
        return {**asdict(linked), "rows": origins.rows}
    columns = {name: getattr(origins, name) for name in ("token_ids", "documents", "positions")}
    columns |= {f"rows_{gate:02d}": rows for gate, rows in origins.merged.items()}
    columns |= {f"counts_{gate:02d}": counts for gate, counts in origins.counts.items()}
    stated = asdict(write_tensors(target, ENTRIES, columns))
    return {**stated, "rows": len(origins.documents)} if origins.merged else stated


def rewrite_settings(pack: MemoryPack, provenance: Mapping[str, Any]) -> MemoryPack:
    """Replace the settings and provenance of a pack on disk by those of `pack`, atomically.

    Only `memory.json` changes; it is written beside the old one and renamed over it.
    """
    manifest = dict(KIND.read(pack.path).content)
    by_gate = {gate.gate: gate for gate in pack.gates}
    manifest["variant"] = pack.variant
    manifest["neighbors"] = pack.neighbors
    manifest["similarity"] = pack.similarity
    manifest["schema"] = SCHEMA
    manifest["evidence"] = pack.evidence
    manifest["calibrated"] = pack.calibrated
    manifest["provenance"] = dict(provenance)
    for stated in manifest["gates"]:
        stated["calibration"] = by_gate[stated["gate"]].calibration.to_json()
        stated["used"] = by_gate[stated["gate"]].used
    write_manifest(pack.path, manifest)
    return MemoryPack.open(pack.path)
