"""`knnmoe::KnnBlend` as an ONNX function of standard operators.

The equations are in docs/method.md, the names and shapes in docs/design.md. Any runtime can run the
function; where the TensorRT plugin is loaded, the plugin takes the node.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields

import numpy as np
import onnx_ir as ir

from knnmoe.runtime.blend import RBF_CLIP
from knnmoe.runtime.bundle import TensorSpec
from knnmoe.runtime.calibration import Calibration, Similarity

from .graph import KNNMOE, OPSET, GraphBuilder

NAME = "KnnBlend"
_LARGEST = float(np.finfo(np.float32).max)

INPUTS = (
    "x", "r", "keys", "key_scales", "values", "evidence_weights", "n_valid", "k", "center",
    "calibration", "state", "lengths",
)  # fmt: skip
# As Calibration.vector() has them.
_CALIBRATION = tuple(field.name for field in fields(Calibration))
OUTPUTS = ("r_out", "state_out", "confidence", "neighbors", "similarities")


def memory_specs(hidden_size: int, num_experts: int) -> tuple[TensorSpec, ...]:
    """The node's inputs that make up one gate's memory, with its state, in the node's order."""
    return (
        TensorSpec("keys", "float32", ("entries", hidden_size)),
        TensorSpec("key_scales", "float32", ("entries", 2)),
        TensorSpec("values", "float32", ("entries", num_experts)),
        TensorSpec("evidence_weights", "float32", ("entries",)),
        TensorSpec("n_valid", "int64", (1,)),
        TensorSpec("k", "int64", (1,)),
        TensorSpec("center", "float32", (hidden_size,)),
        TensorSpec("calibration", "float32", (len(_CALIBRATION),)),
        TensorSpec("state", "float32", ("batch", 2)),
    )


LENGTHS = TensorSpec("lengths", "int64", ("batch",))
RESULTS = (
    TensorSpec("state_out", "float32", ("batch", 2)),
    TensorSpec("confidence", "float32", ("tokens",)),
    TensorSpec("neighbors", "int64", ("tokens", "neighbors")),
    TensorSpec("similarities", "float32", ("tokens", "neighbors")),
)


def blend_node(
    g: GraphBuilder, x: ir.Value, rows: ir.Value, memory: Sequence[ir.Value], similarity: Similarity
) -> tuple[ir.Value, Sequence[ir.Value]]:
    """Append the node: (r', [state_out, confidence, neighbors, similarities]).

    `plugin_namespace` is what makes TensorRT look for the plugin; elsewhere it says nothing.
    """
    blended, *results = g.ops(
        NAME, x, rows, *memory, count=len(OUTPUTS), domain=KNNMOE,
        similarity=similarity, plugin_namespace=KNNMOE,
    )  # fmt: skip
    return blended, results


def blend_function(similarity: Similarity, opset: int = OPSET) -> ir.Function:
    """The function body for one similarity; a model holds one of the two."""
    g = GraphBuilder(NAME, opset)
    v = {name: g.input(name, *_TYPES[name]) for name in INPUTS}
    c = _calibration(g, v["calibration"])
    found = _nearest(g, v, c, similarity)
    weights = _weights(g, found, c)
    means = _weighted_values(g, v["values"], found, weights)
    evidence = _evidence(g, v["evidence_weights"], found, c)
    gate, state = _sequence_gate(g, evidence, v["state"], v["lengths"], c)
    confidence = _confidence(g, evidence, gate, c)
    column = g.op("Unsqueeze", confidence, g.ints(1))
    pulled = g.op("Sub", means, g.op("Mul", c["interpolate"], v["r"]))
    moved = g.op("Add", v["r"], g.op("Mul", column, pulled))
    # Where, and not the sum alone, so that λ = 0 leaves the row bit for bit as it was.
    blended = g.op("Where", g.op("Greater", column, _number(g, 0.0)), moved, v["r"])
    results = (blended, state, confidence, found.neighbors, found.similarities)
    for value, name in zip(results, OUTPUTS, strict=True):
        g.output(value, TensorSpec(name, *_TYPES[name]))
    return g.function(KNNMOE, {"similarity": similarity, "plugin_namespace": KNNMOE})


