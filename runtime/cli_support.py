"""What all commands share: how they end, and how they speak to people and to scripts.

A command does its work inside `with outcome(as_json) as result:` and ends with
`result(figures, show)`. Exit codes: 0 done, 1 a stated failure, 2 wrong usage (click's own).
"""

from __future__ import annotations

import contextlib
import json
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from types import FrameType
from typing import Any

import click

from .errors import KnnMoeError

Result = Callable[[Mapping[str, Any], Callable[[], None]], None]

INTERRUPTED = 130  # what shells report for Ctrl-C
TERMINATED = 143


@contextlib.contextmanager
def outcome(as_json: bool) -> Iterator[Result]:
    """Run a command's work; yields `result(figures, show)`, which reports its success.

    With `as_json`, standard output carries exactly one JSON object: the figures, or the error. What
    libraries print meanwhile goes to standard error. Without it `show` is called to print for a
    person, and an error goes to standard error.

    Raises:
        SystemExit: With code 1 after a `KnnMoeError`, 130 after an interrupt.
    """
    stdout = sys.stdout

    def result(figures: Mapping[str, Any], show: Callable[[], None]) -> None:
        if as_json:
            _print_json(figures, stdout)
        else:
            show()

    diverted = contextlib.redirect_stdout(sys.stderr) if as_json else contextlib.nullcontext()
    try:
        with _clean_termination(), diverted:
            yield result
    except KnnMoeError as error:
        if as_json:
            _print_json(error.to_json(), stdout)
        else:
            print_error(error)
        sys.exit(1)
    except KeyboardInterrupt:
        click.echo("interrupted", err=True)
        sys.exit(INTERRUPTED)


def print_error(error: KnnMoeError) -> None:
    """Print an error for a person, on standard error."""
    click.secho("error: ", fg="red", bold=True, nl=False, err=True)
    click.echo(f"{printable(error.where)}: {printable(error.problem)}", err=True)
    for label, text in (("expected", error.expected), ("found", error.found)):
        if text is not None:
            click.echo(f"  {label}: {printable(text)}", err=True)
    if error.fix:
        click.echo(f"  {printable(error.fix)}", err=True)


def print_note(text: str) -> None:
    """Print something a person should know, on standard error."""
    click.secho("note: ", fg="yellow", bold=True, nl=False, err=True)
    click.echo(printable(text), err=True)


def printable(text: str) -> str:
    """Text that may come from a stranger's file, without what a terminal would obey."""
    return "".join(c if c.isprintable() or c == "\n" else "\N{REPLACEMENT CHARACTER}" for c in text)


def _print_json(content: Mapping[str, Any], stream: Any) -> None:
    stream.write(json.dumps(content, allow_nan=False) + "\n")
    stream.flush()


@contextlib.contextmanager
def _clean_termination() -> Iterator[None]:
    """Let SIGTERM end the command as an exception, so that nothing half-written stays behind."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(_number: int, _frame: FrameType | None) -> None:
        sys.exit(TERMINATED)

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
