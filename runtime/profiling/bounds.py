"""What this machine can do at best: how fast memory is read and copied, and numbers multiplied.

Measured with as many threads as the model has. Each rate is the best of several tries, because it
is to bound what anything else can reach.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from .record import MachineBounds, ReadRate

if TYPE_CHECKING:
    from ..device.cuda import Cuda

WORKING_SETS = (256 << 10, 2 << 20, 16 << 20, 256 << 20)
PASS_BYTES = 64 << 20  # read at least in one try
TRIES = 5
GEMM_SIZE = 1024
_TOPOLOGY = "sys/devices/system/cpu"

HOST_HOW = (
    "Reading: largest of int64 numbers, NumPy, a share a thread. Copying: NumPy, of the largest "
    "working set. Product: fp32, 1024 x 1024 x 1024, ONNX Runtime. Best of 5 each."
)
DEVICE_HOW = (
    "Reading and copying: copies on the device, bytes read and written. Product: fp16, "
    "4096 x 4096 x 4096, CuPy. Best of 5 each."
)


def measure_bounds(threads: int) -> MachineBounds:
    """The bounds of the host; takes about a second."""
    with ThreadPoolExecutor(threads) as pool:
        spread = _Spread(pool, threads)
        reads = tuple(ReadRate(size, _read_rate(spread, size)) for size in WORKING_SETS)
        copy = _copy_rate(spread, WORKING_SETS[-1] // 2)
    return MachineBounds(reads, copy, _gemm_rate(threads), threads, HOST_HOW)


def physical_cores(root: Path = Path("/")) -> int:
    """Cores that this process may use, of which siblings count once: as ONNX Runtime takes them."""
    import os

    affinity = getattr(os, "sched_getaffinity", None)
    usable = sorted(affinity(0)) if affinity else list(range(os.cpu_count() or 1))
    cores = set()
    for cpu in usable:
        siblings = root / _TOPOLOGY / f"cpu{cpu}" / "topology" / "thread_siblings_list"
        cores.add(siblings.read_text().strip() if siblings.is_file() else str(cpu))
    return max(1, len(cores))


class _Spread:
    """Runs one call a thread and waits for all."""

    def __init__(self, pool: ThreadPoolExecutor, threads: int) -> None:
        self._pool, self.threads = pool, threads

    def best_seconds(self, calls: list[Callable[[], Any]]) -> float:
        best = np.inf
        for _ in range(TRIES):
            start = perf_counter()
            for running in [self._pool.submit(call) for call in calls]:
                running.result()
            best = min(best, perf_counter() - start)
        return float(best)


def _read_rate(spread: _Spread, size: int) -> float:
    passes = max(1, PASS_BYTES // size)
    shares = [np.ones(size // 8 // spread.threads, np.int64) for _ in range(spread.threads)]

    def reading(share: NDArray[np.int64]) -> Callable[[], None]:
        def read() -> None:
            for _ in range(passes):
                np.maximum.reduce(share)

        return read

    seconds = spread.best_seconds([reading(share) for share in shares])
    return passes * sum(share.nbytes for share in shares) / seconds / 1e9


def _copy_rate(spread: _Spread, size: int) -> float:
    shares = [np.ones(size // 8 // spread.threads, np.int64) for _ in range(spread.threads)]
    copies = [np.zeros_like(share) for share in shares]

    def copying(source: NDArray[np.int64], target: NDArray[np.int64]) -> Callable[[], None]:
        return lambda: np.copyto(target, source)

    seconds = spread.best_seconds([copying(*pair) for pair in zip(shares, copies, strict=True)])
    return 2 * sum(share.nbytes for share in shares) / seconds / 1e9


def _gemm_rate(threads: int) -> float:
    from ..engines.onnx_bytes import Node, Tensor, graph_bytes
    from ..engines.onnxruntime import OrtEngine

    shape = (GEMM_SIZE, GEMM_SIZE)
    weights: dict[str, NDArray[Any]] = {"w": np.ones(shape, np.float32)}
    graph = graph_bytes(
        [Node("MatMul", ["x", "w"], ["y"])],
        [Tensor("x", np.float32, shape)],
        [Tensor("y", np.float32, shape)],
        {},
        weights,
    )
    engine = OrtEngine(graph, threads=threads, weights=weights)
    run = engine.bind({"x": np.ones(shape, np.float32)}, {"y": np.zeros(shape, np.float32)})
    run()
    best = np.inf
    for _ in range(TRIES):
        start = perf_counter()
        run()
        best = min(best, perf_counter() - start)
    return float(2 * GEMM_SIZE**3 / best / 1e9)


def measure_device_bounds(cuda: Cuda, *, size: int = 512 << 20, side: int = 4096) -> MachineBounds:
    """The bounds of a CUDA device: copies of `size` bytes, a product of `side` rows and columns."""
    source, target = cuda.zeros(size, np.uint8), cuda.zeros(size, np.uint8)
    copy = 2 * size / _best_ms(cuda, lambda: cuda.copy(source, target)) / 1e6
    with cuda.current():
        matrix = cuda.cupy.zeros((side, side), np.float16)
    product = _best_ms(cuda, lambda: cuda.cupy.matmul(matrix, matrix))
    flops = 2 * side**3 / product / 1e6
    return MachineBounds((ReadRate(size, copy),), copy, flops, 1, DEVICE_HOW)


def _best_ms(cuda: Cuda, run: Callable[[], Any]) -> float:
    best = np.inf
    with cuda.lock, cuda.current():
        for _ in range(TRIES + 1):  # the first loads what it needs
            start = cuda.event()
            run()
            end = cuda.event()
            cuda.synchronize()
            best = min(best, cuda.elapsed_ms(start, end))
    return float(best)
