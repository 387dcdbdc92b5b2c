"""Std graphs run by ONNX Runtime, step by step, beside the bundle's own graphs."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache, lru_cache
from pathlib import Path

import numpy as np
import onnx
import onnxruntime

from knnmoe.export.std import StdGraph, StdModel, StdOptions
from knnmoe.runtime.bundle import Bundle
from knnmoe.runtime.selection_bias import read_selection_biases

# What TensorRT's layer is documented to compute, for hosts without it: SwiGLU of the selected
# experts, weighted and added. TensorRT itself has no need of this function.
MOE_FUNCTION = """
<opset_import: ["": 20], domain: "trt">
TRT_MoE <activation_type> (hidden, ids, scores, gate, up, down) => (mixed)
{
    row = Constant <value_ints = [2, 3]> ()
    slots = Constant <value_ints = [2]> ()
    matrix = Constant <value_ints = [3, 4]> ()
    gates = Gather <axis = 0> (gate, ids)
    ups = Gather <axis = 0> (up, ids)
    downs = Gather <axis = 0> (down, ids)
    token = Unsqueeze (hidden, row)
    gated = MatMul (token, gates)
    raised = MatMul (token, ups)
    share = Sigmoid (gated)
    active = Mul (gated, share)
    product = Mul (active, raised)
    outputs = MatMul (product, downs)
    weights = Unsqueeze (scores, matrix)
    weighed = Mul (outputs, weights)
    by_token = ReduceSum <keepdims = 0> (weighed, slots)
    mixed = Squeeze (by_token, slots)
}
"""
# The same of experts with biases, and SwiGLU as its parameters in TensorRT have it.
BIASED_MOE_FUNCTION = """
<opset_import: ["": 20], domain: "trt">
TRT_MoE <activation_type, swiglu_alpha, swiglu_beta, swiglu_limit>
    (hidden, ids, scores, gate, up, down, gate_bias, up_bias, down_bias) => (mixed)
{
    row = Constant <value_ints = [2, 3]> ()
    rank = Constant <value_ints = [3]> ()
    slots = Constant <value_ints = [2]> ()
    matrix = Constant <value_ints = [3, 4]> ()
    wide_alpha = Constant <value_float: float = @swiglu_alpha> ()
    wide_beta = Constant <value_float: float = @swiglu_beta> ()
    wide_limit = Constant <value_float: float = @swiglu_limit> ()
    alpha = CastLike (wide_alpha, hidden)
    beta = CastLike (wide_beta, hidden)
    limit = CastLike (wide_limit, hidden)
    lowest = Neg (limit)
    gates = Gather <axis = 0> (gate, ids)
    ups = Gather <axis = 0> (up, ids)
    downs = Gather <axis = 0> (down, ids)
    gate_biases = Gather <axis = 0> (gate_bias, ids)
    up_biases = Gather <axis = 0> (up_bias, ids)
    down_biases = Gather <axis = 0> (down_bias, ids)
    gate_row = Unsqueeze (gate_biases, rank)
    up_row = Unsqueeze (up_biases, rank)
    down_row = Unsqueeze (down_biases, rank)
    token = Unsqueeze (hidden, row)
    gate_product = MatMul (token, gates)
    up_product = MatMul (token, ups)
    gated = Add (gate_product, gate_row)
    raised = Add (up_product, up_row)
    gated_below = Min (gated, limit)
    raised_below = Clip (raised, lowest, limit)
    steeper = Mul (gated_below, alpha)
    share = Sigmoid (steeper)
    active = Mul (gated_below, share)
    shifted = Add (raised_below, beta)
    product = Mul (active, shifted)
    down_product = MatMul (product, downs)
    outputs = Add (down_product, down_row)
    weights = Unsqueeze (scores, matrix)
    weighed = Mul (outputs, weights)
    by_token = ReduceSum <keepdims = 0> (weighed, slots)
    mixed = Squeeze (by_token, slots)
}
"""
CAPACITY = 24
# Real tokens of each sequence, step by step, of as many rows as the longest of them has: a prefill,
# a second piece of it in which one sequence has nothing, and three single tokens.
STEPS = ((6, 4, 1), (5, 3, 0), (1, 1, 1), (1, 0, 1), (1, 1, 1))
TOTALS = np.sum(STEPS, axis=0)

Arrays = dict[str, np.ndarray]


def options_of(bundle: Bundle, folder: Path | None = None) -> onnxruntime.SessionOptions:
    """Options with the folder of the weights, the bundle's own if none is given."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    options.add_session_config_entry(
        "session.model_external_initializers_file_folder_path",
        str(folder or bundle.path / "segments"),
    )
    return options


