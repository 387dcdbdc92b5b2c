"""A routing trace as JSON for scripts and as a table for people."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from .layouts import GateRecord
from .model import RoutingTrace
from .tokenizer import Tokenizer

if TYPE_CHECKING:
    from rich.console import Console

NEIGHBORS_SHOWN = 3


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
                _pairs(record.trace.neighbors[row], record.trace.similarities[row],
                       NEIGHBORS_SHOWN),
                end_section=index == len(gates) - 1 and len(gates) > 1,
            )
    console.print(table)


def _pairs(names: Any, numbers: Any, count: int | None = None) -> str:
    pairs = zip(names.tolist()[:count], numbers.tolist()[:count])
    return "  ".join(f"{name} {number:.2f}" for name, number in pairs)
