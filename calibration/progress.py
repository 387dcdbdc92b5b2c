"""A progress bar in tokens: done, per second, time left; on standard error, where no result is."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TextColumn,
    TimeRemainingColumn,
)
from rich.text import Text


class _TokensPerSecond(ProgressColumn):
    """Speed of the last half minute."""

    def render(self, task: Task) -> Text:
        speed = task.finished_speed or task.speed
        return Text("" if speed is None else f"{speed:,.0f} tokens/s")


@contextmanager
def token_bar(description: str) -> Iterator[Callable[[int, int], None]]:
    """A bar that appears with the first report; yields what to report (done, total) to.

    What is done at the first report counts as done before: it does not flatter the speed.
    """
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        _TokensPerSecond(),
        TimeRemainingColumn(),
    )
    console = Console(stderr=True)
    # Of a bar that nobody sees, rich would leave an empty line.
    watched = console.is_terminal
    with Progress(*columns, console=console, transient=True, disable=not watched) as bars:
        task = bars.add_task(description, total=None, start=False)

        def report(done: int, total: int) -> None:
            if bars.tasks[0].started:
                bars.update(task, completed=done)
                return
            bars.update(task, total=total, completed=done)
            bars.start_task(task)

        yield report
