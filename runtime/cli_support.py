"""What all commands share: how they end, and how they speak to people and to scripts.

A command does its work inside `with outcome(as_json) as result:` and ends with
`result(figures, show)`. A program is a `CommandLine`, which says how else it can end. The exit
codes are those of `EXIT_CODES`.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

import click

from .errors import InputError, KnnMoeError, OutputError

Result = Callable[[Mapping[str, Any], Callable[[], None]], None]

FAILED = 1
WRONG_USAGE = 2
INTERRUPTED = 130  # what shells report for Ctrl-C
READER_GONE = 141  # for SIGPIPE
TERMINATED = 143
_STDOUT = "standard output"
_UNWRITTEN = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO)

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


@contextlib.contextmanager
def resumable(target: Path) -> Iterator[None]:
    """Say after an interruption how to go on with a target, if anything of it was finished."""
    from .jobs import work_directory

    try:
        yield
    except (KeyboardInterrupt, SystemExit):
        if work_directory(target.absolute()).exists():
            click.echo("Give the same command again to go on.", err=True)
        raise


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
        with _streams():
            return self._run(words, as_json, prog_name, complete_var, **more)

    def make_context(self, *args: Any, **more: Any) -> click.Context:
        """As click does; help may be printed here."""
        with _reader():
            return super().make_context(*args, **more)

    def invoke(self, ctx: click.Context) -> Any:
        """As click does."""
        with _reader():
            return super().invoke(ctx)

    def _run(
        self,
        words: list[str],
        as_json: bool,
        prog_name: str | None,
        complete_var: str | None,
        **more: Any,
    ) -> NoReturn:
        try:
            code = super().main(words, prog_name, complete_var, standalone_mode=False, **more)
            sys.stdout.flush()
        except click.UsageError as error:
            if not (as_json and _printed(_usage_json(error, self.name or ""), sys.stdout)):
                error.show()
            sys.exit(WRONG_USAGE)
        except click.ClickException as error:
            error.show()
            sys.exit(error.exit_code)
        except KnnMoeError as error:
            _fail(error, as_json, sys.stdout)
        except click.Abort:
            _end_interrupted()
        except OSError as error:
            known = _stated(error)
            if known is None:
                raise
            _fail(known, as_json, sys.stdout)
        sys.exit(code if isinstance(code, int) else 0)


@contextlib.contextmanager
def _reader() -> Iterator[None]:
    """End quietly when nobody reads what is printed any more, as behind `| head`."""
    try:
        yield
    except (BrokenPipeError, SystemExit) as end:
        # rich makes a `SystemExit` of it.
        if not isinstance(end if isinstance(end, OSError) else end.__context__, BrokenPipeError):
            raise
        _drop(sys.stdout)
        sys.exit(READER_GONE)


@contextlib.contextmanager
def _streams() -> Iterator[None]:
    """Give standard streams that were closed (`>&-`) a place to write to."""
    with contextlib.ExitStack() as opened:
        for name in ("stdout", "stderr"):
            if getattr(sys, name) is None:
                nowhere = opened.enter_context(open(os.devnull, "w", encoding="utf-8"))
                setattr(sys, name, nowhere)
                opened.callback(setattr, sys, name, None)
        yield


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
    if error.where == _STDOUT or not (as_json and _printed(error.to_json(), stdout)):
        print_error(error)
    sys.exit(FAILED)


def _printed(error: Mapping[str, Any], stdout: Any) -> bool:
    """Print an error for a script; returns whether there was room for it."""
    try:
        _print_json(error, stdout)
    except OSError:
        _drop(stdout)
        return False
    return True


def _drop(stream: Any) -> None:
    """Forget what a stream holds and cannot write, on which Python would fail once more."""
    with contextlib.suppress(OSError, ValueError, AttributeError):
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, stream.fileno())
        os.close(nowhere)
        stream.flush()


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
    if isinstance(error, OSError) and error.errno in _UNWRITTEN:
        _drop(sys.__stdout__)
        return OutputError(
            _STDOUT,
            "cannot be written",
            found=error.strerror,
            fix="Free some room, or write it to another place.",
        )
    return None


def print_error(error: KnnMoeError) -> None:
    """Print an error for a person, on standard error."""
    click.secho("error: ", fg="red", bold=True, nl=False, err=True, color=_colour())
    click.echo(f"{printable(error.where)}: {printable(error.problem)}", err=True)
    for label, text in (("expected", error.expected), ("found", error.found)):
        if text is not None:
            click.echo(f"  {label}: {printable(text)}", err=True)
    if error.fix:
        click.echo(f"  {printable(error.fix)}", err=True)


def _colour() -> bool | None:
    """What click is to do about colours: none with NO_COLOR (no-color.org), else what it would."""
    return False if os.environ.get("NO_COLOR") else None


def print_note(text: str) -> None:
    """Print something a person should know, on standard error."""
    click.secho("note: ", fg="yellow", bold=True, nl=False, err=True, color=_colour())
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
