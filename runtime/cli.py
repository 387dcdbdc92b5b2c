"""The command line `knnmoe`. Everything heavy is imported inside the command that needs it."""

from __future__ import annotations

import importlib
from typing import Any

import click

from .. import __version__
from .cli_support import EXIT_CODES, CommandLine, outcome
from .commands.chat import chat
from .commands.completion import completion
from .commands.doctor import doctor
from .commands.evaluate import evaluate
from .commands.generate import generate
from .commands.profile import profile
from .commands.trace import trace
from .errors import BackendError

_WORDS = f"{__name__}.words"


class LazyGroup(CommandLine, click.Group):
    """A group some of whose commands are imported when they are used.

    `lazy` has, by name: module, attribute, short help, and the extra whose packages it needs.
    """

    lazy: dict[str, tuple[str, str, str, str]] = {  # noqa: RUF012 - a constant
        "compare": (
            "knnmoe.calibration.comparison.cli",
            "compare",
            "A memory beside the alternatives, on your own text.",
            "train",
        ),
        "engines": (
            "knnmoe.export.engines.cli",
            "engines",
            "Build TensorRT engines of a bundle, and look at them.",
            "export",
        ),
        "memory": (
            "knnmoe.calibration.cli",
            "memory",
            "Build, inspect, calibrate and compress memories.",
            "train",
        ),
        "plugin": (
            "knnmoe.trt_plugins.cli",
            "plugin",
            "Build and check the TensorRT plugin.",
            "cupy",
        ),
    }

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Names of all commands."""
        return sorted([*super().list_commands(ctx), *self.lazy])

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """The command of that name, imported if need be."""
        if cmd_name not in self.lazy:
            return super().get_command(ctx, cmd_name)
        module, attribute, _, _ = self.lazy[cmd_name]
        command: click.Command = getattr(importlib.import_module(module), attribute)
        return command

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Parse as ever; `invoke` wants to know what was asked for."""
        ctx.meta[_WORDS] = tuple(args)
        return super().parse_args(ctx, args)

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command; packages that a lazy one lacks are a stated failure."""
        try:
            return super().invoke(ctx)
        except ModuleNotFoundError as error:
            name = next((word for word in ctx.meta[_WORDS] if word in self.lazy), None)
            if name is None or (error.name or "").startswith("knnmoe"):
                raise
            with outcome("--json" in ctx.meta[_WORDS]):
                raise BackendError(
                    f"knnmoe {name}",
                    f"needs the package {error.name}, which is not installed",
                    fix=f"Run `pip install 'knnmoe[{self.lazy[name][3]}]'`.",
                ) from error

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the table of commands without importing any."""
        own = {name: cmd.get_short_help_str(80) for name, cmd in self.commands.items()}
        rows = own | {name: entry[2] for name, entry in self.lazy.items()}
        with formatter.section("Commands"):
            formatter.write_dl(sorted(rows.items()))


EPILOG = f"""\b
Examples:
  knnmoe generate bundle --memory pack --prompt "In the beginning"
  knnmoe memory build checkpoint reference.txt pack
  knnmoe COMMAND --help

{EXIT_CODES}"""


@click.group(cls=LazyGroup, epilog=EPILOG, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="knnmoe")
def main() -> None:
    """Run Mixture-of-Experts bundles with routing that is corrected by retrieval.

    A BUNDLE is a directory written by `knnmoe-export`, a PACK one written by `knnmoe memory build`.
    With --json a command prints one JSON object on standard output, errors too, and nothing else.
    """


for command in (chat, completion, doctor, generate, evaluate, profile, trace):
    main.add_command(command)

if __name__ == "__main__":
    main()
