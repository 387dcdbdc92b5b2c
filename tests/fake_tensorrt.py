"""A stand-in for TensorRT on a machine without a GPU: engines that ONNX Runtime runs on the CPU.

`fake_tensorrt(cupy)` gives what is used as the module `tensorrt`, over the emulated device of
`fake_cupy`. An engine file is one line of JSON, then the ONNX graph that the engine was built of;
what it does on the device is what the graph says, in the order of the stream. What the real one
refuses is refused: addresses that are not 256-byte aligned or not on the device, shapes outside of
the profile, outputs without an address. Activation memory is overwritten by every run.
"""

from __future__ import annotations

import json
from functools import lru_cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnxruntime as ort

ORT_TYPES = {
    "tensor(float)": np.float32,
    "tensor(float16)": np.float16,
    "tensor(int64)": np.int64,
    "tensor(int32)": np.int32,
}
SCRATCH = 4096


def engine_file(graph: bytes, *, weights: Path, profile: dict[str, Any], neighbors: int) -> bytes:
    """What `deserialize_cuda_engine` takes."""
    header = {"weights": str(weights), "profile": profile, "neighbors": neighbors}
    return json.dumps(header).encode() + b"\n" + graph


@lru_cache(maxsize=64)
def session_of(graph: bytes, weights: str) -> ort.InferenceSession:
    """What runs a graph; it keeps no state, so engines of the same graph and weights share it."""
    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = 1
    options.add_session_config_entry(
        "session.model_external_initializers_file_folder_path", weights
    )
    return ort.InferenceSession(graph, options, providers=["CPUExecutionProvider"])


class Engine:
    def __init__(self, module: Any, blob: bytes) -> None:
        header, graph = blob.split(b"\n", 1)
        self.module, self.header = module, json.loads(header)
        self.session = session_of(graph, self.header["weights"])
        self.inputs = {item.name: item for item in self.session.get_inputs()}
        self.outputs = {item.name: item for item in self.session.get_outputs()}
        self.names = [*self.inputs, *self.outputs]
        self.num_io_tensors = len(self.names)
        self.device_memory_size_v2 = SCRATCH

    def get_tensor_name(self, index: int) -> str:
        return self.names[index]

    def get_tensor_mode(self, name: str) -> str:
        return "input" if name in self.inputs else "output"

    def get_tensor_location(self, name: str) -> str:
        return "device"

    def get_tensor_dtype(self, name: str) -> Any:
        return ORT_TYPES[(self.inputs | self.outputs)[name].type]

    def get_tensor_profile_shape(self, name: str, profile: int) -> Any:
        assert profile == 0
        fixed = self.inputs[name].shape
        return self.header["profile"].get(name, [fixed, fixed, fixed])

    def create_execution_context(self, strategy: str) -> Context:
        assert strategy == "user managed"
        return Context(self)


class Context:
    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.addresses: dict[str, int] = {}
        self.memory: tuple[int, int] = (0, 0)

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        low, _, high = self.engine.get_tensor_profile_shape(name, 0)
        assert all(a <= n <= b for a, n, b in zip(low, shape, high, strict=True)), (name, shape)
        self.shapes[name] = shape
        return True

    def set_tensor_address(self, name: str, address: int) -> bool:
        assert address % 256 == 0, f"{name} is not aligned"
        assert self.engine.module.machine.touches_device(address), f"{name} is not on the device"
        self.addresses[name] = address
        return True

    def set_device_memory(self, address: int, size: int) -> None:
        self.memory = (address, size)

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        sizes: dict[str, int] = {}
        for item in self.engine.inputs.values():
            sizes |= zip(map(str, item.shape), self.shapes[item.name], strict=True)
        if "tokens" not in sizes:
            sizes["tokens"] = sizes["batch"] * sizes.get("sequence", 1)
        for symbol, size in list(sizes.items()):
            if symbol.startswith("entries"):
                columns = min(size, self.engine.header["neighbors"])
                sizes[symbol.replace("entries", "neighbors")] = columns
        shape = self.engine.outputs[name].shape
        return tuple(sizes[d] if isinstance(d, str) else d for d in shape)

    def execute_async_v3(self, stream: int) -> bool:
        machine = self.engine.module.machine
        assert set(self.addresses) == set(self.engine.names), "a tensor has no address"
        assert self.memory[1] >= SCRATCH, "no activation memory"

        def view(name: str, shape: tuple[int, ...]) -> Any:
            dtype = self.engine.get_tensor_dtype(name)
            return machine.view(self.addresses[name], shape, dtype)

        def work() -> None:
            inputs = {name: view(name, self.shapes[name]).copy() for name in self.engine.inputs}
            machine.view(self.memory[0], SCRATCH, np.uint8)[:] = 0xFF
            results = self.engine.session.run(list(self.engine.outputs), inputs)
            for name, result in zip(self.engine.outputs, results, strict=True):
                view(name, result.shape)[...] = result

        machine.submit(stream, work)
        return True


def fake_tensorrt(cupy: Any, *, refuses: str | None = None) -> Any:
    """The module over that device; `refuses` is what it says instead of loading an engine."""

    class ILogger:
        Severity = SimpleNamespace(INTERNAL_ERROR=0, ERROR=1, WARNING=2, INFO=3, VERBOSE=4)

    class Runtime:
        def __init__(self, logger: Any) -> None:
            self.logger = logger

        def deserialize_cuda_engine(self, blob: bytes) -> Engine | None:
            if refuses is not None:
                self.logger.log(ILogger.Severity.ERROR, refuses)
                return None
            return Engine(module, blob)

    module = SimpleNamespace(
        machine=cupy.machine,
        ILogger=ILogger,
        Runtime=Runtime,
        TensorIOMode=SimpleNamespace(INPUT="input", OUTPUT="output"),
        TensorLocation=SimpleNamespace(DEVICE="device", HOST="host"),
        ExecutionContextAllocationStrategy=SimpleNamespace(USER_MANAGED="user managed"),
        nptype=lambda dtype: dtype,
    )
    return module
