"""Timing steps of many points turn by turn.

A point is a pipeline and a shape of step. All points are in one process, and every round visits
each of them for a few steps, in an order drawn anew, so that whatever else the machine does, and
however it grows slower or faster, hits all alike.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from time import perf_counter_ns
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from ..layouts import StepTimes
from ..session import Steps
from .plan import Shape, rounds, shapes
from .record import RUNTIME, Bound, Grid, Part, PartKind, Point, Samples

PREFILL_WARMUP = 2  # of a long step one is enough, of a captured one two
CAPTURE_WARMUP = 2  # the second run captures
SHAPES_A_CACHE = 5  # fewer than a pipeline remembers
KINDS: Mapping[str, PartKind] = {
    "segment": "segment",
    "gate": "gate",
    "fused": "fused",
    "graph": "fused",
}

Clock = Callable[[], int]
Tick = Callable[[], None]


class TimedSteps(Steps, Protocol):
    """What profiling asks of a pipeline, whose caches' `lengths` [B] can be set back."""

    def timed_step(self, cache: Any, input_ids: NDArray[np.int64]) -> StepTimes:
        """A step that returns the milliseconds of its parts."""


@dataclass(frozen=True, eq=False)
class Target:
    """A pipeline to measure, and how its points are told apart.

    Attributes:
        pipeline: Runs the steps.
        layout: `split` or `fused`.
        memory_entries: A gate's; 0 is the frozen router.
        cuda_graph: As `Point` has it.
    """

    pipeline: TimedSteps
    layout: str
    memory_entries: int
    cuda_graph: bool | None = None


@dataclass(frozen=True)
class Step:
    """One step that counts: its round, the whole of it and its parts in milliseconds."""

    round: int
    whole: float
    times: StepTimes


@dataclass(frozen=True, eq=False)
class PointSteps:
    """The steps of one point so far; a `Bench` appends to them, one at a time."""

    target: Target
    shape: Shape
    steps: list[Step] = field(default_factory=list)

    def point(
        self,
        *,
        inside: Mapping[str, Mapping[str, Samples]] | None = None,
        bounds: Mapping[str, Bound] | None = None,
        backends: Mapping[str, str] | None = None,
    ) -> Point:
        """The point of a record; the arguments are by the names of the parts."""
        inside, bounds, backends = inside or {}, bounds or {}, backends or {}
        shape, target, steps = self.shape, self.target, self.steps
        whole = tuple(round(step.whole, 6) for step in steps)
        parts = []
        for name in steps[0].times.host if steps else ():
            device = steps[0].times.device is not None
            parts.append(
                Part(
                    name=name,
                    kind=part_kind(name),
                    host_ms=tuple(round(step.times.host[name], 6) for step in steps),
                    device_ms=_device_ms(steps, name) if device else None,
                    inside=inside.get(name, {}),
                    bound=bounds.get(name),
                    backend=backends.get(name),
                )
            )
        if parts:
            rest = np.array(whole) - np.sum([part.ms for part in parts], axis=0)
            parts.append(Part(RUNTIME, "runtime", tuple(np.round(rest, 6).tolist())))
        return Point(
            phase=shape.phase,
            layout=target.layout,
            batch=shape.batch,
            tokens=shape.tokens,
            past=shape.past,
            memory_entries=target.memory_entries,
            cuda_graph=target.cuda_graph if shape.phase == "decode" else _not_captured(target),
            whole_ms=whole,
            rounds=tuple(step.round for step in steps),
            parts=tuple(parts),
        )


def part_kind(name: str) -> PartKind:
    """What a part of that name is."""
    return KINDS.get(name.split()[0], "transfer")


def _not_captured(target: Target) -> bool | None:
    """Prompts are never captured."""
    return None if target.cuda_graph is None else False


def _device_ms(steps: Sequence[Step], name: str) -> Samples:
    return tuple(round((step.times.device or {}).get(name, 0.0), 6) for step in steps)


