"""The pieces in which sequences are fed, and what a run of one gives."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]
Tokens = NDArray[np.int64]


@dataclass(frozen=True)
class Case:
    """Tokens a sequence: `past` fed first, then `new`; the shorter ones are padded on the right."""

    past: tuple[int, ...]
    new: tuple[int, ...]

    @property
    def name(self) -> str:
        """The case as (batch, sequence, past)."""
        return f"({len(self.new)}, {_span(self.new)}, {_span(self.past)})"


CASES = (
    Case((0,), (1,)),
    Case((0,), (24,)),
    Case((17,), (1,)),
    Case((9,), (13,)),
    Case((0, 0, 0), (12, 7, 1)),
    Case((11, 11), (1, 1)),
    Case((10, 4, 7), (5, 5, 5)),
    Case((8, 3), (4, 2)),
)


@dataclass(frozen=True)
class Outputs:
    """One sequence: router logits [G, L, E], expert ids [G, L, k], logits [L, V]."""

    router_logits: Floats
    expert_ids: NDArray[np.int32]
    logits: Floats


def joined(pieces: Sequence[Outputs]) -> Outputs:
    """The outputs of pieces of one sequence, one behind the other."""
    return Outputs(
        np.concatenate([piece.router_logits for piece in pieces], axis=1),
        np.concatenate([piece.expert_ids for piece in pieces], axis=1),
        np.concatenate([piece.logits for piece in pieces]),
    )


def _span(counts: tuple[int, ...]) -> str:
    low, high = min(counts), max(counts)
    return str(low) if low == high else f"{low}-{high}"
