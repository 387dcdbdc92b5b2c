"""The gate that scans compact keys for R candidates and scores only those with the full keys.

What is scanned is int8 keys made of the memory's keys when it is put in place, so that a memory
takes 5 bytes an element of its keys instead of 4; or, of a compressed memory, its projected keys,
and then the full keys stay as they are stored (scan.py). One token of one sequence has a graph of
its own for all of it (one_token.py), or, where the memory has none, the scan's and behind it the
bundle's own gate over the R candidates. Several tokens have candidates each of their own, which is
NumPy's; where that takes longer than to score all entries in one product, that is done instead.
The reference is runtime/two_stage.py with `int8_queries`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..blend import GateMemory, prepare_queries
from ..compressed import CompressedMemory, Memory
from ..engines.base import Engine, Run
from ..engines.onnxruntime import OrtEngine
from ..errors import SettingError
from ..routing import RoutingRule
from ..two_stage import MAX_CANDIDATES, rank_products
from .base import GateBuffers, GateTrace
from .numpy import NumpyGate
from .one_token import OneTokenGate, serves
from .onnx import OnnxGate
from .scan import Candidates, Int8Scan, ProjectedScan, Scan, scan_engine

# Elements of keys [N, D] above which the scan gains more than the second stage costs
# (benchmarks/cpu_scan.py).
SCANNED_ELEMENTS = 1 << 20
# The same for calls of several tokens, to which the exact product and its ranking are cheaper.
MANY_ELEMENTS = 1 << 24
MANY_SIZE = 512
AT_ONCE = 8  # tokens; bounds the candidates' keys [tokens, R, D]


@dataclass(frozen=True, kw_only=True)
class TwoStageGate(NumpyGate):
    """`NumpyGate` with its search in two stages.

    Args:
        scan: Finds the candidates, in a memory as it is or compressed.
        gate: The engine of the bundle's gate graph for the memory.
        many: Whether calls of several tokens are searched in two stages too, or exactly.
        one_token: What routes one token of one sequence, if the memory has such a gate.
        memory: What is blended; its keys are read by exact searches alone.
    """

    memory: GateMemory
    scan: Scan
    gate: Engine
    many: bool
    one_token: OneTokenGate | None = None

    backend = "two-stage"

    @staticmethod
    def over(
        engine: OrtEngine,
        memory: Memory,
        rule: RoutingRule,
        experts_per_token: int,
        selection_bias: NDArray[np.float32] | None = None,
        *,
        candidates: int | None = None,
        frozen: OrtEngine | None = None,
    ) -> TwoStageGate:
        """The gate of one memory.

        Args:
            engine: Of the bundle's gate graph for the memory; the scan takes as many threads.
            memory: Its keys are read now, and again at every call.
            rule, experts_per_token, selection_bias: See `NumpyGate`.
            candidates: R; None takes what the projection was made for, or the most there are.
            frozen: Of the bundle's gate graph without a memory: routes single tokens after a
                retrieval of their own (one_token.py) where the memory has one.

        Raises:
            SettingError: If the memory asks for more than R neighbours.
        """
        if candidates is None:
            candidates = most_candidates(memory)
        count = min(candidates, entries_of(memory))
        if not fits(memory, candidates):
            raise SettingError(
                "neighbors", "more than the gate 'two-stage' scores again",
                expected=f"at most {candidates}", found=memory.k,
                fix="Ask for fewer neighbours, or take the gate 'onnx'.",
            )  # fmt: skip
        if isinstance(memory, CompressedMemory):
            scan: Scan = ProjectedScan.over(memory, count, threads=engine.threads)
            whole, many = memory.without_keys(), True
        else:
            scan = Int8Scan(scan_engine(memory, count, threads=engine.threads), memory, count)
            whole, many = memory, pays_for_many(memory)
        one_token = None
        # Its graph has what it scans once more, which of large int8 keys is too much.
        small = isinstance(memory, CompressedMemory) or not many
        if frozen is not None and small and serves(memory, count):
            one_token = OneTokenGate.over(memory, count, frozen, selection_bias)
        return TwoStageGate(
            rule=rule,
            experts_per_token=experts_per_token,
            memory=whole,
            selection_bias=selection_bias,
            scan=scan,
            gate=engine,
            many=many,
            one_token=one_token,
        )

    @property
    def candidates(self) -> int:
        """R, at most N."""
        return self.scan.candidates

    @property
    def neighbors(self) -> int:
        """See `Gate.neighbors`."""
        return min(self.memory.k, self.candidates)

    def searches_exactly(self, tokens: int) -> bool:
        """Whether calls of that many tokens score all entries."""
        return tokens > 1 and not self.many

    def exact(self) -> OnnxGate:
        """The gate that scores all entries."""
        return OnnxGate.over(self.gate, self.memory, self.selection_bias)

    def bind(self, buffers: GateBuffers, trace: GateTrace | None = None) -> Run:
        """See `Gate.bind`."""
        if self.searches_exactly(len(buffers.router_input)):
            return self.exact().bind(buffers, trace)
        if len(buffers.router_input) > 1:
            return super().bind(buffers, trace)
        if self.one_token is None:
            return self._bind_one(buffers, trace)
        alone, lengths = self.one_token.bind(buffers, trace, self.lap), buffers.lengths

        @cache
        def padded() -> Run:
            return self._bind_one(buffers, trace)

        def run() -> None:
            if lengths[0]:
                alone()
            else:  # a sequence that has ended: its evidence stays as it is
                padded()()

        return run

    def _bind_one(self, buffers: GateBuffers, trace: GateTrace | None) -> Run:
        """One token by the bundle's own gate graph over its candidates."""
        found = self._buffers(1)
        scan = self.scan.bind(buffers.router_input, found, self.lap)
        among = replace(
            self.memory,
            keys=found.keys[0],
            key_scales=found.key_scales[0],
            values=found.values[0],
            n_valid=min(self.memory.n_valid, self.candidates),
            evidence_weights=np.zeros(self.candidates, np.float32),
        )
        gate = OnnxGate.over(self.gate, among, self.selection_bias).bind(buffers, trace)
        entries, evidence = found.entries[0], self.memory.entry_evidence()

        def run() -> None:
            scan()
            evidence.take(entries, out=among.evidence_weights, mode="clip")
            self.lap("gather")
            gate()
            self.lap("blend")
            if trace is not None:
                trace.neighbors[...] = entries[trace.neighbors]

        return run

    def find(
        self, memory: GateMemory, x: NDArray[Any]
    ) -> tuple[NDArray[np.int64], NDArray[Any], NDArray[np.bool_]]:
        """See `NumpyGate.find`."""
        parts = []
        for start in range(0, len(x), AT_ONCE):
            piece = x[start : start + AT_ONCE]
            found = self._buffers(len(piece))
            self.scan.bind(piece, found, self.lap)()
            self.lap("gather")
            queries = prepare_queries(piece, memory)
            # Capacity may hold anything, NaN and infinities too.
            with np.errstate(invalid="ignore", over="ignore"):
                # Not a product of matrices: libraries of those take threads that nobody gave them.
                products = np.einsum("trd,td->tr", found.keys, queries, dtype=self.dtype)
                products *= found.key_scales[:, :, 0]
            norms = found.key_scales[:, :, 1].astype(self.dtype)
            parts.append(rank_products(found.entries, products, norms, queries, memory))
            self.lap("select")
        neighbors, similarities, exist = (np.concatenate(p) for p in zip(*parts, strict=True))
        return neighbors, similarities, exist

    def _buffers(self, tokens: int) -> Candidates:
        size, experts = len(self.memory.center), self.memory.values.shape[1]
        return Candidates.empty(tokens, self.candidates, size, experts)


def entries_of(memory: Memory) -> int:
    """N, capacity included."""
    return memory.entries if isinstance(memory, CompressedMemory) else len(memory.keys)


def most_candidates(memory: Memory) -> int:
    """R: what a projection was made for, else the most there are."""
    return memory.candidates if isinstance(memory, CompressedMemory) else MAX_CANDIDATES


def fits(memory: Memory, candidates: int | None = None) -> bool:
    """Whether R candidates hold the neighbours that the memory asks for."""
    most = most_candidates(memory) if candidates is None else candidates
    return min(memory.k, entries_of(memory)) <= most


def pays(memory: Memory) -> bool:
    """Whether the two stages take less time than the exact scan, for one token."""
    return fits(memory) and entries_of(memory) * len(memory.center) >= SCANNED_ELEMENTS


def pays_for_many(memory: GateMemory) -> bool:
    """The same for several tokens."""
    return memory.keys.shape[1] >= MANY_SIZE and memory.keys.size >= MANY_ELEMENTS
