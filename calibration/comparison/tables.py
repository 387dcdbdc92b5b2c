"""A comparison for people at a terminal."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from knnmoe.runtime.atomic import readable_size
from knnmoe.runtime.cli_support import printable
from knnmoe.runtime.commands.common import output

from .compare import Comparison, RowResult
from .measured import Change

WIDTH = 110  # where nobody watches


@contextmanager
def status() -> Iterator[Callable[[str], None]]:
    """A line on standard error that says what is being done; yields what to tell it."""
    with Console(stderr=True).status("opening") as shown:
        yield lambda text: shown.update(printable(text))


def print_comparison(found: Comparison, html: Path | None) -> None:
    """The table, what failed, and where the report is."""
    console = output(WIDTH)
    table = Table(
        title="Change of NLL against the frozen router, nats a token [95 % interval]",
        title_justify="left",
        box=box.SIMPLE_HEAD,
    )
    table.add_column("", no_wrap=True)
    for name, nll in found.frozen.items():
        table.add_column(f"{name}, frozen {nll:.4f}", justify="right", no_wrap=True)
    table.add_column("extra bytes", justify="right")
    table.add_column("learned")
    group = None
    for one in found.rows:
        if group not in (None, one.row.group):
            table.add_section()
        group = one.row.group
        changes = [_shown(one, name) for name in found.frozen]
        count = None if one.measured is None else one.measured.extra_bytes
        needed = "" if count is None else readable_size(count)
        table.add_row(one.row.label, *changes, needed, one.row.trained)
    console.print(table)
    for one in found.rows:
        if one.failed is not None:
            console.print(Text(f"{one.row.label}: {printable(one.failed)}"))
    for name, unit in found.clusters.items():
        text = found.texts[name]
        console.print(
            f"{name}: {text['tokens']:,} tokens of {text['documents']:,} documents;"
            f" intervals resample {unit}"
        )
    if found.not_explained is not None:
        console.print(Text(f"Not explained: {printable(found.not_explained)}"))
    if html is not None:
        console.print(Text(f"Report: {html}"))


def _shown(one: RowResult, name: str) -> str:
    if one.failed is not None:
        return "not measured"
    return "0" if one.row.group == "base" else interval(one.changes[name])


def interval(found: Change) -> str:
    """A change with its interval, signed."""
    if not math.isfinite(found.low):
        return f"{found.mean:+.4f} [one cluster only]"
    return f"{found.mean:+.4f} [{found.low:+.4f}, {found.high:+.4f}]"
