"""The gate that scans compact keys for R candidates and scores only those with the full keys.

What is scanned is int8 keys made of the memory's keys when it is put in place, so that a memory
takes 5 bytes an element of its keys instead of 4; or, of a compressed memory, its projected keys,
and then the full keys stay as they are stored (scan.py). All of it is one graph (retrieval.py),
which also blends where each token is the next of a sequence; what it finds for prompts is blended
by NumPy. Where that takes longer than to score all entries in one product, that is done instead.
The reference is runtime/two_stage.py with `int8_queries`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..blend import GateMemory
from ..compressed import CompressedMemory, Memory
from ..engines.base import Engine, Run
from ..engines.onnxruntime import OrtEngine
from ..errors import SettingError
from ..routing import RoutingRule
from ..two_stage import MAX_CANDIDATES
from .base import GateBuffers, GateTrace
from .numpy import NumpyGate
from .onnx import OnnxGate
from .retrieval import Retrieval

# Elements of keys [N, D] above which the scan gains more than the second stage costs
# (benchmarks/cpu_scan.py).
SCANNED_ELEMENTS = 1 << 20
# Entries from which prompts gain too: what candidates cost each of their tokens is the same however
# many there are, what scoring all of them costs is not.
MANY_ENTRIES = 1 << 14


@dataclass(frozen=True, kw_only=True)
class TwoStageGate(NumpyGate):
    """`NumpyGate` with its search in two stages.

    Args:
        retrieval: Over the memory as it is or compressed.
        gate: The engine of the bundle's gate graph for the memory.
        many: Whether prompts are searched in two stages too, or exactly.
        frozen: The engine of the bundle's gate graph without a memory: the routing rule over what
            the retrieval blended; None leaves the blend to NumPy.
        memory: What is blended; its keys are read by exact searches alone.
    """

    memory: GateMemory
    retrieval: Retrieval
    gate: Engine
    many: bool
    frozen: Engine | None = None

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
            frozen: See `TwoStageGate`.

        Raises:
            SettingError: If the memory asks for more than R neighbours.
        """
        if candidates is None:
            candidates = most_candidates(memory)
        if not fits(memory, candidates):
            raise SettingError(
                "neighbors", "more than the gate 'two-stage' scores again",
                expected=f"at most {candidates}", found=memory.k,
                fix="Ask for fewer neighbours, or take the gate 'onnx'.",
            )  # fmt: skip
        count = min(candidates, entries_of(memory))
        if isinstance(memory, CompressedMemory):
            whole, many = memory.without_keys(), True
        else:
            whole, many = memory, pays_for_many(memory)
        return TwoStageGate(
            rule=rule,
            experts_per_token=experts_per_token,
            memory=whole,
            selection_bias=selection_bias,
            retrieval=Retrieval.over(memory, count, threads=engine.threads),
            gate=engine,
            many=many,
            frozen=frozen,
        )

    @property
    def candidates(self) -> int:
        """R, at most N."""
        return self.retrieval.candidates

    @property
    def neighbors(self) -> int:
        """See `Gate.neighbors`."""
        return self.retrieval.neighbors

    def searches_exactly(self, tokens: int, sequences: int) -> bool:
        """Whether calls of that many tokens of so many sequences score all entries."""
        return tokens > sequences and not self.many

    def exact(self) -> OnnxGate:
        """The gate that scores all entries."""
        return OnnxGate.over(self.gate, self.memory, self.selection_bias)

    def bind(self, buffers: GateBuffers, trace: GateTrace | None = None) -> Run:
        """See `Gate.bind`."""
        tokens, sequences = len(buffers.router_input), len(buffers.lengths)
        if self.searches_exactly(tokens, sequences):
            return self.exact().bind(buffers, trace)
        if self.frozen is None or not self.retrieval.experts or tokens > sequences:
            return super().bind(buffers, trace)
        blended = np.zeros_like(buffers.router_logits)
        retrieve = self.retrieval.bind(buffers, blended, trace)
        logits = GateBuffers(**{**vars(buffers), "router_logits": blended})
        route = OnnxGate(self.frozen, {}, 0, self.selection_bias).bind(logits)
        lengths = buffers.lengths

        def run() -> None:
            retrieve()
            if not lengths.all():  # of a sequence that has ended the evidence stays as it is
                np.copyto(buffers.state_out, buffers.state, where=lengths[:, None] == 0)
            self.lap("retrieve")
            route()
            self.lap("rule")

        return run

    def find(
        self, memory: GateMemory, x: NDArray[Any]
    ) -> tuple[NDArray[np.int64], NDArray[Any], NDArray[np.bool_]]:
        """See `NumpyGate.find`."""
        neighbors, similarities = self.retrieval.search(x)
        exist = neighbors < memory.n_valid
        self.lap("scan")
        return neighbors, np.where(exist, similarities, 0).astype(self.dtype), exist


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
    """The same for prompts."""
    return len(memory.keys) >= MANY_ENTRIES
