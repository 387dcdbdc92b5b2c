"""How long our kernels take, and what the device's memory gives at best.

Three figures a call, in microseconds, each a median with its quartiles:

* `warm`: one of many calls in a CUDA graph, replayed; small memories stay in the L2 cache;
* `cold`: a graph of one call, replayed after the L2 cache was overwritten;
* `call`: from Python until the result is there, launch and synchronisation included.

Keys are random rows of length one, made on the device.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from knnmoe.runtime.calibration import Calibration
from knnmoe.trt_plugins.cupy_prototype import CupyBlend, MemoryArrays
from knnmoe.trt_plugins.plan import MAX_NEIGHBORS

SOURCE = Path(__file__).parent / "gpu_kernels.cu"
EXPERTS, NEIGHBORS = 64, 8
ENTRIES = (1_000, 10_000, 100_000, 1_000_000)
HIDDEN = (2048, 2880, 256)  # the one that targets speak of first: time may run out
DECODE_TOKENS, PREFILL_TOKENS = (1, 4, 16), (64, 512)
KEY_BYTES = {"f16": 2, "i8": 1, "f32": 4}
TWO_STAGE = "i8+f16"  # int8 keys scanned for 64 candidates, fp16 keys rescored
SPARE_BYTES = 1 << 30
GIB = 1 << 30

Records = dict[str, Any]
Save = Callable[[Records], None]


@dataclass(frozen=True)
class Effort:
    """How long is measured."""

    figure_ms: float = 50  # of device time a figure
    fewest: int = 7
    most: int = 60


QUICK = Effort(figure_ms=12, fewest=5, most=20)


@dataclass(frozen=True)
class Clock:
    """The few things that CuPy and torch call by different names; all on the current stream."""

    event: Callable[[], Any]
    elapsed_ms: Callable[[Any, Any], float]
    synchronize: Callable[[], None]
    flush: Callable[[], None]


class Stopwatch:
    """Times what was captured, and what is called."""

    def __init__(self, clock: Clock, effort: Effort) -> None:
        self.clock, self.effort = clock, effort

    def graph(self, capture: Callable[[int], Callable[[], None]]) -> dict[str, Any]:
        """`warm` and `cold` of what `capture(calls)` gives: a replay of so many calls."""
        single = capture(1)
        single()
        once_ms = max(1e-3, float(np.median(self._spans(single, 3, cold=False))))
        calls = int(np.clip(2 / once_ms, 1, 20))
        many = single if calls == 1 else capture(calls)
        many()
        repetitions = self._repetitions(once_ms * calls)
        warm = np.array(self._spans(many, repetitions, cold=False)) / calls
        cold = np.array(self._spans(single, self._repetitions(once_ms), cold=True))
        return {"warm": figure(1e3 * warm), "cold": figure(1e3 * cold)}

    def call(self, run: Callable[[], Any]) -> dict[str, Any]:
        """`call` of a function that leaves work on the device."""
        spans: list[float] = []
        run()
        self.clock.synchronize()
        until = time.perf_counter() + self.effort.figure_ms / 1e3
        while len(spans) < self.effort.fewest or (
            time.perf_counter() < until and len(spans) < 10 * self.effort.most
        ):
            start = time.perf_counter()
            run()
            self.clock.synchronize()
            spans.append(1e6 * (time.perf_counter() - start))
        return {"call": figure(np.array(spans))}

    def _repetitions(self, milliseconds: float) -> int:
        effort = self.effort
        return int(np.clip(effort.figure_ms / milliseconds, effort.fewest, effort.most))

    def _spans(self, launch: Callable[[], None], repetitions: int, *, cold: bool) -> list[float]:
        events = []
        for _ in range(repetitions):
            start, end = self.clock.event(), self.clock.event()
            if cold:
                self.clock.flush()
            start.record()
            launch()
            end.record()
            events.append((start, end))
        self.clock.synchronize()
        return [self.clock.elapsed_ms(start, end) for start, end in events]


def figure(microseconds: Any) -> dict[str, float]:
    """Median and quartiles of times."""
    low, median, high = np.percentile(microseconds, [25, 50, 75]).tolist()
    return {
        "median_us": median,
        "q1_us": low,
        "q3_us": high,
        "repetitions": len(microseconds),
    }


class Bench:
    """A stream, a stopwatch and the keys, through CuPy."""

    def __init__(self, cupy: Any, effort: Effort) -> None:
        self.cupy = cupy
        self.stream = cupy.cuda.Stream(non_blocking=True)
        self.device = cupy.cuda.Device()
        attributes = self.device.attributes
        self.multiprocessors = attributes["MultiProcessorCount"]
        self.l2_bytes = attributes["L2CacheSize"]
        self.module = cupy.RawModule(code=SOURCE.read_text(), options=("-std=c++17",))
        with self.stream:
            self.eviction = cupy.zeros(4 * max(self.l2_bytes, 1 << 20), np.uint8)
        self.stopwatch = Stopwatch(
            Clock(
                cupy.cuda.Event, cupy.cuda.get_elapsed_time, self.stream.synchronize, self._evict
            ),
            effort,
        )
        self._wake(effort)

    def _wake(self, effort: Effort) -> None:
        """Keep the device busy until its clocks are up."""
        until = time.perf_counter() + effort.figure_ms / 100
        while time.perf_counter() < until:
            for _ in range(10):
                self._evict()
            self.stream.synchronize()

    def _evict(self) -> None:
        self.cupy.cuda.runtime.memsetAsync(
            self.eviction.data.ptr, 0, self.eviction.nbytes, self.stream.ptr
        )

    def free_bytes(self) -> int:
        """Device memory that can still be had."""
        self.stream.synchronize()
        self.cupy.get_default_memory_pool().free_all_blocks()
        return int(self.device.mem_info[0])

    def capture(self, run: Callable[[], None]) -> Callable[[int], Callable[[], None]]:
        """For `Stopwatch.graph`: so many runs as one graph."""

        def captured(calls: int) -> Callable[[], None]:
            run()  # loads the kernels, which a capture may not
            self.stream.synchronize()
            self.stream.begin_capture()
            for _ in range(calls):
                run()
            graph = self.stream.end_capture()
            return lambda: graph.launch(self.stream)

        return captured

    def unit_rows(
        self, rows: int, hidden: int, types: tuple[str, ...], seed: int = 1
    ) -> dict[str, tuple[Any, Any]]:
        """Random keys in the types asked for, each with its key scales; the same rows in all."""
        cupy, null = self.cupy, np.uint64(0)
        dtypes = {"f32": np.float32, "f16": np.float16, "i8": np.int8}
        keys = {name: cupy.empty((rows, hidden), dtypes[name]) for name in types}
        scales, scales_i8 = (cupy.empty((rows, 2), np.float32) for _ in range(2))
        self.module.get_function("knnmoe_unit_rows")(
            (rows,),
            (256,),
            (
                *(keys.get(name, null) for name in ("f32", "f16", "i8")),
                scales,
                scales_i8,
                np.int32(hidden),
                np.uint64(seed),
            ),
        )
        return {
            name: (array, scales_i8 if name == "i8" else scales) for name, array in keys.items()
        }

    def values(self, rows: int) -> Any:
        """Random values [N, E] fp16."""
        return self.unit_rows(rows, EXPERTS, ("f16",), seed=2)["f16"][0]

    def blend(self, keys: Any, scales: Any, values: Any, max_tokens: int, **more: Any) -> CupyBlend:
        """Our kernels over a memory with the paper's calibration."""
        entries, hidden = keys.shape
        memory = MemoryArrays(
            keys=keys,
            key_scales=scales,
            values=values,
            center=np.zeros(hidden, np.float32),
            calibration=Calibration().vector(),
            n_valid=entries,
            k=NEIGHBORS,
            similarity="cosine",
            **more,
        )
        return CupyBlend(memory, max_tokens=max_tokens, cupy=self.cupy)

    def bind(self, blend: CupyBlend, x: Any) -> Any:
        """One call of one sequence; x [T, D]."""
        cupy = self.cupy
        r = self.unit_rows(len(x), EXPERTS, ("f32",), seed=4)["f32"][0]
        state, lengths = cupy.zeros((1, 2), np.float32), cupy.asarray(np.array([len(x)]))
        return blend.bind(x, r, state, lengths)

    def queries(self, tokens: int, hidden: int) -> Any:
        """Random router inputs [T, D] fp32."""
        return self.unit_rows(tokens, hidden, ("f32",), seed=3)["f32"][0]

    def times(self, run: Callable[[], None]) -> dict[str, Any]:
        """All three figures of a bound call."""
        return {**self.stopwatch.graph(self.capture(run)), **self.stopwatch.call(run)}


