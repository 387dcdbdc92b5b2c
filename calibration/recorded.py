"""What the gates are asked on real text: router inputs and logits, recorded in the runtime."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from knnmoe.runtime.engines.base import Run
from knnmoe.runtime.errors import BackendError
from knnmoe.runtime.gates.base import Gate, GateBuffers, GateTrace
from knnmoe.runtime.layouts import HostLayout, SplitWiring
from knnmoe.runtime.model import Model


@dataclass(frozen=True)
class GateInputs:
    """One gate's inputs over some text.

    Attributes:
        x: Router inputs [T, D] fp32.
        router_logits: [T, E] fp32.
    """

    x: NDArray[np.float32]
    router_logits: NDArray[np.float32]


@dataclass(frozen=True)
class RecordingGate:
    """A gate that keeps what it was asked; of one sequence a call."""

    gate: Gate
    kept: list[GateInputs]

    @property
    def backend(self) -> str:
        """See `Gate.backend`."""
        return self.gate.backend

    @property
    def neighbors(self) -> int:
        """See `Gate.neighbors`."""
        return self.gate.neighbors

    def bind(self, buffers: GateBuffers, trace: GateTrace | None = None) -> Run:
        """See `Gate.bind`."""
        route = self.gate.bind(buffers, trace)

        def run() -> None:
            real = int(buffers.lengths[0])
            x, router_logits = buffers.router_input[:real], buffers.router_logits[:real]
            self.kept.append(GateInputs(x.copy(), router_logits.copy()))
            route()

        return run


def record_inputs(
    model: Model, sequences: Sequence[NDArray[np.int64]], advance: Callable[[int], None]
) -> tuple[GateInputs, ...]:
    """What every gate is asked over token sequences [n], the router frozen; the last tokens too.

    Args:
        model: Its memory is replaced, and left out in the end.
        sequences: In this order.
        advance: Called with the tokens just read, but for the last of a sequence.

    Raises:
        BackendError: If the model does not run in the split layout on the CPU.
    """
    model.disable_memory()
    layout = model.pipeline.layout
    if not (isinstance(layout, HostLayout) and isinstance(layout.wiring, SplitWiring)):
        raise BackendError("recording router inputs", "runs in the split layout on the CPU only")
    gates = tuple(RecordingGate(gate, []) for gate in layout.wiring.gates)
    model.pipeline.layout = HostLayout(replace(layout.wiring, gates=gates))
    try:
        for ids in sequences:
            model.logits(ids.tolist())
            advance(len(ids) - 1)
    finally:
        model.disable_memory()
    return tuple(
        GateInputs(
            np.concatenate([part.x for part in gate.kept]),
            np.concatenate([part.router_logits for part in gate.kept]),
        )
        for gate in gates
    )
