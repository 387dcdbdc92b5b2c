"""`knnmoe chat`."""

from __future__ import annotations

import contextlib
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

import click

from ..cli_support import outcome, print_error, print_note
from ..errors import KnnMoeError
from .common import (
    chosen_config,
    json_option,
    load_model,
    model_options,
    run_config_option,
    sampling_options,
    shown_text,
    take_sampling,
)

if TYPE_CHECKING:
    from ..generation import Completion
    from ..model import Model
    from ..sampling import GenerationConfig

EXAMPLE = """\b
Examples:
  knnmoe chat bundle
  knnmoe chat bundle --memory pack --system "Answer in one sentence."

\b
While it runs:
  /memory PACK  put another memory in place; /memory alone takes it away
  /reset        forget the conversation
  /quit         end; so does Ctrl-D
  Ctrl-C        cancel the reply that is being written
"""
HELP = "/memory [PACK], /reset, /quit; Ctrl-C cancels a reply"


@click.command(short_help="Talk to a model in the terminal.", epilog=EXAMPLE)
@click.option("--system", metavar="TEXT", help="Message of the system to begin with.")
@sampling_options
@model_options
@run_config_option
@json_option
def chat(bundle: Path, system: str | None, as_json: bool, **settings: Any) -> None:
    """Talk to a model, line by line, as its chat template has it.

    Replies see the conversation so far, of which only what is new is run. Lines are read from
    standard input if that is no terminal; with --json nothing is printed but, at the end, the whole
    conversation. The package jinja2 is needed: pip install 'knnmoe[chat]'.
    """
    sampling = take_sampling(settings)
    with outcome(as_json) as result:
        model = load_model(bundle, **settings)
        model.chat_template.check_usable()
        talk = Talk(model, chosen_config(model, sampling), system, quiet=as_json)
        for line in _lines():
            if not talk.take(line):
                break
        result({"messages": talk.messages, "replies": talk.replies}, lambda: None)


@dataclass
class Talk:
    """A conversation in the terminal.

    Args:
        model: Who replies.
        config: How.
        system: Its first message, if any.
        quiet: Print nothing on standard output, and let the first error end it.
    """

    model: Model
    config: GenerationConfig
    system: str | None
    quiet: bool
    messages: list[dict[str, str]] = field(default_factory=list)
    replies: list[dict[str, Any]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._session = self.model.session(self.config)
        self._reset("")

    def take(self, line: str) -> bool:
        """Do what a line says; False if it says to end.

        Raises:
            KnnMoeError: Where nobody watches, if that fails; else the error is printed.
        """
        words = line.strip().split(maxsplit=1)
        if not words:
            return True
        if words[0] in ("/quit", "/exit"):
            return False
        try:
            if words[0] in _COMMANDS:
                _COMMANDS[words[0]](self, words[1] if len(words) > 1 else "")
            elif words[0].startswith("/"):
                print_note(f"no such command: {words[0]}; there are {HELP}")
            else:
                self._reply(line.rstrip("\n"))
        except KnnMoeError as error:
            if self.quiet or not sys.stdin.isatty():
                raise
            print_error(error)
        return True

    def _reply(self, text: str) -> None:
        from ..generation import collect

        messages = [*self.messages, {"role": "user", "content": text}]
        ids = self._session.chat_prompt(messages)
        cancel = threading.Event()
        with _interrupt_sets(cancel):
            events = self._session.stream(ids, cancel=cancel)
            completion = collect((self._echo(event) for event in events), len(ids))
        if not self.quiet:
            click.echo()
        self.messages = [*messages, {"role": "assistant", "content": completion.text}]
        self.replies.append(_figures(completion))

    def _echo(self, event: Any) -> Any:
        if not self.quiet:
            click.echo(shown_text(event.text), nl=False)
            sys.stdout.flush()
        return event

    def _reset(self, _rest: str) -> None:
        self._session.reset()
        self.messages = [] if self.system is None else [{"role": "system", "content": self.system}]

    def _swap(self, path: str) -> None:
        self.model.swap_memory(path or None)
        print_note(f"memory: {path or 'none'}")

    def _help(self, _rest: str) -> None:
        print_note(HELP)


_COMMANDS: dict[str, Callable[[Talk, str], None]] = {
    "/memory": Talk._swap,
    "/reset": Talk._reset,
    "/help": Talk._help,
}


def _figures(completion: Completion) -> dict[str, Any]:
    timings = completion.timings
    return {
        "finish_reason": completion.finish_reason,
        "prompt_tokens": completion.prompt_tokens,
        "new_tokens": len(completion.token_ids),
        "first_token_ms": timings.first_token_ms,
        "total_ms": timings.total_ms,
    }


def _lines() -> Iterator[str]:
    """What is typed, line by line, with history and editing; or what stands in standard input."""
    if not sys.stdin.isatty():
        yield from sys.stdin
        return
    with contextlib.suppress(ImportError):  # not part of every Python; `input` does without
        import readline  # noqa: F401 - `input` uses it once it is imported
    while True:
        try:
            # readline must know the prompt, or it writes over it; on standard error nothing is.
            line = input("> ")
        except EOFError:
            click.echo()
            return
        except KeyboardInterrupt:
            click.echo()
            print_note("Ctrl-D or /quit ends")
            continue
        yield line


@contextlib.contextmanager
def _interrupt_sets(flag: threading.Event) -> Iterator[None]:
    """Ctrl-C sets a flag, and does nothing else."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(_number: int, _frame: FrameType | None) -> None:
        flag.set()

    before = signal.signal(signal.SIGINT, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
