"""The gate on a CUDA device: retrieval and blend by our kernels, then the routing rule."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import numpy as np

from knnmoe.trt_plugins.cupy_prototype import CupyBlend, MemoryArrays
from knnmoe.trt_plugins.step_kernels import StepKernels

from ..blend import GateMemory
from ..engines.base import Array, Run
from ..routing import RoutingRule
from .base import GateBuffers, GateTrace

if TYPE_CHECKING:
    from ..device.cuda import Cuda


def resident_blend(
    cuda: Cuda,
    memory: GateMemory,
    arrays: Mapping[str, Array],
    *,
    columns: int,
    max_tokens: int,
    beside: CupyBlend | None = None,
) -> CupyBlend:
    """The blend over a memory that is on the device already; nothing of it is copied.

    `beside` is the blend of another gate, to share compiled kernels and scratch memory with.
    """
    with cuda.current():
        blend = CupyBlend(
            MemoryArrays(
                keys=arrays["keys"], key_scales=arrays["key_scales"], values=arrays["values"],
                evidence_weights=arrays["evidence_weights"], center=arrays["center"],
                calibration=arrays["calibration"],
                n_valid=memory.n_valid, k=memory.k, similarity=memory.similarity,
                scan_keys=arrays.get("scan_keys"), scan_scales=arrays.get("scan_scales"),
            ),
            max_tokens=max_tokens, max_neighbors=columns, beside=beside, cupy=cuda.cupy,
        )  # fmt: skip
    # The numbers too are those of the resident block, so that a swap changes them.
    blend.n_valid, blend.k = arrays["n_valid"], arrays["k"]
    return blend


@dataclass(frozen=True)
class CudaGate:
    """Retrieval, blend and rule in a few launches on the stream of the model.

    Args:
        cuda: The device.
        kernels: Of the routing rule.
        rule: The model's routing rule.
        blend: Over the resident memory; None routes by the frozen router.
        rule_first: The `assignment` variant: rule, then blend.
        neighbors: K' of a trace, 0 without a memory.
        selection_bias: [E] on the device, of this gate, where the rule has one.
    """

    cuda: Cuda
    kernels: StepKernels
    rule: RoutingRule
    blend: CupyBlend | None = None
    rule_first: bool = False
    neighbors: int = 0
    selection_bias: Array | None = None

    backend = "cuda"

    def bind(self, buffers: GateBuffers, trace: GateTrace | None = None) -> Run:
        """See `Gate.bind`; buffers and trace are arrays on the device."""
        launches = tuple(launch for _, launch in self.stages(buffers, trace))
        if len(launches) == 1:
            return launches[0]

        def run() -> None:
            for launch in launches:
                launch()

        return run

    def stages(
        self, buffers: GateBuffers, trace: GateTrace | None = None
    ) -> tuple[tuple[str, Run], ...]:
        """What `bind` runs, one after another, by the name of its stage."""
        rule = self.rule.numbers() | {"selection_bias": self.selection_bias}
        ids, weights = buffers.expert_ids, buffers.expert_weights
        if self.blend is None:
            return (("rule", self.kernels.route(buffers.router_logits, ids, weights, **rule)),)
        rows: Array = buffers.router_logits
        blended = self.cuda.zeros(rows.shape, np.float32)
        runs: list[tuple[str, Run]] = []
        if self.rule_first:
            runs.append(("rule", self.kernels.assign(rows, blended, **rule)))
            rows = blended
        with self.cuda.current():
            bound = self.blend.bind(
                buffers.router_input, rows, buffers.state, buffers.lengths,
                rows=blended, state_out=buffers.state_out,
            )  # fmt: skip
        runs.extend((kernel_stage(kernel), launch) for kernel, launch in bound.launches)
        if self.rule_first:
            runs.append(("rule", self.kernels.heaviest(blended, ids, weights)))
        else:
            runs.append(("rule", self.kernels.route(blended, ids, weights, **rule)))
        if trace is not None:
            pairs = (
                (bound.confidence, trace.confidence),
                (bound.neighbors, trace.neighbors),
                (bound.similarities, trace.similarities),
            )
            runs.extend(("trace", partial(self.cuda.copy, *pair)) for pair in pairs)
        return tuple(runs)


_STAGES = {
    "_prefill_prepare": "prepare",
    "_prefill_scan": "scan",
    "_prefill_merge": "select",
    "_rescore": "select",
    "_prefill_gate": "blend",
    "_prefill_finish": "blend",
    "_decode": "scan and blend",  # one kernel
}


def kernel_stage(kernel: str) -> str:
    """What a kernel does."""
    return next(stage for part, stage in _STAGES.items() if part in kernel)
