"""What a gate looks like from the pipeline."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from ..engines.base import Run, Zeros

# Told the name of each stage of a gate when it is done, by gates that consist of several.
Lap = Callable[[str], None]


def unwatched(stage: str) -> None:
    """The lap of a gate that nobody looks into."""


@dataclass(frozen=True)
class GateBuffers:
    """What a gate reads and writes; T = B·S rows, sequence-major.

    Attributes:
        router_input: [T, D] fp32, read.
        router_logits: [T, E] fp32, read.
        state: [B, 2] fp32, read: evidence of each sequence so far.
        lengths: [B] int64, read: real new tokens of each sequence.
        expert_ids: [T, k] int32, written.
        expert_weights: [T, k] fp32, written.
        state_out: [B, 2] fp32, written: the evidence including this call.
    """

    router_input: NDArray[np.float32]
    router_logits: NDArray[np.float32]
    state: NDArray[np.float32]
    lengths: NDArray[np.int64]
    expert_ids: NDArray[np.int32]
    expert_weights: NDArray[np.float32]
    state_out: NDArray[np.float32]


@dataclass(frozen=True)
class GateTrace:
    """What a gate did, when asked: λ [T], neighbours and their similarities [T, K'].

    A gate without a memory has K' = 0.
    """

    confidence: NDArray[np.float32]
    neighbors: NDArray[np.int64]
    similarities: NDArray[np.float32]

    @staticmethod
    def empty(tokens: int, neighbors: int, *, zeros: Zeros = np.zeros) -> GateTrace:
        """Buffers for that many tokens and neighbours; λ is 0 until a gate says otherwise."""
        return GateTrace(
            zeros(tokens, np.float32),
            zeros((tokens, neighbors), np.int64),
            zeros((tokens, neighbors), np.float32),
        )


class Gate(Protocol):
    """One gate on one backend, with or without a memory."""

    @property
    def backend(self) -> str:
        """Name of the backend, for reports."""

    @property
    def neighbors(self) -> int:
        """K' of a trace: min(K, N), 0 without a memory."""

    def bind(self, buffers: GateBuffers, trace: GateTrace | None = None) -> Run:
        """Fix the buffers and return what routes over them, again and again."""


def pad_experts(
    ids: NDArray[np.int32], weights: NDArray[Any], rows: NDArray[Any], count: int
) -> tuple[NDArray[np.int32], NDArray[Any]]:
    """Widen a rule's selection [T, k] to `count` experts with further ids of weight 0.

    The further ids are the next best of `rows` [T, E], logits or whatever else experts are ranked
    by, so that a token never names an expert twice.
    """
    missing = count - ids.shape[1]
    if missing <= 0:
        return ids, weights
    chosen = np.zeros(rows.shape, bool)
    np.put_along_axis(chosen, ids.astype(np.int64), True, axis=1)
    # By rank among those not chosen; rows may be -inf, so the chosen are not marked by a number.
    order = np.lexsort((-rows.astype(np.float64), chosen), axis=1)
    more = order[:, :missing].astype(np.int32)
    zeros = np.zeros((len(ids), missing), weights.dtype)
    return np.concatenate([ids, more], axis=1), np.concatenate([weights, zeros], axis=1)
