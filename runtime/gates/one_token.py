"""The gate of one token of one sequence: a single graph, with one memory's calibration folded in.

A decode step of a small batch spends its time in a gate on calls and operators, not on arithmetic.
So what every call of the bundle's gate graph finds out again is settled here when a memory is put
in place: which branch its calibration takes, that all candidates exist, that there is one token.
Scan, second stage and blend are one graph of some forty operators; the routing rule is the
bundle's own frozen gate over the blended logits. The equations are those of runtime/blend.py.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..blend import RBF_CLIP
from ..calibration import Calibration
from ..compressed import CompressedMemory, Memory
from ..engines.base import Engine, Run
from ..engines.onnx_bytes import FLOAT, NodeList, Tensor, graph_bytes
from ..engines.onnxruntime import OrtEngine
from .base import GateBuffers, GateTrace, Lap, unwatched
from .gather import append_code_steps, append_values, key_inputs, value_inputs
from .onnx import OnnxGate
from .scan import int8_is_cut_off, int8_scores, projected_scores

# Entries above which the best are looked for among the best blocks: a block's maximum is found
# faster than a list of the best is kept.
BLOCKED_ENTRIES = 1 << 15
BLOCK = 32
_SUMMABLE = 1e34  # elements whose magnitudes do not overflow when they are summed
_LEAST = float(np.finfo(np.float32).tiny)


def serves(memory: Memory, candidates: int) -> bool:
    """Whether there is such a graph: a blend of logits, and R entries that count."""
    return not memory.rule_first and memory.n_valid >= candidates


@dataclass(frozen=True)
class OneTokenGate:
    """What routes one token of one sequence.

    Args:
        engine: `one_token_engine` of the memory.
        inputs: Of the engine beside what comes from the segment: the memory.
        frozen: The engine of the bundle's gate graph without a memory: the routing rule.
        selection_bias: [E], of this gate, where the rule has one.
        make: Makes the engine once more; `profile` is as `OrtEngine` takes it.
        entries: N, by which what is done to every entry is known.
    """

    engine: Engine
    inputs: Mapping[str, NDArray[Any]]
    frozen: Engine
    selection_bias: NDArray[np.float32] | None
    make: Callable[..., OrtEngine]
    entries: int

    @staticmethod
    def over(
        memory: Memory,
        candidates: int,
        frozen: OrtEngine,
        selection_bias: NDArray[np.float32] | None = None,
    ) -> OneTokenGate:
        """The gate of one memory that it `serves`, for R candidates."""
        inputs = _memory_inputs(memory)
        make = partial(one_token_engine, memory, inputs, candidates, threads=frozen.threads)
        return OneTokenGate(make(), inputs, frozen, selection_bias, make, len(memory.values))

    def bind(
        self, buffers: GateBuffers, trace: GateTrace | None = None, lap: Lap = unwatched
    ) -> Run:
        """As `Gate.bind`, for buffers of one token, which must be a real one whenever it runs.

        `lap` is told when the stages `retrieve` and `rule` are done.
        """
        blended = np.zeros_like(buffers.router_logits)
        inputs = {
            "router_input": buffers.router_input,
            "router_logits": buffers.router_logits,
            "state": buffers.state,
            **self.inputs,
        }
        outputs: dict[str, NDArray[Any]] = {
            "blended": blended[None],
            "state_out": buffers.state_out,
        }
        if trace is not None:
            outputs |= {
                "confidence": trace.confidence[None],
                "neighbors": trace.neighbors,
                "similarities": trace.similarities,
            }
        retrieve = self.engine.bind(inputs, outputs)
        logits = GateBuffers(**{**vars(buffers), "router_logits": blended})
        route = OnnxGate(self.frozen, {}, 0, self.selection_bias).bind(logits)

        def run() -> None:
            retrieve()
            lap("retrieve")
            route()
            lap("rule")

        return run


def _memory_inputs(memory: Memory) -> dict[str, NDArray[Any]]:
    # Not a constant, of which a product would be rearranged to sixteen times its size.
    inputs: dict[str, NDArray[Any]] = {"center": np.asarray(memory.center, np.float32)[None]}
    inputs |= value_inputs(memory.values)
    inputs |= key_inputs(memory) if isinstance(memory, CompressedMemory) else {"keys": memory.keys}
    if isinstance(memory, CompressedMemory) and (memory.multipliers != 1).any():
        inputs["multipliers"] = np.ascontiguousarray(memory.multipliers[:, 0])
    if memory.similarity == "rbf":
        norms = memory.norms if isinstance(memory, CompressedMemory) else memory.key_scales[:, 1]
        inputs["half_norms"] = norms / 2
    if memory.evidence_weights is not None:
        inputs["evidence_weights"] = np.ascontiguousarray(memory.evidence_weights, np.float32)
    return inputs


def one_token_engine(
    memory: Memory,
    inputs: Mapping[str, NDArray[Any]],
    candidates: int,
    *,
    threads: int | None = None,
    profile: Path | None = None,
) -> OrtEngine:
    """Retrieval and blend of one token: inputs as `OneTokenGate.bind` names them."""
    g = NodeList()
    size, experts = len(memory.center), memory.values.shape[1]
    compressed = isinstance(memory, CompressedMemory)
    queries = _queries(g, memory.similarity == "rbf")
    if isinstance(memory, CompressedMemory):
        # As long as whole blocks: entries behind the last are never among the best.
        count = memory.entries
        blocked = count >= BLOCKED_ENTRIES
        count += -count % BLOCK if blocked else 0
        scores, weights = projected_scores(g, memory, queries, count)
    else:
        blocked, count = False, len(memory.keys)
        scores, weights = int8_scores(g, memory, queries)
    entries = _best_entries(g, scores, candidates, count, blocked=blocked)
    at, similarities = _nearest(g, memory, inputs, queries, entries, candidates)
    neighbors = g.op("Gather", entries, at, out="neighbors")
    means = g.op(
        "MatMul", _weights(g, similarities, memory.calibration, min(memory.k, candidates)),
        append_values(g, memory.values, neighbors, "values_of_neighbors"),
    )  # fmt: skip
    confidence = _confidence(g, similarities, neighbors, memory)
    pulled = g.op("Sub", means, "router_logits") if memory.calibration.interpolate else means
    g.op("Add", g.op("Mul", pulled, confidence), "router_logits", out="blended")
    k = min(memory.k, candidates)
    graph = graph_bytes(
        g.nodes,
        [
            Tensor("router_input", np.float32, (1, size)),
            Tensor("router_logits", np.float32, (1, experts)),
            Tensor("state", np.float32, (1, 2)),
            *(Tensor(name, array.dtype, array.shape) for name, array in inputs.items()),
        ],
        [
            Tensor("blended", np.float32, (1, 1, experts)),
            Tensor("state_out", np.float32, (1, 2)),
            Tensor("confidence", np.float32, (1, 1)),
            Tensor("neighbors", np.int64, (1, k)),
            Tensor("similarities", np.float32, (1, k)),
        ],
        g.constants,
        weights,
    )
    precise = not compressed and int8_is_cut_off()
    return OrtEngine(graph, threads=threads, weights=weights, precise_int8=precise, profile=profile)


def _queries(g: NodeList, rbf: bool) -> str:
    """The router input as it is compared, [1, D]: `blend.prepare_queries`."""
    bound = RBF_CLIP if rbf else _SUMMABLE
    centred = g.op("Sub", "router_input", "center")
    queries = g.op("Clip", centred, g.number(-bound), g.number(bound))
    if rbf:
        return queries
    # By the sum of magnitudes first: the squares of a finite row may overflow, or vanish.
    return g.op("LpNormalization", g.op("LpNormalization", queries, p=1), p=2)


def _best_entries(g: NodeList, scores: str, candidates: int, count: int, *, blocked: bool) -> str:
    """The R entries with the best scores [1, N], in rising order, [R]; of equal ones the first.

    Blocked: the R best lie in the R blocks whose maxima are the best, since each of these has an
    entry as good as its maximum.
    """
    r = g.ints(candidates)
    if not blocked:
        best = g.ops("TopK", g.op("Reshape", scores, g.ints(-1)), r, out=("best", "ranked"),
                     sorted=0)[1]  # fmt: skip
        return g.ops("TopK", best, r, out=("entries", "order"), largest=0)[0]
    table = g.constant("table", np.arange(count).reshape(-1, BLOCK))
    rows = g.op("Reshape", scores, g.ints(-1, BLOCK))
    maxima = g.op("ReduceMax", rows, g.ints(1), keepdims=0)
    b = g.ints(min(candidates, count // BLOCK))
    found = g.ops("TopK", maxima, b, out=("best_maxima", "best_blocks"), sorted=0)[1]
    blocks = g.ops("TopK", found, b, out=("blocks", "block_order"), largest=0)[0]
    among = g.op("Reshape", g.op("Gather", rows, blocks), g.ints(-1))
    entries = g.op("Reshape", g.op("Gather", table, blocks), g.ints(-1))
    best = g.ops("TopK", among, r, out=("best", "ranked"), sorted=0)[1]
    best = g.ops("TopK", best, r, out=("places", "order"), largest=0)[0]
    return g.op("Gather", entries, best)


def _nearest(
    g: NodeList,
    memory: Memory,
    inputs: Mapping[str, NDArray[Any]],
    queries: str,
    entries: str,
    candidates: int,
) -> tuple[str, str]:
    """The K nearest of R entries [R]: their places among them, and similarities, [1, K]."""
    products = _products(g, memory, queries, entries)
    if "multipliers" in inputs:
        products = g.op("Mul", products, g.op("Gather", "multipliers", entries))
    rbf = memory.similarity == "rbf"
    if rbf:
        products = g.op("Sub", products, g.op("Gather", "half_norms", entries))
    k = g.ints(min(memory.k, candidates))
    best, at = g.ops("TopK", products, k, out=("nearest", "places_of_nearest"))
    if rbf:
        squares = g.op("ReduceSumSquare", queries)
        distances = g.op("Sub", squares, g.op("Mul", best, g.number(2)))
        distances = g.op("Max", distances, g.number(0))
        best = g.op("Exp", g.op("Mul", distances, g.number(-memory.calibration.gamma)))
    return at, g.op("Clip", best, g.number(0), g.number(1), out="similarities")


def _products(g: NodeList, memory: Memory, queries: str, entries: str) -> str:
    """Inner products of the query with R centred keys but for their multipliers, [1, R]."""
    if isinstance(memory, CompressedMemory) and memory.keys is None:
        found = []
        for part in append_code_steps(g, memory, g.op("Unsqueeze", entries, g.ints(0))):
            projected = g.op("Gemm", queries, part.matrix, transB=1)
            products = g.op("Gemm", projected, g.op("Squeeze", part.steps, g.ints(0)), transB=1)
            found.append(products if part.sizes is None else g.op("Mul", products, part.sizes))
        return found[0] if len(found) == 1 else g.op("Add", *found)
    assert memory.keys is not None
    rows = g.op("Gather", "keys", entries)
    if memory.keys.dtype != np.float32:
        rows = g.op("Cast", rows, to=FLOAT)
    products = g.op("Gemm", queries, rows, transB=1)
    if isinstance(memory, CompressedMemory) and memory.keys.dtype != np.int8:
        # Keys as stored: what the centre has of each product is taken off [1, R] instead of [R, D].
        products = g.op("Sub", products, g.op("Gemm", queries, "center", transB=1))
    return products


def _weights(g: NodeList, similarities: str, numbers: Calibration, count: int) -> str:
    """`blend.neighbor_weights` of K similarities that all exist, [1, K]."""
    beta, power = numbers.inverse_temperature, numbers.weight_power
    if power == 0:
        scaled = g.op("Mul", similarities, g.number(beta))
        return g.op("Softmax", scaled)
    raw = _powered(g, similarities, power)
    if beta:
        best = g.op("ReduceMax", similarities)
        below = g.op("Mul", g.op("Sub", similarities, best), g.number(beta))
        raw = g.op("Mul", raw, g.op("Exp", below))
    return g.op("Div", raw, g.op("Max", g.op("ReduceSum", raw), g.number(_LEAST)))


def _confidence(g: NodeList, similarities: str, neighbors: str, memory: Memory) -> str:
    """λ [1, 1]; also leaves `state_out`: `blend.token_evidence`, `blend.sequence_gate`."""
    numbers = memory.calibration
    counted = similarities
    if memory.evidence_weights is not None:
        counted = g.op("Mul", counted, g.op("Gather", "evidence_weights", neighbors))
    evidence = g.op("ReduceMean" if numbers.mean else "ReduceSum", counted)
    if not numbers.mean:
        evidence = g.op("Min", evidence, g.number(1))
    before = "state"
    if numbers.decay != 1:
        before = g.op("Mul", before, g.number(numbers.decay))
    one = g.constant("one_token", np.ones((1, 1), np.float32))
    gained = g.op("Concat", evidence, one, axis=1)
    state = g.op("Add", before, gained, out="state_out")
    strength = _powered(g, evidence, numbers.power)
    if numbers.sharpness:
        strength = g.op("Mul", strength, _sequence_gate(g, evidence, state, numbers))
    # No factor is above 1.
    return g.op("Mul", strength, g.number(numbers.scale), out="confidence")


def _sequence_gate(g: NodeList, evidence: str, state: str, numbers: Calibration) -> str:
    """g [1, 1], of this token or of the sequence with it; one token at least has been seen."""
    sharpness = numbers.sharpness
    measured = evidence
    if numbers.sequence:
        total, seen = g.ops("Split", state, out=("total", "seen"), axis=1, num_outputs=2)
        measured = g.op("Div", total, seen)
    above = g.op("Sub", measured, g.number(numbers.midpoint))
    if numbers.sequence:
        growth = g.op("Min", g.op("Sqrt", seen), g.number(numbers.cap))
        above = g.op("Mul", above, growth)
    else:
        sharpness *= min(1.0, numbers.cap)
    return g.op("Sigmoid", g.op("Mul", above, g.number(sharpness)))


def _powered(g: NodeList, base: str, power: float) -> str:
    if power == 1:
        return base
    return g.op("Mul", base, base) if power == 2 else g.op("Pow", base, g.number(power))
