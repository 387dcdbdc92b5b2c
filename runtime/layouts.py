"""The two ways a model is laid out, and how a step of each is bound to its buffers."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import cycle
from time import perf_counter_ns
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from .blend import GateMemory
from .bundle import ModelShape
from .cache import Cache
from .engines.base import Array, BoundEngine, Engine, Run, Zeros
from .gates.base import Gate, GateBuffers, GateTrace
from .gates.onnx import memory_inputs
from .shortage import memory_for

# Positions a pass of a long prompt takes: bounds the buffers and the [tokens, N] similarities.
PREFILL_CHUNK = 512


@dataclass(frozen=True)
class StepBuffers:
    """What a step of shape [B, S] with R rows of logits is fed with and leaves behind.

    Attributes:
        input_ids: [B, S] int64.
        lengths: [B] int64, real tokens among the S of each sequence.
        past_lengths: [B] int64, tokens of each sequence before the step (`std` lowering).
        seqlens_k: [B] int32, total length of each sequence after the step, minus one (`ort`).
        total_sequence_length: scalar int32, the longest total length (`ort`).
        logit_rows: [R] int64, rows of the flattened [T, D] stream to compute logits for.
        logits: [R, V] fp32.
    """

    input_ids: NDArray[np.int64]
    lengths: NDArray[np.int64]
    past_lengths: NDArray[np.int64]
    seqlens_k: NDArray[np.int32]
    total_sequence_length: NDArray[np.int32]
    logit_rows: NDArray[np.int64]
    logits: NDArray[np.float32]

    @staticmethod
    def allocate(
        batch: int, length: int, rows: int, vocab_size: int, *, zeros: Zeros = np.zeros
    ) -> StepBuffers:
        """Buffers for B sequences, S tokens each, R rows of logits."""
        return StepBuffers(
            input_ids=zeros((batch, length), np.int64),
            lengths=zeros(batch, np.int64),
            past_lengths=zeros(batch, np.int64),
            seqlens_k=zeros(batch, np.int32),
            total_sequence_length=zeros((), np.int32),
            logit_rows=zeros(rows, np.int64),
            logits=zeros((rows, vocab_size), np.float32),
        )

    def named(self) -> dict[str, Array]:
        """The inputs of a graph by name; `logits` is an output."""
        return {
            "input_ids": self.input_ids,
            "lengths": self.lengths,
            "past_lengths": self.past_lengths,
            "seqlens_k": self.seqlens_k,
            "total_sequence_length": self.total_sequence_length,
            "logit_rows": self.logit_rows,
        }


@dataclass(frozen=True)
class GateRecord:
    """What one gate decided in a traced step: experts [T, k] and, with a memory, why."""

    expert_ids: NDArray[np.int32]
    expert_weights: NDArray[np.float32]
    trace: GateTrace

    @staticmethod
    def empty(tokens: int, experts: int, neighbors: int, *, zeros: Zeros = np.zeros) -> GateRecord:
        """Buffers for T tokens, k experts each, K' neighbours each."""
        return GateRecord(
            zeros((tokens, experts), np.int32),
            zeros((tokens, experts), np.float32),
            GateTrace.empty(tokens, neighbors, zeros=zeros),
        )

    def copy(self) -> GateRecord:
        """The same, in arrays that no further step overwrites."""
        return GateRecord.joined((self,))

    @staticmethod
    def joined(records: Sequence[GateRecord]) -> GateRecord:
        """The decisions of one gate in pieces of a sequence, as those of the whole."""
        named = [record.named() for record in records]
        whole = {name: np.concatenate([part[name] for part in named]) for name in named[0]}
        ids, weights = whole.pop("expert_ids"), whole.pop("expert_weights")
        return GateRecord(ids, weights, GateTrace(**whole))

    def named(self) -> dict[str, Array]:
        """The outputs of a graph by name."""
        return {
            "expert_ids": self.expert_ids,
            "expert_weights": self.expert_weights,
            "confidence": self.trace.confidence,
            "neighbors": self.trace.neighbors,
            "similarities": self.trace.similarities,
        }


class BoundStep(Protocol):
    """A step bound to its buffers, to be run again and again."""

    @property
    def records(self) -> tuple[GateRecord, ...]:
        """What the gates decided, on the host, if traced."""

    @property
    def parts(self) -> Parts:
        """What it runs."""

    def run(self) -> None:
        """Run the whole step; its results are there when this returns."""

    def timed(self) -> StepTimes:
        """Run the step and time its parts."""

    def first_nonfinite(self) -> str | None:
        """Run it part by part up to the first that leaves numbers that are not finite: its name."""


