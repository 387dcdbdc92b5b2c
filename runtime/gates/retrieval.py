"""Retrieval as a single graph over one memory, with the memory's calibration folded in.

A decode step of a small batch spends its time in a gate on calls and operators, not on arithmetic.
So what every call of the bundle's gate graph finds out again is settled here when a memory is put
in place: which branch its calibration takes, that all candidates exist, that a token is the next of
its sequence. Scan, second stage and blend are one graph of some forty operators; the routing rule
is the bundle's own frozen gate over the blended logits. Of prompts the same graph finds the
neighbours, so that what is scanned is held once. The equations are those of runtime/blend.py.
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
from .base import GateBuffers, GateTrace
from .gather import append_code_steps, append_values, key_inputs, value_inputs
from .scan import best_entries, blocked_count, int8_is_cut_off, int8_scores, projected_scores

# What bounds the scores [T, N] and the candidates' keys [T, R, D] of a search, in numbers.
_SCORES_AT_ONCE = 1 << 20
_KEYS_AT_ONCE = 1 << 20
_LEAST_AT_ONCE = 8  # tokens
_SUMMABLE = 1e34  # elements whose magnitudes do not overflow when they are summed
_LEAST = float(np.finfo(np.float32).tiny)


@dataclass(frozen=True)
class Retrieval:
    """Finds the K nearest of T router inputs, and blends tokens that are one each of a sequence.

    Args:
        engine: `retrieval_engine` of the memory.
        inputs: Of the engine beside what comes from the segment: the memory.
        make: Makes the engine once more; `profile` is as `OrtEngine` takes it.
        candidates: R.
        neighbors: K.
        entries: N, by which what is done to every entry is known.
        width: Numbers of a key that are scanned.
        bits: Of such a number.
        experts: E; 0 where it does not blend.
        at_once: Tokens that a search takes at most.
    """

    engine: Engine
    inputs: Mapping[str, NDArray[Any]]
    make: Callable[..., OrtEngine]
    candidates: int
    neighbors: int
    entries: int
    width: int
    bits: int
    experts: int
    at_once: int

    @staticmethod
    def over(memory: Memory, candidates: int, *, threads: int | None = None) -> Retrieval:
        """That of one memory for R candidates, at most N."""
        inputs = _memory_inputs(memory)
        make = partial(retrieval_engine, memory, inputs, candidates, threads=threads)
        size, (entries, experts) = len(memory.center), memory.values.shape
        scan = memory.scan if isinstance(memory, CompressedMemory) else None
        bound = min(_SCORES_AT_ONCE // max(1, entries), _KEYS_AT_ONCE // max(1, candidates * size))
        return Retrieval(
            engine=make(),
            inputs=inputs,
            make=make,
            candidates=candidates,
            neighbors=min(memory.k, candidates),
            entries=entries,
            width=size if scan is None else scan.width,
            bits=8 if scan is None else scan.bits,
            experts=experts if blends(memory, candidates) else 0,
            at_once=max(_LEAST_AT_ONCE, bound),
        )

    def search(self, x: NDArray[np.float32]) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        """The K nearest entries of router inputs [T, D] and their similarities, [T, K].

        Where fewer entries count than are asked for, others are named, with any similarity.
        """
        count = len(x)
        neighbors = np.zeros((count, self.neighbors), np.int64)
        similarities = np.zeros((count, self.neighbors), np.float32)
        none = np.zeros((count, self.experts), np.float32), np.zeros((count, 2), np.float32)
        for start in range(0, count, self.at_once):
            some = slice(start, start + self.at_once)
            outputs = {"neighbors": neighbors[some], "similarities": similarities[some]}
            inputs = self._inputs(x[some], *(rows[some] for rows in none))
            self.engine.bind(inputs, outputs)()
        return neighbors, similarities

    def bind(self, buffers: GateBuffers, blended: NDArray[Any], trace: GateTrace | None) -> Run:
        """Fix buffers of one real token each of some sequences; blended logits go to [T, E]."""
        outputs: dict[str, NDArray[Any]] = {
            "blended": blended[:, None],
            "state_out": buffers.state_out[:, None],
        }
        if trace is not None:
            outputs |= {
                "confidence": trace.confidence[:, None, None],
                "neighbors": trace.neighbors,
                "similarities": trace.similarities,
            }
        rows = buffers.router_input, buffers.router_logits, buffers.state
        return self.engine.bind(self._inputs(*rows), outputs)

    def _inputs(self, x: Any, router_logits: Any, state: Any) -> dict[str, NDArray[Any]]:
        if not self.experts:
            return {"router_input": x, **self.inputs}
        blending = {
            "router_logits": router_logits[:, None],
            "state": state[:, None],
            "ones": np.ones((len(x), 1, 1), np.float32),
        }
        return {"router_input": x, **blending, **self.inputs}


def blends(memory: Memory, candidates: int) -> bool:
    """Whether the graph blends too: a blend of logits, and R entries that count."""
    return not memory.rule_first and memory.n_valid >= candidates


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


def retrieval_engine(
    memory: Memory,
    inputs: Mapping[str, NDArray[Any]],
    candidates: int,
    *,
    threads: int | None = None,
    profile: Path | None = None,
) -> OrtEngine:
    """Retrieval and blend of T tokens: inputs and outputs as `Retrieval.bind` names them."""
    g = NodeList()
    size, experts = len(memory.center), memory.values.shape[1]
    compressed = isinstance(memory, CompressedMemory)
    queries = _queries(g, memory.similarity == "rbf")
    count = len(memory.values)
    if isinstance(memory, CompressedMemory):
        # As long as whole blocks: entries behind the last are never among the best.
        count = blocked_count(count)
        scores, weights = projected_scores(g, memory, queries, count)
    else:
        scores, weights = int8_scores(g, memory, queries)
    entries = best_entries(g, scores, candidates, count)
    neighbors, similarities = _nearest(g, memory, inputs, queries, entries, candidates)
    k = min(memory.k, candidates)
    read = [Tensor("router_input", np.float32, ("tokens", size))]
    left = [
        Tensor("neighbors", np.int64, ("tokens", k)),
        Tensor("similarities", np.float32, ("tokens", k)),
    ]
    if blends(memory, candidates):
        _blend(g, memory, neighbors, similarities)
        read += [_row("router_logits", experts), _row("state", 2), _row("ones", 1)]
        left += [_row("blended", experts), _row("state_out", 2), _row("confidence", 1)]
    read += [Tensor(name, array.dtype, array.shape) for name, array in inputs.items()]
    graph = graph_bytes(g.nodes, read, left, g.constants, weights)
    precise = not compressed and int8_is_cut_off()
    return OrtEngine(graph, threads=threads, weights=weights, precise_int8=precise, profile=profile)


def _row(name: str, size: int) -> Tensor:
    return Tensor(name, np.float32, ("tokens", 1, size))


def _queries(g: NodeList, rbf: bool) -> str:
    """Router inputs as they are compared, [T, D]: `blend.prepare_queries`."""
    bound = RBF_CLIP if rbf else _SUMMABLE
    centred = g.op("Sub", "router_input", "center")
    queries = g.op("Clip", centred, g.number(-bound), g.number(bound))
    if rbf:
        return queries
    # By the sum of magnitudes first: the squares of a finite row may overflow, or vanish.
    return g.op("LpNormalization", g.op("LpNormalization", queries, p=1), p=2)


def _nearest(
    g: NodeList,
    memory: Memory,
    inputs: Mapping[str, NDArray[Any]],
    queries: str,
    entries: str,
    candidates: int,
) -> tuple[str, str]:
    """The K nearest of R entries [T, R], and their similarities, [T, K]."""
    products = _products(g, memory, queries, entries)
    if "multipliers" in inputs:
        products = g.op("Mul", products, g.op("Gather", "multipliers", entries))
    rbf = memory.similarity == "rbf"
    if rbf:
        products = g.op("Sub", products, g.op("Gather", "half_norms", entries))
    if memory.n_valid < candidates:  # what others hold may be anything
        valid = g.op("Less", entries, g.constant("n_valid", np.array(memory.n_valid)))
        products = g.op("Where", valid, products, g.number(-np.inf))
    k = g.ints(min(memory.k, candidates))
    best, at = g.ops("TopK", products, k, out=("nearest", "places_of_nearest"))
    if rbf:
        squares = g.op("ReduceSumSquare", queries, g.ints(1))
        distances = g.op("Sub", squares, g.op("Mul", best, g.number(2)))
        distances = g.op("Max", distances, g.number(0))
        best = g.op("Exp", g.op("Mul", distances, g.number(-memory.calibration.gamma)))
    neighbors = g.op("GatherElements", entries, at, out="neighbors", axis=1)
    return neighbors, g.op("Clip", best, g.number(0), g.number(1), out="similarities")


def _products(g: NodeList, memory: Memory, queries: str, entries: str) -> str:
    """Inner products of queries [T, D] with R centred keys each but for their multipliers, [T, R].

    Of projected keys the query is projected too, instead of widening keys: T·R·W and not T·R·W·D.
    """
    if isinstance(memory, CompressedMemory) and memory.keys is None:
        found = []
        for part in append_code_steps(g, memory, entries):
            projected = g.op("Gemm", queries, part.matrix, transB=1)
            products = _by_row(g, part.steps, projected)
            found.append(products if part.sizes is None else g.op("Mul", products, part.sizes))
        return found[0] if len(found) == 1 else g.op("Add", *found)
    assert memory.keys is not None
    rows = g.op("Gather", "keys", entries)
    if memory.keys.dtype != np.float32:
        rows = g.op("Cast", rows, to=FLOAT)
    products = _by_row(g, rows, queries)
    if isinstance(memory, CompressedMemory) and memory.keys.dtype != np.int8:
        # Keys as stored: what the centre has of each product is taken off [T, R] and not [T, R, D].
        products = g.op("Sub", products, g.op("Gemm", queries, "center", transB=1))
    return products


def _by_row(g: NodeList, rows: str, queries: str) -> str:
    """Products of rows [T, R, W] with queries [T, W], each token's with its own: [T, R]."""
    last = g.ints(2)
    return g.op("Squeeze", g.op("MatMul", rows, g.op("Unsqueeze", queries, last)), last)


