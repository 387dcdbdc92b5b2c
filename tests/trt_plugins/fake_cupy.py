"""A stand-in for CuPy on a machine without a GPU.

`fake_cupy()` gives an object that is used as the module `cupy`, its `cupyx` as the module `cupyx`.
Device memory is host memory that NumPy refuses to read by accident, as CuPy refuses; kernels run on
the emulated machine (`emulated.py`, `step_emulated.py`). Signatures and refusals are those of CuPy
14.2. Where a device may do as it likes, the stand-in does the worst:

* What a stream is given waits in the stream until somebody synchronises (`lazy=False`: runs at
  once). So host memory that is read too early or overwritten too early shows.
* Fresh and freed device memory is filled with 0xFF: NaN as floats, -1 as integers.
* While a stream is captured nothing runs: kernels, copies and fills are recorded and replayed by
  `graph.launch`. Pageable copies, synchronisation and allocation are refused then.
* A copy must stay inside what was allocated.
* With `devices=2` there is a second device by number (the memory is the same): a thread begins on
  device 0, and streams and graphs are used on the device they were made on.

Its own face, for other stand-ins such as that of an engine: `cupy.machine.submit(stream_ptr, work)`
puts a function into a stream (recorded under capture), `cupy.machine.view(ptr, shape, dtype)` is
NumPy's view of an address, `cupy.machine.launched` names the kernels that ran, in order.
"""

from __future__ import annotations

import ctypes
import itertools
import sys
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, ClassVar

import numpy as np

Work = Callable[[], None]
ALIGNMENT = 512  # of CuPy's allocations
HOST_TO_HOST, HOST_TO_DEVICE, DEVICE_TO_HOST, DEVICE_TO_DEVICE, DEFAULT = range(5)
EMULATION = threading.Lock()  # the emulated machine is one for the process


class CUDARuntimeError(RuntimeError):
    """What the CUDA runtime refuses."""


class CUDADriverError(RuntimeError):
    """What the CUDA driver refuses."""


class OutOfMemoryError(MemoryError):
    """As `cupy.cuda.memory.OutOfMemoryError`."""

    def __init__(self, size: int, total: int, limit: int = 0) -> None:
        super().__init__(
            f"Out of memory allocating {size:,} bytes (allocated so far: {total:,} bytes)."
        )


