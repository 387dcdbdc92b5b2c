"""`knnmoe profile` takes a bundle, or one of a few words: commands that work on its records."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click
from click.shell_completion import CompletionItem

FROM_DEVICE = "--from-device"  # is an option of `show`; without a bundle `show` need not be said

# By name: module, attribute, short help.
ON_RECORDS: Mapping[str, tuple[str, str, str]] = {
    "show": (".profile_show", "show", "A record's tables, report and budget."),
    "compare": (".profile_compare", "compare", "Two records: what became slower, for CI."),
}


class BundleOrName(click.Path):
    """A bundle, which shells complete as a directory, or a name of `ON_RECORDS`."""

    def shell_complete(
        self, ctx: click.Context, param: click.Parameter, incomplete: str
    ) -> list[CompletionItem]:
        """Names that begin so, with the directories that do; else what a path is completed by."""
        names = [name for name in ON_RECORDS if name.startswith(incomplete)]
        if not names:
            return super().shell_complete(ctx, param, incomplete)
        # Beside what it is given a shell completes no paths; nor does it quote what it is given.
        found = (path.name for path in Path().glob(f"{incomplete}*") if path.is_dir())
        beside = sorted(name for name in found if name[0] != "." and " " not in name)
        return [CompletionItem(name) for name in (*names, *beside)]


class ProfileCommand(click.Command):
    """A command whose first argument may be the name of another one.

    Anything else is a bundle; a bundle whose directory bears such a name is `./compare`.
    """

    def __init__(self, *args: Any, **more: Any) -> None:
        super().__init__(*args, **more)
        for param in self.params:
            if param.name == "bundle":
                param.type = BundleOrName(path_type=Path)

    def make_context(
        self,
        info_name: str | None,
        args: list[str],
        parent: click.Context | None = None,
        **extra: Any,
    ) -> click.Context:
        """The context of this command, or of the one that is named."""
        if args and args[0] in ON_RECORDS:
            return named(args[0]).make_context(f"{info_name} {args[0]}", args[1:], parent, **extra)
        if any(word.partition("=")[0] == FROM_DEVICE for word in args):
            return named("show").make_context(f"{info_name} show", args, parent, **extra)
        return super().make_context(info_name, args, parent, **extra)

    def invoke(self, ctx: click.Context) -> Any:
        """Run what the context is of."""
        return super().invoke(ctx) if ctx.command is self else ctx.command.invoke(ctx)

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """The commands on records, and the example."""
        with formatter.section("Commands on records (a bundle of that name is ./NAME)"):
            formatter.write_dl([(name, entry[2]) for name, entry in ON_RECORDS.items()])
        super().format_epilog(ctx, formatter)


def named(name: str) -> click.Command:
    """The command of one of `ON_RECORDS`, imported."""
    module, attribute, _ = ON_RECORDS[name]
    command: click.Command = getattr(importlib.import_module(module, __package__), attribute)
    return command