def _blend(g: NodeList, memory: Memory, neighbors: str, similarities: str) -> None:
    """Blended logits [T, 1, E], state and confidence of T tokens, each the next of a sequence.

    The middle dimension is there for the product with values [T, K, E].
    """
    found = g.op("Unsqueeze", similarities, g.ints(1))
    values = append_values(g, memory.values, neighbors, "values_of_neighbors")
    means = g.op("MatMul", _weights(g, found, memory.calibration), values)
    confidence = _confidence(g, found, neighbors, memory)
    pulled = g.op("Sub", means, "router_logits") if memory.calibration.interpolate else means
    g.op("Add", g.op("Mul", pulled, confidence), "router_logits", out="blended")


def _weights(g: NodeList, similarities: str, numbers: Calibration) -> str:
    """`blend.neighbor_weights` of K similarities that all exist, [T, 1, K]."""
    beta, power = numbers.inverse_temperature, numbers.weight_power
    if power == 0:
        scaled = g.op("Mul", similarities, g.number(beta))
        return g.op("Softmax", scaled)
    raw, row = _powered(g, similarities, power), g.ints(2)
    if beta:
        best = g.op("ReduceMax", similarities, row)
        below = g.op("Mul", g.op("Sub", similarities, best), g.number(beta))
        raw = g.op("Mul", raw, g.op("Exp", below))
    return g.op("Div", raw, g.op("Max", g.op("ReduceSum", raw, row), g.number(_LEAST)))


