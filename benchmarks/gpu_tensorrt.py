"""The plugin inside TensorRT: engines of the one node, built and run against the reference."""

from __future__ import annotations

import time
from typing import Any

import numpy as np
from gpu_cases import KEY_TYPES, SMALL, Case, every_case
from gpu_correctness import Host, check_host
from gpu_tally import Absent

from knnmoe.runtime.blend import Blended
from knnmoe.runtime.errors import BackendError
from knnmoe.trt_plugins import library

FLAVORS = ("tensorrt", "tensorrt_rtx")
INPUTS = (
    "x", "r", "keys", "key_scales", "values", "n_valid", "k", "center", "calibration", "state",
    "lengths",
)  # fmt: skip
OUTPUTS = ("rows", "state_out", "confidence", "neighbors", "similarities")
COLUMNS = 64  # the plugin has min(N, 64) columns of neighbours


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
        self.creator = library.load(self.trt)
        self.logger = self.trt.Logger(self.trt.Logger.ERROR)

    def build(self, shapes: dict[str, tuple[Any, tuple[int, ...]]], similarity: str) -> bytes:
        """An engine of the node for inputs of these types and shapes.

        Raises:
            BackendError: If TensorRT builds none.
        """
        trt = self.trt
        builder = trt.Builder(self.logger)
        network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
        tensors = [
            network.add_input(name, _data_type(trt, dtype), shape)
            for name, (dtype, shape) in shapes.items()
        ]
        fields = trt.PluginFieldCollection(
            [trt.PluginField("similarity", similarity.encode(), trt.PluginFieldType.CHAR)]
        )
        plugin = self.creator.create_plugin("blend", fields, trt.TensorRTPhase.BUILD)
        layer = network.add_plugin_v3(tensors, [], plugin)
        for index, name in enumerate(OUTPUTS):
            layer.get_output(index).name = name
            network.mark_output(layer.get_output(index))
        plan = builder.build_serialized_network(network, builder.create_builder_config())
        if plan is None:
            raise BackendError(f"TensorRT {self.version}", "builds no engine of the plugin")
        return bytes(plan)

    def run(self, case: Case) -> Blended:
        """One case through an engine of its own."""
        cupy, memory = self.cupy, case.memory
        arrays = {
            "x": case.x, "r": case.r, "keys": case.keys, "key_scales": case.key_scales,
            "values": case.values, "n_valid": np.array([memory.n_valid], np.int64),
            "k": np.array([memory.k], np.int64), "center": memory.center,
            "calibration": memory.calibration.vector(), "state": case.state,
            "lengths": case.lengths.astype(np.int64),
        }  # fmt: skip
        plan = self.build(
            {name: (array.dtype, array.shape) for name, array in arrays.items()}, memory.similarity
        )
        engine = self.trt.Runtime(self.logger).deserialize_cuda_engine(plan)
        if engine is None:
            raise BackendError(f"TensorRT {self.version}", "refuses the engine it has built")
        context = engine.create_execution_context()
        tokens, columns = len(case.x), min(COLUMNS, len(case.keys))
        outputs = {
            "rows": cupy.full(case.r.shape, np.nan, np.float32),
            "state_out": cupy.full(case.state.shape, np.nan, np.float32),
            "confidence": cupy.full((tokens,), np.nan, np.float32),
            "neighbors": cupy.full((tokens, columns), -7, np.int64),
            "similarities": cupy.full((tokens, columns), np.nan, np.float32),
        }
        bound = {name: cupy.asarray(array) for name, array in arrays.items()} | outputs
        for name, array in bound.items():
            context.set_tensor_address(name, array.data.ptr)
        stream = cupy.cuda.Stream(non_blocking=True)
        cupy.cuda.Device().synchronize()
        if not context.execute_async_v3(stream.ptr):
            raise BackendError(f"TensorRT {self.version}", "does not run the engine")
        stream.synchronize()
        host = {name: cupy.asnumpy(array) for name, array in outputs.items()}
        return Blended(
            host["rows"], host["confidence"], host["neighbors"], host["similarities"],
            host["state_out"],
        )  # fmt: skip


def _data_type(trt: Any, dtype: Any) -> Any:
    names = {"float32": "FLOAT", "float16": "HALF", "int8": "INT8", "int64": "INT64"}
    return getattr(trt.DataType, names[np.dtype(dtype).name])