_TYPES: dict[str, tuple[str, tuple[int | str, ...]]] = {
    "x": ("float32", ("T", "D")),
    "r": ("float32", ("T", "E")),
    "keys": ("float32", ("N", "D")),
    "key_scales": ("float32", ("N", 2)),
    "values": ("float32", ("N", "E")),
    "evidence_weights": ("float32", ("N",)),
    "n_valid": ("int64", (1,)),
    "k": ("int64", (1,)),
    "center": ("float32", ("D",)),
    "calibration": ("float32", (len(_CALIBRATION),)),
    "state": ("float32", ("B", 2)),
    "lengths": ("int64", ("B",)),
    "r_out": ("float32", ("T", "E")),
    "state_out": ("float32", ("B", 2)),
    "confidence": ("float32", ("T",)),
    "neighbors": ("int64", ("T", "K")),
    "similarities": ("float32", ("T", "K")),
}


@dataclass(frozen=True)
class _Found:
    """Neighbours [T, K'], their similarities, and whether they exist."""

    neighbors: ir.Value
    similarities: ir.Value
    exists: ir.Value


def _number(g: GraphBuilder, content: float) -> ir.Value:
    return g.constant(content, np.float32)


def _calibration(g: GraphBuilder, calibration: ir.Value) -> Mapping[str, ir.Value]:
    count = len(_CALIBRATION)
    parts = g.ops("Split", calibration, count=count, axis=0, num_outputs=count)
    return dict(zip(_CALIBRATION, parts, strict=True))


def _squares(g: GraphBuilder, key_scales: ir.Value) -> ir.Value:
    """Squared norms of the keys, [N]: Split, as ONNX Runtime is slow at gathering one column."""
    _, squares = g.ops("Split", key_scales, count=2, axis=1, num_outputs=2)
    return g.op("Squeeze", squares, g.ints(1))


def _row_sum(g: GraphBuilder, rows: ir.Value, *, keep: bool = True) -> ir.Value:
    return g.op("ReduceSum", rows, g.ints(1), keepdims=int(keep))


def _divide_or_zero(g: GraphBuilder, rows: ir.Value, by: ir.Value) -> ir.Value:
    """rows / by, and rows / 1 where `by` is not positive (there the rows are zeros)."""
    zero, one = _number(g, 0.0), _number(g, 1.0)
    return g.op("Div", rows, g.op("Where", g.op("Greater", by, zero), by, one))


def _nearest(
    g: GraphBuilder,
    v: Mapping[str, ir.Value],
    c: Mapping[str, ir.Value],
    similarity: Similarity,
) -> _Found:
    """The K' = min(K, N) best valid entries; ties go to the lower index, as TopK has it.

    The keys are fp32 here, so they are true as they are and their multiplier is not read. What is
    done to all [T, N] scores costs as much as the product itself, so the mask, and for RBF the
    keys' norms, ride in the product as its bias, and the rest is done to the K' that are left.
    """
    rbf = similarity == "rbf"
    queries = _queries(g, v, similarity)
    capacity = g.op("Shape", v["keys"], start=0, end=1)
    zero, one = g.constant(0, np.int64), g.constant(1, np.int64)
    positions = g.op("Range", zero, g.op("Squeeze", capacity), one)
    valid = g.op("Less", positions, v["n_valid"])
    # RBF: 2 q·key - ‖key‖² falls with the distance; ‖q‖² is the same for all entries. Doubling q is
    # exact, and a factor of 2 in the node makes ONNX Runtime's product 1.6 times as slow.
    open_bias = g.op("Neg", _squares(g, v["key_scales"])) if rbf else _number(g, 0.0)
    bias = g.op("Where", valid, open_bias, _number(g, -np.inf))
    factors = g.op("Add", queries, queries) if rbf else queries
    scores = g.op("Gemm", factors, v["keys"], bias, transB=1)
    best, neighbors = g.ops("TopK", scores, g.op("Min", v["k"], capacity), count=2, axis=1)
    if rbf:
        squares = _row_sum(g, g.op("Mul", queries, queries))
        distances = g.op("Max", g.op("Sub", squares, best), _number(g, 0.0))
        best = g.op("Exp", g.op("Neg", g.op("Mul", c["gamma"], distances)))
    exists = g.op("Less", neighbors, v["n_valid"])
    best = g.op("Where", exists, best, _number(g, 0.0))
    similarities = g.op("Clip", best, _number(g, 0.0), _number(g, 1.0))
    return _Found(neighbors, similarities, exists)