def measure_bandwidth(cupy: Any, effort: Effort) -> Records:
    """What a device-to-device copy and a plain read of up to a GiB reach, in GB/s."""
    bench = Bench(cupy, effort)
    size = min(GIB, bench.free_bytes() // 4) // 4096 * 4096
    with bench.stream:
        source, target = cupy.zeros(size, np.uint8), cupy.zeros(size, np.uint8)
        sink = cupy.zeros(1, np.uint32)
        read = bench.module.get_function("knnmoe_read")

        def run_copy() -> None:
            cupy.cuda.runtime.memcpyAsync(
                target.data.ptr,
                source.data.ptr,
                size,
                cupy.cuda.runtime.memcpyDeviceToDevice,
                bench.stream.ptr,
            )

        def run_read() -> None:
            read((4 * bench.multiprocessors,), (512,), (source, np.int64(size // 16), sink))

        copied = bench.stopwatch.graph(bench.capture(run_copy))["warm"]
        readen = bench.stopwatch.graph(bench.capture(run_read))["warm"]
    return {
        "bytes": size,
        "copy": copied,
        "read": readen,
        "copy_gb_s": 2 * size / copied["median_us"] / 1e3,  # what is read and what is written
        "read_gb_s": size / readen["median_us"] / 1e3,
    }


@dataclass(frozen=True)
class Shape:
    """One memory that is measured."""

    entries: int
    hidden: int

    def bytes(self, key_bytes: int) -> int:
        """Of keys, scales and values."""
        return self.entries * (self.hidden * key_bytes + 16 + 2 * EXPERTS)


def shapes(entries: tuple[int, ...] = ENTRIES, hidden: tuple[int, ...] = HIDDEN) -> list[Shape]:
    """What is measured, in order of interest: targets first, as time may run out."""
    interest = {100_000: 0, 1_000_000: 1, 10_000: 2, 1_000: 3}
    return [Shape(n, d) for d in hidden for n in sorted(entries, key=lambda n: interest.get(n, 9))]


def too_large(bench: Bench, needed: int) -> str:
    """Why so many bytes do not fit on the device; nothing if they do."""
    left = max(0, bench.free_bytes() - SPARE_BYTES)
    if needed <= left:
        return ""
    return f"{needed / GIB:.1f} GiB do not fit into the {left / GIB:.1f} GiB left"


def measure_ours(
    cupy: Any,
    effort: Effort,
    deadline: float,
    save: Save,
    *,
    tokens: tuple[int, ...] = DECODE_TOKENS,
    which: list[Shape] | None = None,
    types: tuple[str, ...] = ("f16", "i8", "f32"),
) -> Records:
    """Times of CupyBlend over memories of every shape, key type and number of tokens."""
    bench = Bench(cupy, effort)
    rows: list[Records] = []
    records: Records = {"rows": rows, "left_out": []}
    for shape in shapes() if which is None else which:
        with bench.stream:
            for name in _types_now(bench, shape, types, deadline, records):
                _measure_memory(bench, shape, name, tokens, deadline, records, save)
        save(records)
    return records


def _types_now(
    bench: Bench, shape: Shape, types: tuple[str, ...], deadline: float, records: Records
) -> Iterator[str]:
    for name in types:
        where = {"entries": shape.entries, "hidden": shape.hidden, "key_type": name}
        if time.monotonic() > deadline:
            records["left_out"].append({**where, "why": "out of time"})
            continue
        # Keys of fp16 are measured with int8 ones beside them.
        if why := too_large(bench, shape.bytes({"f16": 3, "i8": 1, "f32": 4}[name])):
            records["left_out"].append({**where, "why": why})
        else:
            yield name


def _measure_memory(
    bench: Bench,
    shape: Shape,
    name: str,
    tokens: tuple[int, ...],
    deadline: float,
    records: Records,
    save: Save,
) -> None:
    queries = bench.queries(max(tokens), shape.hidden)
    nearest: Any = None
    for variant, scanned, blend in _blends(bench, shape, name, max(tokens)):
        for count in tokens:
            where: Records = {"entries": shape.entries, "hidden": shape.hidden}
            where["key_type"] = variant
            if time.monotonic() > deadline:
                records["left_out"].append({**where, "tokens": count, "why": "out of time"})
                continue
            bound = bench.bind(blend, queries[:count])
            if scanned != name and nearest is not None:
                bound.run()
                found = bench.cupy.asnumpy(bound.neighbors)
                where["agreement"] = overlap(nearest[:count], found)
            records["rows"].append(
                {
                    "host": "knnmoe",
                    **where,
                    "tokens": count,
                    "neighbors": NEIGHBORS,
                    "experts": EXPERTS,
                    # What the keys of one scan take; the least that has to be read.
                    "key_bytes": shape.entries * (shape.hidden * KEY_BYTES[scanned] + 4),
                    **bench.times(bound.run),
                }
            )
            if scanned == name and count == max(tokens):
                nearest = bench.cupy.asnumpy(bound.neighbors)
            save(records)


def _blends(
    bench: Bench, shape: Shape, name: str, max_tokens: int
) -> Iterator[tuple[str, str, CupyBlend]]:
    """(key type as reported, what is scanned, blend); in two stages too where keys are fp16."""
    two_stages = name == "f16"
    keys = bench.unit_rows(shape.entries, shape.hidden, ("f16", "i8") if two_stages else (name,))
    values = bench.values(shape.entries)
    yield name, name, bench.blend(*keys[name], values, max_tokens)
    for candidates in (MAX_NEIGHBORS, 32) if two_stages else ():
        scan_keys, scan_scales = keys["i8"]
        scan = {"scan_keys": scan_keys, "scan_scales": scan_scales, "candidates": candidates}
        label = TWO_STAGE if candidates == MAX_NEIGHBORS else f"{TWO_STAGE}, R={candidates}"
        yield label, "i8", bench.blend(*keys[name], values, max_tokens, **scan)


def overlap(ours: Any, theirs: Any) -> float:
    """Mean share of our neighbours that are among theirs."""
    pairs = zip(ours.tolist(), theirs.tolist(), strict=True)
    return float(np.mean([len(set(a) & set(b)) / len(a) for a, b in pairs]))
