"""The blend: the NumPy reference of the one operation this project exists for.

Every other host of it (ONNX function, faiss, CUDA) is tested against this file. The equations are
in docs/method.md; names and shapes are those of the `knnmoe::KnnBlend` node in docs/design.md.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .calibration import Calibration, Similarity
from .stored_values import Values

Floats = NDArray[np.floating[Any]]

RBF_CLIP = 1e17  # squares of anything larger overflow fp32 when summed


@dataclass(frozen=True)
class GateMemory:
    """One gate's memory, ready to be searched; shapes and dtypes as in docs/design.md.

    `similarity` and `rule_first` are the two things that choose the graph; the rest is data.
    """

    keys: NDArray[np.float32]  # [N, D] centred; unit length for cosine
    key_scales: NDArray[np.float32]  # [N, 2] multiplier, squared norm
    values: Values  # [N, E], perhaps smaller than fp32 where rows are widened when they are read
    n_valid: int
    k: int
    center: NDArray[np.float32]  # [D]
    calibration: Calibration
    similarity: Similarity
    rule_first: bool  # the `assignment` variant: routing rule, then blend
    evidence_weights: NDArray[np.float32] | None = None  # [N], 0 to 1; None: every entry 1

    def entry_evidence(self) -> NDArray[np.float32]:
        """`evidence_weights` [N] as the blend node takes them."""
        if self.evidence_weights is None:
            return np.ones(len(self.values), np.float32)
        return np.ascontiguousarray(self.evidence_weights, np.float32)

    @staticmethod
    def empty(hidden_size: int, num_experts: int) -> GateMemory:
        """A memory without entries: routing stays the frozen router's, bit for bit."""
        return GateMemory(
            keys=np.zeros((1, hidden_size), np.float32),
            key_scales=np.ones((1, 2), np.float32),
            values=np.zeros((1, num_experts), np.float32),
            n_valid=0,
            k=1,
            center=np.zeros(hidden_size, np.float32),
            calibration=Calibration(),
            similarity="cosine",
            rule_first=False,
        )


@dataclass(frozen=True)
class Blended:
    """What one call returns: r' [T, E], λ [T], neighbours with similarities [T, K'], state."""

    rows: Floats
    confidence: Floats
    neighbors: NDArray[np.int64]
    similarities: Floats
    state: Floats


def knn_blend(
    x: Floats,
    rows: Floats,
    memory: GateMemory,
    state: Floats,
    lengths: NDArray[np.int64],
    *,
    dtype: type[np.floating[Any]] = np.float32,
) -> Blended:
    """Blend neighbours' values into the rows [T, E] of router logits (or assignments).

    Args:
        x: Router inputs [T, D]; T = B·S, sequence-major.
        rows: Router logits, or dense assignments if the memory's rule comes first.
        memory: What to search.
        state: Evidence so far [B, 2]: decayed sum, decayed count of tokens.
        lengths: Real new tokens a sequence [B]; rows beyond them are padding.
        dtype: Arithmetic; float64 is the oracle of the tests.
    """
    x, rows = x.astype(dtype), rows.astype(dtype)
    neighbors, similarities, found = search(x, memory, dtype)
    return blend_found(rows, memory, neighbors, similarities, found, state, lengths, dtype=dtype)


def search(
    x: Floats, memory: GateMemory, dtype: type[np.floating[Any]]
) -> tuple[NDArray[np.int64], Floats, NDArray[np.bool_]]:
    """The K nearest entries of each x [T, D]: ids, similarities and whether they exist, [T, K'].

    K' = min(K, N); entries at or after n_valid are returned with similarity 0 and `False`.
    """
    return rank(inner_products(x, memory, dtype), x, memory, dtype)


def inner_products(x: Floats, memory: GateMemory, dtype: type[np.floating[Any]]) -> Floats:
    """q·key [T, N] of the prepared queries with every entry, true scale."""
    queries = prepare_queries(x, memory)
    keys = memory.keys.astype(dtype, copy=False)
    products: Floats = queries @ keys.T * memory.key_scales[:, 0].astype(dtype)
    return products


def rank(
    products: Floats,
    x: Floats,
    memory: GateMemory,
    dtype: type[np.floating[Any]],
    among: NDArray[np.bool_] | None = None,
) -> tuple[NDArray[np.int64], Floats, NDArray[np.bool_]]:
    """From inner products [T, N] to the K best: ids, similarities, existence, [T, K'].

    Entries outside of `among` [T, N] are passed over, as those at and after n_valid are.
    """
    scores, count = products, products.shape[1]
    if memory.similarity == "rbf":
        # Falls with the distance; ‖q‖² is the same for all entries.
        scores = 2 * products - memory.key_scales[:, 1].astype(dtype)
    exists = np.broadcast_to(np.arange(count) < memory.n_valid, scores.shape)
    if among is not None:
        exists = exists & among
    scores = np.where(exists, scores, -np.inf)
    # Sorting by -score with a stable sort gives ties to the lower index, as ONNX TopK does.
    ids = np.argsort(-scores, axis=1, kind="stable")[:, : min(memory.k, count)]
    found, best = np.take_along_axis(exists, ids, axis=1), np.take_along_axis(scores, ids, axis=1)
    if memory.similarity == "rbf":
        squares = (prepare_queries(x, memory) ** 2).sum(axis=1, keepdims=True)
        best = np.exp(-dtype(memory.calibration.gamma) * np.maximum(squares - best, 0))
    similarities = np.clip(np.where(found, best, 0), 0, 1)
    return ids, similarities.astype(dtype), found


