"""`knnmoe trace`: what each gate decides for each token of a text."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ..cli_support import outcome
from ..errors import SettingError
from .common import json_option, load_model, model_options, output, prompt_options, read_prompt

if TYPE_CHECKING:
    from rich.console import Console

    from ..layouts import GateRecord
    from ..model import RoutingTrace
    from ..tokenizer import Tokenizer

NEIGHBORS_SHOWN = 3

EXAMPLE = """\b
Example:
  knnmoe trace bundle --memory pack --prompt "In the beginning" --only 0
"""


@click.command(short_help="Show which experts each token goes to, and why.", epilog=EXAMPLE)
@prompt_options
@click.option("--only", type=int, multiple=True, metavar="GATE",
              help="Show this gate only, counted from 0; repeatable.")  # fmt: skip
@model_options
@json_option
def trace(
    bundle: Path,
    prompt: str | None,
    prompt_file: Path | None,
    only: tuple[int, ...],
    as_json: bool,
    **settings: Any,
) -> None:
    """Show the routing of a text, token by token and gate by gate.

    The confidence λ says how far the memory corrected the router, then come the experts with their
    weights and the nearest entries of the memory with their similarities.
    """
    with outcome(as_json) as result:
        text, where = read_prompt(prompt, prompt_file)
        model = load_model(bundle, **settings)
        gates = only or tuple(range(model.bundle.manifest.architecture.num_gates))
        _check_gates(gates, model.bundle.manifest.architecture.num_gates)
        decided = model.routing_trace(model.tokenizer.encode(text, where=where))
        result(
            trace_json(decided, model.tokenizer, gates),
            lambda: print_trace(decided, model.tokenizer, gates, output()),
        )


def _check_gates(gates: tuple[int, ...], count: int) -> None:
    for gate in gates:
        if not 0 <= gate < count:
            raise SettingError("--only", "no such gate", expected=f"0 to {count - 1}", found=gate)


def trace_json(trace: RoutingTrace, tokenizer: Tokenizer, gates: Sequence[int]) -> dict[str, Any]:
    """One object a token, holding one object a gate, with all that the gate decided."""
    return {
        "tokens": [
            {
                "token_id": token_id,
                "text": tokenizer.token_text(token_id),
                "gates": [_decision(gate, trace.gates[gate], row) for gate in gates],
            }
            for row, token_id in enumerate(trace.token_ids.tolist())
        ]
    }


def _decision(gate: int, record: GateRecord, row: int) -> dict[str, Any]:
    return {
        "gate": gate,
        "confidence": float(record.trace.confidence[row]),
        "expert_ids": record.expert_ids[row].tolist(),
        "expert_weights": record.expert_weights[row].tolist(),
        "neighbors": record.trace.neighbors[row].tolist(),
        "similarities": record.trace.similarities[row].tolist(),
    }


def print_trace(
    trace: RoutingTrace, tokenizer: Tokenizer, gates: Sequence[int], console: Console
) -> None:
    """Print a line for each token and gate: λ, experts by weight, nearest entries by similarity."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("token", no_wrap=True, max_width=20)
    for name in ("gate", "λ"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("expert weight")
    table.add_column("nearest entry similarity")
    for row, token_id in enumerate(trace.token_ids.tolist()):
        for index, gate in enumerate(gates):
            record = trace.gates[gate]
            confidence = float(record.trace.confidence[row])
            table.add_row(
                Text(repr(tokenizer.token_text(token_id))) if index == 0 else "",
                str(gate),
                Text(f"{confidence:.2f}", style="cyan" if confidence > 0 else "dim"),
                _pairs(record.expert_ids[row], record.expert_weights[row]),
                _pairs(
                    record.trace.neighbors[row], record.trace.similarities[row], NEIGHBORS_SHOWN
                ),
                end_section=index == len(gates) - 1 and len(gates) > 1,
            )
    console.print(table)


def _pairs(names: Any, numbers: Any, count: int | None = None) -> str:
    pairs = zip(names.tolist()[:count], numbers.tolist()[:count], strict=True)
    return "  ".join(f"{name} {number:.2f}" for name, number in pairs)
