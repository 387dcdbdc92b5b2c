"""The plugin inside TensorRT: engines of the one node, built and run against the reference."""

from __future__ import annotations

import os
import time
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from gpu_cases import KEY_TYPES, SMALL, Case, every_case
from gpu_correctness import (
    Host,
    check_host,
    node_answer,
    node_inputs,
    node_outputs,
)
from gpu_plugin import PREPARED
from gpu_tally import Absent

from knnmoe.runtime.blend import Blended
from knnmoe.runtime.errors import BackendError
from knnmoe.trt_plugins import library

FLAVORS = ("tensorrt", "tensorrt_rtx")


def check_engines(cupy: Any, seed: int, deadline: float) -> dict[str, Any]:
    """Small cases through an engine each, in every TensorRT that there is."""
    hosts: dict[str, Any] = {}
    for position, flavor in enumerate(FLAVORS):
        share = (deadline - time.monotonic()) / (len(FLAVORS) - position)
        try:
            engines = Engines(cupy, flavor)
        except (Absent, BackendError) as reason:
            hosts[flavor] = {"status": "absent", "why": str(reason)}
            continue
        host = Host(f"{flavor} {engines.version}", engines.run, KEY_TYPES)
        hosts[host.name] = check_host(host, every_case(seed, SMALL), time.monotonic() + share)
    states = {host["status"] for host in hosts.values()}
    worst = next((s for s in ("failed", "passed") if s in states), "absent")
    why = {} if worst != "absent" else {"why": "no TensorRT that takes the plugin; see hosts"}
    return {"status": worst, **why, "hosts": hosts}


class Engines:
    """Builds and runs engines of one TensorRT."""

    def __init__(self, cupy: Any, flavor: str) -> None:
        from knnmoe.runtime.engines.tensorrt import load_tensorrt

        loaded = load_tensorrt(flavor)  # type: ignore[arg-type] # one of its flavours
        self.cupy, self.trt, self.version = cupy, loaded.module, loaded.version
        prepared = PREPARED / library.LIBRARY
        library.load(self.trt, prepared if prepared.is_file() else None)
        self.logger = self.trt.Logger(self.trt.Logger.ERROR)

    def build(self, model: bytes) -> bytes:
        """An engine of a model that is the node alone.

        Raises:
            BackendError: If TensorRT builds none, or takes the node for something else.
        """
        trt, where = self.trt, f"{self.trt.__name__} {self.version}"
        builder = trt.Builder(self.logger)
        typed = getattr(trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED", None)
        network = builder.create_network(0 if typed is None else 1 << int(typed))
        parser = trt.OnnxParser(network, self.logger)
        if not parser.parse(model):
            said = "; ".join(str(parser.get_error(i)) for i in range(parser.num_errors))
            raise BackendError(where, "does not parse the node", found=said)
        layers = [network.get_layer(i).type for i in range(network.num_layers)]
        if layers.count(trt.LayerType.PLUGIN_V3) != 1:
            raise BackendError(where, "does not take the plugin", found=layers)
        plan = builder.build_serialized_network(network, self.configure(builder))
        if plan is None:
            raise BackendError(where, "builds no engine of the plugin")
        return bytes(plan)

    @staticmethod
    def configure(builder: Any) -> Any:
        """For the device that is here."""
        return builder.create_builder_config()

    def run(self, case: Case) -> Blended:
        """One case through an engine of its own."""
        cupy, arrays = self.cupy, node_inputs(case)
        similarity = case.memory.similarity
        outputs = node_outputs(cupy, case)
        plan = self.build(node_model(arrays, outputs, similarity))
        engine = self.trt.Runtime(self.logger).deserialize_cuda_engine(plan)
        if engine is None:
            raise BackendError(f"TensorRT {self.version}", "refuses the engine it has built")
        context = engine.create_execution_context()
        bound = {name: cupy.asarray(array) for name, array in arrays.items()} | outputs
        for name, array in bound.items():
            context.set_tensor_address(name, array.data.ptr)
        stream = cupy.cuda.Stream(non_blocking=True)
        cupy.cuda.Device().synchronize()
        if not context.execute_async_v3(stream.ptr):
            raise BackendError(f"TensorRT {self.version}", "does not run the engine")
        stream.synchronize()
        return node_answer(cupy, outputs)


def node_model(arrays: dict[str, Any], outputs: dict[str, Any], similarity: str) -> bytes:
    """ONNX of the node alone, for arrays of these types and shapes.

    Raises:
        Absent: If onnx is not installed.
    """
    try:
        onnx = import_module("onnx")
    except ImportError as error:
        raise Absent("onnx is not installed") from error
    helper = onnx.helper
    node = helper.make_node(
        "KnnBlend", list(arrays), list(outputs), name="blend", domain="knnmoe",
        similarity=similarity, plugin_namespace="knnmoe",
    )  # fmt: skip
    sides = [
        [
            helper.make_tensor_value_info(
                name, helper.np_dtype_to_tensor_dtype(np.dtype(array.dtype)), array.shape
            )
            for name, array in side.items()
        ]
        for side in (arrays, outputs)
    ]
    opsets = [helper.make_opsetid("", 20), helper.make_opsetid("knnmoe", 1)]
    graph = helper.make_graph([node], "blend", *sides)
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    return bytes(model.SerializeToString())


def library_path(folder: Path) -> dict[str, str]:
    """An environment in which the parser of the wheels of TensorRT for RTX finds its library.

    It asks for a name without a version, which the wheels do not have: it is linked in `folder`.
    """
    spec = find_spec("tensorrt_rtx_libs")
    if spec is None or spec.origin is None:
        return dict(os.environ)
    home = Path(spec.origin).parent
    for library_file in sorted(home.glob("libtensorrt_rtx.so.?")):
        link = folder / "libtensorrt_rtx.so"
        link.unlink(missing_ok=True)
        link.symlink_to(library_file)
    known = [path for path in (os.environ.get("LD_LIBRARY_PATH"),) if path]
    return {**os.environ, "LD_LIBRARY_PATH": os.pathsep.join([str(folder), str(home), *known])}
