"""Two-stage search: int8 keys are scanned for R candidates, which are scored again with the keys.

A scan reads every key, so its time is the bytes of a key: int8 takes half of fp16 and a quarter of
fp32. What int8 loses is only who is a candidate; the neighbours are the K best of the R candidates
by their exact scores, so their similarities are exact. This is the NumPy reference: the blend with
this search in the place of `blend.search` is what the CUDA kernels return (trt_plugins/kernels),
and, where the scan rounds the queries to int8 too, the gate `two-stage` of the CPU (runtime/gates).

A compressed memory is scanned by projected keys (projection.py) in the place of int8 keys; all
else is the same.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .blend import (
    RBF_CLIP,
    Blended,
    Floats,
    GateMemory,
    blend_found,
    inner_products,
    prepare_queries,
    rank,
)
from .compressed import CompressedMemory
from .errors import SettingError
from .projection import projected_products

MAX_CANDIDATES = 64


@dataclass(frozen=True)
class ScanKeys:
    """What is scanned in the place of a memory's keys.

    Attributes:
        keys: [N, D] int8.
        scales: [N, 2] fp32: multiplier that makes an inner product with the int8 key that with the
            key, squared norm of the key.
    """

    keys: NDArray[np.int8]
    scales: NDArray[np.float32]


def quantize_keys(keys: Floats) -> ScanKeys:
    """int8 keys [N, D] of prepared keys [N, D], each with steps of a 127th of its largest element.

    The multiplier makes the int8 key as long as the key, and not its steps as wide: what rounding
    did along the key itself, which is what counts for a query near it, is thus taken back. So the
    squared norm is the key's own.
    """
    keys = np.asarray(keys, np.float32)
    largest = np.abs(keys).max(axis=1, keepdims=True)
    # Divided before it is multiplied: neither overflows, nor do steps of tiny keys vanish.
    rounded = np.rint(keys / np.where(largest > 0, largest, 1) * np.float32(127)).astype(np.int8)
    squares = np.einsum("nd,nd->n", keys, keys, dtype=np.float64)
    steps = np.einsum("nd,nd->n", rounded, rounded, dtype=np.float64)
    multipliers = np.sqrt(squares / np.where(steps > 0, steps, 1))
    scales = np.stack([multipliers, squares], axis=1).astype(np.float32)
    return ScanKeys(rounded, scales)


def check_candidates(candidates: int, neighbors: int) -> int:
    """R itself.

    Raises:
        SettingError: Unless K ≤ R ≤ 64.
    """
    if not neighbors <= candidates <= MAX_CANDIDATES:
        raise SettingError(
            "candidates",
            "out of range",
            expected=f"{neighbors} (the neighbours asked for) to {MAX_CANDIDATES}",
            found=candidates,
        )
    return candidates


def search_in_two_stages(
    x: Floats,
    memory: GateMemory,
    scan: ScanKeys,
    candidates: int,
    dtype: type[np.floating[Any]],
    *,
    int8_queries: bool = False,
) -> tuple[NDArray[np.int64], Floats, NDArray[np.bool_]]:
    """The K best of the R candidates of each x [T, D], as `blend.search` returns the K best of all.

    Raises:
        SettingError: Unless K ≤ R ≤ 64.
    """
    check_candidates(candidates, min(memory.k, len(memory.keys)))
    scores = scan_scores(x, memory, scan, dtype, int8_queries=int8_queries)
    best = np.argsort(-scores, axis=1, kind="stable")[:, :candidates]
    among = np.zeros(scores.shape, np.bool_)
    np.put_along_axis(among, best, True, axis=1)
    return rank(inner_products(x, memory, dtype), x, memory, dtype, among)


def round_queries(queries: Floats) -> Floats:
    """Queries [T, D] in steps of a 127th of the largest element of each."""
    largest = np.abs(queries).max(axis=1, keepdims=True)
    unit = queries / np.where(largest > 0, largest, 1)
    rounded: Floats = np.rint(unit * 127) * (largest / 127)
    return rounded


def scan_scores(
    x: Floats,
    memory: GateMemory,
    scan: ScanKeys,
    dtype: type[np.floating[Any]],
    *,
    int8_queries: bool = False,
) -> Floats:
    """What the scan ranks by [T, N]: q·key, or what falls with the distance; -inf from n_valid."""
    queries = prepare_queries(x, memory)
    if int8_queries:
        queries = round_queries(queries)
    # Capacity may hold anything, NaN and infinities too.
    with np.errstate(invalid="ignore", over="ignore"):
        products = queries @ scan.keys.T.astype(dtype)
        scores = products * scan.scales[:, 0].astype(dtype)
        if memory.similarity == "rbf":
            scores = 2 * scores - scan.scales[:, 1].astype(dtype)
    exists = np.arange(len(scan.keys)) < memory.n_valid
    masked: Floats = np.where(exists, scores, -np.inf)
    return masked


def search_compressed(
    x: Floats,
    memory: CompressedMemory,
    candidates: int,
    dtype: type[np.floating[Any]],
    *,
    int8_queries: bool = False,
) -> tuple[NDArray[np.int64], Floats, NDArray[np.bool_]]:
    """`search_in_two_stages` of a compressed memory: its projected keys are scanned.

    Raises:
        SettingError: Unless K ≤ R ≤ 64.
    """
    check_candidates(candidates, min(memory.k, memory.entries))
    scores = projected_scores(x, memory, dtype, int8_queries=int8_queries)
    best = np.sort(np.argsort(-scores, axis=1, kind="stable")[:, :candidates], axis=1)
    whole = memory.without_keys()
    queries = prepare_queries(x, whole)
    products = np.einsum("trd,td->tr", memory.rows(best), queries)
    return rank_products(best, products, memory.norms[best].astype(dtype), queries, whole)


def projected_scores(
    x: Floats,
    memory: CompressedMemory,
    dtype: type[np.floating[Any]],
    *,
    int8_queries: bool = False,
) -> Floats:
    """What a scan of projected keys ranks by [T, N]; -inf from n_valid.

    For cosine, as many times too large as the query is long, which ranks the same.
    """
    queries = np.clip(x.astype(dtype) - memory.center.astype(dtype), -RBF_CLIP, RBF_CLIP)
    keys = replace(memory.scan, scales=memory.scan_scales())
    scores = projected_products(queries, keys, int8_queries=int8_queries)
    if memory.similarity == "rbf":
        scores = 2 * scores - memory.norms.astype(dtype)
    masked: Floats = np.where(np.arange(memory.entries) < memory.n_valid, scores, -np.inf)
    return masked


def rank_products(
    candidates: NDArray[np.int64],
    products: Floats,
    norms: Floats,
    queries: Floats,
    memory: GateMemory,
) -> tuple[NDArray[np.int64], Floats, NDArray[np.bool_]]:
    """The K best of candidates [T, R] by their exact inner products and squared norms [T, R].

    Args:
        candidates: Of each row entries in rising order.
        products: With the queries, true scale.
        norms: Squared lengths of the candidates' keys.
        queries: Prepared, [T, D].
        memory: Its keys are not read.
    """
    dtype = products.dtype.type
    scores = products
    if memory.similarity == "rbf":
        with np.errstate(invalid="ignore", over="ignore"):  # beyond n_valid
            scores = 2 * products - norms
    exists = candidates < memory.n_valid
    scores = np.where(exists, scores, -np.inf)
    order = np.argsort(-scores, axis=1, kind="stable")[:, : memory.k]
    found: NDArray[np.bool_] = np.take_along_axis(exists, order, axis=1)
    best: Floats = np.take_along_axis(scores, order, axis=1)
    if memory.similarity == "rbf":
        squares = (queries**2).sum(axis=1, keepdims=True)
        best = np.exp(-dtype(memory.calibration.gamma) * np.maximum(squares - best, 0))
    similarities = np.clip(np.where(found, best, 0), 0, 1).astype(dtype)
    return np.take_along_axis(candidates, order, axis=1), similarities, found


def knn_blend_in_two_stages(
    x: Floats,
    rows: Floats,
    memory: GateMemory,
    scan: ScanKeys,
    candidates: int,
    state: Floats,
    lengths: NDArray[np.int64],
    *,
    dtype: type[np.floating[Any]] = np.float32,
    int8_queries: bool = False,
) -> Blended:
    """`blend.knn_blend` with the search in two stages.

    Raises:
        SettingError: Unless K ≤ R ≤ 64.
    """
    x, rows = x.astype(dtype), rows.astype(dtype)
    neighbors, similarities, found = search_in_two_stages(
        x, memory, scan, candidates, dtype, int8_queries=int8_queries
    )
    return blend_found(rows, memory, neighbors, similarities, found, state, lengths, dtype=dtype)