def _confidence(g: NodeList, similarities: str, neighbors: str, memory: Memory) -> str:
    """λ [T, 1, 1]; also leaves `state_out`: `blend.token_evidence`, `blend.sequence_gate`."""
    numbers = memory.calibration
    counted = similarities
    if memory.evidence_weights is not None:
        weights = g.op("Gather", "evidence_weights", neighbors)
        counted = g.op("Mul", counted, g.op("Unsqueeze", weights, g.ints(1)))
    evidence = g.op("ReduceMean" if numbers.mean else "ReduceSum", counted, g.ints(2))
    if not numbers.mean:
        evidence = g.op("Min", evidence, g.number(1))
    before = "state"
    if numbers.decay != 1:
        before = g.op("Mul", before, g.number(numbers.decay))
    gained = g.op("Concat", evidence, "ones", axis=2)
    state = g.op("Add", before, gained, out="state_out")
    factors = [_powered(g, evidence, numbers.power)]
    if numbers.sharpness:
        factors.append(_sequence_gate(g, evidence, state, numbers))
    if numbers.scale != 1 or len(factors) == 1:
        factors.append(g.number(numbers.scale))
    # No factor is above 1.
    strength, *more, last = factors
    for factor in more:
        strength = g.op("Mul", strength, factor)
    return g.op("Mul", strength, last, out="confidence")


def _sequence_gate(g: NodeList, evidence: str, state: str, numbers: Calibration) -> str:
    """g [T, 1, 1], of the token or of its sequence with it; one token at least has been seen."""
    sharpness = numbers.sharpness
    measured = evidence
    if numbers.sequence:
        total, seen = g.ops("Split", state, out=("total", "seen"), axis=2, num_outputs=2)
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