@dataclass(frozen=True)
class StepTimes:
    """Milliseconds of the parts of a step by name, in order.

    Attributes:
        host: On the host's clock; of work that is launched, what launching it took.
        device: On the device's clock, where there is one.
    """

    host: dict[str, float]
    device: dict[str, float] | None = None

    @staticmethod
    def total(pieces: Sequence[StepTimes]) -> StepTimes:
        """The times of a step that was run in pieces."""
        host = _added([piece.host for piece in pieces])
        device = [piece.device for piece in pieces if piece.device is not None]
        return StepTimes(host, _added(device) if device else None)


def _added(times: Sequence[dict[str, float]]) -> dict[str, float]:
    total: dict[str, float] = {}
    for piece in times:
        for name, milliseconds in piece.items():
            total[name] = total.get(name, 0.0) + milliseconds
    return total


@dataclass(frozen=True)
class BoundGate:
    """A gate with the buffers it was bound to, for looking into it."""

    gate: Gate
    buffers: GateBuffers


@dataclass(frozen=True)
class Parts:
    """The parts of a step in the order they run, and what the gates left if traced.

    Attributes:
        names, runs: One a part.
        records: One a gate, if traced.
        outputs: By part, the fp32 arrays it leaves for the next; caches are not among them.
        gates: Those between segments, by the name of their part.
        engines: The others, by the name of their part, with what they were bound to.
    """

    names: tuple[str, ...]
    runs: tuple[Run, ...]
    records: tuple[GateRecord, ...]
    outputs: tuple[tuple[Array, ...], ...]
    gates: Mapping[str, BoundGate] = field(default_factory=dict)
    engines: Mapping[str, BoundEngine] = field(default_factory=dict)

    def timed(self) -> dict[str, float]:
        """Run the parts: their milliseconds on the host's clock by name."""
        stamps = [perf_counter_ns()]
        for run in self.runs:
            run()
            stamps.append(perf_counter_ns())
        spans = zip(self.names, stamps, stamps[1:], strict=False)
        return {name: (end - start) / 1e6 for name, start, end in spans}

    def first_nonfinite(self, fetch: Callable[[Array], NDArray[Any]]) -> str | None:
        """Run the parts up to the first that leaves NaN or infinite numbers: its name.

        Args:
            fetch: Waits for an array and brings it to the host.
        """
        for name, run, arrays in zip(self.names, self.runs, self.outputs, strict=True):
            run()
            if not all(np.isfinite(fetch(array)).all() for array in arrays):
                return name
        return None


class Wiring(Protocol):
    """Engines and gates of one layout, and how their buffers hang together."""

    @property
    def architecture(self) -> ModelShape:
        """The sizes of the model."""

    def parts(self, step: StepBuffers, cache: Cache, *, traced: bool = False) -> Parts:
        """The parts of a step over these buffers, which lie where the engines can use them."""


class Layout(Protocol):
    """A wiring on a device; what the pipeline runs."""

    @property
    def architecture(self) -> ModelShape:
        """The sizes of the model."""

    @property
    def memory(self) -> object:
        """Which memory routes: what a cache knows of another one is forgotten."""

    @property
    def prefill_chunk(self) -> int:
        """The most tokens a pass over one sequence takes."""

    def new_cache(self, batch: int, capacity: int) -> Cache:
        """An empty cache where the engines can use it."""

    def forget(self, cache: Cache) -> None:
        """Set a cache's evidence back to none."""

    def evidence(self, cache: Cache) -> NDArray[np.float32]:
        """A cache's evidence [G, B, 2] on the host, a copy."""

    def recall(self, cache: Cache, evidence: NDArray[np.float32]) -> None:
        """Set a cache's evidence to what it was."""

    def release(self, cache: Cache) -> None:
        """Drop the steps that a cache has bound here; its next step binds anew."""

    def new_step(self, batch: int, length: int, rows: int) -> StepBuffers:
        """Buffers on the host for steps of one shape."""

    def bind(self, step: StepBuffers, cache: Cache, *, traced: bool = False) -> BoundStep:
        """Bind a step's buffers and a cache; a run also advances the cache's states."""


