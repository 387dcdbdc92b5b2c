"""The gate as NumPy reference: what the other backends are compared with, and always available."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..blend import Blended, GateMemory, blend_found, inner_products, rank
from ..engines.base import Run
from ..routing import RoutingRule, select_assignments
from .base import GateBuffers, GateTrace, Lap, pad_experts, unwatched

ROWS_AT_ONCE = 64  # bounds the [rows, N] matrix of similarities


@dataclass(frozen=True)
class NumpyGate:
    """Retrieval, blend and rule in NumPy.

    Args:
        rule: The model's routing rule.
        experts_per_token: k of the seam.
        memory: None routes by the frozen router.
        dtype: Arithmetic; float64 is the oracle of the tests.
        selection_bias: [E], of this gate, where the rule has one.
        lap: Is told when a stage is done: `scan`, `select`, `gather`, `blend`, `rule`.
    """

    rule: RoutingRule
    experts_per_token: int
    memory: GateMemory | None = None
    dtype: type[np.floating[Any]] = np.float32
    selection_bias: NDArray[np.float32] | None = None
    lap: Lap = unwatched

    backend = "numpy"

    def watched(self, lap: Lap) -> NumpyGate:
        """The same gate, which tells of its stages."""
        return replace(self, lap=lap)

    @property
    def neighbors(self) -> int:
        """See `Gate.neighbors`."""
        return 0 if self.memory is None else min(self.memory.k, len(self.memory.keys))

    def bind(self, buffers: GateBuffers, trace: GateTrace | None = None) -> Run:
        """See `Gate.bind`."""

        def run() -> None:
            rows = buffers.router_logits.astype(self.dtype, copy=False)
            if self.memory is None:
                ids, weights = self._apply(rows)
                np.copyto(buffers.state_out, buffers.state)
            else:
                if self.memory.rule_first:
                    rows = self.rule.assignments(rows, self.selection_bias)
                    self.lap("rule")
                blended = self.blend(self.memory, rows, buffers)
                ids, weights = self._select(blended.rows)
                np.copyto(buffers.state_out, blended.state, casting="same_kind")
                if trace is not None:
                    np.copyto(trace.confidence, blended.confidence, casting="same_kind")
                    np.copyto(trace.neighbors, blended.neighbors)
                    np.copyto(trace.similarities, blended.similarities, casting="same_kind")
            np.copyto(buffers.expert_ids, ids)
            np.copyto(buffers.expert_weights, weights, casting="same_kind")
            self.lap("rule")

        return run

    def blend(self, memory: GateMemory, rows: NDArray[Any], buffers: GateBuffers) -> Blended:
        """Search and blend; a backend with its own search replaces `find`."""
        x = buffers.router_input.astype(self.dtype, copy=False)
        found = [
            self.find(memory, x[start : start + ROWS_AT_ONCE])
            for start in range(0, len(x), ROWS_AT_ONCE)
        ]
        neighbors, similarities, exists = (
            np.concatenate(part) for part in zip(*found, strict=True)
        )
        blended = blend_found(
            rows,
            memory,
            neighbors,
            similarities,
            exists,
            buffers.state,
            buffers.lengths,
            dtype=self.dtype,
        )
        self.lap("blend")
        return blended

    def find(
        self, memory: GateMemory, x: NDArray[Any]
    ) -> tuple[NDArray[np.int64], NDArray[Any], NDArray[np.bool_]]:
        """The K nearest entries of each x [T, D]: ids, similarities, existence, [T, K']."""
        products = inner_products(x, memory, self.dtype)
        self.lap("scan")
        found = rank(products, x, memory, self.dtype)
        self.lap("select")
        return found

    def _select(self, blended: NDArray[Any]) -> tuple[NDArray[np.int32], NDArray[Any]]:
        if self.memory is not None and self.memory.rule_first:
            return select_assignments(blended, self.experts_per_token)
        return self._apply(blended)

    def _apply(self, logits: NDArray[Any]) -> tuple[NDArray[np.int32], NDArray[Any]]:
        """The rule over logits [T, E], as wide as the seam."""
        ids, weights = self.rule.apply(logits, self.selection_bias)
        if self.experts_per_token == self.rule.top_k:
            return ids, weights
        ranking = self.rule.ranking(logits, self.selection_bias)
        return pad_experts(ids, weights, ranking, self.experts_per_token)
