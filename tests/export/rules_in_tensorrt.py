"""Builds gate graphs of several routing rules with a real TensorRT-RTX, without a GPU.

A process of its own, as std_in_tensorrt.py is; prints a line of JSON for each graph.
"""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "src"))

import onnx_ir as ir

from knnmoe.export.gate_graphs import GateShape, gate_functions, gate_graph
from knnmoe.export.graph import keep_names_apart
from knnmoe.runtime.routing import RoutingRule

importlib.import_module("tensorrt_rtx_libs")
trt: Any = importlib.import_module("tensorrt_rtx_bindings")

HIDDEN, EXPERTS, ROOM = 64, 32, 8
FREE = {"tokens": (1, 1, 64), "batch": (1, 1, 1), "entries": (1, 100, 1000)}


def build(name: str, rule: RoutingRule, opset: int) -> tuple[list[str], int]:
    """The graph's inputs in TensorRT, and the size of the engine; 0 where it was refused."""
    g = gate_graph(name, GateShape(HIDDEN, EXPERTS, ROOM, rule), opset)
    functions = [keep_names_apart(function) for function in gate_functions(name, opset)]
    content = ir.to_proto(g.model(functions)).SerializeToString()
    logger = trt.Logger(trt.Logger.ERROR)
    builder = trt.Builder(logger)
    network = builder.create_network(0)
    parser = trt.OnnxParser(network, logger)
    if not parser.parse(content):
        raise SystemExit(str([parser.get_error(i).desc() for i in range(parser.num_errors)]))
    profile = builder.create_optimization_profile()
    for spec in g.input_specs:
        if any(isinstance(d, str) for d in spec.shape):
            sizes = [FREE[d] if isinstance(d, str) else (d,) * 3 for d in spec.shape]
            profile.set_shape(spec.name, *zip(*sizes, strict=True))
    names = []
    for index in range(network.num_inputs):
        tensor = network.get_input(index)
        names.append(tensor.name)
        if tensor.is_shape_tensor:  # K
            profile.set_shape_input(tensor.name, [1], [8], [64])
    config = builder.create_builder_config()
    config.add_optimization_profile(profile)
    config.num_compute_capabilities = 2
    for index, capability in enumerate(("SM86", "SM120")):
        config.set_compute_capability(getattr(trt.ComputeCapability, capability), index)
    plan = builder.build_serialized_network(network, config)
    return names, plan.nbytes if plan else 0


def main(jobs: str) -> None:
    for name, opset, fields in json.loads(jobs):
        names, size = build(name, RoutingRule(**fields), opset)
        print(json.dumps({"inputs": names, "bytes": size}), flush=True)


if __name__ == "__main__":
    main(sys.argv[1])