def _queries(g: GraphBuilder, v: Mapping[str, ir.Value], similarity: Similarity) -> ir.Value:
    """x [T, D] as it is compared: centred, and of unit length for cosine."""
    bound = _LARGEST if similarity == "cosine" else RBF_CLIP
    queries = g.op("Clip", g.op("Sub", v["x"], v["center"]), _number(g, -bound), _number(g, bound))
    if similarity == "rbf":
        return queries
    # Divided by the largest magnitude first: the squares of a finite row may overflow.
    largest = g.op("ReduceMax", g.op("Abs", queries), g.ints(1), keepdims=1)
    queries = _divide_or_zero(g, queries, largest)
    norms = g.op("Sqrt", _row_sum(g, g.op("Mul", queries, queries)))
    return _divide_or_zero(g, queries, norms)


def _weights(g: GraphBuilder, found: _Found, c: Mapping[str, ir.Value]) -> ir.Value:
    """wᵢ ∝ sᵢ^a · exp(β (sᵢ - max s)) over the neighbours that exist, [T, K']."""
    best = g.op("ReduceMax", found.similarities, g.ints(1), keepdims=1)
    below = g.op("Sub", found.similarities, best)
    raw = g.op("Pow", found.similarities, c["weight_power"])
    raw = g.op("Mul", raw, g.op("Exp", g.op("Mul", c["inverse_temperature"], below)))
    raw = g.op("Where", found.exists, raw, _number(g, 0.0))
    return _divide_or_zero(g, raw, _row_sum(g, raw))


def _weighted_values(
    g: GraphBuilder, values: ir.Value, found: _Found, weights: ir.Value
) -> ir.Value:
    """Σ wᵢ vᵢ, [T, E]. Capacity beyond n_valid may hold anything, NaN too: it is masked."""
    gathered = g.op("Gather", values, found.neighbors, axis=0)
    exists = g.op("Unsqueeze", found.exists, g.ints(2))
    gathered = g.op("Where", exists, gathered, _number(g, 0.0))
    mean = g.op("MatMul", g.op("Unsqueeze", weights, g.ints(1)), gathered)
    return g.op("Squeeze", mean, g.ints(1))


def _evidence(
    g: GraphBuilder, entry_weights: ir.Value, found: _Found, c: Mapping[str, ir.Value]
) -> ir.Value:
    """s̄ [T]: the mean of the neighbours' weighted similarities, or their sum up to 1."""
    # What does not exist has similarity 0, but its weight may be NaN.
    counted = g.op("Gather", entry_weights, found.neighbors, axis=0)
    counted = g.op("Where", found.exists, counted, _number(g, 0.0))
    total = _row_sum(g, g.op("Mul", found.similarities, counted), keep=False)
    existing = g.op("Cast", found.exists, to=int(ir.DataType.FLOAT))
    count = g.op("Max", _row_sum(g, existing, keep=False), _number(g, 1.0))
    mean = g.op("Div", total, count)
    bounded = g.op("Min", total, _number(g, 1.0))
    return g.op("Where", g.op("Greater", c["mean"], _number(g, 0.5)), mean, bounded)


