"""The standard graphs made from a bundle compute what the bundle's own graphs compute."""

from __future__ import annotations

import itertools
import json
import shutil
import struct
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np
import onnx
import pytest
from safetensors.numpy import load_file, save_file

from knnmoe.export.exporter import export
from knnmoe.export.std import StdModel, StdOptions
from knnmoe.runtime.bundle import GATE_GRAPHS, Bundle
from knnmoe.runtime.calibration import Calibration
from knnmoe.runtime.errors import BundleError, SettingError
from knnmoe.runtime.layouts import bias_inputs
from knnmoe.runtime.selection_bias import read_selection_biases
from std_harness import (
    TOTALS,
    Arrays,
    Caches,
    own_layout,
    run,
    split_errors,
    std_session,
    steps,
)
from thinned import thinned
from tiny import KINDS as FAMILIES
from tiny import make_tiny, make_tiny_olmoe

KINDS: dict[str, dict[str, Any]] = {
    "two query heads a key head, clipped": {},
    "tied head, a key head for every query head, unclipped": {
        "tie_word_embeddings": True, "num_key_value_heads": None, "clip_qkv": None,
    },
    "one key head, tight clipping, renormalised, another rope and epsilon": {
        "num_key_value_heads": 1, "clip_qkv": 0.5, "norm_topk_prob": True, "rope_theta": 300.0,
        "rms_norm_eps": 0.1, "dtype": "float16",
    },
    "room for more experts than are selected": {"room": 5},
}  # fmt: skip
OTHERS = [(family, kind) for family in FAMILIES if family != "olmoe" for kind in FAMILIES[family]]
FAST = {
    ("qwen3_moe", "first and last layers dense, two in a row"),
    ("mixtral", "a window of 5, wide heads, many experts"),
    ("qwen2_moe", "windows of 6 in every other layer, last layer dense"),
    ("gpt_oss", "plain"),
    ("deepseek_v3", "plain"),
}
WAYS = [StdOptions(o, "float32", e) for o in ("primitive", "modern") for e in ("gathered", "dense")]
# Of floating-point weights the graph differs for TensorRT only where experts are gathered.
FOR_TENSORRT = [
    StdOptions(o, "float32", "gathered", host="tensorrt") for o in ("primitive", "modern")
]
MOE = [StdOptions(operators, "float32", "moe") for operators in ("primitive", "modern")]
ALL = [*WAYS, *FOR_TENSORRT, *MOE]
PLAIN, *VARIED = [*KINDS, *OTHERS]


def name_of(way: StdOptions) -> str:
    return f"{way.operators}-{way.experts}-{way.host}"


def kind_name(kind: Any) -> str:
    return kind if isinstance(kind, str) else " ".join(kind)


# Fast are the plain kind with all ways, and others with a third of them each.
OFTEN = [kind for kind in VARIED if kind in FAST or kind in KINDS]
PAIRS = {(PLAIN, way) for way in ALL}
PAIRS |= {(kind, way) for number, kind in enumerate(OFTEN) for way in ALL[number % 3 :: 3]}
every_kind_and_way = pytest.mark.parametrize(
    ("kind", "options"),
    thinned(
        itertools.product((PLAIN, *VARIED), ALL),
        lambda *pair: pair in PAIRS,
        lambda kind, way: f"{kind_name(kind)}-{name_of(way)}",
    ),
)
every_kind = pytest.mark.parametrize(
    "kind",
    thinned(
        ((kind,) for kind in (PLAIN, *VARIED)),
        lambda kind: kind in (PLAIN, *OFTEN[::2]),
        kind_name,
    ),
)


@pytest.fixture(scope="module")
def bundle_of(tmp_path_factory) -> Callable[[Any], Bundle]:
    """The bundle of a kind, made once."""

    @cache
    def make(kind: Any) -> Bundle:
        root, room = tmp_path_factory.mktemp("std"), None
        if isinstance(kind, str):
            settings = dict(KINDS[kind])
            room = settings.pop("room", None)
            checkpoint = make_tiny_olmoe(root / "checkpoint", seed=6, **settings)
        else:
            checkpoint = make_tiny(root / "checkpoint", *kind, seed=6)
        export(checkpoint, root / "bundle", experts_per_token=room)
        return Bundle.open(root / "bundle")

    return make


