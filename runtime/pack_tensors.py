"""The tensors of a pack: what a file must hold, keys as they are stored and as they compare."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .blend import unit_rows
from .calibration import Similarity
from .compressed_files import (
    KEY_LENGTHS,
    PARTS,
    RESTORED,
    projection_specs,
    projection_tensors,
    scan_specs,
    value_specs,
)
from .errors import MemoryPackError
from .pack_files import REBUILD, TensorSpecs, read_tensors
from .pack_parts import Array, EntryOrigins, ModelIdentity, PackGate


def gate_specs(gate: PackGate, model: ModelIdentity) -> TensorSpecs:
    """What a gate's file must hold: by name, shape and possible dtypes."""
    entries, size, experts = gate.entries, model.hidden_size, model.num_experts
    floats = ("F16", "F32")
    specs: dict[str, tuple[tuple[int, ...], tuple[str, ...]]] = {
        "center": ((size,), floats),
    }
    if gate.keys in RESTORED:
        specs[KEY_LENGTHS] = ((entries,), ("F32",))
    else:
        specs["keys"] = ((entries, size), ("I8",) if gate.keys == "int8" else floats)
    if gate.keys == "int8":
        specs["key_steps"] = ((entries,), ("F32",))
    for (name, bits), width in zip(PARTS.items(), gate.key_widths, strict=False):
        specs |= projection_specs(name, entries, size, width, bits)
    if gate.values is None:
        both = dict.fromkeys(("router_logits", "residuals"), ((entries, experts), floats))
        specs |= both
    else:
        specs |= value_specs(gate.values, entries, experts)
    if gate.scan is not None:
        specs |= scan_specs(gate.scan, entries, size)
    return specs


def read_gate(
    root: Path, gate: PackGate, model: ModelIdentity
) -> tuple[Array, NDArray[np.float32], dict[str, Any]]:
    """Keys [N, D] that are not projected, centre [D] fp32, and the tensors of the values.

    Raises:
        MemoryPackError: If the file holds anything else than the manifest states.
    """
    path = root / gate.stored.file
    leave = (*projection_tensors("scan"), KEY_LENGTHS)
    tensors = read_tensors(path, gate_specs(gate, model), leave=leave)
    steps = tensors.pop("key_steps", None)
    if steps is not None:
        tensors["keys"] = tensors["keys"] * steps[:, None] + tensors["center"]
    return tensors.pop("keys"), tensors.pop("center"), tensors


def prepare_keys(
    keys: Array, center: NDArray[np.float32], similarity: Similarity
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Stored keys [N, D] as the blend compares them: (keys fp32 [N, D], key_scales fp32 [N, 2])."""
    prepared = keys.astype(np.float32) - center
    if similarity == "cosine":
        prepared = unit_rows(prepared)
    squares = np.einsum("nd,nd->n", prepared, prepared, dtype=np.float64)
    scales = np.stack([np.ones(len(prepared)), squares], axis=1).astype(np.float32)
    return np.ascontiguousarray(prepared, dtype=np.float32), scales


def read_origins(path: Path, origin_rows: int, gates: Sequence[PackGate]) -> EntryOrigins:
    """Where the entries of a pack's gates came from.

    Raises:
        MemoryPackError: If the file holds anything else, or a gate names rows that are not there.
    """
    kind = ((origin_rows,), ("I32",))
    specs = dict.fromkeys(("token_ids", "documents", "positions"), kind)
    merged = [gate for gate in gates if gate.entries < origin_rows]
    for gate in merged:
        names = (f"rows_{gate.gate:02d}", f"counts_{gate.gate:02d}")
        specs |= dict.fromkeys(names, ((gate.entries,), ("I32",)))
    tensors = read_tensors(path, specs)
    rows = {gate.gate: tensors.pop(f"rows_{gate.gate:02d}") for gate in merged}
    counts = {}
    for gate in merged:
        counts[gate.gate] = tensors.pop(f"counts_{gate.gate:02d}")
        found = rows[gate.gate]
        if found.min() < 0 or found.max() >= origin_rows:
            raise MemoryPackError(
                path,
                f"rows_{gate.gate:02d} names rows that are not there",
                expected=f"0 to {origin_rows - 1}",
                found=f"{found.min()} to {found.max()}",
                fix=REBUILD,
            )
    return EntryOrigins(**tensors, merged=rows, counts=counts)
