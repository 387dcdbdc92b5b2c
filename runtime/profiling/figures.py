"""Figures that follow from the points of a record."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from .intervals import median
from .record import Bound, Part, PartKind, Point, Samples

DISTURBED = 0.33  # of a median step


def frozen_twin(point: Point, points: Sequence[Point]) -> Point | None:
    """The same point with the frozen router; None if it is that itself, or was not measured."""
    if point.memory_entries == 0:
        return None
    key = replace(point, memory_entries=0).key
    return next((other for other in points if other.key == key and other.whole_ms), None)


def summed(name: str, parts: Sequence[Part]) -> Part:
    """Parts of one kind as one: step by step the sum of their times."""

    def total(rows: list[Samples]) -> Samples:
        return tuple(np.sum(rows, axis=0).tolist())

    bounds = [part.bound for part in parts if part.bound]
    bound = Bound(
        sum(b.bytes for b in bounds), sum(b.flops for b in bounds), sum(b.ms for b in bounds)
    )
    stages = dict.fromkeys(stage for part in parts for stage in part.inside)
    count = min((len(s) for part in parts for s in part.inside.values()), default=0)
    zeros = (0.0,) * count
    return Part(
        name=name,
        kind=parts[0].kind,
        host_ms=total([part.ms for part in parts]),
        inside={
            stage: total([part.inside.get(stage, zeros)[:count] for part in parts])
            for stage in stages
        },
        bound=bound if len(bounds) == len(parts) else None,
    )


def typical_ms(point: Point, kind: PartKind | None = None) -> float:
    """Sum of the medians of a point's parts (of one kind), without the runtime's.

    Unlike the median of whole steps it hardly moves when a busy machine makes every step wait once,
    but each time in another part.
    """
    parts = [part for part in point.parts if part.kind != "runtime"]
    return sum(median(part.ms) for part in parts if kind is None or part.kind == kind)


def gate_share(loaded: Point, frozen: Point | None) -> float:
    """Share of a step that retrieval takes: what the gates take beyond routing alone.

    (gates with the memory - gates frozen) / all parts with the memory, sums of medians. Where gates
    cannot be seen (fused, or captured in a graph) and the frozen model is the same graph over an
    empty memory, the numerator is that of all parts. 0 without a memory.
    """
    if frozen is None or not loaded.whole_ms or not frozen.whole_ms:
        return 0.0
    kind: PartKind | None = "gate" if any(p.kind == "gate" for p in loaded.parts) else None
    return (typical_ms(loaded, kind) - typical_ms(frozen, kind)) / typical_ms(loaded)


def unexplained(point: Point) -> float:
    """What of the median step the medians of its parts do not add up to, as a share of it.

    0 on a quiet machine, where every part takes what it takes. Where other programs make each step
    wait in another part, the median step waits and the median part does not.
    """
    whole = median(point.whole_ms)
    return 1 - sum(median(part.ms) for part in point.parts) / whole if point.parts else 0.0


def disturbed(point: Point) -> bool:
    """Whether whole steps took much longer than their parts typically do: a busy machine."""
    return unexplained(point) > DISTURBED
