"""`knnmoe profile compare`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click

from ..cli_support import outcome, print_note
from .common import PATH, json_option, output, percent

if TYPE_CHECKING:
    from rich.table import Table

    from ..profiling.compare import Change, Comparison

EXAMPLE = """\b
Example:
  knnmoe profile bundle --memory pack --steps 1000 --output before.json
  # what is to be compared changes
  knnmoe profile bundle --memory pack --steps 1000 --output after.json
  knnmoe profile compare before.json after.json --fail-above 5%
"""


@click.command(short_help="Two records: what became slower, for CI.", epilog=EXAMPLE)
@click.argument("before", type=PATH)
@click.argument("after", type=PATH)
@click.option(
    "--fail-above",
    "limit",
    metavar="PERCENT",
    callback=percent,
    default="5%",
    show_default=True,
    help="Slowdown of a part that is accepted.",
)
@click.option(
    "--min-share",
    metavar="PERCENT",
    callback=percent,
    default="1%",
    show_default=True,
    help="Parts that are less of the step are not judged.",
)
@click.option(
    "--quantile",
    metavar="PERCENT",
    callback=percent,
    default="10%",
    show_default=True,
    help="Of a part's times, what is compared; 50% is the median, which other programs disturb.",
)
@click.option(
    "--absolute",
    is_flag=True,
    help="Judge each part, and whole steps, by themselves: nothing else runs on the machine.",
)
@click.option(
    "--also-before",
    type=PATH,
    multiple=True,
    metavar="FILE",
    help="Another run of the same as BEFORE; repeatable.",
)
@click.option(
    "--also-after",
    type=PATH,
    multiple=True,
    metavar="FILE",
    help="Another run of the same as AFTER; repeatable.",
)
@click.option("--all", "everything", is_flag=True, help="Print all parts, not what matters only.")
@json_option
def compare(
    before: Path,
    after: Path,
    limit: float,
    min_share: float,
    quantile: float,
    absolute: bool,
    also_before: tuple[Path, ...],
    also_after: tuple[Path, ...],
    everything: bool,
    as_json: bool,
) -> None:
    """Compare two records of `knnmoe profile --output`, part by part.

    A part's figure is the ratio of a low quantile of its times, beside what all parts have in
    common, since how fast a machine runs changes from run to run, and alike for all. The 95 %
    intervals hold for all parts together, from blocks of each run. A part is slower if its whole
    interval lies beyond the limit. What made all parts slower is told from a slower machine only
    by three runs and more of each side, taken in turn, or if you vouch for it with --absolute.
    Exit code 1: something is slower (or a record cannot be read); what cannot be told is named
    and does not fail.
    """
    with outcome(as_json) as result:
        from ..profiling.compare import compare as compared
        from ..profiling.compare import joined
        from ..profiling.record import read_record

        sides = [
            joined([read_record(path) for path in (first, *others)])
            for first, others in ((before, also_before), (after, also_after))
        ]
        found = compared(
            *sides,
            limit=limit,
            min_share=min_share,
            quantile=quantile,
            absolute=absolute,
            runs=1 + min(len(also_before), len(also_after)),
        )
        result(found.to_json(), lambda: _show(found, everything))
    if found.slower:
        sys.exit(1)


def _show(found: Comparison, everything: bool) -> None:
    console = output()
    console.print(_table(found, everything))
    if not everything:
        console.print(
            "Whole steps (by themselves), and parts that changed or cannot be told; --all prints "
            "all."
        )
    console.print(
        f"All parts together: ×{found.common:.3f} (median). {len(found.slower)} slower than "
        f"{found.limit:.1%}, {len(found.unclear)} cannot be told."
    )
    if abs(found.common - 1) > found.limit:
        print_note(
            "all parts changed alike: was the machine in the same state? Give several runs of each "
            "side, taken in turn, with --also-before and --also-after"
        )
    for difference in found.differences:
        print_note(f"the records differ in {difference}")
    for point in found.unmatched:
        print_note(point)
    if any(change.low is None for change in found.changes):
        print_note("too few: samples for an interval, which takes several rounds of steps")
    if found.unclear:
        print_note("where it cannot be told, measure more steps, or on a quieter machine")


_COLOURS = {"slower": "red", "faster": "green", "unclear": "yellow", "small": "dim"}


def _table(found: Comparison, everything: bool) -> Table:
    from rich.table import Table

    from ..profiling.compare import WHOLE

    quantile = "Medians" if found.quantile == 0.5 else f"{found.quantile:.0%} quantiles"
    judged = "by itself" if found.absolute else "beside all parts"
    title = f"{quantile}, ms, their change, and that {judged} (95 % interval, all parts together)"
    table = Table(title=title, title_justify="left")
    for name in ("point", "part"):
        table.add_column(name)
    for name in ("before", "after", "change", judged):
        table.add_column(name, justify="right", no_wrap=name == judged)
    table.add_column("")
    last = None
    for change in found.changes:
        matters = change.part == WHOLE or change.verdict in ("slower", "unclear", "faster")
        if not (matters or everything):
            continue
        table.add_row(
            change.point if change.point != last else "",
            change.part,
            f"{change.before_ms:.3f}",
            f"{change.after_ms:.3f}",
            f"{change.ratio - 1:+.1%}",
            in_words(change),
            change.verdict if change.verdict != "within" else "",
            style=_COLOURS.get(change.verdict),
        )
        last = change.point
    return table


def in_words(change: Change) -> str:
    """What is judged, in percent, with its interval: `+10.2% [+7.9, +12.4]`."""
    if change.low is None or change.high is None:
        return f"{change.beside - 1:+.1%} [too few]"
    return (
        f"{change.beside - 1:+.1%} [{100 * (change.low - 1):+.1f}, {100 * (change.high - 1):+.1f}]"
    )