@pytest.fixture
def bundle(bundle_of, kind) -> Bundle:
    return bundle_of(kind)


@pytest.fixture(scope="module")
def tiny(tiny_bundle) -> Bundle:
    return Bundle.open(tiny_bundle)


@pytest.fixture(scope="module")
def sequences() -> list[np.ndarray]:
    rng = np.random.default_rng(7)
    return [rng.integers(0, 256, total) for total in TOTALS]


@every_kind_and_way
def test_segments_agree_with_the_bundles_own(bundle, sequences, options):
    logits, router_logits = split_errors(bundle, options, sequences)
    assert logits <= 1e-4
    assert router_logits <= 1e-4


# Measured: logits 0.005, and 0.03 with the tied head, where they are larger; router logits 0.0024.
@every_kind_and_way
def test_float16_segments_agree_where_the_experts_are_the_same(bundle, sequences, options):
    half = replace(options, precision="float16")
    logits, router_logits = split_errors(bundle, half, sequences, forced=True)
    assert logits <= 0.1
    assert router_logits <= 0.01


@pytest.mark.parametrize("options", ALL, ids=name_of)
def test_what_overflows_stays_in_its_row(tmp_path, options):
    """Neither an expert of weight 0 nor a row behind it reaches the first token."""
    checkpoint = make_tiny_olmoe(tmp_path / "checkpoint")
    tensors = load_file(checkpoint / "model.safetensors")
    for part in ("gate_proj", "up_proj"):
        tensors[f"model.layers.0.mlp.experts.7.{part}.weight"] *= np.float32(1e6)
    save_file(tensors, checkpoint / "model.safetensors")
    export(checkpoint, tmp_path / "bundle")
    bundle, half = Bundle.open(tmp_path / "bundle"), replace(options, precision="float16")
    session = std_session(bundle, StdModel.of(bundle, half).segment(1))
    caches, hidden = Caches(bundle, half, 1), np.random.default_rng(9).normal(size=(1, 2, 64))

    def outputs(*second: int) -> Arrays:
        routed: Arrays = {
            "expert_ids": np.array([[3, 7], second], np.int32),
            "expert_weights": np.array([[0.5, 0], [0.5, 0.5]], np.float32),
        }
        stream = hidden.astype(np.float32)
        values: Arrays = {
            "hidden": stream, "router_input": stream[0], "past_lengths": np.array([0]),
        }  # fmt: skip
        return run(session, values | routed | caches.past)

    within, beyond = outputs(1, 2), outputs(1, 7)
    added = {name: value for name, value in beyond.items() if "_key_" in name or "_value_" in name}
    for value in (*within.values(), *added.values()):
        assert np.isfinite(value).all()
    assert np.isnan(beyond["hidden_out"][0, 1]).any()
    np.testing.assert_array_equal(beyond["hidden_out"][0, 0], within["hidden_out"][0, 0])
    np.testing.assert_array_equal(beyond["router_logits_out"][0], within["router_logits_out"][0])


@pytest.mark.parametrize("operators", ["primitive", "modern"])
def test_padding_may_reach_beyond_the_last_position(tiny, operators):
    positions, shape = tiny.manifest.architecture.max_positions, tiny.manifest.architecture
    session = std_session(tiny, StdModel.of(tiny, StdOptions(operators)).segment(0))
    size = (2, shape.num_kv_heads, positions + 3, shape.head_size)
    ids = np.arange(8).reshape(2, 4)
    values = {"past_key_0": np.zeros(size, np.float32), "past_value_0": np.zeros(size, np.float32)}

    def hidden(*past_lengths: int) -> np.ndarray:
        inputs = {"input_ids": ids, "past_lengths": np.array(past_lengths)}
        return run(session, values | inputs)["hidden_out"]

    beyond = hidden(positions - 1, 0)
    assert np.isfinite(beyond).all()
    np.testing.assert_allclose(beyond[1], hidden(0, 0)[1], atol=1e-5)


