"""The gate as an ONNX graph: retrieval, blend and rule in one engine call.

The memory is bound to the graph as inputs, once; nothing of it is copied at a call.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..blend import GateMemory
from ..compressed import Memory
from ..engines.base import Array, BoundEngine, Engine, Run
from ..stored_values import dense
from .base import GateBuffers, GateTrace

FROZEN = "frozen"


def graph_name(memory: Memory | None) -> str:
    """Which of a bundle's gate graphs runs this memory."""
    if memory is None:
        return FROZEN
    return f"{memory.similarity}-assignment" if memory.rule_first else memory.similarity


def memory_inputs(memory: GateMemory, suffix: str = "") -> Mapping[str, NDArray[Any]]:
    """A memory as the inputs of the blend node, by name (docs/design.md)."""
    arrays: dict[str, NDArray[Any]] = {
        "keys": np.ascontiguousarray(memory.keys, dtype=np.float32),
        "key_scales": np.ascontiguousarray(memory.key_scales, dtype=np.float32),
        "values": np.ascontiguousarray(dense(memory.values), dtype=np.float32),
        "evidence_weights": memory.entry_evidence(),
        "n_valid": np.array([memory.n_valid], np.int64),
        "k": np.array([memory.k], np.int64),
        "center": np.ascontiguousarray(memory.center, dtype=np.float32),
        "calibration": memory.calibration.vector(),
    }
    return {name + suffix: array for name, array in arrays.items()}


@dataclass(frozen=True)
class OnnxGate:
    """A gate graph of the bundle over one gate's memory.

    Args:
        engine: The engine of `graph_name(memory)`; gates with the same graph share it.
        inputs: `memory_inputs` of the memory, empty without one.
        neighbors: min(K, N), 0 without a memory.
        selection_bias: [E], of this gate, where the routing rule has one.
    """

    engine: Engine
    inputs: Mapping[str, NDArray[Any]]
    neighbors: int
    selection_bias: Array | None = None

    backend = "onnx"

    @staticmethod
    def over(
        engine: Engine, memory: GateMemory | None, selection_bias: Array | None = None
    ) -> OnnxGate:
        """The gate of one memory, or the frozen router's."""
        if memory is None:
            return OnnxGate(engine, {}, 0, selection_bias)
        neighbors = min(memory.k, len(memory.keys))
        return OnnxGate(engine, memory_inputs(memory), neighbors, selection_bias)

    def bind(self, buffers: GateBuffers, trace: GateTrace | None = None) -> Run:
        """See `Gate.bind`."""
        bound = self.bound(buffers, trace)
        return self.engine.bind(bound.inputs, bound.outputs)

    def bound(self, buffers: GateBuffers, trace: GateTrace | None = None) -> BoundEngine:
        """The inputs and outputs of the graph."""
        inputs: dict[str, NDArray[Any]] = {
            "router_input": buffers.router_input,
            "router_logits": buffers.router_logits,
        }
        if self.selection_bias is not None:
            inputs["selection_bias"] = self.selection_bias
        outputs: dict[str, NDArray[Any]] = {
            "expert_ids": buffers.expert_ids,
            "expert_weights": buffers.expert_weights,
        }
        if not self.inputs:
            return BoundEngine(self.engine, inputs, outputs)
        inputs |= {"state": buffers.state, "lengths": buffers.lengths, **self.inputs}
        outputs["state_out"] = buffers.state_out
        if trace is not None:
            outputs |= {
                "confidence": trace.confidence,
                "neighbors": trace.neighbors,
                "similarities": trace.similarities,
            }
        return BoundEngine(self.engine, inputs, outputs)
