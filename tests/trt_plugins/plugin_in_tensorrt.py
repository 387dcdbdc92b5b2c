"""What a real TensorRT-RTX, without a GPU, does with the plugin; see test_plugin.py.

A process of its own: TensorRT's parser looks for its library by a name that the wheel does not
have, so the search path must be right from the start.
"""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "src"))

from knnmoe.trt_plugins import library

importlib.import_module("tensorrt_rtx_libs")
trt: Any = importlib.import_module("tensorrt_rtx_bindings")

HIDDEN, EXPERTS = 32, 8
FLOAT, HALF, INT8, INT32, INT64 = (
    getattr(TensorProto, name) for name in ("FLOAT", "FLOAT16", "INT8", "INT32", "INT64")
)
SIZES = {"tokens": (1, 4, 64), "entries": (1, 1000, 10000), "batch": (1, 1, 4)}
Spec = tuple[str, int, tuple[int | str, ...]]


def inputs(keys: int = FLOAT, values: int = FLOAT) -> list[Spec]:
    return [
        ("x", FLOAT, ("tokens", HIDDEN)), ("r", FLOAT, ("tokens", EXPERTS)),
        ("keys", keys, ("entries", HIDDEN)), ("key_scales", FLOAT, ("entries", 2)),
        ("values", values, ("entries", EXPERTS)), ("evidence_weights", FLOAT, ("entries",)),
        ("n_valid", INT64, (1,)), ("k", INT64, (1,)),
        ("center", FLOAT, (HIDDEN,)), ("calibration", FLOAT, (12,)), ("state", FLOAT, ("batch", 2)),
        ("lengths", INT64, ("batch",)),
    ]  # fmt: skip


def two_stage_inputs(keys: int = FLOAT, scan: int = INT8) -> list[Spec]:
    scanned: list[Spec] = [
        ("scan_keys", scan, ("entries", HIDDEN)), ("scan_scales", FLOAT, ("entries", 2)),
    ]  # fmt: skip
    return inputs(keys) + scanned


OUTPUTS: list[Spec] = [
    ("rows", FLOAT, ("tokens", EXPERTS)), ("state_out", FLOAT, ("batch", 2)),
    ("confidence", FLOAT, ("tokens",)), ("neighbors", INT64, ("tokens", "neighbors")),
    ("similarities", FLOAT, ("tokens", "neighbors")),
]  # fmt: skip


def node_model(specs: list[Spec], similarity: str = "cosine", **attributes: int) -> onnx.ModelProto:
    """A graph of the one node."""
    node = helper.make_node(
        "KnnBlend", [s[0] for s in specs], [s[0] for s in OUTPUTS], name="blend",
        domain="knnmoe", similarity=similarity, plugin_namespace="knnmoe", **attributes,
    )  # fmt: skip
    tensors = [[helper.make_tensor_value_info(*s) for s in side] for side in (specs, OUTPUTS)]
    opsets = [helper.make_opsetid("", 20), helper.make_opsetid("knnmoe", 1)]
    graph = helper.make_graph([node], "blend", *tensors)
    return helper.make_model(graph, opset_imports=opsets, ir_version=10)


def gate_model(name: str) -> onnx.ModelProto:
    """A gate graph of the bundle, which carries the node's function too."""
    import onnx_ir

    from knnmoe.export.gate_graphs import GateShape, gate_functions, gate_graph
    from knnmoe.runtime.routing import RoutingRule

    shape = GateShape(HIDDEN, EXPERTS, 2, RoutingRule(2))
    return onnx_ir.to_proto(gate_graph(name, shape).model(gate_functions(name)))