def runnable(content: bytes) -> bytes:
    """The graph with a function for TensorRT's layer, if it has that."""
    proto = onnx.load_model_from_string(content)
    inputs = {len(node.input) for node in proto.graph.node if node.op_type == "TRT_MoE"}
    if inputs:
        (count,) = inputs
        function = onnx.parser.parse_function({6: MOE_FUNCTION, 9: BIASED_MOE_FUNCTION}[count])
        (opset,) = (entry.version for entry in proto.opset_import if not entry.domain)
        function.opset_import[0].version = opset
        proto.functions.append(function)
    return proto.SerializeToString()


def std_session(
    bundle: Bundle, graph: StdGraph, folder: Path | None = None
) -> onnxruntime.InferenceSession:
    """The graph as ONNX Runtime sees it, whose inputs and outputs must be those stated."""
    session = onnxruntime.InferenceSession(runnable(graph.content), options_of(bundle, folder))
    types = {"float": "float32", "float16": "float16", "int64": "int64", "int32": "int32"}
    for stated, found in (
        (graph.inputs, session.get_inputs()),
        (graph.outputs, session.get_outputs()),
    ):
        assert [(s.name, s.dtype, list(s.shape)) for s in stated] == [
            (f.name, types[f.type[7:-1]], f.shape) for f in found
        ]
    return session


def run(session: onnxruntime.InferenceSession, values: Arrays) -> Arrays:
    names = [spec.name for spec in session.get_outputs()]
    feeds = {spec.name: values[spec.name] for spec in session.get_inputs()}
    return dict(zip(names, session.run(names, feeds), strict=True))


def routed(bundle: Bundle, logits: np.ndarray, gate: int) -> Arrays:
    """The routing rule in NumPy; what the seam has room for beyond it is expert 0 with weight 0."""
    manifest = bundle.manifest
    ids, weights = manifest.routing.apply(logits, read_selection_biases(bundle)[gate])
    extra = ((0, 0), (0, manifest.experts_per_token - manifest.routing.top_k))
    return {"expert_ids": np.pad(ids, extra), "expert_weights": np.pad(weights, extra)}


@lru_cache(maxsize=16)
def own_session(path: Path, file: str) -> onnxruntime.InferenceSession:
    """One of a bundle's own graphs; no test changes a bundle that it has run."""
    return onnxruntime.InferenceSession(path / file, options_of(Bundle.open(path, verify=False)))


def own_layout(bundle: Bundle, file: str, tokens: np.ndarray, values: Arrays) -> Arrays:
    """One of the bundle's own graphs over one whole sequence."""
    shape, count = bundle.manifest.architecture, len(tokens)
    empty = np.zeros((1, shape.num_kv_heads, count, shape.head_size), np.float32)
    caches = {f"past_{part}_{layer}": empty
              for part in ("key", "value") for layer in range(shape.num_layers)}  # fmt: skip
    common = {
        "input_ids": tokens[None], "seqlens_k": np.array([count - 1], np.int32),
        "total_sequence_length": np.array(count, np.int32), "logit_rows": np.arange(count),
    }  # fmt: skip
    return run(own_session(bundle.path, file), common | caches | values)


@dataclass
class Reference:
    """Of one sequence, by position: logits, and router logits and experts of each gate."""

    logits: np.ndarray
    router_logits: list[np.ndarray]
    routed: list[Arrays]


@cache
def reference(path: Path, tokens: tuple[int, ...]) -> Reference:
    """The segments of the bundle there over one whole sequence."""
    bundle, values = Bundle.open(path, verify=False), dict[str, np.ndarray]()
    result = Reference(np.empty(0), [], [])
    for segment in bundle.manifest.segments:
        found = own_layout(bundle, segment.file, np.array(tokens), values)
        values = {name.removesuffix("_out"): value for name, value in found.items()}
        if "logits" in values:
            result.logits = values["logits"]
            break
        result.router_logits.append(values["router_logits"])
        result.routed.append(routed(bundle, values["router_logits"], len(result.routed)))
        values |= result.routed[-1]
    return result


