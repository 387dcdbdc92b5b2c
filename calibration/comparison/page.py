"""A comparison as one HTML page."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from knnmoe.runtime.atomic import readable_size
from knnmoe.runtime.reports.elements import E, Element
from knnmoe.runtime.reports.page import (
    cell,
    colour_key,
    figure,
    grid,
    page,
    section,
    table,
    write_html,
)
from knnmoe.runtime.reports.plots import (
    Scale,
    histogram,
    interval_axis,
    interval_bar,
    paired_bars,
)

from .bench import DOMAIN, GENERAL
from .compare import Comparison, RowResult
from .explain import Explanation, TextExplained, TokenChange
from .measured import Change
from .rows import BOUND, CONTROL, MEMORY, OTHER

_GROUPS = {
    "base": "The model as it is",
    MEMORY: "The memory, weights frozen",
    CONTROL: "Controls: a memory without what should make it work",
    OTHER: "Alternatives",
    BOUND: "A bound, not a method: it sees the tokens it is scored on",
}
_WIDTH = 220.0


def write_page(path: Path, found: Comparison) -> None:
    """Write the report.

    Raises:
        OutputError: If it cannot be written.
    """
    write_html(path, comparison_page(found))


def comparison_page(found: Comparison) -> str:
    """The report as a document."""
    return page(
        "What the memory is worth",
        _summary(found),
        _table_section(found),
        [] if found.explanation is None else _explained(found, found.explanation),
        _about(found),
    )


def _summary(found: Comparison) -> list[Element]:
    by_name = {one.row.name: one for one in found.rows}
    lines = [E("p", _model(found.model), class_="soft")]
    memory = by_name.get("memory")
    if memory is None or not memory.changes:
        return lines
    told = [
        E("li", E("b", name), f": {_sentence(memory.changes[name], found.frozen[name])}")
        for name in memory.changes
    ]
    return [*lines, E("p", "With the memory as calibrated, against the frozen router:"),
            E("ul", told)]  # fmt: skip


def _sentence(change: Change, frozen: float) -> str:
    numbers = f"NLL {frozen:.4f} → {frozen + change.mean:.4f} nats a token ({_numbers(change)})"
    if not math.isfinite(change.low):
        return f"{numbers}; one cluster of text tells nothing about others."
    kind = _kind(change)
    verdict = {"gain": "a gain", "loss": "a loss", "unsure": "no certain difference"}[kind]
    return f"{numbers}: {verdict}."


def _model(model: Mapping[str, Any]) -> str:
    return (
        f"{model['model_type']}: {model['num_gates']} gates, {model['num_experts']} experts,"
        f" {model['top_k']} a token, width {model['hidden_size']}"
    )


def _table_section(found: Comparison) -> Element:
    scale = _scale([row for row in found.rows if row.row.group in (MEMORY, OTHER)], found)
    names = list(found.frozen)
    columns = ["", *(f"{name}, frozen {found.frozen[name]:.4f}" for name in names),
               "extra bytes", "learned"]  # fmt: skip
    rows: list[Element] = []
    group = None
    for one in found.rows:
        if one.row.group != group:
            group = one.row.group
            rows.append(E("tr", E("td", _GROUPS[group], colspan=len(columns)), class_="group"))
        rows.append(_row(one, names, scale))
    axis = [E("td"), *(E("td", interval_axis(scale)) for _ in names), E("td"), E("td")]
    return section(
        "The table",
        E("p", "Change of the negative log-likelihood against the frozen router, in nats a token,"
          " with 95 % intervals (paired bootstrap over whole documents). Below zero is better. All"
          " rows learn from the same reference text and choose their settings on validation text;"
          " the test text chooses nothing.", class_="soft"),
        table(columns, [*rows, E("tr", axis, class_="axis")]),
    )  # fmt: skip


def _row(one: RowResult, names: Sequence[str], scale: Scale) -> Element:
    label = [E("b", one.row.label), E("div", one.row.source, class_="soft")
             if one.row.source else None]  # fmt: skip
    best = "best" if one.row.name == "memory" else None
    if one.failed is not None:
        why = E("td", "not measured: ", one.failed, colspan=len(names) + 2)
        return E("tr", cell(label), why)
    changes = [_cell(one, name, scale) for name in names]
    needed = one.measured.extra_bytes if one.measured else None
    return E(
        "tr",
        cell([label, _chosen(one)]),
        changes,
        cell("" if needed is None else readable_size(needed), "extra bytes", number=True),
        cell(one.row.trained, "learned"),
        class_=best,
    )


def _cell(one: RowResult, name: str, scale: Scale) -> Element:
    if one.row.group == "base":
        return cell("0", name)
    found = one.changes[name]
    return cell([_change(found), _bar(found, scale, f"{one.row.label}, {name}")], name)


def _chosen(one: RowResult) -> Element | None:
    if one.measured is None:
        return None
    found = {**one.measured.chosen, **one.measured.facts}
    told = [f"{name.replace('_', ' ')} {_short(value)}" for name, value in found.items()]
    return E("div", "; ".join(told), class_="soft") if told else None


def _short(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, list):
        return ", ".join(_short(one) for one in value)
    return str(value)


def _scale(rows: Sequence[RowResult], found: Comparison) -> Scale:
    """Wide enough for the memory and the alternatives; a control may go beyond."""
    ends = [
        end
        for row in rows
        for change in row.changes.values()
        for end in (change.low, change.high)
        if math.isfinite(end)
    ]
    return _around_zero(ends)


def _around_zero(ends: Sequence[float]) -> Scale:
    low, high = min([0.0, *ends]), max([0.0, *ends])
    room = 0.06 * (high - low) or 0.01
    return Scale(low - room, high + room, _WIDTH)


def _change(change: Change) -> Element:
    return E(
        "div",
        E("b", f"{change.mean:+.4f}"),
        E("small", f"[{_bound(change.low)}, {_bound(change.high)}]"),
        class_=f"change {_kind(change)}",
    )


def _bar(change: Change, scale: Scale, label: str) -> Element:
    return interval_bar(change.mean, change.low, change.high, scale,
                        label=f"{label}: {_numbers(change)}")  # fmt: skip


def _kind(change: Change) -> str:
    return "gain" if change.high < 0 else "loss" if change.low > 0 else "unsure"


def _numbers(change: Change) -> str:
    return f"{change.mean:+.4f} [{_bound(change.low)}, {_bound(change.high)}]"


def _bound(number: float) -> str:
    return f"{number:+.4f}" if math.isfinite(number) else "unknown"


def _explained(found: Comparison, why: Explanation) -> list[Element]:
    parts = [_gates(why), _confidence(why)]
    parts += [_experts(name, text) for name, text in why.texts.items()]
    parts += [_tokens(name, text) for name, text in why.texts.items()]
    return parts


def _gates(why: Explanation) -> Element:
    ends = [
        end
        for gate in why.gates
        for changes in (gate.alone, gate.without)
        for change in changes.values()
        for end in (change.low, change.high)
        if math.isfinite(end)
    ]
    scale, names = _around_zero(ends), list(why.texts)
    columns = [
        "gate",
        *(f"{name}, {way}" for name in names for way in ("only here", "all but here")),
    ]
    rows = []
    for gate in why.gates:
        cells = [
            cell([_change(changes[name]), _bar(changes[name], scale, f"gate {gate.gate}, {way}")],
                 f"{name}, {way}")
            for name in names
            for way, changes in (("only here", gate.alone), ("all but here", gate.without))
        ]  # fmt: skip
        rows.append(E("tr", cell(f"gate {gate.gate}"), cells))
    return section(
        "Gate by gate",
        E("p", "The memory in one gate only, and in all but that one; measured on fewer tokens,"
          " so the intervals are wider.", class_="soft"),
        table(columns, rows),
    )  # fmt: skip


def _confidence(why: Explanation) -> Element:
    names = list(why.texts)
    gates = sorted(why.texts[names[0]].confidence)
    figures = []
    for gate in gates:
        # Domain is drawn last: it is what the memory is for.
        series = [
            ("b" if name == DOMAIN else "a", why.texts[name].confidence[gate].histogram)
            for name in reversed(names)
        ]
        means = ", ".join(f"{name} {why.texts[name].confidence[gate].mean:.3f}" for name in names)
        plot = histogram(series, 0.0, 1.0, label=f"λ of gate {gate}: mean {means}")
        figures.append(figure(plot, E("b", f"gate {gate}"), f": mean {means}"))
    return section(
        "How far the memory is trusted",
        E("p", "λ of every token, from 0 (the frozen router) to 1; height is the share of tokens.",
          class_="soft"),
        colour_key(GENERAL, DOMAIN) if GENERAL in names else colour_key("", DOMAIN),
        grid(figures),
    )  # fmt: skip


def _experts(name: str, text: TextExplained) -> Element:
    figures = []
    for gate, before in text.frozen_load.items():
        after = text.memory_load[gate]
        plot = paired_bars(
            list(zip(before.shares, after.shares, strict=True)),
            level=1 / len(before.shares),
            label=f"share of the assignments of gate {gate} by expert",
        )
        told = (
            f": entropy {before.entropy:.3f} → {after.entropy:.3f},"
            f" busiest {before.imbalance:.2f} → {after.imbalance:.2f} × mean"
        )
        figures.append(figure(plot, E("b", f"gate {gate}"), told))
    return section(
        f"Experts on {name} text",
        E("p", f"Each expert's share of the tokens. The memory sends {text.moved:.1%} of the"
          " assignments to another expert. Entropy is a share of the largest possible; the dashed"
          " line is balance.", class_="soft"),
        colour_key("frozen", "with the memory"),
        grid(figures),
    )  # fmt: skip


def _tokens(name: str, text: TextExplained) -> Element:
    def rows(tokens: Sequence[TokenChange]) -> list[Element]:
        return [
            E("tr",
              cell(E("span", E("b", f"{one.change:+.2f}"),
                     class_=f"change {'gain' if one.change < 0 else 'loss'}"), number=True),
              cell(_in_place(one)))
            for one in tokens
        ]  # fmt: skip

    columns = ("nats", "token in its place")
    return section(
        f"Tokens of {name} text",
        E("h3", "that gained most"),
        table(columns, rows(text.gained)),
        E("h3", "that lost most"),
        table(columns, rows(text.lost)),
    )


def _in_place(one: TokenChange) -> Element:
    before, token, after = (
        text.replace("\n", " ⏎ ") for text in (one.before, one.token, one.after)
    )
    return E("div", "…", before, E("mark", token), after, "…", class_="text")


def _about(found: Comparison) -> Element:
    rows = [
        E("tr", cell(E("b", name)), cell(", ".join(text["files"]), "files"),
          cell(f"{text['documents']:,}", "documents", number=True),
          cell(f"{text['tokens']:,}", "tokens", number=True),
          cell(found.clusters.get(name, ""), "intervals resample"))
        for name, text in found.texts.items()
    ]  # fmt: skip
    memory = found.memory
    used = (
        f"{memory['entries']:,} entries a gate in gates {', '.join(map(str, memory['gates']))},"
        f" {readable_size(memory['bytes'])}; variant {memory['variant']}, K {memory['neighbors']},"
        f" {memory['similarity']} similarity,"
        f" {'calibrated' if memory['calibrated'] else 'not calibrated'}."
    )
    failed = None
    if found.not_explained is not None:
        failed = E("p", f"Not explained: {found.not_explained}", class_="soft")
    return section(
        "What was measured",
        E("p", E("b", "Memory: "), used),
        failed,
        table(("text", "files", "documents", "tokens", "intervals resample"), rows),
    )
