"""The summary of an export, for a person."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from rich.table import Table

from knnmoe.runtime.atomic import readable_size
from knnmoe.runtime.commands.common import output

from .exporter import ExportPlan, ExportReport
from .fit import RESERVED, Needs, fits, needs
from .verification.differences import VerifyReport


def print_report(report: ExportReport, check: VerifyReport | None) -> None:
    """Print what was written and, if it was compared with transformers, the worst errors."""
    console = output()
    console.print(f"Exported to {report.bundle}", soft_wrap=True)
    table = Table()
    table.add_column("segment", justify="right")
    table.add_column("ends at")
    table.add_column("graph", justify="right")
    table.add_column("weights", justify="right")
    if check is not None:
        table.add_column("worst |Δ|", justify="right")
    for index in range(report.segments):
        last = index == report.gates
        graph, weights = (
            report.files[f"segments/{index:02d}.{suffix}"].size
            for suffix in ("onnx", "safetensors")
        )
        row = [
            str(index),
            "logits" if last else f"gate {index}",
            readable_size(graph),
            readable_size(weights),
        ]
        if check is not None:
            row.append(f"{check.logits if last else check.gates[index]:.1e}")
        table.add_row(*row)
    console.print(table)
    if report.errors:
        console.print(_errors(report))
    layouts = "split and fused" if report.fused else "split"
    console.print(
        f"{report.gates} gates, {report.segments} segments, layouts: {layouts}; "
        f"{readable_size(report.total_bytes)} in {report.seconds:.1f} s"
    )
    if report.left_out:
        console.print(_left_out(report.left_out))
    if report.linked_bytes:
        console.print(
            f"{readable_size(report.linked_bytes)} of the weights lie in the checkpoint's own "
            "files, which the bundle links and counts whole"
        )
    if check is not None:
        ties = f", {check.ties} positions left out as ties" if check.ties else ""
        stored = "" if report.storage.precision == "fp32" else " over the weights as stored"
        console.print(
            f"agrees with transformers{stored}: worst |Δ| {check.max_abs_error:.1e} over "
            f"{len(check.cases)} shapes (batch, sequence, past){ties}"
        )
        if check.activations is not None:
            console.print(
                "rounding activations to 8 bits changes router logits and logits by "
                f"{check.activations:.1%} (relative RMS, with the same experts)"
            )


def _left_out(tensors: tuple[str, ...]) -> str:
    return (
        f"left out: {len(tensors)} tensors of layers behind the last one, which predict more "
        "tokens than the next"
    )


def _errors(report: ExportReport) -> Table:
    """What storing changed in each weight."""
    table = Table(title=f"Weights as {report.storage.precision}", title_justify="left")
    table.add_column("weight")
    table.add_column("stored")
    table.add_column("relative RMS |Δ|", justify="right")
    table.add_column("largest |Δ|", justify="right")
    for error in report.errors:
        table.add_row(error.name, error.stored, f"{error.relative_rms:.2%}", f"{error.max_abs:.1e}")
    return table


DEFAULT_CONTEXT = 4096


def _needs(plan: ExportPlan, context: int | None, entries: int) -> tuple[Needs, int]:
    """What the model of a plan needs on ONNX Runtime's CPU provider, and the context taken."""
    shape = plan.model.shape
    tokens = min(context or DEFAULT_CONTEXT, shape.max_positions)
    return needs(shape, plan.weight_bytes, context=tokens, entries=entries), tokens


def fit_json(plan: ExportPlan, context: int | None, entries: int) -> dict[str, Any]:
    """What `--dry-run --json` prints."""
    needed, tokens = _needs(plan, context, entries)
    shape = plan.model.shape
    return {
        "family": plan.model.name,
        "layers": shape.num_layers,
        "gates": shape.num_gates,
        "experts": shape.num_experts,
        "precision": plan.storage.precision,
        "context": tokens,
        "entries": entries,
        "tensors_left_out": len(plan.left_out),
        "bytes": {**asdict(needed), "total": needed.total},
        "linked_bytes": plan.links.nbytes,
        "devices": [asdict(fit) | {"fits": fit.fits} for fit in fits(needed)],
    }


def print_fit(plan: ExportPlan, context: int | None, entries: int) -> None:
    """Print what a bundle would hold, and which devices it would fit."""
    needed, tokens = _needs(plan, context, entries)
    shape = plan.model.shape
    console = output()
    console.print(
        f"{plan.model.name}: {shape.num_layers} layers, {shape.num_gates} gates of "
        f"{shape.num_experts} experts, {plan.storage.precision}; nothing was written"
    )
    if plan.left_out:
        console.print(_left_out(plan.left_out))
    parts = Table(box=None, pad_edge=False, show_header=False)
    parts.add_column()
    parts.add_column(justify="right")
    parts.add_row("weights", readable_size(needed.weights))
    parts.add_row(f"key-value cache of {tokens:,} tokens, fp32", readable_size(needed.cache))
    parts.add_row(f"memory of {entries:,} entries a gate, fp32", readable_size(needed.memory))
    parts.add_row("in all", readable_size(needed.total))
    console.print(parts)
    if plan.links.nbytes:
        console.print(
            f"{readable_size(plan.links.nbytes)} of the weights need not be written: they lie in "
            "the checkpoint's own files"
        )
    table = Table(
        title=f"What is left beside {readable_size(RESERVED)} for the system", title_justify="left"
    )
    table.add_column("device")
    table.add_column("fits")
    table.add_column("left", justify="right")
    for fit in fits(needed):
        left = readable_size(abs(fit.left))
        table.add_row(
            fit.device, "yes" if fit.fits else "no", left if fit.fits else f"{left} short"
        )
    console.print(table)
