"""What the commands print for people."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from math import isnan
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from knnmoe.runtime.atomic import readable_size
from knnmoe.runtime.calibration import Calibration
from knnmoe.runtime.cli_support import printable
from knnmoe.runtime.commands.common import fitting, output

if TYPE_CHECKING:
    from .budget_report import BudgetReport
    from .build import BuildReport  # which needs torch
    from .calibrate import CalibrationReport
    from .compress import CompressReport
    from .confidence import Interval
    from .summary import PackSummary


def print_build(report: BuildReport) -> None:
    """The outcome of a build, in a few lines."""
    pack, console = report.pack, output()
    background = f", {report.background_tokens:,} of them background"
    fewest, most = min(report.entries.values()), max(report.entries.values())
    entries = f"{most:,}" if fewest == most else f"{fewest:,} to {most:,}"
    console.print(
        f"{pack.path}: {entries} entries in each of {len(pack.gates)} gates"
        f"{background if report.background_tokens else ''}, {readable_size(pack.bytes)}",
        markup=False,
    )
    made = report.tokens + report.background_tokens
    if fewest < made:
        shares = ", ".join(f"{count / made:.0%}" for count in report.entries.values())
        console.print(f"Near-identical entries were merged; left, by gate: {shares}")
    console.print(
        f"NLL of the reference text {report.nll_before:.4f} → {report.nll_after:.4f} nats a token"
        " with the logits learned for it"
    )
    speed = f", {report.tokens_per_second:,.0f} tokens/s" if report.tokens_per_second else ""
    console.print(f"{report.seconds:.1f} s{speed}")


def print_compression(report: CompressReport) -> None:
    """What became of each gate, as a table."""
    console, settings = output(), report.settings
    console.print(
        f"{report.pack.path}: {settings.candidates} candidates, keys {settings.keys},"
        f" values {settings.values},"
        f" {readable_size(report.pack.bytes)}",
        markup=False,
    )
    rows = [
        {
            "gate": str(gate.gate),
            "entries": f"{gate.entries:,}",
            "width": str(gate.width),
            "bits": str(gate.bits),
            f"recall@{report.pack.neighbors}": f"{gate.recall:.4f}",
            "kept": f"{gate.kept:.4f}",
            "scanned": readable_size(gate.scanned_bytes),
            "before": readable_size(gate.bytes_before),
            "after": readable_size(gate.bytes_after),
        }
        for gate in report.gates
    ]
    least = ("before", "kept", "entries", "bits")
    console.print(fitting(console, partial(_table_of, rows), least))
    console.print(
        "Of keys held back, searched for among the others: recall, neighbours among the candidates;"
        " kept, neighbours by the keys that are kept. Scanned: read at every token.",
        style="dim",
    )


def print_budget(report: BudgetReport) -> None:
    """The points of the front, and which was written."""
    console, whole = output(), report.points[0]
    table = Table()
    for name in ("", "memory", "bytes", "of all", "recall", "gain kept", "general", "ms a token"):
        table.add_column(name, justify="left" if name == "memory" else "right")
    for number, point in enumerate(report.points):
        table.add_row(
            str(number),
            point.name,
            readable_size(point.bytes),
            f"{point.bytes / whole.bytes:.1%}",
            f"{point.recall:.4f}",
            "-" if point.kept is None else point.kept.percent(),
            "-" if point.general is None else str(point.general),
            "-" if point.ms is None else f"{point.ms:.3g}",
            style="bold" if point is report.chosen else None,
        )
    console.print(table)
    chosen = report.chosen
    gates = ", ".join(f"{gate} {readable_size(size)}" for gate, size in chosen.by_gate.items())
    console.print(f"Written to {report.pack.path}: {chosen.name}; by gate {gates}", markup=False)
    if report.judge == "recall":
        console.print(
            "Chosen by the memory's own keys alone, without text: what it keeps of the gain is not"
            " known. Give --bundle, --domain and --general to have that measured.",
            style="yellow",
        )
        return
    console.print(
        f"Domain {_of(whole.domain)} as it is, {_of(chosen.domain)} now; settings"
        f" {report.calibration}"
    )
    if chosen.general is not None and any(point.general is None for point in report.points):
        console.print(
            "General text was read with what might be chosen, and not with what keeps less in as"
            " many bytes.", style="dim",
        )  # fmt: skip
    if chosen.general is None:
        console.print("General text was not given: what it loses is not known.", style="yellow")
    if report.dropped:
        gone = ", ".join(map(str, report.dropped))
        console.print(f"Left to the frozen router, as their retrieval gains nothing: gates {gone}")


def _of(found: Interval | None) -> str:
    return "-" if found is None else str(found)


def print_summary(summary: PackSummary) -> None:
    """A pack's gates as a table, then how it is used and where it comes from."""
    pack, console = summary.pack, output()
    console.print(
        f"{pack.path}: {pack.model.model_type}, variant {pack.variant}, K = {pack.neighbors},"
        f" {pack.similarity} similarity, {readable_size(pack.bytes)}",
        markup=False,
    )
    least = ("sharpness", "midpoint", "residuals", "logits", "evidence", "background")
    console.print(fitting(console, partial(_table_of, _gate_rows(summary)), least))
    console.print(
        "Logits and residuals: root mean square. Evidence: what an entry drawn at random finds"
        " among the entries of other documents.",
        style="dim",
    )
    by_formula: dict[str, list[int]] = {}
    for stated in pack.gates:
        by_formula.setdefault(formula(stated.calibration), []).append(stated.gate)
    for text, gates in by_formula.items():
        console.print(f"gates {', '.join(map(str, gates))}: {text}")
    missing = sorted(set(range(pack.model.num_gates)) - {gate.gate for gate in pack.gates})
    if missing:
        console.print(f"gates {', '.join(map(str, missing))}: left to the frozen router")
    _print_provenance(console, pack.provenance)