def memories(bundle: Bundle) -> Arrays:
    """A random memory for every gate, as the fused graph takes it, that moves its logits; and the
    gates' selection biases.
    """
    shape = bundle.manifest.architecture
    rng = np.random.default_rng(8)
    numbers = replace(Calibration(), power=0.3, sequence=1.0, sharpness=3.0, midpoint=0.1)
    values: Arrays = {}
    for gate in range(shape.num_gates):
        keys = rng.normal(size=(40, shape.hidden_size)).astype(np.float32)
        one = {
            "keys": keys / np.linalg.norm(keys, axis=1, keepdims=True),
            "key_scales": np.ones((40, 2), np.float32),
            "values": rng.normal(size=(40, shape.num_experts)).astype(np.float32),
            "evidence_weights": np.ones(40, np.float32),
            "n_valid": np.array([30]), "k": np.array([4]),
            "center": np.zeros(shape.hidden_size, np.float32), "calibration": numbers.vector(),
        }  # fmt: skip
        values |= {f"{name}_{gate}": value for name, value in one.items()}
    return values | bias_inputs(read_selection_biases(bundle))


def states(bundle: Bundle, batch: int) -> Arrays:
    gates = range(bundle.manifest.architecture.num_gates)
    return {f"state_{gate}": np.zeros((batch, 2), np.float32) for gate in gates}


@pytest.fixture(scope="module")
def whole_of(bundle_of, sequences) -> Callable[[Any], list[Arrays]]:
    """Of a kind, its bundle's own fused graph with those memories over each whole sequence."""

    @cache
    def run_them(kind: Any) -> list[Arrays]:
        bundle = bundle_of(kind)
        memory, file = memories(bundle) | states(bundle, 1), bundle.manifest.fused.file
        return [
            own_layout(bundle, file, tokens, memory | {"lengths": np.array([len(tokens)])})
            for tokens in sequences
        ]

    return run_them


@every_kind_and_way
def test_the_fused_graph_agrees_with_the_bundles_own(bundle, kind, sequences, whole_of, options):
    whole = whole_of(kind)
    assert whole[0]["confidence_1"].mean() > 0.1  # the memory does take part
    memory = memories(bundle)
    session = std_session(bundle, StdModel.of(bundle, options).fused())
    caches, state = Caches(bundle, options, len(sequences)), states(bundle, len(sequences))
    for step in steps(sequences):
        common = {
            "input_ids": step.input_ids, "past_lengths": caches.lengths, "lengths": step.lengths,
            "logit_rows": np.arange(step.input_ids.size),
        }  # fmt: skip
        found = run(session, common | caches.past | memory | state)
        state = {name: found[name.replace("state", "state_out")] for name in state}
        caches.take(found, step.lengths)
        caches.advance(step.lengths)
        for name in [n for n in found if n.startswith(("logits", "expert_", "confidence_"))]:
            both = step.both(found[name], [outputs[name] for outputs in whole])
            np.testing.assert_allclose(*both, atol=1e-4, err_msg=name)


@every_kind
def test_a_float16_fused_graph_is_its_segments_with_its_gates(bundle, sequences):
    options = StdOptions("primitive", "float16", "gathered")
    model, memory, step = StdModel.of(bundle, options), memories(bundle), steps(sequences)[0]
    caches = Caches(bundle, options, len(sequences))
    values = memory | caches.past | states(bundle, len(sequences)) | {
        "input_ids": step.input_ids, "past_lengths": caches.lengths, "lengths": step.lengths,
        "logit_rows": np.arange(step.input_ids.size),
    }  # fmt: skip
    fused = run(std_session(bundle, model.fused()), values)
    assert bundle.manifest.fused is not None
    gate = std_session(bundle, model.gate(bundle.manifest.fused.gate))
    for index in range(len(bundle.manifest.segments)):
        found = run(std_session(bundle, model.segment(index)), values)
        values |= {name.removesuffix("_out"): value for name, value in found.items()}
        if "logits" in found:
            break
        of_gate = {name.removesuffix(f"_{index}"): v for name, v in values.items()
                   if name.endswith(f"_{index}")}  # fmt: skip
        values |= run(gate, values | of_gate)
    np.testing.assert_allclose(fused["logits"], found["logits"], atol=1e-4)


