"""What all commands share: how they end, and how they speak to people and to scripts.

A command does its work inside `with outcome(as_json) as result:` and ends with
`result(figures, show)`. A program is a `CommandLine`, which says how else it can end. The exit
codes are those of `EXIT_CODES`.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import FrameType
from typing import Any, NoReturn

import click

from .errors import InputError, KnnMoeError

Result = Callable[[Mapping[str, Any], Callable[[], None]], None]

FAILED = 1
WRONG_USAGE = 2
INTERRUPTED = 130  # what shells report for Ctrl-C
TERMINATED = 143

# What `--help` of a program ends with.
EXIT_CODES = """\b
Exit codes:
  0    done
  1    a stated failure: what is wrong, where, and what to do
  2    wrong usage
  130  interrupted (Ctrl-C); 143 terminated
"""


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
        _fail(error, as_json, stdout)
    except Exception as error:
        known = _stated(error)
        if known is None:
            raise
        _fail(known, as_json, stdout)
    except KeyboardInterrupt:
        _end_interrupted()


class CommandLine(click.Command):
    """A program: whatever it is given, it ends with one of `EXIT_CODES` and without a traceback.

    With `--json` among its words wrong usage too is an object on standard output.
    """

    def main(
        self,
        args: Sequence[str] | None = None,
        prog_name: str | None = None,
        complete_var: str | None = None,
        standalone_mode: bool = True,
        **more: Any,
    ) -> Any:
        """Run the program; raises `SystemExit`, as click's own does in standalone mode."""
        if not standalone_mode:
            return super().main(args, prog_name, complete_var, standalone_mode=False, **more)
        words = list(sys.argv[1:] if args is None else args)
        as_json = "--json" in words
        try:
            code = super().main(words, prog_name, complete_var, standalone_mode=False, **more)
        except click.UsageError as error:
            if as_json:
                _print_json(_usage_json(error, self.name or ""), sys.stdout)
            else:
                error.show()
            sys.exit(WRONG_USAGE)
        except click.ClickException as error:
            error.show()
            sys.exit(error.exit_code)
        except KnnMoeError as error:
            _fail(error, as_json, sys.stdout)
        except click.Abort:
            _end_interrupted()
        sys.exit(code if isinstance(code, int) else 0)


def _usage_json(error: click.UsageError, program: str) -> dict[str, Any]:
    """Wrong usage in the form of `KnnMoeError.to_json`."""
    path = error.ctx.command_path if error.ctx is not None else program
    problem = error.format_message()
    if isinstance(error, click.exceptions.NoArgsIsHelpError):
        problem = "Missing command."
    return {
        "error": "UsageError",
        "where": path,
        "problem": problem,
        "expected": None,
        "found": None,
        "fix": f"See `{path} --help`.",
    }


def _fail(error: KnnMoeError, as_json: bool, stdout: Any) -> NoReturn:
    if as_json:
        _print_json(error.to_json(), stdout)
    else:
        print_error(error)
    sys.exit(FAILED)


def _end_interrupted() -> NoReturn:
    click.echo("interrupted", err=True)
    sys.exit(INTERRUPTED)


def _stated(error: Exception) -> KnnMoeError | None:
    """What a person should know of an error that is not ours, if it is the machine's and no bug."""
    from .shortage import is_shortage, shortage

    if is_shortage(error):
        return shortage(error, "this command", None, "Close what else uses the memory.")
    if isinstance(error, OSError) and error.filename is not None and error.strerror:
        concerned = os.fsdecode(error.filename) if isinstance(error.filename, str | bytes) else ""
        return InputError(
            concerned,
            "cannot be used",
            found=error.strerror,
            fix="Check that it is there, and that you may read or write it.",
        )
    return None


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
