"""What a memory adds to a decode step of this machine."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from knnmoe.runtime.memory import MemoryPack
from knnmoe.runtime.model import Model
from knnmoe.runtime.pipeline import Pipeline
from knnmoe.runtime.profiling.measure import DEFAULT_CONTEXT, ProfileSettings, measure

STEPS = 40


@dataclass(frozen=True)
class Latency:
    """Decode steps with the memory beside steps of the frozen model, turn by turn.

    Attributes:
        percent: What the memory adds to a frozen step, sums of the parts' medians.
        frozen_ms: The frozen step.
        limit: Percent that were allowed.
        disturbed: Whether other work kept the machine so busy that `percent` says little.
    """

    percent: float
    frozen_ms: float
    limit: float
    disturbed: bool

    @property
    def exceeded(self) -> bool:
        """Whether it is more than was allowed."""
        return self.percent > self.limit

    def to_json(self) -> dict[str, Any]:
        """The figures by name."""
        return {**asdict(self), "exceeded": self.exceeded}


def measure_latency(model: Model, pack: MemoryPack, limit: float) -> Latency:
    """Time decode steps with a pack and without; the model is left without a memory."""
    model.swap_memory(pack)
    loaded = Pipeline(model.pipeline.layout)
    model.disable_memory()
    frozen = Pipeline(model.pipeline.layout)
    context = min(DEFAULT_CONTEXT, loaded.max_positions - 1)
    settings = ProfileSettings(context=context, prompts=(), steps=STEPS)
    decode = measure(loaded, frozen, settings).decode
    assert decode.frozen is not None
    before = decode.frozen.typical()
    return Latency(100 * (decode.loaded.typical() / before - 1), before, limit, decode.disturbed)
