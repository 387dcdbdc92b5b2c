"""What `knnmoe profile` and `profile show` make of a record: a page, and a budget's answer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from ..cli_support import printable
from ..errors import KnnMoeError, SettingError
from .common import PATH, percent

if TYPE_CHECKING:
    from rich.console import Console

    from ..memory import MemoryPack
    from ..profiling.budget import Answer
    from ..profiling.from_device import DeviceResults
    from ..profiling.record import ProfileRecord

Command = TypeVar("Command", bound=Callable[..., Any])


def output_options(command: Command) -> Command:
    """--html and those of a budget; `Outputs.taken_from` takes the values."""
    options = (
        click.option("--html", type=PATH, metavar="FILE", help="Write a report as one HTML page."),
        click.option(
            "--budget-ms",
            type=float,
            metavar="MS",
            help="Which memory fits a decode step of so long? Needs several sizes, see --entries.",
        ),
        click.option(
            "--budget-quantile",
            metavar="PERCENT",
            callback=percent,
            default="50%",
            show_default=True,
            help="Of the steps, which are to keep to the budget.",
        ),
        click.option(
            "--budget-context",
            type=int,
            metavar="TOKENS",
            help="Before the step.  [default: the first that was measured]",
        ),
        click.option(
            "--write-run-config",
            type=PATH,
            metavar="FILE",
            help="Write what fits, for --run-config of the commands that run a model.",
        ),
    )
    for option in reversed(options):
        command = option(command)
    return command


@dataclass(frozen=True)
class Outputs:
    """The values of `output_options`."""

    html: Path | None
    budget_ms: float | None
    budget_quantile: float
    budget_context: int | None
    write_run_config: Path | None

    @staticmethod
    def taken_from(settings: dict[str, Any]) -> Outputs:
        """Taken out of a command's values.

        Raises:
            click.UsageError: If something is asked of a budget that is not given.
        """
        found = Outputs(**{name: settings.pop(name) for name in Outputs.__dataclass_fields__})
        if found.write_run_config is not None and found.budget_ms is None:
            raise click.UsageError("--write-run-config needs --budget-ms.")
        return found

    def check_files(self) -> None:
        """Raise `OutputError` if a file that is asked for could not be written."""
        from ..atomic import check_file

        check_file("--html", self.html)
        check_file("--write-run-config", self.write_run_config)

    def check_sizes(self, entries: Sequence[str]) -> None:
        """Raise `click.UsageError` if sizes asked for would leave a budget without an answer."""
        if self.budget_ms is not None and ("0" not in entries or len(set(entries)) < 3):
            raise click.UsageError(
                "--budget-ms needs steps of several memory sizes, such as --entries 0,5000,all."
            )

    def answer_of_a_run(self, record: ProfileRecord, memory: Path | None) -> Answer | None:
        """As `answer`; of a measurement that was interrupted only the page is made."""
        from ..memory import MemoryPack

        if not record.finished:
            page_only = replace(self, budget_ms=None, write_run_config=None)
            return (
                page_only.answer(record, None) if any(p.whole_ms for p in record.points) else None
            )
        pack = None
        if memory is not None and self.write_run_config is not None:
            pack = MemoryPack.open(memory)
        return self.answer(record, pack)

    @property
    def of_a_record(self) -> bool:
        """Whether something is asked for that takes a record."""
        return self.html is not None or self.budget_ms is not None

    def answer(
        self,
        record: ProfileRecord,
        pack: MemoryPack | None,
        device: DeviceResults | None = None,
    ) -> Answer | None:
        """Write what was asked for; returns which memory fits, if that was asked.

        Raises:
            ProfileError: If the record has too few sizes for an answer, or no step for a page.
            SettingError: If nothing fits, or a run configuration is asked for without the pack.
            OutputError: If a file cannot be written.
        """
        from ..profiling.budget import fit_budget

        found, problem = None, None
        if self.budget_ms is not None:
            try:
                found = fit_budget(
                    record,
                    self.budget_ms,
                    context=self.budget_context,
                    quantile=self.budget_quantile,
                )
            except KnnMoeError as error:
                problem = error
        if self.html is not None:
            from ..profiling.html import profile_page
            from ..reports.page import write_html

            write_html(self.html, profile_page(record, found, device))
        if problem is not None:
            raise problem  # the page is there, whatever fits
        if self.write_run_config is not None and found is not None:
            from ..profiling.budget import run_config

            if pack is None:
                raise SettingError(
                    "--write-run-config", "needs the memory that was measured",
                    fix="Give it with --memory PACK.",
                )  # fmt: skip
            run_config(record, found, pack).write(self.write_run_config)
        return found


def print_answer(answer: Answer, console: Console) -> None:
    """Print which memory fits, and by what."""
    from rich.table import Table

    cost = answer.cost
    table = Table(
        title=f"Memory for {answer.budget_ms:g} ms a decode step at {cost.context} tokens",
        title_justify="left",
    )
    for name in ("gates, the last", "entries a gate", "ms", "95 %"):
        table.add_column(name, justify="right")
    for choice in answer.choices:
        step = choice.step
        cells = (str(choice.gates), f"{step.entries:,}", f"{step.ms:.3g}")
        interval = f"{step.low:.3g}–{step.high:.3g}"
        table.add_row(*cells, interval, style="bold" if choice is answer.best else None)
    console.print(table)
    console.print(
        f"Frozen {cost.frozen.ms:.3g} ms; a memory {cost.line.base:.3g} ms and "
        f"{1e3 * cost.line.slope:.3g} µs an entry, from {len(cost.sizes)} sizes."
    )
    if answer.best.total < cost.sizes[-1].entries * cost.used_gates:
        console.print(
            "A memory that is cut gains less than its share: see `knnmoe eval --run-config`, and"
            " `knnmoe memory compress --budget` for a smaller one that keeps more."
        )
    for words in cost.bent:
        console.print(f"Not on the line: {words}.", style="yellow")


MOST_LAYERS = 15


def print_device(device: DeviceResults, console: Console) -> None:
    """Print what its sensors said, and the longest layers of its engines."""
    from rich.table import Table

    for name, log in device.sensors.items():
        table = Table(title=f"Sensors: {name}", title_justify="left")
        table.add_column("reading")
        for column in ("smallest", "mean", "largest", "unit"):
            table.add_column(column, justify="right")
        for what, found in log.items():
            numbers = (found.smallest, found.mean, found.largest)
            table.add_row(printable(what), *(f"{number:.4g}" for number in numbers), found.unit)
        console.print(table)
    for name, layers in device.layers.items():
        longest = sorted(layers, key=lambda layer: -layer.mean_ms)[:MOST_LAYERS]
        table = Table(
            title=f"Layers: {name} (the {len(longest)} longest of {len(layers)})",
            title_justify="left",
        )
        table.add_column("layer", overflow="fold")
        for column in ("ms", "share"):
            table.add_column(column, justify="right")
        for layer in longest:
            table.add_row(printable(layer.name), f"{layer.mean_ms:.4f}", f"{layer.share:.1%}")
        console.print(table)
    for name in device.unread:
        console.print(f"Left unread: {printable(name)}", style="dim")