def _sequence_gate(
    g: GraphBuilder,
    evidence: ir.Value,
    state: ir.Value,
    lengths: ir.Value,
    c: Mapping[str, ir.Value],
) -> tuple[ir.Value, ir.Value]:
    """The gate g [T] and the state [B, 2] after the real tokens of each sequence."""
    zero, one = _number(g, 0.0), _number(g, 1.0)
    batch = g.op("Shape", state, start=0, end=1)
    rows = g.op("Concat", batch, g.ints(-1), axis=0)
    by_sequence = g.op("Reshape", evidence, rows)
    width = g.op("Squeeze", g.op("Shape", by_sequence, start=1, end=2))
    positions = g.op("Range", g.constant(0, np.int64), width, g.constant(1, np.int64))
    real = g.op("Less", positions, g.op("Unsqueeze", lengths, g.ints(1)))
    # Where, and not a product: what attention leaves in a row of padding may be NaN.
    counted = g.op("Where", real, by_sequence, zero)
    real = g.op("Cast", real, to=int(ir.DataType.FLOAT))
    middle = g.ints(1)
    terms = g.op("Concat", *(g.op("Unsqueeze", t, middle) for t in (counted, real)), axis=1)
    totals = _decayed_sums(g, terms, state, lengths, width, c["decay"])
    new_state = g.op("Gather", totals, g.constant(-1, np.int64), axis=2)
    sums, counts = (g.op("Gather", totals, g.constant(i, np.int64), axis=1) for i in (0, 1))
    whole = g.op("Greater", c["sequence"], _number(g, 0.5))
    # A row of padding before any real token has seen none: it divides by one.
    seen = g.op("Where", whole, g.op("Max", counts, one), one)
    measured = g.op("Div", g.op("Where", whole, sums, by_sequence), seen)
    growth = g.op("Min", g.op("Sqrt", seen), c["cap"])
    above = g.op("Sub", measured, c["midpoint"])
    gate = g.op("Sigmoid", g.op("Mul", g.op("Mul", growth, c["sharpness"]), above))
    gate = g.op("Where", g.op("Equal", c["sharpness"], zero), one, gate)
    return g.op("Reshape", gate, g.ints(-1)), new_state


def _decayed_sums(
    g: GraphBuilder,
    terms: ir.Value,
    before: ir.Value,
    lengths: ir.Value,
    width: ir.Value,
    decay: ir.Value,
) -> ir.Value:
    """Sums [B, 2, S] of terms [B, 2, S] so far, each token leaving `decay` of the sum before it.

    There is no operator for it: a product with a matrix of powers, [S+1, S+1], which is small
    beside the scores [T, N]. Rows of padding have the sum of the last real token.
    """
    zero, one, middle = g.constant(0, np.int64), g.constant(1, np.int64), g.ints(1)
    before = g.op("Unsqueeze", before, g.ints(2))
    plain = g.op("Add", before, g.op("CumSum", terms, g.constant(2, np.int64)))
    count = g.op("Add", width, one)
    moments = g.op("Range", zero, count, one)
    ages = g.op("Sub", moments, g.op("Unsqueeze", moments, middle))
    powers = g.op("Pow", decay, g.op("Cast", g.op("Max", ages, zero), to=int(ir.DataType.FLOAT)))
    powers = g.op("Where", g.op("Less", ages, zero), _number(g, 0.0), powers)
    decayed = g.op("MatMul", g.op("Concat", before, terms, axis=2), powers)
    following = g.op("Range", one, count, one)
    last = g.op("Min", following, g.op("Unsqueeze", lengths, middle))
    last = g.op("Unsqueeze", last, middle)
    decayed = g.op("GatherElements", decayed, g.op("Concat", last, last, axis=1), axis=2)
    # The plain sum where nothing decays, so that it is to the bit what it was without a decay.
    return g.op("Where", g.op("Equal", decay, _number(g, 1.0)), plain, decayed)


def _confidence(
    g: GraphBuilder, evidence: ir.Value, gate: ir.Value, c: Mapping[str, ir.Value]
) -> ir.Value:
    """λ = clip(scale · s̄^p · g, 0, 1), [T]."""
    strength = g.op("Mul", c["scale"], g.op("Pow", evidence, c["power"]))
    return g.op("Clip", g.op("Mul", strength, gate), _number(g, 0.0), _number(g, 1.0))
