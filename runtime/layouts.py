"""The two ways a model is laid out, and how a step of each is bound to its buffers."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from .blend import GateMemory
from .bundle import ModelShape
from .cache import Cache
from .engines.base import Array, Engine, Run
from .gates.base import Gate, GateBuffers, GateTrace
from .gates.onnx import memory_inputs


@dataclass(frozen=True)
class StepBuffers:
    """What a step of shape [B, S] with R rows of logits is fed with and leaves behind.

    Attributes:
        input_ids: [B, S] int64.
        lengths: [B] int64, real tokens among the S of each sequence.
        seqlens_k: [B] int32, total length of each sequence after the step, minus one.
        total_sequence_length: scalar int32, the longest total length.
        logit_rows: [R] int64, rows of the flattened [T, D] stream to compute logits for.
        logits: [R, V] fp32.
    """

    input_ids: NDArray[np.int64]
    lengths: NDArray[np.int64]
    seqlens_k: NDArray[np.int32]
    total_sequence_length: NDArray[np.int32]
    logit_rows: NDArray[np.int64]
    logits: NDArray[np.float32]

    @staticmethod
    def allocate(batch: int, length: int, rows: int, vocab_size: int) -> StepBuffers:
        """Buffers for B sequences, S tokens each, R rows of logits."""
        return StepBuffers(
            np.zeros((batch, length), np.int64),
            np.zeros(batch, np.int64),
            np.zeros(batch, np.int32),
            np.zeros((), np.int32),
            np.zeros(rows, np.int64),
            np.zeros((rows, vocab_size), np.float32),
        )

    def named(self) -> dict[str, Array]:
        """The inputs of a graph by name; `logits` is an output."""
        return {
            "input_ids": self.input_ids,
            "lengths": self.lengths,
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
    def empty(tokens: int, experts: int, neighbors: int) -> GateRecord:
        """Buffers for T tokens, k experts each, K' neighbours each."""
        return GateRecord(
            np.zeros((tokens, experts), np.int32),
            np.zeros((tokens, experts), np.float32),
            GateTrace.empty(tokens, neighbors),
        )

    def named(self) -> dict[str, Array]:
        """The outputs of a graph by name."""
        return {
            "expert_ids": self.expert_ids,
            "expert_weights": self.expert_weights,
            "confidence": self.trace.confidence,
            "neighbors": self.trace.neighbors,
            "similarities": self.trace.similarities,
        }


@dataclass(frozen=True)
class BoundStep:
    """A step bound to its buffers: running the parts in order is the whole step."""

    names: tuple[str, ...]
    runs: tuple[Run, ...]
    records: tuple[GateRecord, ...]


class Layout(Protocol):
    """Engines and gates together; immutable, so that a swap of the memory is one assignment."""

    @property
    def architecture(self) -> ModelShape:
        """The sizes of the model."""

    def bind(self, step: StepBuffers, cache: Cache, *, traced: bool = False) -> BoundStep:
        """Bind a step's buffers and a cache."""


@dataclass(frozen=True)
class SplitLayout:
    """One engine a segment, the gates between them."""

    architecture: ModelShape
    experts_per_token: int
    segments: tuple[Engine, ...]
    layers: tuple[tuple[int, ...], ...]  # whose KV cache each segment holds
    gates: tuple[Gate, ...]

    def bind(self, step: StepBuffers, cache: Cache, *, traced: bool = False) -> BoundStep:
        """See `Layout.bind`."""
        batch, length = step.input_ids.shape
        flows = _flows(self.architecture, batch, length)
        names: list[str] = []
        runs: list[Run] = []
        records: list[GateRecord] = []
        entering: dict[str, Array] = {}
        for index, engine in enumerate(self.segments):
            inputs = {**step.named(), **entering, **_past(cache, self.layers[index])}
            outputs = _present(cache, self.layers[index])
            last = index == len(self.segments) - 1
            leaving: dict[str, Array] = {"logits": step.logits} if last else next(flows)
            outputs |= {name if last else f"{name}_out": a for name, a in leaving.items()}
            names.append(f"segment {index}")
            runs.append(engine.bind(inputs, outputs))
            if last:
                break
            gate = self.gates[index]
            record = GateRecord.empty(batch * length, self.experts_per_token, gate.neighbors)
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
            runs.append(gate.bind(buffers, record.trace if traced else None))
            records.append(record)
            entering = {
                "hidden": leaving["hidden"],
                "router_input": leaving["router_input"],
                "expert_ids": record.expert_ids,
                "expert_weights": record.expert_weights,
            }
        return BoundStep(tuple(names), tuple(runs), tuple(records) if traced else ())


@dataclass(frozen=True)
class FusedLayout:
    """One engine; the gates are nodes inside it and the memories its inputs."""

    architecture: ModelShape
    experts_per_token: int
    engine: Engine
    memory_inputs: dict[str, Array]
    neighbors: tuple[int, ...]  # K' of each gate

    @staticmethod
    def over(
        architecture: ModelShape,
        experts_per_token: int,
        engine: Engine,
        memories: tuple[GateMemory, ...],
    ) -> FusedLayout:
        """The fused graph over one memory a gate; a frozen gate has an empty one."""
        inputs: dict[str, Array] = {}
        for gate, memory in enumerate(memories):
            inputs |= memory_inputs(memory, f"_{gate}")
        neighbors = tuple(min(memory.k, len(memory.keys)) for memory in memories)
        return FusedLayout(architecture, experts_per_token, engine, inputs, neighbors)

    def bind(self, step: StepBuffers, cache: Cache, *, traced: bool = False) -> BoundStep:
        """See `Layout.bind`."""
        layers = range(self.architecture.num_layers)
        inputs = {**step.named(), **_past(cache, layers), **self.memory_inputs}
        outputs: dict[str, Array] = {**_present(cache, layers), "logits": step.logits}
        records: list[GateRecord] = []
        for gate, neighbors in enumerate(self.neighbors):
            inputs[f"state_{gate}"] = cache.states[gate]
            outputs[f"state_out_{gate}"] = cache.states_out[gate]
            if traced:
                record = GateRecord.empty(step.input_ids.size, self.experts_per_token, neighbors)
                outputs |= {f"{name}_{gate}": a for name, a in record.named().items()}
                records.append(record)
        run = self.engine.bind(inputs, outputs)
        return BoundStep(("fused",), (run,), tuple(records))


def _flows(architecture: ModelShape, batch: int, length: int) -> Iterator[dict[str, Any]]:
    """Buffers between segments, two sets in turn: a segment reads one and writes the other."""
    rows = batch * length
    sets = [
        {
            "hidden": np.zeros((batch, length, architecture.hidden_size), np.float32),
            "router_input": np.zeros((rows, architecture.hidden_size), np.float32),
            "router_logits": np.zeros((rows, architecture.num_experts), np.float32),
        }
        for _ in range(2)
    ]
    while True:
        yield from sets


def _past(cache: Cache, layers: tuple[int, ...] | range) -> dict[str, Array]:
    past: dict[str, Array] = {}
    for layer in layers:
        past |= {f"past_key_{layer}": cache.keys[layer], f"past_value_{layer}": cache.values[layer]}
    return past


def _present(cache: Cache, layers: tuple[int, ...] | range) -> dict[str, Array]:
    present: dict[str, Array] = {}
    for layer in layers:
        present |= {
            f"present_key_{layer}": cache.keys[layer],
            f"present_value_{layer}": cache.values[layer],
        }
    return present