class Caches:
    """The caches of a batch, as a runtime keeps them; their unused columns hold large numbers."""

    def __init__(self, bundle: Bundle, options: StdOptions, batch: int) -> None:
        shape = bundle.manifest.architecture
        size = (batch, shape.num_kv_heads, CAPACITY, shape.head_size)
        self.past = {
            f"past_{part}_{layer}": np.full(size, 900, options.precision)
            for part in ("key", "value") for layer in range(shape.num_layers)
        }  # fmt: skip
        self.lengths = np.zeros(batch, np.int64)

    def take(self, outputs: Arrays, lengths: np.ndarray) -> None:
        """Append what is new, or take over the whole; `advance` comes after the last segment."""
        for name, value in outputs.items():
            kind, _, rest = name.partition("_")
            cache = self.past.get(f"past_{rest}")
            if kind == "present":
                self.past[f"past_{rest}"] = value
            elif kind == "new":
                assert cache is not None
                for row, (start, count) in enumerate(zip(self.lengths, lengths, strict=True)):
                    cache[row, :, start : start + count] = value[row, :, :count]

    def advance(self, lengths: np.ndarray) -> None:
        self.lengths += lengths


@dataclass
class Step:
    """The rows of one step: which (row, sequence, position) are tokens and not padding."""

    input_ids: np.ndarray
    lengths: np.ndarray
    real: list[tuple[int, int, int]]

    def both(self, found: np.ndarray, whole: list[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
        """Those rows, and what they are in the outputs of the whole sequences."""
        rows = [row for row, _, _ in self.real]
        return found[rows], np.stack([whole[b][position] for _, b, position in self.real])


def steps(sequences: list[np.ndarray]) -> list[Step]:
    made, starts = [], np.zeros(len(sequences), np.int64)
    for counts in STEPS:
        width = max(counts)
        ids, real = np.zeros((len(sequences), width), np.int64), []
        for b, count in enumerate(counts):
            ids[b, :count] = sequences[b][starts[b] : starts[b] + count]
            real += [(b * width + s, b, int(starts[b]) + s) for s in range(count)]
        made.append(Step(ids, np.array(counts), real))
        starts += counts
    return made


def split_errors(
    bundle: Bundle,
    options: StdOptions,
    sequences: list[np.ndarray],
    *,
    forced: bool = False,
    own: Bundle | None = None,
    folder: Path | None = None,
) -> tuple[float, float]:
    """Run the segments step by step; the largest error of the logits and of the router logits.

    Args:
        bundle, options: What the segments are made of.
        sequences: What they run on.
        forced: Give every real row the experts of the reference, not those of its router logits.
        own: Whose own graphs are the reference, if not the bundle's.
        folder: Of the weights, if not the bundle's.
    """
    model = StdModel.of(bundle, options)
    count = len(bundle.manifest.segments)
    segments = [std_session(bundle, model.segment(index), folder) for index in range(count)]
    expected = [reference((own or bundle).path, tuple(tokens.tolist())) for tokens in sequences]
    caches = Caches(bundle, options, len(sequences))
    worst = {"logits": 0.0, "router_logits": 0.0}

    def compare(kind: str, found: np.ndarray, expected_of: list[np.ndarray], step: Step) -> None:
        assert np.isfinite(found).all()
        here, there = step.both(found, expected_of)
        worst[kind] = max(worst[kind], float(np.abs(here - there).max()))

    for step in steps(sequences):
        values: Arrays = {
            "input_ids": step.input_ids, "past_lengths": caches.lengths,
            "logit_rows": np.arange(step.input_ids.size),
        }  # fmt: skip
        for index, segment in enumerate(segments):
            found = run(segment, values | caches.past)
            caches.take(found, step.lengths)
            if index == len(segments) - 1:
                compare("logits", found["logits"], [e.logits for e in expected], step)
                break
            values |= {name.removesuffix("_out"): value for name, value in found.items()}
            logits = values["router_logits"]
            compare("router_logits", logits, [e.router_logits[index] for e in expected], step)
            experts = routed(bundle, logits, index)
            if forced:
                for row, b, position in step.real:
                    for name, value in experts.items():
                        value[row] = expected[b].routed[index][name][position]
            values |= experts
        caches.advance(step.lengths)
    return worst["logits"], worst["router_logits"]