def models(model: StdModel) -> list[tuple[str, onnx.ModelProto]]:
    graphs = {f"segment {i}": model.segment(i) for i in range(len(model.bundle.manifest.segments))}
    graphs |= {f"gate {name}": model.gate(name) for name in GATE_GRAPHS}
    graphs["fused"] = model.fused()
    return [(name, onnx.load_model_from_string(graph.content)) for name, graph in graphs.items()]


@pytest.mark.parametrize("precision", ["float32", "float16"])
@pytest.mark.parametrize(("operators", "opset"), [("primitive", 20), ("modern", 24)])
def test_graphs_have_standard_operators_of_one_opset_only(tiny, operators, opset, precision):
    for name, proto in models(StdModel.of(tiny, StdOptions(operators, precision))):
        with_function = {"", "knnmoe"} if proto.functions else {""}
        assert {entry.domain for entry in proto.opset_import} == with_function, name
        for entry in (*proto.opset_import, *(e for f in proto.functions for e in f.opset_import)):
            assert entry.version == (1 if entry.domain else opset)
        for node in (*proto.graph.node, *(n for f in proto.functions for n in f.node)):
            assert node.domain == "" or node.op_type == "KnnBlend"
        if name.startswith("gate"):
            onnx.checker.check_model(proto, full_check=True)


def test_primitive_segments_have_only_operators_that_old_parsers_know(tiny):
    """All are in the support matrix of TensorRT's parser since release 8."""
    known = {
        "Abs", "Add", "Cast", "Clip", "Concat", "Constant", "Div", "Equal", "Expand", "Gather",
        "Gemm", "GreaterOrEqual", "Less", "LessOrEqual", "MatMul", "Min", "Mul", "Range",
        "ReduceMean", "ReduceSum", "Reshape", "Shape", "Sigmoid", "Slice", "Softmax", "Split",
        "Sqrt", "Squeeze", "Sub", "Transpose", "Unsqueeze", "Where",
    }  # fmt: skip
    used: set[str] = set()
    for experts in ("gathered", "dense"):
        for precision in ("float32", "float16"):
            model = StdModel.of(tiny, StdOptions("primitive", precision, experts))
            for name, proto in models(model):
                if name.startswith("segment"):
                    used |= {node.op_type for node in proto.graph.node}
    assert used == known


def test_graphs_copy_no_weight(tiny):
    model = StdModel.of(tiny, StdOptions("modern", "float16", "dense"))
    for name, proto in models(model):
        for tensor in proto.graph.initializer:
            location = {entry.key: entry.value for entry in tensor.external_data}["location"]
            assert tensor.data_location == onnx.TensorProto.EXTERNAL
            assert f"segments/{location}" in tiny.manifest.files
        limit = 100_000 if name == "fused" else 30_000
        assert len(proto.SerializeToString()) < limit, name


@pytest.mark.parametrize("precision", ["float32", "float16"])
def test_experts_of_tensorrt_are_one_layer_a_gate_and_copy_no_weight(tiny, precision):
    for name, proto in models(StdModel.of(tiny, StdOptions("primitive", precision, "moe"))):
        layers = [node for node in proto.graph.node if node.op_type == "TRT_MoE"]
        gates = tiny.manifest.architecture.num_gates
        without = name == "segment 0" or name.startswith("gate")
        assert len(layers) == (gates if name == "fused" else 0 if without else 1), name
        for layer in layers:
            (silu,) = layer.attribute
            assert (layer.domain, len(layer.input)) == ("trt", 6)
            assert (silu.name, silu.i) == ("activation_type", 1)
        for tensor in proto.graph.initializer:
            assert tensor.data_location == onnx.TensorProto.EXTERNAL, (name, tensor.name)


def test_inner_names_of_the_function_are_no_names_of_the_graph(tiny):
    """TensorRT's parser connects the wrong tensors where they are."""
    for name, proto in models(StdModel.of(tiny, StdOptions())):
        outer = {value for node in proto.graph.node for value in node.output}
        outer -= {value.name for value in proto.graph.output}
        inner = {v for function in proto.functions for node in function.node for v in node.output}
        assert not outer & inner, name


