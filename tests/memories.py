"""Random gate memories for tests."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np

from knnmoe.calibration.recall import (
    Widths,
    graded_parts,
    principal,
    project_keys,
    turned,
)
from knnmoe.runtime.blend import GateMemory
from knnmoe.runtime.calibration import Calibration, Similarity
from knnmoe.runtime.compressed import CompressedMemory
from knnmoe.runtime.pack_tensors import prepare_keys
from knnmoe.runtime.stored_values import ValueType, store_values


def random_memory(
    seed: int,
    *,
    entries: int = 50,
    hidden_size: int = 16,
    num_experts: int = 6,
    k: int = 4,
    n_valid: int | None = None,
    similarity: Similarity = "cosine",
    duplicates: bool = False,
    rule_first: bool = False,
    calibration: Calibration | None = None,
    weighted: bool = False,
) -> GateMemory:
    """A memory of random entries; with `duplicates`, every key is there about three times.

    With `weighted` its entries are evidence of different weights, some of none.
    """
    rng = np.random.default_rng(seed)
    raw = rng.normal(size=(entries, hidden_size)).astype(np.float32)
    if duplicates:
        raw = raw[rng.integers(0, max(1, entries // 3), entries)]
    center = raw.mean(axis=0).astype(np.float32)
    keys, scales = prepare_keys(raw, center, similarity)
    values = rng.normal(size=(entries, num_experts)).astype(np.float32)
    return GateMemory(
        keys=keys,
        key_scales=scales,
        values=np.abs(values) if rule_first else values,
        n_valid=entries if n_valid is None else n_valid,
        k=k,
        center=center,
        calibration=calibration or Calibration(),
        similarity=similarity,
        rule_first=rule_first,
        evidence_weights=rng.choice([0, 0.5, 1], entries).astype(np.float32) if weighted else None,
    )


def random_calibration(seed: int, **fixed: Any) -> Calibration:
    """Numbers within what a calibration may say, no two draws alike."""
    rng = np.random.default_rng(seed)
    numbers = Calibration(
        interpolate=float(rng.integers(0, 2)),
        weight_power=float(rng.choice([0.0, 1.0, 2.0])),
        inverse_temperature=float(rng.choice([0.0, 5.0, 20.0])),
        mean=float(rng.integers(0, 2)),
        scale=float(rng.uniform(0.2, 1.0)),
        power=float(rng.choice([1.0, 2.0, 3.0])),
        midpoint=float(rng.uniform(0.0, 1.0)),
        sharpness=float(rng.choice([0.0, 3.0, 10.0])),
        cap=float(rng.choice([1.0, 12.0])),
        sequence=float(rng.integers(0, 2)),
        gamma=float(rng.uniform(0.01, 0.2)),
        decay=float(rng.choice([1.0, 0.97, 0.7])),
    )
    return replace(numbers, **fixed)


def random_compressed(
    seed: int,
    *,
    entries: int = 200,
    hidden_size: int = 64,
    num_experts: int = 8,
    k: int = 4,
    n_valid: int | None = None,
    similarity: Similarity = "cosine",
    dtype: Any = np.float16,
    graded: Widths | None = None,
    stored_values: ValueType | None = None,
    bits: int = 8,
    width: int = 32,
    candidates: int = 32,
    duplicates: bool = False,
    rule_first: bool = False,
    calibration: Calibration | None = None,
    weighted: bool = False,
) -> CompressedMemory:
    """A compressed memory of random entries far from the origin, as `random_memory` otherwise.

    Its keys are of `dtype`, None for projected ones alone, those that are scanned or `graded` ones.
    """
    rng = np.random.default_rng(seed)
    spread = np.arange(1, hidden_size + 1) ** -0.7
    keys: Any = rng.normal(size=(entries, hidden_size)) * spread + 2
    if duplicates:
        keys = keys[rng.integers(0, max(1, entries // 3), entries)]
    center = keys.mean(axis=0).astype(np.float32)
    steps = np.ones(entries, np.float32)
    if dtype == np.int8:
        steps = (np.abs(keys - center).max(axis=1) / 127).astype(np.float32)
        keys = np.rint((keys - center) / steps[:, None])
    keys = keys.astype(dtype or np.float32)
    shift = 0 if dtype == np.int8 else center
    centred = (keys.astype(np.float32) - shift) * steps[:, None]
    lengths = np.linalg.norm(centred, axis=1).astype(np.float32)
    scan = project_keys(centred, turned(principal(centred), width, seed), bits)
    cosine = similarity == "cosine"
    parts = []
    for matrix, part_bits in graded_parts(principal(centred), graded, seed) if graded else ():
        part = project_keys(centred, matrix, part_bits)
        parts.append(replace(part, scales=part.scales / lengths) if cosine else part)
    if dtype is None:
        keys, steps = None, scan.scales
    if graded:  # whose parts have sizes of their own
        steps = lengths if cosine else np.ones_like(lengths)
    values: Any = rng.normal(size=(entries, num_experts)).astype(np.float32)
    values = np.abs(values) if rule_first else values
    return CompressedMemory(
        keys=keys,
        multipliers=(steps / lengths if cosine else steps)[:, None],
        norms=np.ones_like(lengths) if cosine else lengths**2,
        lengths=lengths,
        scan=scan,
        candidates=candidates,
        values=values if stored_values is None else store_values(values, stored_values),
        n_valid=entries if n_valid is None else n_valid,
        k=k,
        center=center,
        calibration=calibration or Calibration(),
        similarity=similarity,
        rule_first=rule_first,
        evidence_weights=rng.choice([0, 0.5, 1], entries).astype(np.float32) if weighted else None,
        parts=tuple(parts),
    )
