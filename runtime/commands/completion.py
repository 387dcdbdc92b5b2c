"""`knnmoe completion`."""

from __future__ import annotations

import click

SHELLS = ("bash", "zsh", "fish")

EXAMPLE = """\b
Examples:
  eval "$(knnmoe completion bash)"    # in ~/.bashrc for every shell
  knnmoe completion fish > ~/.config/fish/completions/knnmoe.fish
"""


@click.command(short_help="Print what completes commands and options.", epilog=EXAMPLE)
@click.argument("shell", type=click.Choice(SHELLS))
def completion(shell: str) -> None:
    """Print a script that lets a shell complete the commands, options and choices of knnmoe.

    It is for `knnmoe` and `knnmoe-export`, and asks them, so it knows what is installed.
    """
    from click.shell_completion import get_completion_class

    written = get_completion_class(shell)
    assert written is not None  # one of the three
    program = click.Command("")  # of a script, the names alone count
    for name, variable in (("knnmoe", "_KNNMOE_COMPLETE"),
                           ("knnmoe-export", "_KNNMOE_EXPORT_COMPLETE")):  # fmt: skip
        click.echo(written(program, {}, name, variable).source())
