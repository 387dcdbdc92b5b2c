"""A profile record as one HTML page: where a step goes, what a memory costs, what is held."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from ..atomic import readable_size
from ..errors import ProfileError
from ..reports.elements import E, Element
from ..reports.page import cell, figure, page, section, table
from ..reports.timing_plots import Dot, Piece, lines, span, stack, waterfall_bar
from .budget import Answer, MemoryCost, memory_cost
from .compare import describe
from .from_device import DeviceResults
from .intervals import interval, median, percentiles
from .record import Part, Point, ProfileRecord

_STYLE = """
:root { --segment: #2563ae; --gate: #c77700; --scan: #c77700; --select: #e0a040; --blend: #8f5a00;
  --other: #eac48a; --runtime: #8a94a0; --bound: #111; --budget: #b3362b; }
@media (prefers-color-scheme: dark) { :root { --segment: #6fa8ee; --gate: #f0a030; --scan: #f0a030;
  --select: #f7c777; --blend: #b9741a; --other: #7a5a28; --runtime: #77818d; --bound: #fff;
  --budget: #f0887d; } }
@media print { :root { --segment: #2563ae; --gate: #c77700; --scan: #c77700; --select: #e0a040;
  --blend: #8f5a00; --other: #eac48a; --runtime: #8a94a0; --bound: #111; --budget: #b3362b; }
  .piece, .key i { print-color-adjust: exact; -webkit-print-color-adjust: exact; } }
.facts { display: grid; grid-template-columns: repeat(auto-fill, minmax(9.5rem, 1fr));
  gap: .5rem 1rem; margin: 1rem 0; }
.facts div { border-left: 3px solid var(--line); padding-left: .6rem; min-width: 0;
  overflow-wrap: anywhere; }
.facts b { display: block; font-size: 1.15rem; font-variant-numeric: tabular-nums; }
.note { border-left: 3px solid var(--budget); padding: .1rem 0 .1rem .75rem; }
.bars { display: grid; overflow-wrap: anywhere; grid-template-columns:
  fit-content(14rem) minmax(0, 1fr) max-content;
  gap: .15rem .6rem; align-items: center; margin: .75rem 0; font-size: .875rem; }
.bars .number { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
svg.stretched { width: 100%; height: .9rem; overflow: visible; }
svg.stretched line { vector-effect: non-scaling-stroke; }
.piece.segment, .piece.fused, .piece.whole { fill: var(--segment); }
.piece.gate, .piece.scan { fill: var(--gate); } .piece.select { fill: var(--select); }
.piece.blend { fill: var(--blend); } .piece.other { fill: var(--other); }
.piece.runtime, .piece.transfer { fill: var(--runtime); }
.piece.weights { fill: var(--segment); } .piece.kv_cache { fill: var(--blend); }
.piece.retrieval_memory { fill: var(--gate); } .piece.workspace { fill: var(--runtime); }
.bound { stroke: var(--bound); stroke-width: 2; }
.tail { stroke: var(--soft); stroke-width: 1.5; }
.dot { fill: var(--segment); } .fitted { fill: none; stroke: var(--segment); stroke-width: 1.5; }
.band { fill: var(--segment); fill-opacity: .15; }
.budget { stroke: var(--budget); stroke-width: 1.5; stroke-dasharray: 5 3; }
.key i.segment { background: var(--segment); } .key i.scan, .key i.gate { background: var(--gate); }
.key i.select { background: var(--select); } .key i.blend { background: var(--blend); }
.key i.other { background: var(--other); } .key i.runtime { background: var(--runtime); }
.key i.mark { width: 2px; background: var(--bound); border-radius: 0; }
.key i.weights { background: var(--segment); } .key i.kv_cache { background: var(--blend); }
.key i.retrieval_memory { background: var(--gate); }
.key i.workspace { background: var(--runtime); }
.key span { white-space: nowrap; display: inline-block; margin-right: 1em; }
.key span i { margin-left: 0; }
.cards th:not(:first-child) { text-align: right; }
@media (max-width: 44rem) { .bars .soft { display: none; }
  .cards td.number { display: inline-block; width: auto; margin-right: 1rem; } }
.pair { display: grid; gap: 1rem 2rem; grid-template-columns: repeat(auto-fit,
  minmax(min(100%, 20rem), 1fr)); align-items: start; }
table.plain td:first-child { color: var(--soft); padding-right: 1.5rem; width: 40%; }
table.plain td { overflow-wrap: anywhere; }
details { margin: .75rem 0; } summary { cursor: pointer; }
"""

MOST_LAYERS = 20
MIN_STEPS = 5  # of a point, for a dot with an interval

# Stages that a gate was taken apart into, as far as they have a colour of their own.
_STAGES = ("scan", "select", "blend")
_RESIDENT = {
    "weights": "weights",
    "kv_cache": "keys and values of the context",
    "retrieval_memory": "memory of the gates",
    "workspace": "workspace and everything else",
}


def profile_page(
    record: ProfileRecord, answer: Answer | None = None, device: DeviceResults | None = None
) -> str:
    """The page of a record.

    Args:
        record: What was measured.
        answer: Which memory fits a budget; its shape of step is then the one that is drawn.
        device: What was recorded beside it on a device.

    Raises:
        ProfileError: If no step was measured.
    """
    points = [point for point in record.points if point.whole_ms]
    if not points:
        raise ProfileError(
            "record", "has no measured step", expected="at least one point with samples",
            fix="Measure again, and let it finish one round.",
        )  # fmt: skip
    costs = list(_costs(points, record, answer))
    return page(
        f"Profile of {_name(record.subject.bundle)}",
        _summary(record, points),
        _warnings(record, answer, costs),
        section("Where a step goes", *_waterfalls(points)),
        section("Latency over memory size", *_over_sizes(costs, answer)) if costs else None,
        section("All that was measured", _percentiles(points)),
        section("What is held in memory", *_resident(record)),
        *([] if device is None else _device(device)),
        section("The machine", *_machine(record)),
        style=_STYLE,
    )


def _name(path: str) -> str:
    return path.rstrip("/").rpartition("/")[2] or path


def _summary(record: ProfileRecord, points: Sequence[Point]) -> Element:
    subject, memory = record.subject, record.subject.memory
    shown = _main_point(points)
    facts = {
        f"{describe(shown)}": f"{_ms(median(shown.whole_ms))} ms",
        "tokens a second": f"{shown.tokens_per_s:,.1f}",
        **_retrieval(shown, points),
        "model": f"{subject.model_type}, {subject.precision}",
        "on": subject.device if subject.device != "cpu" else _text(record.environment.get("cpu")),
        "threads of an operator": "chosen by itself" if subject.threads is None else
        str(subject.threads),
        "memory": "none" if memory is None else
        f"{memory.entries:,} entries in {memory.gates} gates",
        "measured": record.started[:16].replace("T", " "),
    }  # fmt: skip
    return E("div", (E("div", E("b", value), E("span", name, class_="soft"))
                     for name, value in facts.items()), class_="facts")  # fmt: skip


def _main_point(points: Sequence[Point]) -> Point:
    """The first decode step with a memory, else the first decode step, else the first."""
    decode = [point for point in points if point.phase == "decode"]
    return next((point for point in decode if point.memory_entries), (decode or points)[0])


def _retrieval(shown: Point, points: Sequence[Point]) -> dict[str, str]:
    """What retrieval adds to the step without it."""
    alone = _frozen(shown, points)
    if alone is None or not shown.memory_entries:
        return {}
    times = median(shown.whole_ms) / median(alone.whole_ms)
    return {"the frozen router's time": f"× {times:.2f}"}


def _frozen(shown: Point, points: Sequence[Point]) -> Point | None:
    """The same step without a memory."""

    def rest(point: Point) -> tuple[object, ...]:
        return point.phase, point.layout, point.batch, point.tokens, point.past, point.cuda_graph

    return next((p for p in points if not p.memory_entries and rest(p) == rest(shown)), None)


def _warnings(
    record: ProfileRecord, answer: Answer | None, costs: Sequence[MemoryCost]
) -> Element | None:
    found = list(record.warnings)
    if not record.finished:
        found.append(
            "The measurement was interrupted: figures are of what was measured until then."
        )
    bent = [words for cost in costs for words in cost.bent]
    if bent:
        found.append("Latency does not grow evenly with the memory: " + "; ".join(bent) + ".")
    if answer is not None:
        found.append(_answered(answer))
    return E("div", (E("p", text, class_="note") for text in found)) if found else None


def _answered(answer: Answer) -> str:
    best = answer.best
    gates = f"{best.gates} gates" if best.gates != 1 else "one gate"
    return (
        f"Within {answer.budget_ms:g} ms: {best.step.entries:,} entries in {gates}, a step of "
        f"{_ms(best.step.ms)} ms [{_ms(best.step.low)}, {_ms(best.step.high)}]."
    )


def _waterfalls(points: Sequence[Point]) -> Iterator[Element]:
    yield E(
        "p",
        [
            E("span", E("i", class_=kind), text)
            for kind, text in (
                ("segment", "segment"), ("scan", "gate: scan"), ("select", "select"),
                ("blend", "blend"), ("other", "rest of a gate"), ("runtime", "runtime"),
                ("mark", "least it could take (roofline)"),
            )
        ],
        class_="key soft",
    )  # fmt: skip
    shown = _main_point(points)
    apart = [point for point in points if point.parts]
    if shown in apart:
        yield E("h3", describe(shown).capitalize())
        yield _waterfall(shown)
    for point in apart:
        if point is not shown:
            yield E("details", E("summary", describe(point).capitalize()), _waterfall(point))
    if not apart:
        yield E("p", "The steps of this layout cannot be taken apart.")


def _waterfall(point: Point) -> Element:
    times = [max(median(part.ms), 0.0) for part in point.parts]
    total, start, rows = sum(times), 0.0, []
    for part, ms in zip(point.parts, times, strict=True):
        bound = None if part.bound is None else part.bound.ms
        least = "" if bound is None else f", at least {_ms(bound)}"
        bar = waterfall_bar(
            start, list(_pieces(part, ms)), total, bound=bound, label=f"{part.name}: {_ms(ms)} ms"
        )
        rows += [E("span", part.name), bar, E("span", _ms(ms), E("span", least, class_="soft"),
                                              class_="number")]  # fmt: skip
        start += ms
    whole = median(point.whole_ms)
    rows += [E("b", "whole step"), E("span"), E("b", f"{_ms(whole)} ms", class_="number")]
    return E("div", rows, class_="bars")


def _pieces(part: Part, ms: float) -> Iterator[Piece]:
    """A part's bar; that of a gate in the proportions of its stages, measured on other steps."""
    stages = {name: median(times) for name, times in part.inside.items() if times}
    total = sum(stages.values())
    if part.kind != "gate" or not total:
        yield Piece(part.kind, ms)
        return
    for name, time in stages.items():
        yield Piece(name if name in _STAGES else "other", ms * time / total)


def _costs(
    points: Sequence[Point], record: ProfileRecord, answer: Answer | None
) -> Iterator[MemoryCost]:
    """One a shape of decode step with sizes enough for a line; the answered one first."""
    if answer is not None:
        yield answer.cost
    enough = [p for p in points if p.phase == "decode" and len(p.whole_ms) >= MIN_STEPS]
    shapes: dict[tuple[str, int, int], set[int]] = {}
    for point in enough:
        shape = (point.layout, point.batch, point.past)
        shapes.setdefault(shape, set()).add(point.memory_entries)
    measured = replace(record, points=tuple(enough))
    for (layout, batch, context), sizes in shapes.items():
        if answer is not None and (layout, batch, context) == (
            answer.cost.layout, answer.cost.batch, answer.cost.context,
        ):  # fmt: skip
            continue
        if 0 in sizes and len(sizes) > 2:
            yield memory_cost(measured, context=context, batch=batch, layout=layout)


def _over_sizes(costs: Sequence[MemoryCost], answer: Answer | None) -> Iterator[Element]:
    budget = None if answer is None else answer.budget_ms
    for cost in costs:
        largest = cost.sizes[-1].entries
        dots = [Dot(s.entries, s.ms, s.low, s.high) for s in (cost.frozen, *cost.sizes)]
        grown = [cost.line.at(entries) for entries in np.linspace(1, largest, 20)]
        way = [Dot(s.entries, s.ms, s.low, s.high) for s in grown]
        words = (
            f"Decode at {cost.context}"
            + (f", batch {cost.batch}" if cost.batch != 1 else "")
            + (f", {cost.layout}" if cost.layout != "split" else "")
            + f": milliseconds over entries a gate, {_quantile(cost.quantile)} "
            f"with 95 % intervals. {_ms(cost.frozen.ms)} ms frozen, then {_ms(cost.line.base)} ms "
            f"and {cost.line.slope * 1e3:.3g} µs an entry."
        )
        plot = lines(dots, way, level=budget, label=words)
        level = f" The dashed line is the budget of {budget:g} ms." if budget is not None else ""
        yield E("div", figure(plot, words, level), _choices(answer, cost), class_="pair")


def _choices(answer: Answer | None, cost: MemoryCost) -> Element | None:
    if answer is None or answer.cost is not cost:
        return None
    rows = [
        E(
            "tr",
            cell(f"{choice.gates}", "gates"),
            cell(f"{choice.step.entries:,}", "entries a gate", number=True),
            cell(f"{_ms(choice.step.ms)} [{_ms(choice.step.low)}, {_ms(choice.step.high)}]", "ms",
                 number=True),
            class_="best" if choice is answer.best else None,
        )
        for choice in answer.choices
    ]  # fmt: skip
    heads = ("gates, the last ones", "entries a gate", "ms")
    return E("div", E("h3", f"What fits {answer.budget_ms:g} ms"), table(heads, rows))


def _quantile(quantile: float) -> str:
    return "median" if quantile == 0.5 else f"{quantile:.0%} quantile"


def _percentiles(points: Sequence[Point]) -> Element:
    rows = []
    highest = {
        phase: max(percentiles(p.whole_ms)["p99_ms"] for p in points if p.phase == phase)
        for phase in {point.phase for point in points}
    }
    for point in points:
        found = percentiles(point.whole_ms)
        p50, p90, p99, longest = (found[f"{name}_ms"] for name in ("p50", "p90", "p99", "max"))
        low, high = interval(point.whole_ms, point.rounds)
        sure = f" [{_ms(low)}, {_ms(high)}]" if np.isfinite(low) else ""
        bar = span((p50, p90, p99), highest[point.phase], bound=point.bound_ms,
                   label=f"{_ms(p50)}, {_ms(p90)}, {_ms(p99)} ms")  # fmt: skip
        bound = "" if point.bound_ms is None else _ms(point.bound_ms)
        rows.append(
            E(
                "tr",
                cell([describe(point).capitalize(), bar]),
                cell([_ms(p50), E("small", sure, class_="soft")], "p50", number=True),
                cell(_ms(p90), "p90", number=True),
                cell(_ms(p99), "p99", number=True),
                cell(_ms(longest), "longest", number=True),
                cell(bound, "at least", number=True),
                cell(f"{point.tokens_per_s:,.1f}", "tokens/s", number=True),
                cell(str(len(point.whole_ms)), "steps", number=True),
            )
        )
    heads = ("milliseconds of whole steps", "p50 [95 %]", "p90", "p99", "longest", "at least",
             "tokens/s", "steps")  # fmt: skip
    return table(heads, rows)


def _resident(record: ProfileRecord) -> Iterator[Element]:
    held = {name: getattr(record.resident, name) for name in _RESIDENT}
    known = {name: size for name, size in held.items() if size is not None}
    if known:
        yield stack([Piece(name, float(size)) for name, size in known.items()],
                    label="shares of what is held")  # fmt: skip
        yield E(
            "p", [E("span", E("i", class_=name), _RESIDENT[name]) for name in known],
            class_="key soft",
        )  # fmt: skip
    rows = [(words, held[name]) for name, words in _RESIDENT.items()]
    rows += [("peak of the process", record.resident.peak_rss), ("device", record.resident.device)]
    if record.subject.memory is not None:
        rows.append(("the pack's files", record.subject.memory.bytes))
    yield _plain(
        {name: "not known" if size is None else readable_size(size) for name, size in rows}
    )


def _device(device: DeviceResults) -> Iterator[Element]:
    """Sensors while it ran, and the layers of its engines."""
    for name, log in device.sensors.items():
        rows = [
            E(
                "tr",
                cell(what),
                cell(f"{found.smallest:.4g}", "smallest", number=True),
                cell(f"{found.mean:.4g}", "mean", number=True),
                cell(f"{found.largest:.4g} {found.unit}", "largest", number=True),
            )
            for what, found in log.items()
        ]
        yield section(f"Sensors: {name}", table(("reading", "smallest", "mean", "largest"), rows))
    for name, layers in device.layers.items():
        longest = sorted(layers, key=lambda layer: -layer.mean_ms)[:MOST_LAYERS]
        highest = longest[0].mean_ms
        bars = [
            (
                E("span", layer.name),
                waterfall_bar(0.0, [Piece("segment", layer.mean_ms)], highest, bound=None,
                              label=f"{layer.name}: {_ms(layer.mean_ms)} ms"),
                E("span", f"{_ms(layer.mean_ms)} ({layer.share:.1%})", class_="number"),
            )
            for layer in longest
        ]  # fmt: skip
        words = f"{len(layers)} layers, {_ms(sum(layer.mean_ms for layer in layers))} ms"
        more = f"; the {MOST_LAYERS} longest of them" if len(layers) > MOST_LAYERS else ""
        yield section(
            f"Layers: {name}", E("p", words + more, class_="soft"), E("div", bars, class_="bars")
        )


def _machine(record: ProfileRecord) -> Iterator[Element]:
    bounds = record.machine_bounds
    if bounds is not None:
        yield E("h3", "What it can do")
        reads = {
            f"reading {readable_size(rate.working_set)}": f"{rate.gb_s:.1f} GB/s"
            for rate in bounds.reads
        }
        yield _plain(
            {**reads, "copying": f"{bounds.copy_gb_s:.1f} GB/s",
             "products of matrices": f"{bounds.gemm_gflop_s:,.0f} GFLOP/s",
             "measured": f"{bounds.how}; threads: {bounds.threads}"}
        )  # fmt: skip
    yield E("h3", "What it is")
    yield _plain(dict(_flat(record.environment)))
    yield E("h3", "What was asked for")
    grid, subject = record.settings, record.subject
    yield _plain(
        {
            "bundle": subject.bundle,
            "fingerprint": subject.fingerprint,
            "run by": subject.backend,
            "memory pack": "none" if subject.memory is None else subject.memory.path,
            **({} if subject.memory is None else {
                "variant": subject.memory.variant, "similarity": subject.memory.similarity,
                "neighbours": str(subject.memory.neighbors),
                "gates run by": ", ".join(subject.memory.backends),
            }),
            "steps of each": f"{grid.steps} decode, {grid.prefills} prefill, after {grid.warmup}",
        }
    )  # fmt: skip


def _flat(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    for name, value in values.items():
        words = f"{prefix}{name.replace('_', ' ')}"
        if isinstance(value, Mapping):
            yield from _flat(value, f"{words}: ")
        else:
            yield words, _text(value)


def _text(value: Any) -> str:
    if value is None:
        return "not known"
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, list | tuple):
        return ", ".join(map(_text, value))
    return str(value)


def _plain(rows: Mapping[str, str]) -> Element:
    """A table of names and values."""
    return E(
        "table",
        E("tbody", (E("tr", E("td", name), E("td", value)) for name, value in rows.items())),
        class_="plain",
    )


def _ms(milliseconds: float) -> str:
    """Three digits: 0.013, 1.20, 153."""
    if milliseconds >= 100:
        return f"{milliseconds:,.0f}"
    return f"{milliseconds:.3f}" if milliseconds < 1 else f"{milliseconds:#.3g}"
