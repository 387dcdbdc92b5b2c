"""What others take for the same search: torch, faiss on the GPU, cuVS.

torch does the whole blend (product, top K, gather, weighted sum), as it is called and as a CUDA
graph. faiss and cuVS do the search alone, as they cannot be captured: they are compared by `call`.
All read keys and queries where they are on the device. Each names how many of the neighbours it
found are among ours (`agreement`).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import numpy as np
from gpu_tally import Absent
from gpu_timing import (
    DECODE_TOKENS,
    EXPERTS,
    KEY_BYTES,
    NEIGHBORS,
    Bench,
    Clock,
    Effort,
    Records,
    Save,
    Shape,
    Stopwatch,
    overlap,
    shapes,
    too_large,
)


@dataclass(frozen=True)
class Subject:
    """One memory on the device, with the queries of the largest call."""

    shape: Shape
    key_type: str
    keys: Any
    values: Any
    queries: Any  # [T, D] fp32
    r: Any  # [T, E] fp32


@dataclass(frozen=True)
class Search:
    """A rival over one memory; `find` runs over the first T queries and returns ids [T, K]."""

    find: Callable[[int], Any]
    times: Callable[[int], dict[str, Any]]


class Rival:
    """One library. `open` may raise `Absent`."""

    name: str
    key_types: tuple[str, ...]
    extra_copies: int  # of the keys that it makes for itself

    def open(self, bench: Bench, subject: Subject) -> Search:
        """The library's search over a memory."""
        raise NotImplementedError


class Torch(Rival):
    """torch: a matrix product, topk and a gather."""

    name, key_types, extra_copies = "torch", ("f16", "f32"), 0

    def __init__(self, effort: Effort) -> None:
        self.torch = _module("torch")
        if not self.torch.cuda.is_available():
            raise Absent(f"torch {self.torch.__version__} sees no CUDA device")
        torch = self.torch
        self.eviction = torch.zeros(
            4 * torch.cuda.get_device_properties(0).L2_cache_size, dtype=torch.uint8, device="cuda"
        )
        clock = Clock(
            lambda: torch.cuda.Event(enable_timing=True),
            lambda start, end: float(start.elapsed_time(end)),
            torch.cuda.synchronize,
            lambda: self.eviction.zero_(),
        )
        self.stopwatch = Stopwatch(clock, effort)

    def open(self, bench: Bench, subject: Subject) -> Search:
        bench.stream.synchronize()
        take = self.torch.from_dlpack
        keys, values = take(subject.keys), take(subject.values)
        x, r = take(subject.queries), take(subject.r)
        center = self.torch.zeros(keys.shape[1], device=keys.device)

        def blend(tokens: int) -> tuple[Any, Any]:
            return torch_blend(x[:tokens], r[:tokens], keys, values, center, NEIGHBORS)

        def times(tokens: int) -> dict[str, Any]:
            call = self.stopwatch.call(lambda: blend(tokens))
            return {**call, **self.stopwatch.graph(self._capture(lambda: blend(tokens)))}

        return Search(lambda tokens: blend(tokens)[1].cpu().numpy(), times)

    def _capture(self, run: Callable[[], Any]) -> Callable[[int], Callable[[], None]]:
        torch = self.torch

        def captured(calls: int) -> Callable[[], None]:
            side = torch.cuda.Stream()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                for _ in range(3):
                    run()
            torch.cuda.current_stream().wait_stream(side)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                for _ in range(calls):
                    run()

            def replay() -> None:
                graph.replay()

            return replay

        return captured


def torch_blend(x: Any, r: Any, keys: Any, values: Any, center: Any, k: int) -> tuple[Any, Any]:
    """The blend with the paper's numbers, as one would write it in torch; rows and neighbours."""
    q = x - center
    q = q / q.norm(dim=1, keepdim=True)
    best, ids = (q.to(keys.dtype) @ keys.T).topk(k, dim=1)
    similarities = best.float().clamp(0, 1)
    weights = similarities / similarities.sum(dim=1, keepdim=True).clamp_min(1e-30)
    mean = (weights.unsqueeze(-1) * values[ids].float()).sum(dim=1)
    return r + similarities.mean(dim=1, keepdim=True) * (mean - r), ids