def points_of(targets: Sequence[Target], grid: Grid) -> tuple[PointSteps, ...]:
    """The points of a measurement, without steps yet: each shape with all targets.

    Prompts are never captured in a graph, so a target that captures has decode steps alone where
    the same stands beside it without.
    """
    launched = {(t.layout, t.memory_entries) for t in targets if t.cuda_graph is False}
    return tuple(
        PointSteps(target, shape)
        for shape in shapes(grid)
        for target in targets
        if shape.phase == "decode"
        or not target.cuda_graph
        or (target.layout, target.memory_entries) not in launched
    )


def ticks(points: Sequence[PointSteps], grid: Grid) -> int:
    """How often `Bench.measure` reports progress."""
    visited = [shape for each in rounds(grid) for shape, _ in each]
    return len(points) + sum(visited.count(point.shape) for point in points)


class Bench:
    """The caches of the points, and the steps over them.

    Args:
        points: Of `points_of`; `measure` fills their `steps`.
        grid: What to measure.
        clock: Nanoseconds.
    """

    def __init__(
        self, points: Sequence[PointSteps], grid: Grid, clock: Clock = perf_counter_ns
    ) -> None:
        self.points, self._grid, self._clock = points, grid, clock
        self._shapes = shapes(grid)
        self._caches: dict[tuple[int, Shape], Any] = {}
        for target in dict.fromkeys(point.target for point in points):
            mine = [point.shape for point in points if point.target is target]
            for batch in grid.batches:
                same = [shape for shape in mine if shape.batch == batch]
                decode = [shape for shape in same if shape.phase == "decode"]
                prefill = [shape for shape in same if shape.phase == "prefill"]
                for group in filter(None, [decode, *_pieces(prefill, SHAPES_A_CACHE)]):
                    self._share(target, group)

    def measure(self, tick: Tick = lambda: None) -> None:
        """Time the steps of all points; an interrupt leaves what was measured until then.

        Args:
            tick: Called after each visit to a point, and after its warm-up.
        """
        grid, order = self._grid, np.random.default_rng(self._grid.seed)
        for point in self.points:
            for index in range(_warmup(point, grid)):
                self._step(point, -1 - index, 0)
            tick()
        for number, planned in enumerate(rounds(grid)):
            counts = dict(planned)
            here = [point for point in self.points if point.shape in counts]
            for index in order.permutation(len(here)):
                point = here[index]
                if point.shape.phase == "decode" and len(self.points) > 1:
                    self._step(point, number, -1)  # the others left the caches full of theirs
                for step in range(counts[point.shape]):
                    point.steps.append(self._step(point, number, step))
                tick()

    def cache(self, point: PointSteps) -> Any:
        """The cache that the point's steps run over; several points share it."""
        return self._caches[id(point.target), point.shape]

    def _share(self, target: Target, group: Sequence[Shape]) -> None:
        """One cache for some shapes of a batch, filled as far as the longest context."""
        past = max(shape.past for shape in group)
        room = max(shape.past + shape.tokens for shape in group)
        cache = target.pipeline.new_cache(group[0].batch, room)
        if past:
            random = np.random.default_rng(self._grid.seed)
            ids = random.integers(target.pipeline.vocab_size, size=(group[0].batch, past))
            target.pipeline.step(cache, ids)
        for shape in group:
            self._caches[id(target), shape] = cache

    def _step(self, point: PointSteps, number: int, step: int) -> Step:
        """Run a step and time it; its tokens depend on the shape, the round and the step alone."""
        pipeline, shape, cache = point.target.pipeline, point.shape, self.cache(point)
        which = (self._grid.seed, self._shapes.index(shape), number + (1 << 20), step + 1)
        ids = np.random.default_rng(which).integers(
            pipeline.vocab_size, size=(shape.batch, shape.tokens)
        )
        cache.lengths[:] = shape.past
        start = self._clock()
        times = pipeline.timed_step(cache, ids)
        return Step(number, (self._clock() - start) / 1e6, times)


def _warmup(point: PointSteps, grid: Grid) -> int:
    if point.shape.phase == "prefill":
        return min(grid.warmup, PREFILL_WARMUP)
    return max(grid.warmup, CAPTURE_WARMUP) if point.target.cuda_graph else grid.warmup


def _pieces(items: Sequence[Shape], size: int) -> list[Sequence[Shape]]:
    return [items[start : start + size] for start in range(0, len(items), size)]