def test_a_capacity_that_is_given_is_the_caches(tiny):
    graph = StdModel.of(tiny, StdOptions("modern", capacity=96)).segment(0)
    caches = [s for s in (*graph.inputs, *graph.outputs) if "_key_" in s.name]
    assert [spec.shape[2] for spec in caches] == [96, 96]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"operators": "future"}, "std.operators: unknown; expected primitive or modern"),
        ({"precision": "int8"}, "std.precision: unknown; expected float32 or float16"),
        ({"experts": "some"}, "std.experts: unknown; expected gathered or dense or moe"),
        ({"host": "torch"}, "std.host: unknown; expected onnxruntime or tensorrt"),
        ({"capacity": 0}, "std.capacity: out of range; expected >= 1; found 0"),
    ],
)
def test_options_that_do_not_exist_are_named(tiny, change, message):
    with pytest.raises(SettingError, match=message):
        StdModel.of(tiny, replace(StdOptions(), **change))


def test_graphs_that_do_not_exist_are_named(tiny):
    model = StdModel.of(tiny, StdOptions())
    for index in (-1, 4):
        with pytest.raises(
            SettingError, match=f"segment: out of range; expected 0 to 3; .* {index}"
        ):
            model.segment(index)
    with pytest.raises(SettingError, match="gate: unknown; expected frozen or cosine"):
        model.gate("dot")
    without = Bundle(tiny.path, replace(tiny.manifest, fused=None))
    with pytest.raises(BundleError, match="has no fused layout"):
        StdModel.of(without, StdOptions()).fused()


def test_a_config_that_is_not_the_manifests_is_refused(tiny, tmp_path):
    root = shutil.copytree(tiny.path, tmp_path / "bundle")
    config = json.loads((root / "config.json").read_text())
    changes: dict[str, Any] = {
        "describes another model than the manifest": {"num_experts_per_tok": 3},
        "hidden_act: is not supported": {"hidden_act": "gelu"},
    }
    for message, change in changes.items():
        (root / "config.json").write_text(json.dumps(config | change))
        with pytest.raises(BundleError, match=message):
            StdModel.of(Bundle(root, tiny.manifest), StdOptions())
    (root / "config.json").write_text("[]")
    with pytest.raises(BundleError, match="is not a JSON object"):
        StdModel.of(Bundle(root, tiny.manifest), StdOptions())


def test_a_malformed_weights_file_is_refused(tiny, tmp_path):
    root = shutil.copytree(tiny.path, tmp_path / "bundle")
    bundle, weights = Bundle(root, tiny.manifest), root / "segments" / "03.safetensors"
    content = weights.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    header = json.loads(content[8 : 8 + length])

    def with_header(changed: object) -> bytes:
        text = json.dumps(changed).encode()
        return struct.pack("<Q", len(text)) + text + content[8 + length :]

    entry = header["final_norm"]
    begin, end = entry["data_offsets"]

    def with_entry(**changes: object) -> bytes:
        return with_header(header | {"final_norm": entry | changes})

    malformed = [
        ("has a malformed header", content[:5]),
        ("has a malformed header", struct.pack("<Q", 1 << 60) + content[8:]),
        (r"has a malformed header \(", struct.pack("<Q", 40) + content[8:]),
        ("final_norm: dtype: unknown; expected F32", with_entry(dtype="BF16")),
        ("final_norm: data_offsets: malformed", with_entry(data_offsets=[begin, end - 4])),
        ("final_norm: data_offsets", with_entry(data_offsets=[begin + 2**40, end + 2**40])),
    ]
    for message, written in malformed:
        weights.write_bytes(written)
        with pytest.raises(BundleError, match=message):
            StdModel.of(bundle, StdOptions())
    weights.write_bytes(with_header({n: e for n, e in header.items() if n != "final_norm"}))
    with pytest.raises(BundleError, match="no weight named final_norm"):
        StdModel.of(bundle, StdOptions()).segment(3)