class Machine:
    """One emulated device with its streams and memory."""

    def __init__(self, *, lazy: bool, memory_bytes: int, attributes: dict[str, int]) -> None:
        self.lazy = lazy
        self.memory_bytes = memory_bytes
        self.limit = 0
        self.used_bytes = 0
        self.attributes = attributes
        self.launched: list[str] = []
        self.shared_limits: dict[str, int] = {}
        self.device_ranges: dict[int, int] = {}
        self.pinned_ranges: dict[int, int] = {}
        self.streams: dict[int, Stream] = {}
        self.numbers = itertools.count(1)
        self.threads = threading.local()
        self.captures = 0

    # --- its own face
    def submit(self, stream_ptr: int, work: Work) -> None:
        """Put work into the stream of that pointer; recorded where it is captured."""
        self.streams[stream_ptr].submit(work)

    @staticmethod
    def view(ptr: int, shape: Any, dtype: Any) -> Any:
        """NumPy's view of what lies at an address."""
        dtype = np.dtype(dtype)
        shape = (shape,) if isinstance(shape, int) else tuple(shape)
        count = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
        raw = (ctypes.c_ubyte * max(count, 1)).from_address(ptr)
        return np.frombuffer(raw, np.uint8, count).view(dtype).reshape(shape)

    # --- streams
    @property
    def stack(self) -> list[Stream]:
        """The streams this thread has made current, the innermost last."""
        if not hasattr(self.threads, "stack"):
            self.threads.stack = [self.streams[0]]
        stack: list[Stream] = self.threads.stack
        return stack

    def stream(self, given: Any = None) -> Stream:
        """The stream given, else the current one."""
        return self.stack[-1] if given is None else given

    @property
    def device(self) -> int:
        """The device that this thread uses."""
        return self.devices[-1]

    @property
    def devices(self) -> list[int]:
        """The devices this thread has made current, the innermost last."""
        if not hasattr(self.threads, "devices"):
            self.threads.devices = [0]
        devices: list[int] = self.threads.devices
        return devices

    def check_device(self, stream: Stream) -> None:
        """Refuse a stream of another device than this thread's."""
        if stream.ptr and stream.device_id != self.device:
            raise RuntimeError(
                f"The device that the stream is created on ({stream.device_id}) does not match "
                f"with the current device ({self.device})"
            )

    def synchronize(self) -> None:
        """Wait for every stream."""
        for stream in list(self.streams.values()):
            stream.synchronize()

    # --- memory
    def allocate(self, size: int) -> int:
        """Account for device memory; returns what it takes."""
        if self.captures:
            raise CUDARuntimeError("memory is asked for while a stream is captured")
        taken = -(-size // ALIGNMENT) * ALIGNMENT
        most = min(self.memory_bytes, self.limit or self.memory_bytes)
        if self.used_bytes + taken > most:
            raise OutOfMemoryError(size, self.used_bytes, self.limit)
        self.used_bytes += taken
        return taken

    @staticmethod
    def within(ranges: dict[int, int], address: int, size: int) -> bool:
        """Whether the bytes lie inside of one of the ranges."""
        held = list(ranges.items())  # other threads take and give back memory meanwhile
        return any(start <= address and address + size <= end for start, end in held)

    def touches_device(self, address: int) -> bool:
        """Whether an address is device memory."""
        return self.within(self.device_ranges, address, 1)

    def copy(self, dst: int, src: int, size: int, kind: int, stream: Stream) -> None:
        """memcpyAsync."""
        if size == 0:
            return
        if kind == DEFAULT:
            kind = 2 * self.touches_device(src) + self.touches_device(dst)
        sides = ((dst, kind in (HOST_TO_DEVICE, DEVICE_TO_DEVICE), "to"),
                 (src, kind in (DEVICE_TO_HOST, DEVICE_TO_DEVICE), "from"))  # fmt: skip
        pageable = False
        for address, device, word in sides:
            if device and not self.within(self.device_ranges, address, size):
                raise CUDARuntimeError(f"a copy of {size} bytes {word} outside of device memory")
            if not device and self.touches_device(address):
                raise CUDARuntimeError(f"a copy {word} the host has an address of the device")
            pageable |= not device and not self.within(self.pinned_ranges, address, size)
        if pageable and stream.capture is not None:
            raise CUDARuntimeError("a copy of pageable memory while the stream is captured")

        def work(src: int = src) -> None:
            for address, device, _ in sides:
                known = self.device_ranges if device else self.pinned_ranges
                if (device or not pageable) and not self.within(known, address, size):
                    raise CUDARuntimeError("memory was freed before the copy ran")
            ctypes.memmove(dst, src, size)

        if pageable and kind == HOST_TO_DEVICE:  # CUDA stages it before it returns
            staged = ctypes.create_string_buffer(ctypes.string_at(src, size), size)
            stream.submit(lambda: ctypes.memmove(dst, staged, size) and None)
        else:
            stream.submit(work)
            if pageable:  # CUDA returns when it is done
                stream.synchronize()


class Capture:
    """What is recorded while streams are captured."""

    def __init__(self, origin: Stream) -> None:
        self.origin = origin
        self.work: list[Work] = []
        self.forks: set[Stream] = set()


class Stream:
    """As `cupy.cuda.Stream`."""

    machine: ClassVar[Machine]
    null: ClassVar[Stream]

    def __init__(
        self,
        null: bool = False,
        non_blocking: bool = False,
        ptds: bool = False,
        priority: Any = None,
    ) -> None:
        self.ptr = 0 if null else 0x5000 + 0x10 * next(self.machine.numbers)
        self.device_id = self.machine.device
        self.non_blocking = non_blocking
        self.queue: deque[Work] = deque()
        self.capture: Capture | None = None
        self.machine.streams[self.ptr] = self

    def submit(self, work: Work) -> None:
        """Put work into the stream."""
        if self.capture is not None:
            self.capture.work.append(work)
            return
        if not self.non_blocking:  # the null stream and the others wait for each other
            for other in list(self.machine.streams.values()):
                if (self.ptr == 0) != (other.ptr == 0) and not other.non_blocking:
                    other.drain()
        self.queue.append(work)
        if not self.machine.lazy:
            self.drain()

    def drain(self) -> None:
        """Run what waits."""
        while self.queue:
            self.queue.popleft()()

    def synchronize(self) -> None:
        if self.capture is not None:
            raise CUDARuntimeError("the stream is captured and cannot be waited for")
        self.drain()

    @property
    def done(self) -> bool:
        return not self.queue

    def record(self, event: Event | None = None) -> Event:
        event = Event() if event is None else event
        event.machine = self.machine
        event.record(self)
        return event

    def wait_event(self, event: Event) -> None:
        if event.capture is not None:  # the other stream is captured from here on, too
            if self.capture is None:
                self.capture = event.capture
                self.capture.forks.add(self)
            elif event.stream is not None:
                self.capture.forks.discard(event.stream)
            return
        stream, number = event.stream, event.number
        if stream is not None and stream is not self:
            self.submit(lambda: event.complete(number))

    def launch_host_func(self, callback: Callable[[Any], None], arg: Any) -> None:
        self.submit(lambda: callback(arg))

    def begin_capture(self, mode: Any = None) -> None:
        if self.ptr == 0:
            raise RuntimeError("cannot capture on the default (legacy) stream")
        if self.capture is not None:
            raise CUDARuntimeError("the stream is captured already")
        self.capture = Capture(self)
        self.machine.captures += 1

    def end_capture(self) -> Graph:
        capture = self.capture
        if capture is None or capture.origin is not self:
            raise CUDARuntimeError("no capture began on this stream")
        for fork in capture.forks:
            fork.capture = None
        self.capture = None
        self.machine.captures -= 1
        if capture.forks:
            raise CUDARuntimeError("a stream that joined the capture was not waited for")
        return Graph(self.machine, capture.work)

    def is_capturing(self) -> bool:
        return self.capture is not None

    def use(self) -> Stream:
        self.machine.stack[-1] = self
        return self

    def __enter__(self) -> Stream:
        self.machine.check_device(self)
        self.machine.stack.append(self)
        return self

    def __exit__(self, *_: object) -> None:
        self.machine.stack.pop()

    def __cuda_stream__(self) -> tuple[int, int]:
        return 0, self.ptr


class Event:
    """As `cupy.cuda.Event`."""

    machine: Machine

    def __init__(
        self, block: bool = False, disable_timing: bool = False, interprocess: bool = False
    ) -> None:
        self.timed = not disable_timing
        self.stream: Stream | None = None
        self.capture: Capture | None = None
        self.number = 0  # of the last record
        self.reached = 0
        self.time = 0.0

    def record(self, stream: Stream | None = None) -> None:
        self.stream = self.machine.stream(stream)
        self.capture = self.stream.capture
        if self.capture is not None:
            return
        self.number += 1
        number = self.number

        def reach() -> None:
            self.reached, self.time = number, time.perf_counter()

        self.stream.submit(reach)

    def complete(self, number: int) -> None:
        """Run the event's stream until that record."""
        while self.stream is not None and self.reached < number and self.stream.queue:
            self.stream.queue.popleft()()

    def synchronize(self) -> None:
        if self.capture is not None:
            raise CUDARuntimeError("the event was recorded in a capture")
        self.complete(self.number)

    @property
    def done(self) -> bool:
        return self.reached >= self.number


def get_elapsed_time(start: Event, end: Event) -> float:
    """As `cupy.cuda.get_elapsed_time`: milliseconds."""
    if not (start.timed and end.timed and start.number and end.number):
        raise CUDARuntimeError("an event without a time")
    if not (start.done and end.done):
        raise CUDARuntimeError("device not ready")
    return 1000 * (end.time - start.time)


class Graph:
    """As `cupy.cuda.Graph`: keeps no array alive, as CUDA's does not."""

    def __init__(self, machine: Machine, work: list[Work]) -> None:
        self.machine = machine
        self.work = tuple(work)

    def launch(self, stream: Stream | None = None) -> None:
        target = self.machine.stream(stream)
        self.machine.check_device(target)
        for work in self.work:
            target.submit(work)

    def upload(self, stream: Stream | None = None) -> None:
        self.machine.stream(stream)


class DeviceMemory:
    """An allocation; poisoned when it is made and when it is given back.

    It is given back in the order of the stream it was asked for on, as in CuPy's pool: what that
    stream was given before may still use it, another stream may not.
    """

    def __init__(self, machine: Machine, size: int) -> None:
        taken = machine.allocate(size)
        self.size = size
        raw = np.full(size + ALIGNMENT, 0xFF, np.uint8)
        self.ptr = raw.ctypes.data + -raw.ctypes.data % ALIGNMENT
        machine.device_ranges[self.ptr] = self.ptr + size
        stream = machine.stream()
        weakref.finalize(self, self._release, machine, stream, raw, self.ptr, taken).atexit = False

    @staticmethod
    def _release(machine: Machine, stream: Stream, raw: Any, ptr: int, taken: int) -> None:
        machine.used_bytes -= taken

        def work() -> None:
            machine.device_ranges.pop(ptr, None)
            raw[:] = 0xFF
            FREED.append(raw)

        if stream.queue:
            stream.queue.append(work)
        else:
            work()


FREED: deque[Any] = deque(maxlen=64)  # not given back at once: a late reader finds 0xFF


class UnownedMemory:
    """As `cupy.cuda.UnownedMemory`."""

    machine: ClassVar[Machine]

    def __init__(self, ptr: int, size: int, owner: object, device_id: int = -1) -> None:
        self.ptr, self.size, self.owner = ptr, size, owner
        ranges = self.machine.device_ranges
        if not self.machine.within(ranges, ptr, size):
            ranges[ptr] = ptr + size
            weakref.finalize(self, ranges.pop, ptr, None).atexit = False


class MemoryPointer:
    """As `cupy.cuda.MemoryPointer`."""

    machine: ClassVar[Machine]

    def __init__(self, mem: Any, offset: int) -> None:
        self.mem, self.ptr = mem, mem.ptr + offset

    def __int__(self) -> int:
        return int(self.ptr)

    def __add__(self, offset: int) -> MemoryPointer:
        return type(self)(self.mem, self.ptr - self.mem.ptr + offset)

    def _transfer(self, dst: int, src: Any, size: int, kind: int, stream: Stream | None) -> None:
        target = self.machine.stream(stream)
        if kind != DEVICE_TO_DEVICE and target.capture is not None:
            raise RuntimeError("the current stream is capturing, so transfers are disallowed")
        self.machine.copy(dst, src, size, kind, target)

    def copy_from_host_async(self, mem: Any, size: int, stream: Stream | None = None) -> None:
        self._transfer(self.ptr, getattr(mem, "value", mem), size, HOST_TO_DEVICE, stream)

    def copy_to_host_async(self, mem: Any, size: int, stream: Stream | None = None) -> None:
        self._transfer(getattr(mem, "value", mem), self.ptr, size, DEVICE_TO_HOST, stream)

    def copy_from_device_async(
        self, src: MemoryPointer, size: int, stream: Stream | None = None
    ) -> None:
        self._transfer(self.ptr, src.ptr, size, DEVICE_TO_DEVICE, stream)

    def memset_async(self, value: int, size: int, stream: Stream | None = None) -> None:
        ptr = self.ptr
        if not self.machine.within(self.machine.device_ranges, ptr, size):
            raise CUDARuntimeError(f"a fill of {size} bytes outside of device memory")
        self.machine.stream(stream).submit(lambda: ctypes.memset(ptr, value, size) and None)


class FakeArray:
    """As `cupy.ndarray`, of which it has what the project asks for."""

    machine: ClassVar[Machine]
    pointer: ClassVar[type[MemoryPointer]]
    __array_priority__ = 100

    def __init__(
        self, shape: Any, dtype: Any = float, memptr: Any = None, strides: Any = None,
        order: str = "C",
    ) -> None:  # fmt: skip
        shape = (int(shape),) if np.isscalar(shape) else tuple(int(size) for size in shape)
        dtype = np.dtype(dtype)
        size = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
        if memptr is None:
            memptr = self.pointer(DeviceMemory(self.machine, size), 0)
        self.data = memptr
        self.host = self.machine.view(memptr.ptr, shape, dtype)  # for the stand-in alone
        if strides is not None:
            self.host = np.lib.stride_tricks.as_strided(self.host, shape, strides)

    shape = property(lambda self: self.host.shape)
    dtype = property(lambda self: self.host.dtype)
    ndim = property(lambda self: self.host.ndim)
    size = property(lambda self: self.host.size)
    nbytes = property(lambda self: self.host.nbytes)
    itemsize = property(lambda self: self.host.itemsize)
    strides = property(lambda self: self.host.strides)
    flags = property(lambda self: self.host.flags)

    @property
    def __cuda_array_interface__(self) -> dict[str, Any]:
        strides = None if self.flags.c_contiguous else self.strides
        return {
            "shape": self.shape, "typestr": self.dtype.str, "data": (self.data.ptr, False),
            "strides": strides, "version": 3,
        }  # fmt: skip

    def __array__(self, dtype: Any = None, copy: Any = None) -> Any:
        raise TypeError(
            "Implicit conversion to a NumPy array is not allowed. "
            "Please use `.get()` to construct a NumPy array explicitly."
        )

    def __len__(self) -> int:
        return len(self.host)

    def _like(self, host: Any) -> FakeArray:
        """The same memory as NumPy has looked at it."""
        same = type(self).__new__(type(self))
        offset = host.ctypes.data - self.host.ctypes.data
        same.data, same.host = self.data + offset, host
        return same

    def __getitem__(self, index: Any) -> FakeArray:
        host = self.host[index]
        if not isinstance(host, np.ndarray):
            index = index if isinstance(index, tuple) else (index,)
            host = self.host[(*index, ...)]
        if host.size and not np.shares_memory(host, self.host):
            raise NotImplementedError("the stand-in has no advanced indexing")
        return self._like(host)

    def __setitem__(self, index: Any, value: Any) -> None:
        stream = self.machine.stream()
        if isinstance(value, FakeArray):
            source = value.host
        elif isinstance(value, np.ndarray) and stream.capture is not None:
            raise RuntimeError("the current stream is capturing, so transfers are disallowed")
        else:
            source = np.array(value)
        host = self.host
        np.broadcast_to(source, host[index].shape)

        def work() -> None:
            host[index] = source

        stream.submit(work)

    def fill(self, value: Any) -> None:
        self[...] = value

    def get(
        self, stream: Stream | None = None, order: str = "C", out: Any = None, blocking: bool = True
    ) -> Any:
        if out is None:
            out = np.empty(self.shape, self.dtype)
        if not isinstance(out, np.ndarray):
            raise TypeError("Only numpy.ndarray can be obtained from cupy.ndarray")
        if self.dtype != out.dtype:
            raise TypeError(f"{out.dtype} array cannot be obtained from {self.dtype} array")
        if self.shape != out.shape:
            raise ValueError(f"Shape mismatch. Expected shape: {self.shape}, actual: {out.shape}")
        target = self.machine.stream(stream)
        if target.capture is not None:
            raise RuntimeError("the current stream is capturing, so D2H transfers are disallowed")
        source = self.host

        def work() -> None:
            out[...] = source

        target.submit(work)
        pinned = self.machine.within(self.machine.pinned_ranges, out.ctypes.data, out.nbytes)
        if blocking or not pinned:
            target.synchronize()
        return out

    def set(self, arr: Any, stream: Stream | None = None) -> None:
        if not isinstance(arr, np.ndarray):
            raise TypeError("Only numpy.ndarray can be set to cupy.ndarray")
        if self.dtype != arr.dtype:
            raise TypeError(f"{arr.dtype} array cannot be set to {self.dtype} array")
        if self.shape != arr.shape:
            raise ValueError(f"Shape mismatch. Old shape: {self.shape}, new shape: {arr.shape}")
        if not self.flags.c_contiguous:
            raise RuntimeError("Cannot set to non-contiguous array")
        self.data.copy_from_host_async(np.ascontiguousarray(arr).ctypes.data, self.nbytes, stream)

    def item(self) -> Any:
        return self.get().item()

    def __int__(self) -> int:
        return int(self.item())

    def __float__(self) -> float:
        return float(self.item())

    def reshape(self, *shape: Any, order: str = "C") -> FakeArray:
        host = self.host.reshape(*shape)
        if host.size and not np.shares_memory(host, self.host):
            return self.copy().reshape(*shape)
        return self._like(host)

    def ravel(self) -> FakeArray:
        return self.reshape(-1)

    def view(self, dtype: Any = None) -> FakeArray:
        return self._like(self.host.view(self.dtype if dtype is None else dtype))

    def astype(self, dtype: Any, copy: bool = True) -> FakeArray:
        if not copy and np.dtype(dtype) == self.dtype:
            return self
        fresh = type(self)(self.shape, dtype)
        fresh[...] = self
        return fresh

    def copy(self) -> FakeArray:
        return self.astype(self.dtype)

    def __dlpack_device__(self) -> tuple[int, int]:
        return 2, 0

    def __dlpack__(self, **_: Any) -> Any:
        raise NotImplementedError("the stand-in gives its arrays to itself only")


class RawKernel:
    """As `cupy.RawKernel`, run by the emulation that has a kernel of that name."""

    machine: ClassVar[Machine]

    def __init__(self, code: str, name: str, options: tuple[str, ...] = ()) -> None:
        self.name = name

    @property
    def max_dynamic_shared_size_bytes(self) -> int:
        return self.machine.shared_limits.get(self.name, 48 * 1024)

    @max_dynamic_shared_size_bytes.setter
    def max_dynamic_shared_size_bytes(self, limit: int) -> None:
        if limit > self.machine.attributes["MaxSharedMemoryPerBlockOptin"]:
            raise CUDADriverError("CUDA_ERROR_INVALID_VALUE: more shared memory than there is")
        self.machine.shared_limits[self.name] = limit

    def __call__(
        self, grid: tuple[int, ...], block: tuple[int, ...], args: tuple[Any, ...], *,
        shared_mem: int = 0,
    ) -> None:  # fmt: skip
        (params,) = args
        assert params.size == 1  # CuPy passes NumPy arrays of one element by value
        grid, block = (*grid, 1, 1)[:3], (*block, 1, 1)[:3]
        assert grid[2] == block[1] == block[2] == 1, "the emulation has not so many dimensions"
        if not 1 <= block[0] <= 1024 or not 1 <= grid[0] < 2**31 or not 1 <= grid[1] < 2**16:
            raise CUDADriverError(f"CUDA_ERROR_INVALID_VALUE: grid {grid}, block {block}")
        if shared_mem > self.max_dynamic_shared_size_bytes:
            raise CUDADriverError(f"CUDA_ERROR_INVALID_VALUE: {shared_mem} bytes of shared memory")
        value = np.array(params)  # the argument as it is now

        def work() -> None:
            with EMULATION:
                error = emulated_launch(self.name)(
                    self.name.encode(), ctypes.c_void_p(value.ctypes.data), grid[0], grid[1],
                    block[0], ctypes.c_longlong(shared_mem),
                )  # fmt: skip
            if error is not None:
                raise CUDADriverError(f"{self.name}: {error.decode()}")
            self.machine.launched.append(self.name)

        self.machine.check_device(self.machine.stream())
        self.machine.stream().submit(work)


def emulated_launch(kernel: str) -> Any:
    """The function that launches it: (name, argument, grid x, grid y, threads, shared bytes)."""
    if kernel.startswith("knnmoe_step_"):
        import step_emulated

        return step_emulated.library().knnmoe_launch
    import emulated

    return emulated.library().knnmoe_launch


class RawModule:
    """As `cupy.RawModule`."""

    kernel: ClassVar[type[RawKernel]]

    def __init__(
        self, code: str | None = None, *, path: str | None = None, options: tuple[str, ...] = (),
        backend: str = "nvrtc", **_: Any,
    ) -> None:  # fmt: skip
        if not isinstance(code, str) or not isinstance(options, tuple):
            raise TypeError("code must be a str and options a tuple")
        self.code = code

    def get_function(self, name: str) -> RawKernel:
        if f"({name}," not in self.code and f" {name}(" not in self.code:
            raise CUDADriverError(f"CUDA_ERROR_NOT_FOUND: {name}")
        return self.kernel(self.code, name)


class Device:
    """As `cupy.cuda.Device`."""

    machine: ClassVar[Machine]
    capability: ClassVar[str]

    def __init__(self, device: int | None = None) -> None:
        self.id = self.machine.device if device is None else device

    @property
    def attributes(self) -> dict[str, int]:
        return dict(self.machine.attributes)

    @property
    def compute_capability(self) -> str:
        return self.capability

    @property
    def mem_info(self) -> tuple[int, int]:
        return self.machine.memory_bytes - self.machine.used_bytes, self.machine.memory_bytes

    def synchronize(self) -> None:
        self.machine.synchronize()

    def use(self) -> Device:
        self.machine.devices[-1] = self.id
        return self

    def __enter__(self) -> Device:
        self.machine.devices.append(self.id)
        return self

    def __exit__(self, *_: object) -> None:
        self.machine.devices.pop()


class MemoryPool:
    """As `cupy.get_default_memory_pool()`; keeps nothing that is free."""

    def __init__(self, machine: Machine) -> None:
        self.machine = machine

    def used_bytes(self) -> int:
        return self.machine.used_bytes

    def total_bytes(self) -> int:
        return self.machine.used_bytes

    def free_bytes(self) -> int:
        return 0

    def free_all_blocks(self, stream: Any = None) -> None:
        return None

    def set_limit(self, size: int | None = None, fraction: float | None = None) -> None:
        self.machine.limit = size or int((fraction or 0) * self.machine.memory_bytes)

    def get_limit(self) -> int:
        return self.machine.limit


def fake_cupy(
    *,
    lazy: bool = True,
    memory_bytes: int = 4 << 30,
    multiprocessors: int = 2,
    shared_bytes: int = 99 * 1024,
    capability: str = "86",
    devices: int = 1,
) -> Any:
    """A fresh device, as the module `cupy`; its `cupyx` is the other module."""
    attributes = {
        "MultiProcessorCount": multiprocessors, "MaxSharedMemoryPerBlockOptin": shared_bytes,
        "MaxThreadsPerBlock": 1024, "WarpSize": 32, "ComputeCapabilityMajor": int(capability[:-1]),
        "ComputeCapabilityMinor": int(capability[-1]), "MaxGridDimX": 2**31 - 1,
        "MaxGridDimY": 2**16 - 1, "Integrated": 0, "L2CacheSize": 4 << 20,
    }  # fmt: skip
    machine = Machine(lazy=lazy, memory_bytes=memory_bytes, attributes=attributes)

    def of_this_machine(base: type, **more: Any) -> Any:
        return type(base.__name__, (base,), {"machine": machine, **more})

    stream_type = of_this_machine(Stream)
    stream_type.null = stream_type(null=True)
    pointer = of_this_machine(MemoryPointer)
    array_type = of_this_machine(FakeArray, pointer=pointer)
    kernel = of_this_machine(RawKernel)
    pool = MemoryPool(machine)

    def empty(shape: Any, dtype: Any = float, order: str = "C") -> Any:
        return array_type(shape, dtype)

    def full(shape: Any, fill_value: Any, dtype: Any = None) -> Any:
        array = array_type(shape, np.asarray(fill_value).dtype if dtype is None else dtype)
        array.fill(fill_value)
        return array

    def zeros(shape: Any, dtype: Any = float, order: str = "C") -> Any:
        return full(shape, 0, dtype)

    def asarray(
        a: Any, dtype: Any = None, order: Any = None, *, copy: Any = None, blocking: bool = False
    ) -> Any:
        if isinstance(a, FakeArray):
            return a.astype(a.dtype if dtype is None else dtype, copy=bool(copy))
        host = np.ascontiguousarray(a, dtype).reshape(np.shape(a))
        array = array_type(host.shape, host.dtype)
        array.set(host)
        if blocking:
            machine.stream().synchronize()
        return array

    def ascontiguousarray(a: Any, dtype: Any = None) -> Any:
        array = asarray(a, dtype)
        return array if array.flags.c_contiguous else array.copy()

    def from_dlpack(array: Any, *, device: Any = None, copy: Any = None) -> Any:
        return array if isinstance(array, FakeArray) else asarray(np.from_dlpack(array))

    def matmul(a: Any, b: Any) -> Any:
        return asarray(a.get() @ b.get())

    def asnumpy(
        a: Any, stream: Any = None, order: str = "C", out: Any = None, *, blocking: bool = True
    ) -> Any:
        if isinstance(a, FakeArray):
            return a.get(stream=stream, order=order, out=out, blocking=blocking)
        return np.asarray(a)

    def alloc(size: int) -> Any:
        return pointer(DeviceMemory(machine, size), 0)

    def alloc_pinned_memory(size: int) -> Any:
        kind = type("PinnedMemoryPointer", (ctypes.c_ubyte * max(size, 1),), {})
        memory: Any = kind()
        memory.ptr = ctypes.addressof(memory)
        memory.size = lambda: size
        machine.pinned_ranges[memory.ptr] = memory.ptr + size
        weakref.finalize(memory, machine.pinned_ranges.pop, memory.ptr, None).atexit = False
        return memory

    def empty_pinned(shape: Any, dtype: Any = float, order: str = "C") -> Any:
        shape = (shape,) if np.isscalar(shape) else tuple(shape)
        count = int(np.prod(shape, dtype=np.int64)) * np.dtype(dtype).itemsize
        array = np.ndarray(shape, dtype, buffer=alloc_pinned_memory(count))
        array.view(np.uint8).reshape(-1)[...] = 0xFF
        return array

    def zeros_pinned(shape: Any, dtype: Any = float, order: str = "C") -> Any:
        array = empty_pinned(shape, dtype)
        array[...] = 0
        return array

    def memcpy_async(dst: int, src: int, size: int, kind: int, stream: int) -> None:
        machine.copy(dst, src, size, kind, machine.streams[stream])

    def memcpy(dst: int, src: int, size: int, kind: int) -> None:
        machine.copy(dst, src, size, kind, machine.streams[0])
        machine.streams[0].synchronize()

    def memset_async(ptr: int, value: int, size: int, stream: int) -> None:
        pointer(SimpleNamespace(ptr=ptr), 0).memset_async(value, size, machine.streams[stream])

    runtime = SimpleNamespace(
        CUDARuntimeError=CUDARuntimeError,
        getDeviceCount=lambda: devices,
        getDevice=lambda: machine.device,
        setDevice=lambda device: None,
        getDeviceProperties=lambda device: {"name": b"emulated device"},
        driverGetVersion=lambda: 13000,
        runtimeGetVersion=lambda: 13000,
        deviceSynchronize=machine.synchronize,
        streamSynchronize=lambda stream: machine.streams[stream].synchronize(),
        memcpyAsync=memcpy_async,
        memcpy=memcpy,
        memsetAsync=memset_async,
        memcpyHostToHost=HOST_TO_HOST,
        memcpyHostToDevice=HOST_TO_DEVICE,
        memcpyDeviceToHost=DEVICE_TO_HOST,
        memcpyDeviceToDevice=DEVICE_TO_DEVICE,
        memcpyDefault=DEFAULT,
        streamCaptureModeGlobal=0,
        streamCaptureModeThreadLocal=1,
        streamCaptureModeRelaxed=2,
    )
    memory = SimpleNamespace(
        OutOfMemoryError=OutOfMemoryError,
        MemoryPointer=pointer,
        UnownedMemory=of_this_machine(UnownedMemory),
        alloc=alloc,
    )
    cuda = SimpleNamespace(
        Device=of_this_machine(Device, capability=capability),
        Event=of_this_machine(Event),
        Graph=Graph,
        MemoryPointer=pointer,
        Stream=stream_type,
        UnownedMemory=memory.UnownedMemory,
        alloc=alloc,
        alloc_pinned_memory=alloc_pinned_memory,
        driver=SimpleNamespace(CUDADriverError=CUDADriverError),
        get_current_stream=lambda device_id=-1: machine.stream(),
        get_elapsed_time=get_elapsed_time,
        memory=memory,
        runtime=runtime,
    )
    types = (
        np.float16, np.float32, np.float64, np.int8, np.int32, np.int64, np.uint8, np.uint32,
        np.uint64, np.bool_,
    )  # fmt: skip
    return SimpleNamespace(
        **{kind.__name__: kind for kind in types},
        RawKernel=kernel,
        RawModule=of_this_machine(RawModule, kernel=kernel),
        __version__="14.2.0",
        asarray=asarray,
        array=lambda a, dtype=None: asarray(a, dtype, copy=True),
        ascontiguousarray=ascontiguousarray,
        asnumpy=asnumpy,
        cuda=cuda,
        cupyx=SimpleNamespace(empty_pinned=empty_pinned, zeros_pinned=zeros_pinned),
        empty=empty,
        empty_like=lambda a, dtype=None: empty(a.shape, a.dtype if dtype is None else dtype),
        from_dlpack=from_dlpack,
        matmul=matmul,
        full=full,
        get_default_memory_pool=lambda: pool,
        get_default_pinned_memory_pool=lambda: SimpleNamespace(free_all_blocks=lambda: None),
        machine=machine,
        ndarray=array_type,
        zeros=zeros,
        zeros_like=lambda a, dtype=None: zeros(a.shape, a.dtype if dtype is None else dtype),
    )


def install(monkeypatch: Any, cupy: Any = None) -> Any:
    """Put a stand-in where `import cupy` and `import cupyx` find it; returns it."""
    cupy = fake_cupy() if cupy is None else cupy
    modules = {
        "cupy": cupy, "cupyx": cupy.cupyx, "cupy.cuda": cupy.cuda,
        "cupy.cuda.memory": cupy.cuda.memory, "cupy.cuda.runtime": cupy.cuda.runtime,
    }  # fmt: skip
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    return cupy
