"""One CUDA device as the runtime uses it: one stream, buffers, graphs. Everything through CuPy."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import numpy as np
from numpy.typing import NDArray

from knnmoe.trt_plugins.cupy_prototype import import_cupy

from ..atomic import readable_size
from ..engines.base import Array, Run
from ..errors import DeviceError

ALIGNMENT = 256  # of every array that an engine or a kernel is given
_HOST_TO_DEVICE, _DEVICE_TO_HOST, _DEVICE_TO_DEVICE = 1, 2, 3


@dataclass(frozen=True)
class Graph:
    """Captured work; `launch` replays it on the stream it was captured on."""

    launch: Run


class Cuda:
    """A device with the one stream that all work of a model goes to.

    It is the one that is CuPy's current device where this is made. Work of several threads takes
    turns, on that device whatever theirs is: a step holds `lock` from its upload to its download.

    Attributes:
        device: The device.

    Args:
        cupy, cupyx: The modules; imported if not given.

    Raises:
        BackendError: If CuPy, a driver or a device is missing.
    """

    def __init__(self, *, cupy: Any = None, cupyx: Any = None) -> None:
        self.cupy = import_cupy() if cupy is None else cupy
        self.cupyx = import_module("cupyx") if cupyx is None else cupyx
        self.device = self.cupy.cuda.Device()
        self.stream = self.cupy.cuda.Stream(non_blocking=True)
        self.side = self.cupy.cuda.Stream(non_blocking=True)  # for uploads while steps go on
        self.lock = threading.RLock()

    @property
    def capability(self) -> str:
        """Compute capability, as `86`."""
        return str(self.device.compute_capability)

    @property
    def name(self) -> str:
        """What its vendor calls the device."""
        name = self.cupy.cuda.runtime.getDeviceProperties(self.device.id)["name"]
        return name.decode() if isinstance(name, bytes) else str(name)

    @property
    def driver(self) -> str:
        """The newest CUDA that the driver supports, as `13.0`."""
        number = int(self.cupy.cuda.runtime.driverGetVersion())
        return f"{number // 1000}.{number % 1000 // 10}"

    @contextmanager
    def current(self, stream: Any = None) -> Iterator[None]:
        """Make device and stream CuPy's current ones, for this thread.

        Running out of memory becomes a stated failure.
        """
        with self.device:
            try:
                with self.stream if stream is None else stream:
                    yield
            except self.cupy.cuda.memory.OutOfMemoryError as error:
                raise self._too_small(error) from error

    def _too_small(self, error: Exception) -> DeviceError:
        free, total = self.device.mem_info
        return DeviceError(
            "device memory", "not enough is free", found=f"{error}; {readable_size(free)} of "
            f"{readable_size(total)} free", fix="Use a smaller context, batch or memory, or "
            "close what else uses the device; the CPU can run the same bundle.",
        )  # fmt: skip

    def zeros(self, shape: Any, dtype: Any) -> Array:
        """An array of zeros on the device."""
        with self.current():
            return self.cupy.zeros(shape, dtype)

    def bytes(self, count: int, *, stream: Any = None) -> Array:
        """Uninitialised memory on the device, at least one byte, first used on that stream."""
        with self.current(stream):
            return self.cupy.empty(max(count, 1), np.uint8)

    def pinned(self, shape: Any, dtype: Any) -> NDArray[Any]:
        """An array of zeros on the host that the device can copy from and to by itself."""
        array: NDArray[Any] = self.cupyx.zeros_pinned(shape, dtype)
        return array

    def upload(self, host: NDArray[Any], device: Array, *, stream: Any = None) -> None:
        """Copy to the device, on a stream; a pinned `host` must not change until it is done."""
        self._copy(device.data.ptr, host.ctypes.data, host, device, _HOST_TO_DEVICE, stream)

    def download(self, device: Array, host: NDArray[Any]) -> None:
        """Copy from the device, on the stream; `synchronize` before reading."""
        self._copy(host.ctypes.data, device.data.ptr, host, device, _DEVICE_TO_HOST)

    def fetch(self, device: Array) -> NDArray[Any]:
        """A copy on the host of what the array holds once the current stream is empty."""
        host: NDArray[Any] = device.get()
        return host

    def copy(self, source: Array, target: Array) -> None:
        """Copy on the device, on the stream."""
        self._copy(target.data.ptr, source.data.ptr, source, target, _DEVICE_TO_DEVICE)

    def _copy(
        self, to: int, of: int, one: Array, other: Array, kind: int, stream: Any = None
    ) -> None:
        contiguous = one.flags.c_contiguous and other.flags.c_contiguous
        if one.nbytes != other.nbytes or not contiguous:
            raise ValueError(f"cannot copy between {one.shape} and {other.shape}")
        pointer = (self.stream if stream is None else stream).ptr
        self.cupy.cuda.runtime.memcpyAsync(to, of, one.nbytes, kind, pointer)

    def synchronize(self) -> None:
        """Wait until the stream is empty."""
        self.stream.synchronize()

    def event(self) -> Any:
        """A mark on the current stream that knows when it was reached."""
        mark = self.cupy.cuda.Event()
        mark.record(self.stream)
        return mark

    def elapsed_ms(self, start: Any, end: Any) -> float:
        """Milliseconds on the device between two marks that were reached."""
        return float(self.cupy.cuda.get_elapsed_time(start, end))

    def capture(self, run: Callable[[], None]) -> Graph:
        """Record what `run` puts on the stream, without running it.

        Raises:
            DeviceError: If something of it cannot be recorded; the stream is as it was.
        """
        with self.current():
            self.stream.begin_capture()
            try:
                try:
                    run()
                finally:
                    graph = self.stream.end_capture()
            except Exception as error:  # CuPy's, TensorRT's, an engine's: of no common base class
                cause = error.__context__ or error  # ending a broken capture fails, too
                raise DeviceError(
                    "CUDA graph",
                    "the step cannot be captured",
                    found=f"{type(cause).__name__}: {cause}",
                    fix="Load the model with cuda_graph=False (--no-cuda-graph).",
                ) from error
        return Graph(lambda: self._launch(graph))

    def _launch(self, graph: Any) -> None:
        with self.current():
            graph.launch(self.stream)
