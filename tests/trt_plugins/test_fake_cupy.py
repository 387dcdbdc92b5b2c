"""The stand-in for CuPy refuses what CuPy and CUDA refuse, and does its worst where they may."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from fake_cupy import CUDARuntimeError, OutOfMemoryError, fake_cupy


@pytest.fixture
def cupy() -> Any:
    return fake_cupy()


def test_what_a_stream_was_given_waits_until_somebody_waits_for_it(cupy: Any) -> None:
    stream = cupy.cuda.Stream(non_blocking=True)
    host, result = cupy.cupyx.empty_pinned(4, np.float32), cupy.cupyx.zeros_pinned(4, np.float32)
    with stream:
        array = cupy.empty(4, np.float32)
        host[:] = 1
        array.set(host)
        host[:] = 2  # too early: the copy has not run
        array.get(out=result, stream=stream, blocking=False)
    assert (result == 0).all()
    stream.synchronize()
    assert (result == 2).all()


def test_pageable_memory_is_copied_at_once_and_read_in_order(cupy: Any) -> None:
    host = np.arange(4)
    array = cupy.asarray(host)
    host[:] = 0
    np.testing.assert_array_equal(array.get(), np.arange(4))
    with pytest.raises(TypeError, match="Implicit conversion"):
        np.asarray(array)


def test_streams_that_do_not_block_do_not_wait_for_each_other(cupy: Any) -> None:
    first, second = (cupy.cuda.Stream(non_blocking=True) for _ in range(2))
    array = cupy.zeros(3, np.int64)
    cupy.machine.synchronize()
    with first:
        array[...] = 1
        event = first.record()
    assert array.get(stream=second)[0] == 0
    second.wait_event(event)
    assert array.get(stream=second)[0] == 1


def test_a_capture_records_and_a_launch_replays(cupy: Any) -> None:
    stream = cupy.cuda.Stream(non_blocking=True)
    source = cupy.cupyx.zeros_pinned(2, np.float32)
    with stream:
        array, target = cupy.zeros(2, np.float32), cupy.zeros(2, np.float32)
        stream.synchronize()
        stream.begin_capture()
        kind = cupy.cuda.runtime.memcpyHostToDevice
        cupy.cuda.runtime.memcpyAsync(array.data.ptr, source.ctypes.data, 8, kind, stream.ptr)
        target[...] = array
        for refused in (
            stream.synchronize,
            lambda: array.get(),
            lambda: array.set(source),
            lambda: cupy.empty(3),
        ):
            with pytest.raises((CUDARuntimeError, RuntimeError)):
                refused()
        graph = stream.end_capture()
        source[:] = 7
        assert (target.get() == 0).all()
        graph.launch(stream)
        assert (target.get() == 7).all()
        source[:] = 8
        graph.launch(stream)
        assert (target.get() == 8).all()


def test_memory_is_poisoned_counted_and_guarded(cupy: Any) -> None:
    array = cupy.empty((2, 3), np.float32)
    assert np.isnan(array.get()).all()
    assert cupy.get_default_memory_pool().used_bytes() == 512
    copy = cupy.cuda.runtime.memcpyAsync
    with pytest.raises(CUDARuntimeError, match="outside"):
        copy(array.data.ptr + 8, array.data.ptr, 24, 3, 0)
    with pytest.raises(CUDARuntimeError, match="outside"):
        copy(array.data.ptr, np.zeros(6).ctypes.data, 24, 3, 0)
    with pytest.raises(OutOfMemoryError, match="Out of memory"):
        fake_cupy(memory_bytes=1 << 20).empty(1 << 20, np.float32)
    part = array[1]
    assert part.data.ptr == array.data.ptr + 12
    del array
    part[...] = 1
    assert (part.get() == 1).all()
    del part
    assert cupy.get_default_memory_pool().used_bytes() == 0


def test_a_pointer_from_elsewhere_is_an_array_too(cupy: Any) -> None:
    memory = cupy.cuda.alloc(64)
    unowned = cupy.cuda.UnownedMemory(memory.ptr, 64, memory)
    array = cupy.ndarray((4,), np.int64, cupy.cuda.MemoryPointer(unowned, 32))
    array.fill(5)
    assert list(array.get()) == [5] * 4
    assert (cupy.machine.view(memory.ptr, 4, np.int64) == -1).all()


def test_events_measure_and_order(cupy: Any) -> None:
    stream = cupy.cuda.Stream()
    start, end = cupy.cuda.Event(), cupy.cuda.Event()
    start.record(stream)
    ran: list[int] = []
    cupy.machine.submit(stream.ptr, lambda: ran.append(1))
    end.record(stream)
    with pytest.raises(CUDARuntimeError, match="not ready"):
        cupy.cuda.get_elapsed_time(start, end)
    end.synchronize()
    assert ran == [1]
    assert cupy.cuda.get_elapsed_time(start, end) >= 0