@dataclass(frozen=True)
class HostStep:
    """A step whose parts are done when they return."""

    parts: Parts
    cache: Cache

    @property
    def records(self) -> tuple[GateRecord, ...]:
        """See `BoundStep.records`."""
        return self.parts.records

    def run(self) -> None:
        """See `BoundStep.run`."""
        for run in self.parts.runs:
            run()
        self.cache.states[...] = self.cache.states_out  # as in `timed`

    def timed(self) -> StepTimes:
        """See `BoundStep.timed`."""
        times = self.parts.timed()
        self._take_over()
        return StepTimes(times)

    def first_nonfinite(self) -> str | None:
        """See `BoundStep.first_nonfinite`."""
        return self.parts.first_nonfinite(np.asarray)

    def _take_over(self) -> None:
        # A frozen ONNX gate leaves its zeros: it gathers no evidence.
        self.cache.states[...] = self.cache.states_out


@dataclass(frozen=True)
class HostLayout:
    """A wiring on the host; immutable, so that a swap of the memory is one assignment.

    Attributes:
        wiring: What it runs.
        memory: See `Layout.memory`: each layout has its own, if it is not the same memory with more
            entries; an object that holds nothing, so that whoever remembers which memory it was
            does not keep it.
    """

    wiring: Wiring
    memory: object = field(default_factory=object)

    prefill_chunk = PREFILL_CHUNK

    @property
    def architecture(self) -> ModelShape:
        """See `Layout.architecture`."""
        return self.wiring.architecture

    def new_cache(self, batch: int, capacity: int) -> Cache:
        """See `Layout.new_cache`."""
        shape = self.architecture
        numbers = batch * capacity * shape.cache_width * shape.num_layers
        with memory_for(f"the key-value cache of {batch} x {capacity} tokens", 4 * numbers):
            cache = Cache.allocate(shape, batch, capacity)
        if self.architecture.latent_size:
            # The graphs write the same twice, since GroupQueryAttention has an output for each.
            cache.values = cache.keys
        return cache

    def forget(self, cache: Cache) -> None:
        """See `Layout.forget`."""
        cache.states[...] = 0

    def evidence(self, cache: Cache) -> NDArray[np.float32]:
        """See `Layout.evidence`."""
        return np.array(cache.states)

    def recall(self, cache: Cache, evidence: NDArray[np.float32]) -> None:
        """See `Layout.recall`."""
        cache.states[...] = evidence

    def release(self, cache: Cache) -> None:
        """See `Layout.release`."""
        cache.plans = OrderedDict()

    def new_step(self, batch: int, length: int, rows: int) -> StepBuffers:
        """See `Layout.new_step`."""
        vocab_size = self.architecture.vocab_size
        with memory_for(f"logits of {rows} tokens", 4 * rows * vocab_size):
            return StepBuffers.allocate(batch, length, rows, vocab_size)

    def bind(self, step: StepBuffers, cache: Cache, *, traced: bool = False) -> HostStep:
        """See `Layout.bind`."""
        batch, length = step.input_ids.shape
        with memory_for(f"buffers of a step of {batch} x {length} tokens"):
            return HostStep(self.wiring.parts(step, cache, traced=traced), cache)


