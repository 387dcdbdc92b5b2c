"""Which memory fits a latency: a line through decode steps measured with memories of several sizes.

A search reads every entry, so a step takes base + slope · entries once there is a memory at all;
the frozen router, which searches nothing, stands apart.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from ..errors import ProfileError, SettingError
from ..memory import MemoryPack
from ..run_config import RunConfig, pack_hash, used_gates
from .record import Point, ProfileRecord
from .resample import block_correlation, block_starts, resampled_quantiles, student_factor, widening

SCHEMA = "knnmoe.profile-budget/1"
NORMAL = 1.96  # two-sided 95 %
STEPS = 1000  # of the largest memory measured: how finely an answer is looked for
ONE_POINT = 0.03
MEASURE_SIZES = "Measure with --entries 0,5000,all: frozen, and two sizes at least."


@dataclass(frozen=True)
class Size:
    """Decode steps with a memory of that many entries a gate: a quantile with its 95 % interval."""

    entries: int
    ms: float
    low: float
    high: float


@dataclass(frozen=True)
class Line:
    """base + slope · entries, milliseconds.

    Attributes:
        base, slope: The least-squares line, in which sizes count by how sure they are.
        covariance: Variance of the base, covariance of both, variance of the slope.
        reach: How many standard deviations the interval goes to each side.
    """

    base: float
    slope: float
    covariance: tuple[float, float, float]
    reach: float

    def at(self, entries: float) -> Size:
        """The line at a size, with its 95 % interval."""
        of_base, of_both, of_slope = self.covariance
        ms = self.base + self.slope * entries
        variance = of_base + 2 * entries * of_both + entries**2 * of_slope
        spread = self.reach * math.sqrt(max(variance, 0.0))
        return Size(round(entries), ms, ms - spread, ms + spread)


@dataclass(frozen=True)
class MemoryCost:
    """What a memory's size costs at one shape of decode step.

    Attributes:
        layout, batch, context: The shape.
        quantile: Of a step's times.
        frozen: Without a memory.
        sizes: With one, by growing size.
        line: Through them.
        used_gates: How many gates have a memory.
        gates: By number, what each of them adds to a step with the largest memory, ms; empty where
            parts were not measured (fused layout).
        bent: Sizes at which the measured step is off the line, in words.
    """

    layout: str
    batch: int
    context: int
    quantile: float
    frozen: Size
    sizes: tuple[Size, ...]
    line: Line
    used_gates: int
    gates: dict[int, float]
    bent: tuple[str, ...]

    def at(self, entries: int, share: float = 1.0) -> Size:
        """A step with that many entries a gate: the line, or what was measured where that is more.

        Args:
            entries: A gate's; 0 is the frozen router.
            share: Of what all gates add to the frozen step, in the gates that are used.
        """
        if entries == 0:
            return self.frozen
        fitted = self.line.at(entries)
        measured = [size.entries for size in self.sizes]
        if entries >= measured[0]:
            highs = float(np.interp(entries, measured, [size.high for size in self.sizes]))
            fitted = Size(entries, fitted.ms, fitted.low, max(fitted.high, highs))
        low, ms, high = (
            base + share * max(full - base, 0.0)
            for base, full in zip(
                (self.frozen.low, self.frozen.ms, self.frozen.high),
                (fitted.low, fitted.ms, fitted.high),
                strict=True,
            )
        )
        return Size(entries, ms, low, high)


@dataclass(frozen=True)
class Choice:
    """A memory that fits.

    Attributes:
        gates: How many gates use it, of all that could: the last ones.
        step: Entries a gate, and what a decode step takes.
    """

    gates: int
    step: Size

    @property
    def total(self) -> int:
        """Entries in all gates together."""
        return self.gates * self.step.entries


@dataclass(frozen=True)
class Answer:
    """Which memory fits a budget.

    Attributes:
        budget_ms: For a decode step.
        cost: What it follows from.
        choices: For every number of gates that a memory fits in, the most entries; all gates first.
    """

    budget_ms: float
    cost: MemoryCost
    choices: tuple[Choice, ...]

    @property
    def best(self) -> Choice:
        """The most entries in all gates together; of those the most gates.

        On the demo model two of four gates with all entries gained more than four with half of
        them, and one more than four with a quarter (docs/profiling.md).
        """
        return max(self.choices, key=lambda choice: (choice.total, choice.gates))

    def to_json(self) -> dict[str, Any]:
        """The answer and what it follows from."""
        cost = self.cost
        return {
            "schema": SCHEMA,
            "budget_ms": self.budget_ms,
            "quantile": cost.quantile,
            "layout": cost.layout,
            "batch": cost.batch,
            "context": cost.context,
            "choices": [{"gates": c.gates, **asdict(c.step)} for c in self.choices],
            "frozen": asdict(cost.frozen),
            "sizes": [asdict(size) for size in cost.sizes],
            "base_ms": cost.line.base,
            "ms_per_entry": cost.line.slope,
            "bent": list(cost.bent),
        }


def memory_cost(
    record: ProfileRecord,
    *,
    context: int | None = None,
    batch: int | None = None,
    layout: str | None = None,
    quantile: float = 0.5,
    seed: int = 0,
) -> MemoryCost:
    """Fit decode steps over memory sizes.

    Args:
        record: With steps at 0 entries and at two other sizes at least.
        context, batch, layout: Of the steps; None takes the first that was measured.
        quantile: Of a step's times.
        seed: Of the bootstrap.

    Raises:
        ProfileError: If the record has no such steps.
    """
    decode = [point for point in record.points if point.phase == "decode" and point.whole_ms]
    wanted = {"past": context, "batch": batch, "layout": layout}
    points = [
        point
        for point in decode
        if all(value in (None, getattr(point, name)) for name, value in wanted.items())
    ]
    if points:
        way = (*_shape(points[0]), points[0].cuda_graph)
        points = [point for point in points if (*_shape(point), point.cuda_graph) == way]
    by_size = {point.memory_entries: point for point in points}
    sizes = sorted(set(by_size) - {0})
    if 0 not in by_size or len(sizes) < 2:
        asked = ", ".join(f"{name} {value}" for name, value in wanted.items() if value is not None)
        raise ProfileError(
            "record",
            "has too few memory sizes to say what a size costs" + (f" at {asked}" if asked else ""),
            expected="decode steps with 0 entries and two other sizes",
            found=", ".join(
                f"{p.memory_entries} entries at {p.past} (batch {p.batch}, {p.layout})"
                for p in decode
            )
            or "no decode steps",
            fix=MEASURE_SIZES,
        )
    gates = record.subject.memory.gates if record.subject.memory is not None else 0
    frozen, *found = (_size(by_size[size], quantile, seed) for size in (0, *sizes))
    line = _line(found, min(len(block_starts(by_size[size].rounds)) for size in sizes))
    return MemoryCost(
        *_shape(points[0]),
        quantile,
        frozen,
        tuple(found),
        line,
        gates,
        _added(by_size[0], by_size[sizes[-1]], gates),
        tuple(_bent(found, line)),
    )


def _shape(point: Point) -> tuple[str, int, int]:
    return point.layout, point.batch, point.past


def _size(point: Point, quantile: float, seed: int) -> Size:
    """A quantile of whole steps, with its interval from resampled blocks."""
    ms = float(np.quantile(point.whole_ms, quantile))
    blocks = len(block_starts(point.rounds))
    if blocks < 2:
        raise ProfileError(
            "record",
            f"has too few steps with {point.memory_entries} entries",
            expected="several",
            found=len(point.whole_ms),
            fix="Measure more --steps.",
        )
    drawn = resampled_quantiles(
        [point.whole_ms],
        point.rounds,
        quantile=quantile,
        seed=seed,
    )
    correlation = block_correlation([([point.whole_ms], point.rounds)])
    reach = _reach(blocks) * float(drawn.std()) * widening(point.rounds, correlation)
    return Size(point.memory_entries, ms, ms - reach, ms + reach)


def _reach(blocks: int) -> float:
    return NORMAL * student_factor(NORMAL, max(blocks - 1, 1))


def _line(sizes: Sequence[Size], blocks: int) -> Line:
    """Weighted least squares; where sizes differ from a line by more than they should, so much
    more are base and slope unsure.
    """
    entries = np.array([size.entries for size in sizes], np.float64)
    times = np.array([size.ms for size in sizes])
    spread = np.array([(size.high - size.ms) / _reach(blocks) for size in sizes])
    spread = np.maximum(spread, 1e-4 * times)  # samples that are all the same
    design = np.stack([np.ones_like(entries), entries], axis=1)
    scaled, inverse = design / spread[:, None], 1 / spread
    covariance = np.linalg.inv(scaled.T @ scaled)
    base, slope = covariance @ scaled.T @ (times * inverse)
    if len(sizes) > 2:
        misfit = (times - design @ np.array([base, slope])) / spread
        covariance = covariance * max(1.0, float(misfit @ misfit) / (len(sizes) - 2))
    spreads = (float(covariance[0, 0]), float(covariance[0, 1]), float(covariance[1, 1]))
    return Line(float(base), float(slope), spreads, _reach(blocks))


def _added(frozen: Point, full: Point, gates: int) -> dict[int, float]:
    """What each gate takes more than without a memory, by its number, ms.

    Args:
        frozen, full: The step without a memory, and with the largest.
        gates: How many have one: those that take most more.
    """
    alone = {part.name: part for part in frozen.parts}
    more = {
        int(part.name.split()[1]): max(
            float(np.median(part.ms)) - float(np.median(alone[part.name].ms)), 0.0
        )
        for part in full.parts
        if part.kind == "gate" and part.name in alone
    }
    used = sorted(more, key=lambda gate: -more[gate])[:gates]
    return {gate: more[gate] for gate in sorted(used)}


def _bent(sizes: Sequence[Size], line: Line) -> list[str]:
    return [
        f"{size.entries:,} entries take {size.ms:.3g} ms, the line says {at.ms:.3g}"
        for size in sizes
        if not (size.low <= (at := line.at(size.entries)).ms <= size.high)
        and abs(size.ms - at.ms) > ONE_POINT * size.ms
    ]


def fit_budget(
    record: ProfileRecord,
    budget_ms: float,
    *,
    context: int | None = None,
    batch: int | None = None,
    layout: str | None = None,
    quantile: float = 0.5,
) -> Answer:
    """The largest memory whose decode steps stay within a budget, at the interval's upper end.

    No answer is larger than the largest memory measured. Where not all gates have one, it is the
    first gates that go without: later ones gain more, on the demo model (docs/profiling.md) and in
    what has been published of re-mixing (C3PO, arXiv 2504.07964, on OLMoE).

    Args:
        record: See `memory_cost`, as of `context`, `batch`, `layout`, `quantile`.
        budget_ms: Of a decode step.
        context, batch, layout, quantile: Which steps, and which of their times.

    Raises:
        ProfileError: If the record has no such steps.
        SettingError: If nothing fits; it says what would.
    """
    if not 0 < budget_ms < 1e9:
        raise SettingError("--budget-ms", "out of range", expected="more than 0", found=budget_ms)
    cost = memory_cost(record, context=context, batch=batch, layout=layout, quantile=quantile)
    if cost.frozen.high > budget_ms:
        raise _impossible(record, cost, budget_ms, quantile)
    least = record.subject.memory.neighbors if record.subject.memory is not None else 1
    choices = []
    for gates, share in _shares(cost):
        entries = _most_entries(cost, share, budget_ms)
        if entries >= least:
            choices.append(Choice(gates, cost.at(entries, share)))
        if entries == cost.sizes[-1].entries:
            break  # fewer gates would not hold more
    if not choices:
        gates, share = _shares(cost)[-1]
        smallest = cost.at(least, share)
        raise SettingError(
            "--budget-ms",
            "leaves no room for a memory",
            expected=f"at least {smallest.high:.3g} ms, for {least} entries in {gates} gate(s)",
            found=f"{budget_ms:g} ms",
            fix=f"The frozen router alone fits ({cost.frozen.ms:.3g} ms): run without a memory, or"
            " compress it (`knnmoe memory compress`) and measure again.",
        )
    return Answer(budget_ms, cost, tuple(choices))


def _shares(cost: MemoryCost) -> list[tuple[int, float]]:
    """For all gates, all but the first, …: how many they are, and their share of what all add."""
    times = list(cost.gates.values())
    total = sum(times)
    if not total:
        return [(cost.used_gates, 1.0)]
    return [(len(times) - left, sum(times[left:]) / total) for left in range(len(times))]


def _most_entries(cost: MemoryCost, share: float, budget_ms: float) -> int:
    """The most entries that fit, in steps of a thousandth of the largest memory measured."""
    largest = cost.sizes[-1].entries
    for step in range(STEPS, 0, -1):
        entries = largest * step // STEPS
        if entries and cost.at(entries, share).high <= budget_ms:
            return entries
    return 0


def _impossible(
    record: ProfileRecord, cost: MemoryCost, budget_ms: float, quantile: float
) -> SettingError:
    fitting = [
        f"{point.past} tokens of context, batch {point.batch}, {point.layout}"
        for point in record.points
        if point.phase == "decode"
        and point.memory_entries == 0
        and point.whole_ms
        and np.quantile(point.whole_ms, quantile) <= budget_ms
    ]
    would = (
        f"Of what was measured, this fits without a memory: {'; '.join(fitting)}."
        if fitting
        else "Nothing that was measured fits: take a bundle of fewer bits, or a faster device."
    )
    return SettingError(
        "--budget-ms",
        "is less than the frozen router takes without any memory",
        expected=f"at least {cost.frozen.high:.3g} ms, and {cost.at(1).high:.3g} ms with a memory",
        found=f"{budget_ms:g} ms",
        fix=would,
    )


def run_config(record: ProfileRecord, answer: Answer, pack: MemoryPack) -> RunConfig:
    """The best choice as a run configuration for the pack that was measured.

    Raises:
        SettingError: If the pack is of another model than the record, or is not the one measured.
    """
    best, cost = answer.best, answer.cost
    gates = used_gates(pack)
    memory = record.subject.memory
    stated = (record.subject.fingerprint, None if memory is None else memory.entries)
    if stated != (pack.model.fingerprint, pack.entries):
        raise SettingError(
            pack.path, "is not the memory that was measured",
            expected=f"{stated[1]} entries, for {stated[0]}",
            found=f"{pack.entries} entries, for {pack.model.fingerprint}",
            fix="Name the pack that the record was measured with.",
        )  # fmt: skip
    return RunConfig(
        fingerprint=record.subject.fingerprint,
        precision=record.subject.precision,
        memory=pack_hash(pack),
        entries=best.step.entries,
        gates=gates[-best.gates :],
        expected={
            "budget_ms": answer.budget_ms,
            "quantile": cost.quantile,
            "layout": cost.layout,
            "batch": cost.batch,
            "context": cost.context,
            "device": record.subject.device,
            "threads": record.subject.threads,
            "ms": best.step.ms,
            "low_ms": best.step.low,
            "high_ms": best.step.high,
            "frozen_ms": cost.frozen.ms,
            "measured": record.started,
        },
    )