def build(model: onnx.ModelProto, capabilities: tuple[str, ...] = ("SM86",)) -> tuple[int, int]:
    """How many layers are the plugin, and the size of the engine; 0 where TensorRT refused."""
    logger = trt.Logger(trt.Logger.ERROR)
    builder = trt.Builder(logger)
    network = builder.create_network(0)
    parser = trt.OnnxParser(network, logger)
    if not parser.parse(model.SerializeToString()):
        return 0, 0
    layers = [network.get_layer(i).type for i in range(network.num_layers)]
    config, profile = builder.create_builder_config(), builder.create_optimization_profile()
    for tensor in model.graph.input:
        dims = [d.dim_param or d.dim_value for d in tensor.type.tensor_type.shape.dim]
        if any(isinstance(d, str) for d in dims):
            shapes = [
                tuple(SIZES[d][i] if isinstance(d, str) else d for d in dims) for i in range(3)
            ]
            profile.set_shape(tensor.name, *shapes)
    config.add_optimization_profile(profile)
    config.num_compute_capabilities = len(capabilities)
    for i, capability in enumerate(capabilities):
        config.set_compute_capability(getattr(trt.ComputeCapability, capability), i)
    plan = builder.build_serialized_network(network, config)
    return layers.count(trt.LayerType.PLUGIN_V3), plan.nbytes if plan else 0


ALIVE: list[Any] = []  # a PluginField points into the array it was given, and does not hold it


def fields(**content: Any) -> Any:
    ALIVE.append(content)
    kinds = {bytes: trt.PluginFieldType.CHAR, np.ndarray: trt.PluginFieldType.INT32}
    return trt.PluginFieldCollection(
        [trt.PluginField(name, value, kinds[type(value)]) for name, value in content.items()]
    )


def main(path: Path) -> None:
    creator = library.load(trt, path)
    assert (creator.name, creator.plugin_version) == ("KnnBlend", "1")
    assert creator.plugin_namespace == "knnmoe"
    for similarity in (b"cosine", b"rbf", b"rbf\0"):
        numbers = {"max_neighbors": np.array([8], np.int32), "candidates": np.array([32], np.int32)}
        for content in (fields(similarity=similarity), fields(similarity=similarity, **numbers)):
            assert creator.create_plugin("blend", content, trt.TensorRTPhase.BUILD)
            assert creator.create_plugin("blend", content, trt.TensorRTPhase.RUNTIME)
    for wrong in (
        fields(),
        fields(similarity=b"dot"),
        fields(similarity=np.array([1], np.int32)),
        fields(similarity=b"rbf", neighbors=np.array([8], np.int32)),
        fields(similarity=b"rbf", max_neighbors=np.array([65], np.int32)),
        fields(similarity=b"rbf", max_neighbors=np.array([8, 8], np.int32)),
        fields(similarity=b"rbf", candidates=np.array([32], np.int32)),  # of 64 neighbours
    ):
        assert creator.create_plugin("blend", wrong, trt.TensorRTPhase.BUILD) is None

    plugins, size = build(node_model(inputs()), ("SM86", "SM89", "SM120"))
    assert plugins == 1
    assert size > 0
    for keys, values in ((HALF, HALF), (INT8, HALF)):
        plugins, size = build(node_model(inputs(keys, values), "rbf"))
        assert plugins == 1
        assert size > 0
    plugins, size = build(node_model(inputs(), max_neighbors=8))
    assert plugins == 1
    assert size > 0
    for keys in (FLOAT, HALF):
        plugins, size = build(node_model(two_stage_inputs(keys), max_neighbors=8, candidates=32))
        assert plugins == 1
        assert size > 0
    for name in ("cosine", "rbf-assignment", "cosine-assignment"):
        plugins, size = build(gate_model(name), ("SM86", "SM89", "SM120"))
        assert plugins == 1, name
        assert size > 0

    assert build(node_model(inputs(), "dot")) == (0, 0)
    assert build(node_model(inputs(), max_neighbors=65)) == (0, 0)
    assert build(node_model(two_stage_inputs()[:-1]))[1] == 0
    assert build(node_model(two_stage_inputs(INT8)))[1] == 0
    assert build(node_model(two_stage_inputs(scan=HALF)))[1] == 0
    for name, dtype, shape in (
        ("calibration", FLOAT, (7,)),
        ("center", FLOAT, (HIDDEN + 1,)),
        ("k", INT32, (1,)),
        ("keys", INT64, ("entries", HIDDEN)),
        ("x", HALF, ("tokens", HIDDEN)),
    ):
        wrong_specs = [(name, dtype, shape) if s[0] == name else s for s in inputs()]
        assert build(node_model(wrong_specs))[1] == 0, name
    print("taken")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