def prepare_queries(x: Floats, memory: GateMemory) -> Floats:
    """x [T, D] as it is compared: centred, and of unit length for cosine."""
    cosine = memory.similarity == "cosine"
    bound = np.finfo(np.float32).max if cosine else RBF_CLIP
    with np.errstate(over="ignore"):  # of the difference of two huge numbers: clipped right here
        queries: Floats = np.clip(x - memory.center.astype(x.dtype), -bound, bound)
    return unit_rows(queries) if cosine else queries


def unit_rows(rows: Floats) -> Floats:
    """Rows of length one; rows of zeros stay zeros, and no finite row overflows."""
    largest = np.abs(rows).max(axis=1, keepdims=True)
    rows = rows / np.where(largest > 0, largest, 1)
    norms = np.sqrt((rows * rows).sum(axis=1, keepdims=True))
    unit: Floats = rows / np.where(norms > 0, norms, 1)
    return unit


def blend_found(
    rows: Floats,
    memory: GateMemory,
    neighbors: NDArray[np.int64],
    similarities: Floats,
    found: NDArray[np.bool_],
    state: Floats,
    lengths: NDArray[np.int64],
    *,
    dtype: type[np.floating[Any]] = np.float32,
) -> Blended:
    """The second half of `knn_blend`, for neighbours found by whatever search."""
    numbers = memory.calibration
    weights = neighbor_weights(similarities, found, numbers)
    # Capacity beyond n_valid may hold anything, NaN too: it is masked, not weighted by zero.
    values = np.where(found[:, :, None], memory.values[neighbors], 0).astype(dtype)
    means = np.einsum("tk,tke->te", weights, values)
    counted = similarities
    if memory.evidence_weights is not None:
        counted = counted * np.where(found, memory.evidence_weights[neighbors], 0).astype(dtype)
    evidence = token_evidence(counted, found, numbers)
    gate, new_state = sequence_gate(evidence, state.astype(dtype), lengths, numbers)
    strength = dtype(numbers.scale) * evidence ** dtype(numbers.power) * gate
    confidence = np.clip(strength, 0, 1).astype(dtype)
    correction = confidence[:, None] * (means - dtype(numbers.interpolate) * rows)
    blended = np.where(confidence[:, None] > 0, rows + correction, rows)
    return Blended(blended, confidence, neighbors, similarities, new_state)


def neighbor_weights(
    similarities: Floats, found: NDArray[np.bool_], numbers: Calibration
) -> Floats:
    """wᵢ ∝ sᵢ^a · exp(β (sᵢ - max s)) over the neighbours that exist, [T, K']."""
    dtype = similarities.dtype.type
    best = similarities.max(axis=1, keepdims=True)
    raw = similarities ** dtype(numbers.weight_power)
    raw = raw * np.exp(dtype(numbers.inverse_temperature) * (similarities - best)) * found
    total = raw.sum(axis=1, keepdims=True)
    weights: Floats = raw / np.where(total > 0, total, 1)
    return weights


def token_evidence(counted: Floats, found: NDArray[np.bool_], numbers: Calibration) -> Floats:
    """s̄ [T]: the mean of the neighbours' weighted similarities [T, K'], or their sum up to 1."""
    evidence: Floats = counted.sum(axis=1)
    if numbers.mean:
        evidence = evidence / np.maximum(found.sum(axis=1), 1).astype(evidence.dtype)
    return np.minimum(evidence, 1)


def sequence_gate(
    evidence: Floats, state: Floats, lengths: NDArray[np.int64], numbers: Calibration
) -> tuple[Floats, Floats]:
    """The gate g [T] and the advanced state [B, 2]; evidence [T] is sequence-major."""
    dtype = evidence.dtype.type
    by_sequence = evidence.reshape(state.shape[0], -1)
    real = np.arange(by_sequence.shape[1])[None, :] < lengths[:, None]
    sums = decayed_sums(np.where(real, by_sequence, 0), state[:, 0], real, numbers)
    tokens = decayed_sums(real.astype(dtype), state[:, 1], real, numbers)
    new_state = np.stack([sums[:, -1], tokens[:, -1]], axis=1)
    if not numbers.sharpness:
        return np.ones_like(evidence), new_state
    measured, seen = by_sequence, np.ones_like(by_sequence)
    if numbers.sequence:
        # A row of padding before any real token has seen none: it divides by one.
        seen = np.maximum(tokens, 1)
        measured = sums / seen
    growth = np.minimum(np.sqrt(seen), dtype(numbers.cap))
    z = growth * dtype(numbers.sharpness) * (measured - dtype(numbers.midpoint))
    gate: Floats = 1 / (1 + np.exp(-np.clip(z, -80, 80)))
    return gate.reshape(-1).astype(dtype), new_state


def decayed_sums(
    terms: Floats, before: Floats, real: NDArray[np.bool_], numbers: Calibration
) -> Floats:
    """Sums [B, S] of terms [B, S] so far, each real token leaving `decay` of the sum before it.

    Padding adds nothing and takes nothing: its rows have the sum of the last real token.
    """
    dtype = terms.dtype.type
    if numbers.decay == 1:
        running: Floats = before[:, None] + np.cumsum(terms, axis=1)
        return running
    sums = np.empty_like(terms)
    decay = dtype(numbers.decay)
    for token in range(terms.shape[1]):
        before = np.where(real[:, token], decay * before + terms[:, token], before)
        sums[:, token] = before
    return sums