def _gate_rows(summary: PackSummary) -> list[dict[str, str]]:
    rows = []
    for gate, stated in zip(summary.gates, summary.pack.gates, strict=True):
        numbers = stated.calibration
        gated = bool(numbers.sharpness)
        rows.append(
            {
                "gate": str(gate.gate),
                "entries": f"{gate.entries:,}",
                "background": f"{gate.background:,}",
                "size": readable_size(gate.bytes),
                "logits": f"{gate.logit_rms:.3f}",
                "residuals": f"{gate.residual_rms:.3f}",
                "evidence": "-" if isnan(gate.similarity) else f"{gate.similarity:.3f}",
                "midpoint": f"{numbers.midpoint:.3f}" if gated else "-",
                "sharpness": f"{numbers.sharpness:.3g}" if gated else "-",
            }
        )
    return rows


def _table_of(rows: Sequence[Mapping[str, str]], left_out: Sequence[str]) -> Table:
    """A table of figures, a line a row, by the names of their columns."""
    table = Table()
    kept = [name for name in rows[0] if name not in left_out]
    for name in kept:
        table.add_column(name, justify="right", no_wrap=True)
    for row in rows:
        table.add_row(*(row[name] for name in kept))
    return table


def print_calibration(report: CalibrationReport) -> None:
    """What was tried, what was chosen, and what that is worth."""
    console = output()
    table = Table(title="Change of NLL, nats a token [95 % interval]")
    table.add_column("settings")
    table.add_column("domain", justify="right")
    table.add_column("general", justify="right")
    table.add_column("subject change, nats", justify="right")
    for one in report.tried:
        table.add_row(
            one.candidate.name,
            str(one.domain),
            str(one.general),
            "-" if one.switch is None else one.switch.text(2),
            style="bold" if one is report.chosen else None,
        )
    console.print(table)
    console.print(f"Written into {report.pack.path}: {report.chosen.candidate.name}", markup=False)
    console.print(
        f"On text that took no part in the choice: domain {report.domain}, general {report.general}"
    )
    controls = report.controls
    console.print(
        f"Of the domain's change retrieval makes {controls.retrieval}, a constant"
        f" correction (the mean residual) {controls.constant}"
    )
    if controls.shuffled is not None:
        console.print(f"Values at other entries (control): {controls.shuffled}")
    if report.law is not None:
        sizes = zip(report.law.tokens, report.law.changes, strict=True)
        console.print("By reference tokens: " + ", ".join(f"{n:,} {c:+.4f}" for n, c in sizes))
    if report.switch is None:
        console.print("Changes of subject were not measured: too few sequences are long enough.")
    sequences = [name for name, unit in report.drawn.items() if unit == "sequences"]
    if sequences:
        console.print(
            f"Intervals of {', '.join(sequences)} draw sequences, not documents: too few of them."
        )
    if report.latency is not None and report.latency.exceeded:
        busy = "; the machine was busy" if report.latency.disturbed else ""
        console.print(
            f"Warning: a decode step takes {report.latency.percent:.0f} % longer with this memory,"
            f" {report.latency.limit:g} % were allowed{busy}.",
            style="yellow",
        )


def formula(numbers: Calibration) -> str:
    """λ and the weights as docs/method.md writes them; midpoint and sharpness by name."""
    evidence = "s̄" if numbers.mean else "min(1, Σs)"
    power = "" if numbers.power == 1 else f"^{numbers.power:g}"
    gate = ""
    if numbers.sharpness:
        growth = f"min(√t, {numbers.cap:g})·" if numbers.sequence else ""
        measured = "mean s̄" if numbers.sequence else "s̄"
        gate = f"·σ({growth}sharpness·({measured} - midpoint))"
    parts = []
    if numbers.weight_power:
        parts.append("s" if numbers.weight_power == 1 else f"s^{numbers.weight_power:g}")
    if numbers.inverse_temperature:
        parts.append(f"exp(s/{1 / numbers.inverse_temperature:.3g})")
    return f"λ = {numbers.scale:g}·{evidence}{power}{gate}, w ∝ {'·'.join(parts) or '1'}"


def _print_provenance(console: Console, provenance: Mapping[str, Any]) -> None:
    table = Table(show_header=False, box=None)

    def add(label: str, content: str) -> None:
        # As text, because a stranger's pack may hold what a terminal or rich would obey.
        table.add_row(Text(printable(label).replace("_", " ")), Text(printable(content)))

    for name, content in provenance.items():
        if not isinstance(content, Mapping):
            add(name, _short(content))
            continue
        nested = {key: value for key, value in content.items() if isinstance(value, Mapping)}
        add(name, _listed({key: value for key, value in content.items() if key not in nested}))
        for key, value in nested.items():
            add(f"  {key}", _listed(value))
    console.print(table)


def _listed(content: Mapping[str, Any]) -> str:
    return ", ".join(f"{key.replace('_', ' ')} {_short(value)}" for key, value in content.items())


def _short(value: object) -> str:
    if value is None:
        return "none"
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, list):
        return ", ".join(_short(item) for item in value)
    if isinstance(value, Mapping):
        return f"({_listed(value)})"
    text = str(value)
    # Enough of a hash to recognise it.
    return text[:12] + "…" if len(text) == 64 and text.isalnum() else text
