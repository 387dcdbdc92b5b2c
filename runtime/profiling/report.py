"""A profile record as tables that a person reads in ten seconds."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from typing import TYPE_CHECKING

import numpy as np

from ..atomic import readable_size
from ..commands.common import fitting
from .figures import frozen_twin, gate_share, summed, typical_ms
from .intervals import interval, median, percentiles
from .record import Bound, Part, Point, ProfileRecord, Samples

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

MOST_ROWS = 12  # parts of a step that are shown one by one unless all are asked for
STAGES = ("prepare", "scan", "select", "gather", "blend", "rule")


def print_record(record: ProfileRecord, console: Console, *, every_part: bool = False) -> None:
    """Print the parts of a decode step, a line a point, the account, and what to doubt."""
    points = [point for point in record.points if point.whole_ms]
    for point in _explained(points):
        twin = frozen_twin(point, points)
        console.print(
            fitting(
                console,
                partial(_parts_table, point, twin, every_part),
                ("p99", "p90", "share", "95 %"),
            )
        )
    if points:
        most = ("max", "p90", "tok/s", "95 %")
        console.print(fitting(console, partial(_points_table, points), most))
    for line in _lines(record, points):
        console.print(line, soft_wrap=False)
    for warning in record.warnings:
        console.print(warning, style="yellow")


def _explained(points: Sequence[Point]) -> Iterator[Point]:
    """The points whose parts are shown: the first decode step of each layout, else a prefill."""
    shown: set[tuple[str, bool | None]] = set()
    for point in sorted(points, key=lambda p: p.phase != "decode"):
        way = (point.layout, point.cuda_graph)
        if way not in shown and (len(point.parts) > 2 or point.layout == "fused"):
            shown.add(way)
            yield point


def _parts_table(
    point: Point, frozen: Point | None, every_part: bool, left_out: Sequence[str]
) -> Table:
    from rich.table import Table

    title = f"Where a step goes, ms ({_step_name(point)}, {_way(point)})"
    table = Table(title=title, title_justify="left")
    table.add_column("part", no_wrap=True)
    names = ["p50", "95 %", "p90", "p99", "share", "x bound"]
    names += [] if frozen is None else ["frozen"]
    kept = [index for index, name in enumerate(names) if name not in left_out]
    for index in kept:
        table.add_column(names[index], justify="right", no_wrap=True)
    total = sum(median(part.ms) for part in point.parts)
    rows = _rows(point, every_part)
    others = {} if frozen is None else {part.name: part for part in _rows(frozen, every_part)}

    def add(part: Part, twin: Part | None, taken: Sequence[Part] = ()) -> None:
        cells = _figures(part.ms, point.rounds)
        share = sum(median(each.ms) for each in taken or (part,)) / total
        cells += [f"{share:.0%}", _times_bound(median(part.ms), part.bound)]
        if frozen is not None:
            cells.append(_ms(median(twin.ms)) if twin else "")
        style = "cyan" if part.kind == "gate" else None
        table.add_row(part.name, *(cells[index] for index in kept), style=style)

    for part in rows:
        add(part, others.get(part.name), _taken(part, point))
    for kind in dict.fromkeys(part.kind for part in point.parts if part.inside):
        same = [part for part in point.parts if part.kind == kind]
        whole = same[0] if len(same) == 1 else summed(f"{len(same)} {kind}s", same)
        table.add_section()
        if whole.name not in [part.name for part in rows]:
            twins = [] if frozen is None else [p for p in frozen.parts if p.kind == kind]
            add(whole, summed(whole.name, twins) if twins else None, same)
        for stage in sorted(whole.inside, key=_stage_order):
            table.add_row(f"  {stage}", _ms(median(whole.inside[stage])), style="dim")
    table.add_section()
    figures = _figures(point.whole_ms, point.rounds)
    least = point.bound_ms
    share = "" if least is None else _ratio(median(point.whole_ms) / least)
    last = [] if frozen is None else [_ms(median(frozen.whole_ms))]
    cells = [*figures, "", share, *last]
    table.add_row("whole step", *(cells[index] for index in kept), style="bold")
    return table


def _taken(row: Part, point: Point) -> list[Part]:
    """The parts that a row stands for."""
    if row.name in [part.name for part in point.parts]:
        return [row]
    return [part for part in point.parts if part.kind == row.kind]


def _rows(point: Point, every_part: bool) -> list[Part]:
    if every_part or len(point.parts) <= MOST_ROWS:
        return list(point.parts)
    rows = []
    for kind in dict.fromkeys(part.kind for part in point.parts):
        same = [part for part in point.parts if part.kind == kind]
        rows.append(same[0] if len(same) == 1 else summed(f"{len(same)} {kind}s", same))
    return rows


def _points_table(points: Sequence[Point], left_out: Sequence[str]) -> Table:
    from rich.table import Table

    table = Table(title="Whole steps, ms", title_justify="left")
    table.add_column("step", no_wrap=True)
    several = len({_way(point) for point in points}) > 1
    memory = any(point.memory_entries for point in points)
    if several:
        table.add_column("layout", no_wrap=True)
    if memory:
        table.add_column("entries", justify="right", no_wrap=True)
    names = [n for n in ("p50", "95 %", "p90", "p99", "max", "tok/s") if n not in left_out]
    for name in names:
        table.add_column(name, justify="right", no_wrap=True)
    if memory:
        table.add_column("gates +", justify="right", no_wrap=True)
    last: tuple[str, str] | None = None
    for point in points:
        group = (_step_name(point), _way(point))
        name = group[0] if last is None or last[0] != group[0] else ""
        if last is not None and name:
            table.add_section()
        last = group
        cells = [name]
        if several:
            cells.append(_way(point))
        if memory:
            cells.append(f"{point.memory_entries:,}" if point.memory_entries else "frozen")
        found = dict(
            zip(("p50", "95 %", "p90", "p99"), _figures(point.whole_ms, point.rounds), strict=True)
        )
        found["max"], found["tok/s"] = _ms(max(point.whole_ms)), _rate(point.tokens_per_s)
        cells += [found[name] for name in names]
        if memory:
            twin = frozen_twin(point, points)
            cells.append("" if twin is None else f"{gate_share(point, twin):.0%}")
        table.add_row(*cells)
    return table


def _lines(record: ProfileRecord, points: Sequence[Point]) -> Iterator[str]:
    for phase, words in (("prefill", "Time to first token"), ("decode", "Between two tokens")):
        alone = [p for p in points if p.phase == phase and p.batch == 1]
        if alone:
            first = alone[0]
            where = f"{_step_name(first)}, {_entries(first)}"
            yield f"{words}: {_ms(median(first.whole_ms))} ms ({where})."
    loaded = [(p, t) for p in points if (t := frozen_twin(p, points)) and p.phase == "decode"]
    if loaded:
        point, twin = loaded[0]
        added = typical_ms(point) - typical_ms(twin)
        yield f"The memory adds {_ms(added)} ms to a frozen step of {_ms(typical_ms(twin))} ms."
    held = record.resident
    named = {
        "weights": held.weights, "cache": held.kv_cache, "memory": held.retrieval_memory,
        "workspace": held.workspace, "peak": held.peak_rss, "device": held.device,
    }  # fmt: skip
    sizes = [f"{name} {readable_size(size)}" for name, size in named.items() if size is not None]
    yield "Bytes: " + ", ".join(sizes) + "."
    machine = record.machine_bounds
    if machine is not None:
        fast, slow = machine.reads[0].gb_s, machine.reads[-1].gb_s
        reads = f"{slow:.0f}" if len(machine.reads) == 1 else f"{slow:.0f} (in cache {fast:.0f})"
        yield (
            f"Bound by: reading {reads} GB/s, products {machine.gemm_gflop_s:,.0f} GFLOP/s, "
            f"measured on {machine.threads} thread{'s' if machine.threads > 1 else ''}."
        )


def _step_name(point: Point) -> str:
    batch = f" x{point.batch}" if point.batch > 1 else ""
    if point.phase == "prefill":
        return f"prompt of {point.tokens}{batch}"
    return f"decode after {point.past}{batch}"


def _way(point: Point) -> str:
    graph = {None: "", True: ", graph", False: ", launched"}[point.cuda_graph]
    return point.layout + graph


def _entries(point: Point) -> str:
    return f"{point.memory_entries:,} entries" if point.memory_entries else "frozen"


def _figures(samples: Samples, rounds: Sequence[int]) -> list[str]:
    """p50, its interval, p90, p99."""
    found = percentiles(samples)
    low, high = interval(samples, rounds)
    sure = f"{_ms(low)}-{_ms(high)}" if np.isfinite(low) else "?"
    return [_ms(found["p50_ms"]), sure, _ms(found["p90_ms"]), _ms(found["p99_ms"])]


def _times_bound(milliseconds: float, bound: Bound | None) -> str:
    return "" if bound is None or bound.ms <= 0 else _ratio(milliseconds / bound.ms)


def _ratio(times: float) -> str:
    return f"{times:.1f}" if times < 100 else f"{times:,.0f}"


def _ms(milliseconds: float) -> str:
    """Three digits that count, as far as that is sensible."""
    if abs(milliseconds) < 10:
        return f"{milliseconds:.3f}" if abs(milliseconds) < 1 else f"{milliseconds:.2f}"
    return f"{milliseconds:.1f}" if abs(milliseconds) < 100 else f"{milliseconds:,.0f}"


def _rate(tokens: float) -> str:
    return f"{tokens:,.1f}" if tokens < 100 else f"{tokens:,.0f}"


def _stage_order(stage: str) -> int:
    return STAGES.index(stage) if stage in STAGES else len(STAGES)