@dataclass(frozen=True)
class SplitWiring:
    """One engine a segment, the gates between them."""

    architecture: ModelShape
    experts_per_token: int
    segments: tuple[Engine, ...]
    layers: tuple[tuple[int, ...], ...]  # whose KV cache each segment holds
    gates: tuple[Gate, ...]
    zeros: Zeros = np.zeros

    def parts(self, step: StepBuffers, cache: Cache, *, traced: bool = False) -> Parts:
        """See `Wiring.parts`."""
        batch, length = step.input_ids.shape
        flows = self._flows(batch, length)
        names: list[str] = []
        runs: list[Run] = []
        records: list[GateRecord] = []
        outs: list[tuple[Array, ...]] = []
        gates: dict[str, BoundGate] = {}
        engines: dict[str, BoundEngine] = {}
        entering: dict[str, Array] = {}
        for index, engine in enumerate(self.segments):
            inputs = {**step.named(), **entering, **_past(cache, self.layers[index])}
            outputs = _present(cache, self.layers[index])
            last = index == len(self.segments) - 1
            leaving: dict[str, Array] = {"logits": step.logits} if last else next(flows)
            outputs |= {name if last else f"{name}_out": a for name, a in leaving.items()}
            names.append(f"segment {index}")
            engines[names[-1]] = BoundEngine(engine, inputs, outputs)
            outs.append(tuple(leaving.values()))
            runs.append(engine.bind(inputs, outputs))
            if last:
                break
            gate = self.gates[index]
            record = GateRecord.empty(
                batch * length, self.experts_per_token, gate.neighbors, zeros=self.zeros
            )
            buffers = GateBuffers(
                router_input=leaving["router_input"],
                router_logits=leaving["router_logits"],
                state=cache.states[index],
                lengths=step.lengths,
                expert_ids=record.expert_ids,
                expert_weights=record.expert_weights,
                state_out=cache.states_out[index],
            )
            names.append(f"gate {index}")
            gates[names[-1]] = BoundGate(gate, buffers)
            outs.append((record.expert_weights,))
            runs.append(gate.bind(buffers, record.trace if traced else None))
            records.append(record)
            entering = {
                "hidden": leaving["hidden"],
                "router_input": leaving["router_input"],
                "expert_ids": record.expert_ids,
                "expert_weights": record.expert_weights,
            }
        kept = tuple(records) if traced else ()
        return Parts(tuple(names), tuple(runs), kept, tuple(outs), gates, engines)

    def _flows(self, batch: int, length: int) -> Iterator[dict[str, Array]]:
        """Buffers between segments, two sets in turn: a segment reads one and writes the other."""
        shape, rows = self.architecture, batch * length
        sets = [
            {
                "hidden": self.zeros((batch, length, shape.hidden_size), np.float32),
                "router_input": self.zeros((rows, shape.hidden_size), np.float32),
                "router_logits": self.zeros((rows, shape.num_experts), np.float32),
            }
            for _ in range(2)
        ]
        return cycle(sets)


@dataclass(frozen=True)
class FusedWiring:
    """One engine; the gates are nodes inside it and the memories its inputs."""

    architecture: ModelShape
    experts_per_token: int
    engine: Engine
    memory_inputs: Mapping[str, Array]  # and the gates' selection biases, where they have any
    neighbors: tuple[int, ...]  # K' of each gate
    zeros: Zeros = np.zeros

    @staticmethod
    def over(
        architecture: ModelShape,
        experts_per_token: int,
        engine: Engine,
        memories: tuple[GateMemory, ...],
        selection_biases: Sequence[Array | None] = (),
    ) -> FusedWiring:
        """The fused graph over one memory a gate; a frozen gate has an empty one."""
        inputs = bias_inputs(selection_biases)
        for gate, memory in enumerate(memories):
            inputs |= memory_inputs(memory, f"_{gate}")
        neighbors = tuple(min(memory.k, len(memory.keys)) for memory in memories)
        return FusedWiring(architecture, experts_per_token, engine, inputs, neighbors)

    def parts(self, step: StepBuffers, cache: Cache, *, traced: bool = False) -> Parts:
        """See `Wiring.parts`."""
        layers = range(self.architecture.num_layers)
        inputs = {**step.named(), **_past(cache, layers), **self.memory_inputs}
        outputs: dict[str, Array] = {**_present(cache, layers), "logits": step.logits}
        records: list[GateRecord] = []
        for gate, neighbors in enumerate(self.neighbors):
            inputs[f"state_{gate}"] = cache.states[gate]
            outputs[f"state_out_{gate}"] = cache.states_out[gate]
            if traced:
                record = GateRecord.empty(
                    step.input_ids.size, self.experts_per_token, neighbors, zeros=self.zeros
                )
                outputs |= {f"{name}_{gate}": a for name, a in record.named().items()}
                records.append(record)
        run = self.engine.bind(inputs, outputs)
        engines = {"fused": BoundEngine(self.engine, inputs, outputs)}
        return Parts(("fused",), (run,), tuple(records), ((step.logits,),), {}, engines)


def bias_inputs(selection_biases: Sequence[Array | None]) -> dict[str, Array]:
    """The selection biases [E] of the gates as inputs of the fused graph, where there are any."""
    biases = enumerate(selection_biases)
    return {f"selection_bias_{gate}": bias for gate, bias in biases if bias is not None}


def _past(cache: Cache, layers: tuple[int, ...] | range) -> dict[str, Array]:
    return _named(cache, layers, "past")


def _present(cache: Cache, layers: tuple[int, ...] | range) -> dict[str, Array]:
    return _named(cache, layers, "present")


def _named(cache: Cache, layers: tuple[int, ...] | range, prefix: str) -> dict[str, Array]:
    parts = (("key", cache.keys), ("value", cache.values))
    return {
        f"{prefix}_{name}_{layer}": part[layer]
        for layer in layers
        for name, part in parts
        if layer in part
    }
