"""Engines of TensorRT and TensorRT for RTX, behind one small loader.

Both have the same Python interface under other module names. Nothing here builds an engine.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np

from ..errors import BackendError, DeviceError, EngineError
from .base import Array, Run

if TYPE_CHECKING:
    from ..device.cuda import Cuda

Flavor = Literal["tensorrt", "tensorrt_rtx"]
FLAVORS: tuple[Flavor, ...] = get_args(Flavor)
_INSTALL = {
    "tensorrt": "Install TensorRT 10 or newer: it is part of JetPack, else get it from its vendor.",
    "tensorrt_rtx": "Run `pip install tensorrt-rtx-cu13-bindings tensorrt-rtx-cu13-libs`.",
}


@dataclass(frozen=True)
class TensorRT:
    """A loaded TensorRT: its flavour, Python module and version."""

    flavor: Flavor
    module: Any
    version: str


def load_tensorrt(flavor: Flavor) -> TensorRT:
    """Import a TensorRT.

    Raises:
        BackendError: If it is not installed, cannot be loaded, or is older than 10.
    """
    try:
        if flavor == "tensorrt":
            module = import_module("tensorrt")
        elif find_spec("tensorrt_rtx") is not None:
            module = import_module("tensorrt_rtx")
        else:  # the wheels, whose bindings find the library only once it is loaded
            import_module("tensorrt_rtx_libs")
            module = import_module("tensorrt_rtx_bindings")
    except ModuleNotFoundError as error:
        raise BackendError(flavor, "is not installed", fix=_INSTALL[flavor]) from error
    except (ImportError, OSError) as error:
        raise BackendError(
            flavor, "is installed but cannot be loaded", found=str(error), fix=_INSTALL[flavor]
        ) from error
    version = str(module.__version__)
    if flavor == "tensorrt" and int(version.split(".")[0]) < 10:
        raise BackendError(
            flavor, "too old", expected="TensorRT 10 or newer", found=version, fix=_INSTALL[flavor]
        )
    return TensorRT(flavor, module, version)


class Messages:
    """A TensorRT logger that keeps the last errors and warnings, to be told when a call fails."""

    def __init__(self, tensorrt: TensorRT, *, kept: int = 20) -> None:
        trt = tensorrt.module
        severity = trt.ILogger.Severity
        lines: list[str] = []
        warnings: list[str] = []
        self.lines, self.warnings = lines, warnings

        class Logger(trt.ILogger):  # type: ignore[misc,name-defined] # a module known at run time
            def __init__(self) -> None:
                trt.ILogger.__init__(self)

            def log(self, level: Any, message: str) -> None:
                kind = warnings if level == severity.WARNING else lines
                if level in (severity.INTERNAL_ERROR, severity.ERROR, severity.WARNING):
                    kind.append(message)
                    del kind[:-kept]

        self.logger = Logger()

    def last(self) -> str:
        """The last errors, newest first, as one; warnings where there are none."""
        return " / ".join(reversed((self.lines or self.warnings)[-3:])) or "no message"


class Scratch:
    """Activation memory shared by all execution contexts: they run one after another.

    A context keeps the block it was given, so one that needs more makes a larger block for itself
    and those after it.
    """

    def __init__(self, cuda: Cuda) -> None:
        self._cuda = cuda
        self._needed = 1
        self._block: Array = None

    def reserve(self, count: int) -> None:
        """Say that some context will need that many bytes."""
        self._needed = max(self._needed, count)

    def block(self, count: int) -> Array:
        """A block of at least that many bytes."""
        self.reserve(count)
        if self._block is None or self._block.nbytes < self._needed:
            self._block = self._cuda.bytes(self._needed)
        return self._block


class TensorRTEngine:
    """One engine on the device.

    Args:
        tensorrt: What built it.
        path: The engine.
        cuda: The device.
        scratch: Activation memory to share with other engines of the same stream.

    Raises:
        EngineError: If TensorRT refuses the engine.
    """

    def __init__(self, tensorrt: TensorRT, path: Path, cuda: Cuda, scratch: Scratch) -> None:
        trt = tensorrt.module
        self._trt, self._cuda, self._scratch, self._path = trt, cuda, scratch, path
        self._messages = Messages(tensorrt)
        self._runtime = trt.Runtime(self._messages.logger)
        with cuda.current():
            self._engine = self._runtime.deserialize_cuda_engine(path.read_bytes())
        if self._engine is None:
            raise EngineError(
                path, f"{tensorrt.flavor} {tensorrt.version} refuses this engine",
                found=self._messages.last(), fix="Build the engines again on this device.",
            )  # fmt: skip
        names = [self._engine.get_tensor_name(i) for i in range(self._engine.num_io_tensors)]
        modes = {name: self._engine.get_tensor_mode(name) for name in names}
        self.inputs = tuple(n for n in names if modes[n] == trt.TensorIOMode.INPUT)
        self.outputs = tuple(n for n in names if modes[n] == trt.TensorIOMode.OUTPUT)
        for name in self.inputs:
            if self._engine.get_tensor_location(name) != trt.TensorLocation.DEVICE:
                raise EngineError(
                    path, f"reads {name} on the host, so a step would wait for it",
                    fix="Build the engines again with the plugin (`knnmoe plugin build`).",
                )  # fmt: skip
        scratch.reserve(int(self._engine.device_memory_size_v2))

    def bind(self, inputs: Mapping[str, Array], outputs: Mapping[str, Array]) -> Run:
        """See `Engine.bind`; buffers are arrays on the device.

        Raises:
            DeviceError: If a shape is beyond what the engine was built for.
        """
        trt = self._trt
        strategy = trt.ExecutionContextAllocationStrategy.USER_MANAGED
        with self._cuda.current():
            context = self._engine.create_execution_context(strategy)
            if context is None:
                raise DeviceError(
                    self._path, "no execution context could be made", found=self._messages.last()
                )
            for name in self.inputs:
                array = inputs[name]
                self._check(name, array)
                context.set_input_shape(name, tuple(array.shape))
                context.set_tensor_address(name, int(array.data.ptr))
            buffers = {
                name: self._output(context, name, outputs.get(name)) for name in self.outputs
            }
            for name, array in buffers.items():
                context.set_tensor_address(name, int(array.data.ptr))
            block = self._scratch.block(int(self._engine.device_memory_size_v2))
            context.set_device_memory(int(block.data.ptr), int(block.nbytes))
        kept = (*(inputs[name] for name in self.inputs), *buffers.values(), block)
        return _Bound(context, self._cuda.stream.ptr, self._path, self._messages, kept).run

    def _check(self, name: str, array: Array) -> None:
        low, _, high = self._engine.get_tensor_profile_shape(name, 0)
        shape = tuple(array.shape)
        fits = len(shape) == len(high) and all(
            a <= n <= b for a, n, b in zip(low, shape, high, strict=True)
        )
        if not fits:
            raise DeviceError(
                f"{self._path.name}: {name}", "a shape beyond what the engine was built for",
                expected=f"{tuple(low)} to {tuple(high)}", found=shape,
                fix="Build the engines again with larger --max-batch, --max-context, "
                "--prefill or --max-entries.",
            )  # fmt: skip
        stated = np.dtype(self._trt.nptype(self._engine.get_tensor_dtype(name)))
        if stated != array.dtype:
            raise DeviceError(
                f"{self._path.name}: {name}", "of another type than the engine was built for",
                expected=stated, found=array.dtype,
            )  # fmt: skip

    def _output(self, context: Any, name: str, given: Array | None) -> Array:
        """The buffer of an output: the one given, or a place for what nobody asked for."""
        shape = tuple(context.get_tensor_shape(name))
        if min(shape, default=0) < 0:
            raise DeviceError(
                f"{self._path.name}: {name}", "its shape is not known before the engine runs",
                found=shape,
            )  # fmt: skip
        if given is None:
            dtype = np.dtype(self._trt.nptype(self._engine.get_tensor_dtype(name)))
            return self._cuda.zeros(shape, dtype)
        if tuple(given.shape) != shape:
            raise ValueError(f"output {name} has shape {shape}, its buffer {tuple(given.shape)}")
        return given


class _Bound:
    """An execution context together with the buffers it borrows."""

    __slots__ = ("_buffers", "_context", "_messages", "_path", "_stream")

    def __init__(
        self, context: Any, stream: int, path: Path, messages: Messages, buffers: tuple[Array, ...]
    ) -> None:
        self._context, self._stream, self._buffers = context, stream, buffers
        self._path, self._messages = path, messages

    def run(self) -> None:
        if not self._context.execute_async_v3(self._stream):
            raise DeviceError(self._path, "the engine failed", found=self._messages.last())
