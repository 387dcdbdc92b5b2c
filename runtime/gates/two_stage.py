"""The gate that scans int8 keys for R candidates and scores only those with the full keys.

The scan is a graph of a few operators over one memory, made when the memory is put in place; its
int8 keys are weights of that graph, because ONNX Runtime multiplies by int8 at speed only what it
could rearrange beforehand. A memory's keys so take 5 bytes an element instead of 4.

What follows the scan of one token is the bundle's own gate over the R candidates. Several tokens
have candidates each of their own, which is NumPy's; where that takes longer than to score all
entries in one product, that is done instead. The reference is runtime/two_stage.py with
`int8_queries`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..blend import RBF_CLIP, GateMemory
from ..engines.base import Engine, Run
from ..engines.onnx_bytes import Node, Tensor, graph_bytes
from ..engines.onnxruntime import OrtEngine
from ..errors import SettingError
from ..routing import RoutingRule
from ..two_stage import MAX_CANDIDATES, quantize_keys, rank_candidates
from .base import GateBuffers, GateTrace
from .numpy import NumpyGate
from .onnx import OnnxGate

# Elements of keys [N, D] above which the scan gains more than the second stage costs
# (benchmarks/cpu_scan.py).
SCANNED_ELEMENTS = 1 << 20
# The same for calls of several tokens, to which the exact product and its ranking are cheaper.
MANY_ELEMENTS = 1 << 24
MANY_SIZE = 512
_QUANTIZED_AT_ONCE = 1 << 22  # elements


@dataclass(frozen=True, kw_only=True)
class TwoStageGate(NumpyGate):
    """`NumpyGate` with its search in two stages.

    Args:
        scan: `scan_engine` of the memory.
        gate: The engine of the bundle's gate graph for the memory.
        candidates: R, at most N.
        many: Whether calls of several tokens are searched in two stages too, or exactly.
    """

    memory: GateMemory
    scan: Engine
    gate: Engine
    candidates: int
    many: bool

    backend = "two-stage"

    @staticmethod
    def over(
        engine: OrtEngine,
        memory: GateMemory,
        rule: RoutingRule,
        experts_per_token: int,
        selection_bias: NDArray[np.float32] | None = None,
        *,
        candidates: int = MAX_CANDIDATES,
    ) -> TwoStageGate:
        """The gate of one memory.

        Args:
            engine: Of the bundle's gate graph for the memory; the scan takes as many threads.
            memory: Its keys are read now, and again at every call.
            rule, experts_per_token, selection_bias: See `NumpyGate`.
            candidates: R.

        Raises:
            SettingError: If the memory asks for more than R neighbours.
        """
        count = min(candidates, len(memory.keys))
        if not fits(memory, candidates):
            raise SettingError(
                "neighbors", "more than the gate 'two-stage' scores again",
                expected=f"at most {candidates}", found=memory.k,
                fix="Ask for fewer neighbours, or take the gate 'onnx'.",
            )  # fmt: skip
        return TwoStageGate(
            rule=rule,
            experts_per_token=experts_per_token,
            memory=memory,
            selection_bias=selection_bias,
            scan=scan_engine(memory, count, threads=engine.threads),
            gate=engine,
            candidates=count,
            many=pays_for_many(memory),
        )

    def bind(self, buffers: GateBuffers, trace: GateTrace | None = None) -> Run:
        """See `Gate.bind`."""
        whole = self.memory
        if len(buffers.router_input) > 1:
            if self.many:
                return super().bind(buffers, trace)
            return OnnxGate.over(self.gate, whole, self.selection_bias).bind(buffers, trace)
        found = np.zeros((1, self.candidates), np.int64)
        scan = self.scan.bind({"router_input": buffers.router_input}, {"candidates": found})
        among = replace(
            whole,
            keys=np.zeros((self.candidates, whole.keys.shape[1]), np.float32),
            key_scales=np.zeros((self.candidates, 2), np.float32),
            values=np.zeros((self.candidates, whole.values.shape[1]), np.float32),
            n_valid=min(whole.n_valid, self.candidates),
        )
        gate = OnnxGate.over(self.gate, among, self.selection_bias).bind(buffers, trace)
        entries = found[0]

        def run() -> None:
            scan()
            for source, target in (
                (whole.keys, among.keys),
                (whole.key_scales, among.key_scales),
                (whole.values, among.values),
            ):
                source.take(entries, axis=0, out=target, mode="clip")
            gate()
            if trace is not None:
                trace.neighbors[...] = entries[trace.neighbors]

        return run

    def find(
        self, memory: GateMemory, x: NDArray[Any]
    ) -> tuple[NDArray[np.int64], NDArray[Any], NDArray[np.bool_]]:
        """See `NumpyGate.find`."""
        found = np.zeros((len(x), self.candidates), np.int64)
        self.scan.bind({"router_input": x}, {"candidates": found})()
        return rank_candidates(found, x, memory, self.dtype)


def fits(memory: GateMemory, candidates: int = MAX_CANDIDATES) -> bool:
    """Whether R candidates hold the neighbours that the memory asks for."""
    return min(memory.k, len(memory.keys)) <= candidates


def pays(memory: GateMemory) -> bool:
    """Whether the two stages take less time than the exact scan, for one token."""
    return fits(memory) and memory.keys.size >= SCANNED_ELEMENTS


def pays_for_many(memory: GateMemory) -> bool:
    """The same for several tokens."""
    return memory.keys.shape[1] >= MANY_SIZE and memory.keys.size >= MANY_ELEMENTS


def scan_engine(memory: GateMemory, candidates: int, *, threads: int | None = None) -> OrtEngine:
    """What finds the candidates [T, R] of router inputs [T, D], entries in rising order.

    Rows of int8 queries times columns of int8 keys, exact in integers; the sums become scores as
    `two_stage.scan_scores` has them, those of cosine but for the length of the query.
    """
    keys, scales, norms = _scan_weights(memory)
    size = memory.keys.shape[1]
    cosine = memory.similarity == "cosine"
    bound = np.float32(np.finfo(np.float32).max if cosine else RBF_CLIP)
    step = np.array(1 / 127, np.float32)
    constants: dict[str, NDArray[Any]] = {
        "center": np.ascontiguousarray(memory.center, np.float32),
        "low": np.array(-bound, np.float32),
        "high": np.array(bound, np.float32),
        "zero": np.array(0, np.float32),
        "one": np.array(1, np.float32),
        "columns": np.array([1], np.int64),
        "step": step,
        "middle": np.array(128, np.uint8),
        "r": np.array([candidates], np.int64),
    }
    weights: dict[str, NDArray[Any]] = {"keys": keys, "scales": scales}
    product_inputs = ["bytes", "keys", "step", "scales", "middle", ""]
    nodes = [
        Node("Sub", ["router_input", "center"], ["centred"]),
        Node("Clip", ["centred", "low", "high"], ["queries"]),
        Node("Abs", ["queries"], ["sizes"]),
        Node("ReduceMax", ["sizes", "columns"], ["largest"]),
        Node("Greater", ["largest", "zero"], ["positive"]),
        Node("Where", ["positive", "largest", "one"], ["divisor"]),
        Node("Div", ["queries", "divisor"], ["unit"]),
        Node("QuantizeLinear", ["unit", "step", "middle"], ["bytes"]),
    ]
    valid = np.arange(len(memory.keys)) < memory.n_valid
    if cosine:
        # Of one query all scores may be as many times too large: the mask can ride in the product.
        constants["mask"] = np.where(valid, 0, -np.inf).astype(np.float32)
        nodes.append(_times([*product_inputs, "mask"], "scores"))
    else:
        constants["norms"] = np.where(valid, norms, np.inf).astype(np.float32)
        nodes += [
            _times(product_inputs[:-1], "products"),
            Node("Add", ["largest", "largest"], ["twice"]),
            Node("Mul", ["products", "twice"], ["nearness"]),
            Node("Sub", ["nearness", "norms"], ["scores"]),
        ]
    nodes += [
        Node("TopK", ["scores", "r"], ["best", "ranked"], [("axis", 1), ("sorted", 0)]),
        Node("TopK", ["ranked", "r"], ["candidates", "order"], [("axis", 1), ("largest", 0)]),
    ]
    graph = graph_bytes(
        nodes,
        [Tensor("router_input", np.float32, ("tokens", size))],
        [Tensor("candidates", np.int64, ("tokens", candidates))],
        constants,
        weights,
    )
    return OrtEngine(graph, threads=threads, weights=weights, precise_int8=int8_is_cut_off())


@cache
def int8_is_cut_off() -> bool:
    """Whether this processor cuts off sums of large products of bytes, found out by trying."""
    size, count = 64, 16
    weights: dict[str, NDArray[Any]] = {
        "keys": np.full((size, count), 127, np.int8),
        "scales": np.ones(count, np.float32),
    }
    graph = graph_bytes(
        [_times(["bytes", "keys", "step", "scales", "middle"], "products")],
        [Tensor("bytes", np.uint8, (1, size))],
        [Tensor("products", np.float32, (1, count))],
        {"step": np.array(1, np.float32), "middle": np.array(128, np.uint8)},
        weights,
    )
    got = np.zeros((1, count), np.float32)
    queries = np.full((1, size), 255, np.uint8)
    OrtEngine(graph, threads=1, weights=weights).bind({"bytes": queries}, {"products": got})()
    return bool((got != size * 127 * 127).any())


def _times(inputs: list[str], output: str) -> Node:
    return Node("MatMulIntegerToFloat", inputs, [output], domain="com.microsoft")


def _scan_weights(
    memory: GateMemory,
) -> tuple[NDArray[np.int8], NDArray[np.float32], NDArray[np.float32]]:
    """int8 keys [D, N], their multipliers and squared norms [N]; zeros from n_valid."""
    count, size = memory.keys.shape
    keys = np.zeros((size, count), np.int8)
    scales = np.zeros((count, 2), np.float32)
    rows = max(1, _QUANTIZED_AT_ONCE // size)
    for start in range(0, memory.n_valid, rows):
        piece = slice(start, min(start + rows, memory.n_valid))
        scan = quantize_keys(memory.keys[piece])
        keys[:, piece] = scan.keys.T
        scales[piece] = scan.scales
    return keys, np.ascontiguousarray(scales[:, 0]), scales[:, 1]
