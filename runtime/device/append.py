"""An engine whose graph leaves new keys and values beside the cache, as one that writes the cache.

The `primitive` graphs of the `std` lowering have outputs `new_key_{l}` [B, KV heads, S, head size]
where others have `present_key_{l}`: TensorRT before 10.15 has no operator that writes a cache in
place, and one that returns a whole cache copies it at every step.
"""

from __future__ import annotations

from collections.abc import Mapping

from knnmoe.trt_plugins.step_kernels import MOST_CACHES, StepKernels

from ..engines.base import Array, Engine, Run
from .cuda import Cuda


class AppendingEngine:
    """The engine, followed by a launch that appends to the caches of its segment."""

    def __init__(self, engine: Engine, cuda: Cuda, kernels: StepKernels) -> None:
        self._engine, self._cuda, self._kernels = engine, cuda, kernels

    def bind(self, inputs: Mapping[str, Array], outputs: Mapping[str, Array]) -> Run:
        """See `Engine.bind`; `present_*` outputs are the caches that the new tokens go to."""
        passed: dict[str, Array] = {}
        pairs: list[tuple[Array, Array]] = []
        for name, array in outputs.items():
            if not name.startswith("present_"):
                passed[name] = array
                continue
            batch, heads, _, size = array.shape
            length = _sequence(inputs)
            fresh = self._cuda.zeros((batch, heads, length, size), array.dtype)
            passed[name.replace("present_", "new_", 1)] = fresh
            pairs.append((array, fresh))
        run = self._engine.bind(inputs, passed)
        if not pairs:
            return run
        appends = [
            self._kernels.append_many(pairs[start : start + MOST_CACHES], inputs["past_lengths"])
            for start in range(0, len(pairs), MOST_CACHES)
        ]

        def run_and_append() -> None:
            run()
            for append in appends:
                append()

        return run_and_append


def _sequence(inputs: Mapping[str, Array]) -> int:
    """S of the step: of the token ids, which every step has."""
    return int(inputs["input_ids"].shape[1])
