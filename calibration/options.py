"""Options that several of the commands which measure have: text files, limits, tokens, threads."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import click

from knnmoe.runtime.commands.common import PATH

Command = TypeVar("Command", bound=Callable[..., Any])
Option = Callable[[Command], Command]

threads_option = click.option(
    "--threads", type=int, help="Of the runtime.  [default: physical cores]"
)


def text_option(name: str, of: str, *, required: bool = False) -> Option[Any]:
    """Text files, with weights or without; `of` is their help."""
    return click.option(name, multiple=True, required=required, type=PATH, metavar="FILE", help=of)


def tokens_option(default: int, of: str) -> Option[Any]:
    """How many tokens are measured; `of` says of which texts."""
    return click.option(
        "--max-tokens",
        default=default,
        show_default=True,
        help=f"Tokens of each {of}, drawn from all over it.",
    )


def loss_options(command: Command) -> Command:
    """What a memory may cost text that it is not for."""
    general = click.option(
        "--max-general-loss",
        default=0.002,
        show_default=True,
        help="What general text may lose, nats a token, upper end of the interval.",
    )
    switch = click.option(
        "--max-switch-loss",
        default=5.0,
        show_default=True,
        help="What general text may lose where it follows the domain's, nats in all, upper end.",
    )
    return general(switch(command))