class Faiss(Rival):
    """faiss on the GPU: exhaustive inner products, keys in fp32 or fp16."""

    name, key_types, extra_copies = "faiss-gpu", ("f16", "f32"), 1

    def __init__(self) -> None:
        self.faiss = _module("faiss")
        if not hasattr(self.faiss, "StandardGpuResources"):
            raise Absent(f"faiss {self.faiss.__version__} was built without GPU support")
        if self.faiss.get_num_gpus() < 1:
            raise Absent("faiss sees no GPU")
        self.resources = self.faiss.StandardGpuResources()

    def open(self, bench: Bench, subject: Subject) -> Search:
        faiss, cupy, shape = self.faiss, bench.cupy, subject.shape
        config = faiss.GpuIndexFlatConfig()
        config.device = 0
        config.useFloat16 = subject.key_type == "f16"
        index = faiss.GpuIndexFlatIP(self.resources, shape.hidden, config)
        at_once = max(1, (256 << 20) // (4 * shape.hidden))
        for first in range(0, shape.entries, at_once):  # it takes fp32, wherever it is
            part = subject.keys[first : first + at_once].astype(np.float32)
            bench.stream.synchronize()
            index.add_c(len(part), faiss.cast_integer_to_float_ptr(part.data.ptr))
        most = len(subject.queries)
        scores = cupy.empty((most, NEIGHBORS), np.float32)
        ids = cupy.empty((most, NEIGHBORS), np.int64)

        def search(tokens: int) -> None:
            index.search_c(
                tokens,
                faiss.cast_integer_to_float_ptr(subject.queries.data.ptr),
                NEIGHBORS,
                faiss.cast_integer_to_float_ptr(scores.data.ptr),
                faiss.cast_integer_to_idx_t_ptr(ids.data.ptr),
            )

        def find(tokens: int) -> Any:
            search(tokens)
            bench.device.synchronize()
            return cupy.asnumpy(ids)[:tokens]

        return Search(find, lambda tokens: _calls(bench, lambda: search(tokens)))


class Cuvs(Rival):
    """cuVS: brute force."""

    name, key_types, extra_copies = "cuvs", ("f16", "f32"), 1

    def __init__(self) -> None:
        self.brute_force = _module("cuvs.neighbors").brute_force

    def open(self, bench: Bench, subject: Subject) -> Search:
        bench.stream.synchronize()
        index = self.brute_force.build(subject.keys, metric="inner_product")
        queries = subject.queries.astype(subject.keys.dtype)
        bench.device.synchronize()

        def search(tokens: int) -> Any:
            return self.brute_force.search(index, queries[:tokens], NEIGHBORS)

        def find(tokens: int) -> Any:
            _, ids = search(tokens)
            bench.device.synchronize()
            return bench.cupy.asnumpy(bench.cupy.asarray(ids))

        return Search(find, lambda tokens: _calls(bench, lambda: search(tokens)))


def measure_rival(
    cupy: Any,
    make: Callable[[], Rival],
    effort: Effort,
    deadline: float,
    save: Save,
    *,
    tokens: tuple[int, ...] = DECODE_TOKENS,
    which: list[Shape] | None = None,
) -> Records:
    """Times of a rival over memories of every shape that fits, and its agreement with us."""
    try:
        rival = make()
    except Absent as reason:
        return {"status": "absent", "why": str(reason)}
    bench = Bench(cupy, effort)
    rows: list[Records] = []
    records: Records = {"rows": rows, "left_out": []}
    for shape in shapes() if which is None else which:
        for key_type in rival.key_types:
            where = {"entries": shape.entries, "hidden": shape.hidden, "key_type": key_type}
            needed = shape.bytes(KEY_BYTES[key_type]) * (1 + rival.extra_copies)
            why = "out of time" if time.monotonic() > deadline else too_large(bench, needed)
            if why:
                records["left_out"].append({**where, "why": why})
                continue
            with bench.stream:
                for row in _measure(bench, rival, shape, key_type, tokens, deadline):
                    rows.append({"host": rival.name, **where, **row})
                    save(records)
    return records


def _measure(
    bench: Bench,
    rival: Rival,
    shape: Shape,
    key_type: str,
    tokens: tuple[int, ...],
    deadline: float,
) -> Iterator[Records]:
    keys, scales = bench.unit_rows(shape.entries, shape.hidden, (key_type,))[key_type]
    values, most = bench.values(shape.entries), max(tokens)
    queries = bench.queries(most, shape.hidden)
    r = bench.unit_rows(most, EXPERTS, ("f32",), seed=4)["f32"][0]
    search = rival.open(bench, Subject(shape, key_type, keys, values, queries, r))
    bound = bench.bind(bench.blend(keys, scales, values, most), queries)
    bound.run()
    ours = bench.cupy.asnumpy(bound.neighbors)
    agreement = overlap(ours, search.find(most))
    for count in tokens:
        if time.monotonic() <= deadline:
            yield {"tokens": count, "agreement": agreement, **search.times(count)}


def _calls(bench: Bench, run: Callable[[], Any]) -> dict[str, Any]:
    clock = bench.stopwatch.clock
    whole = Clock(clock.event, clock.elapsed_ms, bench.device.synchronize, clock.flush)
    return Stopwatch(whole, bench.stopwatch.effort).call(run)


def _module(name: str) -> Any:
    try:
        return import_module(name)
    except ImportError as error:
        raise Absent(f"{name.partition('.')[0]} is not installed ({error})") from error
