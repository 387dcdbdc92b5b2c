"""What a memory adds to a decode step of this machine."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from knnmoe.runtime.memory import MemoryPack
from knnmoe.runtime.model import Model
from knnmoe.runtime.pipeline import Pipeline
from knnmoe.runtime.profiling.figures import disturbed, typical_ms
from knnmoe.runtime.profiling.measure import Bench, Target, points_of
from knnmoe.runtime.profiling.plan import fit_grid

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
    grid = fit_grid(loaded.max_positions, phases=("decode",), entries=(1, 0), steps=STEPS)
    targets = [Target(loaded, model.layout, 1), Target(frozen, model.layout, 0)]
    bench = Bench(points_of(targets, grid), grid)
    bench.measure()
    with_memory, without = (point.point() for point in bench.points)
    before = typical_ms(without)
    percent = 100 * (typical_ms(with_memory) / before - 1)
    return Latency(percent, before, limit, disturbed(with_memory))
