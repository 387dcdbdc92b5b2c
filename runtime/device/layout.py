"""A layout on a CUDA device: uploads a step's few numbers, runs its parts, brings the logits back.

Between upload and download the host only waits. A decode step is captured in a CUDA graph the
second time it runs, so that from then on it is one launch.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field
from time import perf_counter_ns
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..bundle import ModelShape
from ..cache import Cache
from ..engines.base import Array, Run, Zeros
from ..errors import SettingError
from ..gates.base import GateTrace
from ..layouts import GateRecord, Parts, StepBuffers, StepTimes, Wiring
from .cuda import ALIGNMENT, Cuda, Graph


@dataclass(frozen=True)
class DeviceLimits:
    """The largest shapes: sequences, tokens of a sequence, tokens a pass takes."""

    batch: int
    context: int
    prefill: int


@dataclass(frozen=True)
class PackedStep(StepBuffers):
    """Step buffers whose inputs lie in one block, so that one copy carries them all."""

    block: Array

    @staticmethod
    def pack(batch: int, length: int, rows: int, vocab_size: int, zeros: Zeros) -> PackedStep:
        """As `StepBuffers.allocate`; the same places in the block for the same sizes."""
        inputs = {
            "input_ids": ((batch, length), np.int64),
            "lengths": ((batch,), np.int64),
            "past_lengths": ((batch,), np.int64),
            "seqlens_k": ((batch,), np.int32),
            "total_sequence_length": ((), np.int32),
            "logit_rows": ((rows,), np.int64),
        }
        places: dict[str, slice] = {}
        end = 0
        for name, (shape, dtype) in inputs.items():
            nbytes = math.prod(shape) * np.dtype(dtype).itemsize
            places[name] = slice(end, end + nbytes)
            end += -(-nbytes // ALIGNMENT) * ALIGNMENT
        block = zeros(end, np.uint8)
        views = {
            name: block[places[name]].view(dtype).reshape(shape)
            for name, (shape, dtype) in inputs.items()
        }
        return PackedStep(**views, logits=zeros((rows, vocab_size), np.float32), block=block)


@dataclass(eq=False)
class DeviceStep:
    """A step bound to arrays on the device; see `BoundStep`.

    Attributes:
        cuda: The device.
        parts: Upload, the parts of the wiring, taking over the states, download.
        records: What the gates decided, on the host.
        captured: Whether the step is worth a graph, and its engines allow one.
    """

    cuda: Cuda
    parts: Parts
    records: tuple[GateRecord, ...]
    captured: bool
    _graph: Graph | None = field(default=None, init=False)
    _runs: int = field(default=0, init=False)

    def run(self) -> None:
        """See `BoundStep.run`."""
        with self.cuda.lock:
            if self._graph is not None:
                self._graph.launch()
            elif self.captured and self._runs:
                # Not the first time: engines and kernels are loaded when they are first run.
                self._graph = self.cuda.capture(self._launch)
                self._graph.launch()
            else:
                with self.cuda.current():
                    self._launch()
            self._runs += 1
            self.cuda.synchronize()

    def timed(self) -> StepTimes:
        """See `BoundStep.timed`: by events between the parts; a captured step is one part."""
        with self.cuda.lock:
            names, runs = self.parts.names, self.parts.runs
            if self.captured and self._runs:
                self._graph = self._graph or self.cuda.capture(self._launch)
                names, runs = ("graph",), (self._graph.launch,)
            self._runs += 1
            return self._timed(names, runs)

    def _timed(self, names: tuple[str, ...], runs: tuple[Run, ...]) -> StepTimes:
        cuda = self.cuda
        with cuda.current():
            events = [cuda.event()]
            stamps = [perf_counter_ns()]
            for run in runs:
                run()
                events.append(cuda.event())
                stamps.append(perf_counter_ns())
            cuda.synchronize()
        host = {n: (stamps[i + 1] - stamps[i]) / 1e6 for i, n in enumerate(names)}
        device = {n: cuda.elapsed_ms(events[i], events[i + 1]) for i, n in enumerate(names)}
        return StepTimes(host, device)

    def first_nonfinite(self) -> str | None:
        """See `BoundStep.first_nonfinite`."""
        with self.cuda.lock, self.cuda.current():
            return self.parts.first_nonfinite(self.cuda.fetch)

    def _launch(self) -> None:
        for run in self.parts.runs:
            run()


class DeviceLayout:
    """See `Layout`.

    Args:
        cuda: The device.
        decode: The wiring of steps of one token a sequence.
        prefill: That of longer ones; None takes a prompt token by token.
        limits: Of the engines.
        cache_dtype: Of keys and values.
        room: Tokens every cache has room for, where graphs fix that; None: what is asked for.
        capturable: Whether decode steps may be captured in a CUDA graph.
        shown_neighbors: K' of each gate, of which the engines may have more columns.
    """

    def __init__(
        self,
        cuda: Cuda,
        decode: Wiring,
        prefill: Wiring | None,
        *,
        limits: DeviceLimits,
        cache_dtype: type[np.floating[Any]],
        room: int | None,
        capturable: bool,
        shown_neighbors: Callable[[int], int],
    ) -> None:
        self._cuda, self._decode, self._prefill = cuda, decode, prefill
        self._limits, self._cache_dtype, self._capturable = limits, cache_dtype, capturable
        self._room, self._shown = room, shown_neighbors
        self.memory: object = object()

    @property
    def architecture(self) -> ModelShape:
        """See `Layout.architecture`."""
        return self._decode.architecture

    @property
    def prefill_chunk(self) -> int:
        """See `Layout.prefill_chunk`."""
        return 1 if self._prefill is None else self._limits.prefill

    def new_cache(self, batch: int, capacity: int) -> Cache:
        """See `Layout.new_cache`.

        Raises:
            SettingError: If the engines were built for less.
            DeviceError: If the device has too little memory.
        """
        for name, asked, most in (
            ("batch", batch, self._limits.batch),
            ("capacity", capacity, self._limits.context),
        ):
            if asked > most:
                raise SettingError(
                    name, "more than the engines were built for", expected=f"at most {most}",
                    found=asked, fix="Build them again with a larger --max-batch or --max-context.",
                )  # fmt: skip
        cache = Cache.allocate(
            self.architecture,
            batch,
            self._room or capacity,
            zeros=self._cuda.zeros,
            dtype=self._cache_dtype,
        )
        cache.capacity = capacity
        return cache

    def forget(self, cache: Cache) -> None:
        """See `Layout.forget`; in the order of the stream."""
        with self._cuda.lock, self._cuda.current():
            cache.states[...] = 0

    def evidence(self, cache: Cache) -> NDArray[np.float32]:
        """See `Layout.evidence`."""
        with self._cuda.lock, self._cuda.current():
            return self._cuda.fetch(cache.states)

    def recall(self, cache: Cache, evidence: NDArray[np.float32]) -> None:
        """See `Layout.recall`; in the order of the stream."""
        with self._cuda.lock, self._cuda.current():
            cache.states[...] = self._cuda.cupy.asarray(evidence)

    def release(self, cache: Cache) -> None:
        """See `Layout.release`; between two steps, since what is dropped is freed on the device."""
        with self._cuda.lock, self._cuda.current():
            cache.plans = OrderedDict()

    def new_step(self, batch: int, length: int, rows: int) -> PackedStep:
        """See `Layout.new_step`; in pinned memory, for copies that wait for nobody."""
        vocab_size = self.architecture.vocab_size
        return PackedStep.pack(batch, length, rows, vocab_size, self._cuda.pinned)

    def bind(self, step: StepBuffers, cache: Cache, *, traced: bool = False) -> DeviceStep:
        """See `Layout.bind`.

        Raises:
            DeviceError: If a shape is beyond what the engines were built for.
        """
        cuda = self._cuda
        if not isinstance(step, PackedStep):
            raise TypeError("a step of this layout's own `new_step` is needed")
        batch, length = step.input_ids.shape
        vocab_size = self.architecture.vocab_size
        wiring = self._decode if length == 1 or self._prefill is None else self._prefill
        with cuda.lock:  # not while another thread's step is captured
            there = PackedStep.pack(batch, length, len(step.logit_rows), vocab_size, cuda.zeros)
            inner = wiring.parts(there, cache, traced=traced)
        downloads: list[tuple[Array, NDArray[Any]]] = [(there.logits, step.logits)]
        records = []
        for gate, record in enumerate(inner.records):
            kept = _pinned_record(record, cuda)
            downloads.extend(zip(record.named().values(), kept.named().values(), strict=True))
            records.append(_shown(kept, self._shown(gate)))
        names = ("upload", *inner.names, "state", "download")
        outputs = ((), *inner.outputs, (), ())
        runs: tuple[Run, ...] = (
            lambda: cuda.upload(step.block, there.block),
            *inner.runs,
            lambda: cache.states.__setitem__(..., cache.states_out),
            lambda: _each(cuda.download, downloads),
        )
        captured = self._capturable and length == 1 and not traced
        parts = Parts(names, runs, (), outputs, inner.gates, inner.engines)
        return DeviceStep(cuda, parts, tuple(records), captured)

    @property
    def captures(self) -> bool:
        """Whether decode steps become launches of a graph."""
        return self._capturable

    def launching(self) -> DeviceLayout:
        """The same engines, gates and memory, launched one by one at every step."""
        return DeviceLayout(
            self._cuda,
            self._decode,
            self._prefill,
            limits=self._limits,
            cache_dtype=self._cache_dtype,
            room=self._room,
            capturable=False,
            shown_neighbors=self._shown,
        )


def _each(copy: Callable[[Any, Any], None], pairs: list[tuple[Any, Any]]) -> None:
    for source, target in pairs:
        copy(source, target)


def _pinned_record(record: GateRecord, cuda: Cuda) -> GateRecord:
    """Room on the host for a record on the device."""
    room = {name: cuda.pinned(array.shape, array.dtype) for name, array in record.named().items()}
    ids, weights = room.pop("expert_ids"), room.pop("expert_weights")
    return GateRecord(ids, weights, GateTrace(**room))


def _shown(record: GateRecord, neighbors: int) -> GateRecord:
    """The record with the first K' columns of the neighbours alone."""
    trace = record.trace
    shown = GateTrace(
        trace.confidence, trace.neighbors[:, :neighbors], trace.similarities[:, :neighbors]
    )
    return GateRecord(record.expert_ids, record.expert_weights, shown)
