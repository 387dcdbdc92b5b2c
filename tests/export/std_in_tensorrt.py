"""Builds std graphs with a real TensorRT-RTX, without a GPU; see test_std_tensorrt.py.

A process of its own: TensorRT's parser looks for its library by a name that the wheel does not
have, so the search path must be right from the start. Takes a bundle and a list of jobs as JSON,
which may name bundles of their own, and prints a line of JSON for each.
"""

from __future__ import annotations

import importlib
import json
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "src"))

from knnmoe.export.lowering.std_weights import stored_weights
from knnmoe.export.signed_codes import signed_codes, write_signed
from knnmoe.export.std import StdGraph, StdModel, StdOptions
from knnmoe.runtime.bundle import Bundle

importlib.import_module("tensorrt_rtx_libs")
trt: Any = importlib.import_module("tensorrt_rtx_bindings")

CAPACITY = 128


def graph_of(model: StdModel, name: str) -> StdGraph:
    if name == "fused":
        return model.fused()
    if name.startswith("gate "):
        return model.gate(name.removeprefix("gate "))
    return model.segment(int(name))


def profile_of(builder: Any, network: Any, graph: StdGraph, tokens: int) -> Any:
    """One sequence, up to so many tokens of it and so many entries of a memory."""
    free = {
        "batch": (1, 1, 1), "capacity": (CAPACITY,) * 3, "entries": (1, 1000, 10000),
        **dict.fromkeys(("sequence", "tokens", "rows"), (1, 1, tokens)),
    }  # fmt: skip
    profile = builder.create_optimization_profile()
    for spec in graph.inputs:
        if any(isinstance(d, str) for d in spec.shape):
            sizes = [free[d.rsplit("_", 1)[0]] if isinstance(d, str) else (d,) * 3
                     for d in spec.shape]  # fmt: skip
            profile.set_shape(spec.name, *zip(*sizes, strict=True))
    for index in range(network.num_inputs):
        tensor = network.get_input(index)
        if tensor.is_shape_tensor:  # K, where the function of the blend and not the plugin runs
            profile.set_shape_input(tensor.name, [1], [8], [64])
    return profile


def moe_layer(layer: Any) -> dict[str, Any]:
    """What the parser made of a mixture of experts."""
    layer.__class__ = trt.IMoELayer
    inputs = [layer.get_input(index) for index in range(layer.num_inputs)]
    return {
        "activation": layer.activation_type.name,
        "swiglu": [layer.swiglu_param_alpha, layer.swiglu_param_beta, layer.swiglu_param_limit],
        "dtypes": [tensor.dtype.name for tensor in (*inputs, layer.get_output(0))],
        "shapes": [list(tensor.shape) for tensor in (*inputs, layer.get_output(0))],
    }


def build(bundle: Bundle, job: dict[str, Any]) -> dict[str, Any]:
    """Parse, and build unless the job has no capabilities: errors, kinds of layers, bytes, time."""
    options = StdOptions(
        job["operators"], job["precision"], job["experts"], CAPACITY, host="tensorrt"
    )
    graph = graph_of(StdModel.of(bundle, options), job["graph"])
    folder = bundle.path / "segments"
    # What graphs over 4- and 8-bit codes refer to, in the bundle: it is the test's own.
    write_signed(signed_codes([graph.content]), stored_weights(bundle), folder, folder)
    logger = trt.Logger(trt.Logger.ERROR)
    builder = trt.Builder(logger)
    network = builder.create_network(0)
    parser = trt.OnnxParser(network, logger)
    # The path says where the external weights are; no file of that name is read.
    if not parser.parse(graph.content, str(folder / "std.onnx")):
        errors = [parser.get_error(index).desc() for index in range(parser.num_errors)]
        return job | {"errors": errors}
    layers = [network.get_layer(index) for index in range(network.num_layers)]
    found: dict[str, Any] = job | {"layers": sorted({layer.type.name for layer in layers})}
    found["moe"] = [moe_layer(layer) for layer in layers if layer.type == trt.LayerType.MOE]
    for tensors, count, specs in (
        (network.get_input, network.num_inputs, graph.inputs),
        (network.get_output, network.num_outputs, graph.outputs),
    ):
        assert [tensors(index).name for index in range(count)] == [spec.name for spec in specs]
    if not job["capabilities"]:
        return found
    for layer in layers:
        # float32, and other shapes that no fused kernel is there for, become matrix products.
        if layer.type == trt.LayerType.ATTENTION_OUTPUT:
            layer.__class__ = trt.IAttentionOutputLayer
            layer.attention.decomposable = True
    config = builder.create_builder_config()
    config.add_optimization_profile(profile_of(builder, network, graph, job["tokens"]))
    config.num_compute_capabilities = len(job["capabilities"])
    for index, capability in enumerate(job["capabilities"]):
        config.set_compute_capability(getattr(trt.ComputeCapability, capability), index)
    started = time.perf_counter()
    plan = builder.build_serialized_network(network, config)
    found["seconds"] = round(time.perf_counter() - started, 2)
    return found | {"bytes": plan.nbytes if plan else 0}


def main(path: str, jobs: str) -> None:
    for job in json.loads(jobs):
        bundle = Bundle.open(job.get("bundle", path), verify=False)
        print(json.dumps(build(bundle, job)), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
