"""`knnmoe compare`; nothing heavy is imported before it runs."""

from __future__ import annotations

from pathlib import Path

import click

from knnmoe.runtime.cli_support import outcome
from knnmoe.runtime.commands.common import PATH, json_option

from ..options import text_option, threads_option, tokens_option

EXAMPLE = """\b
Example:
  knnmoe compare checkpoint bundle --memory pack --reference reference.jsonl \\
      --validation validation.jsonl --text test.jsonl --html report.html
"""


@click.command(short_help="A memory beside the alternatives, on your own text.", epilog=EXAMPLE)
@click.argument("checkpoint", type=PATH)
@click.argument("bundle", type=PATH)
@click.option("--memory", type=PATH, required=True, metavar="PACK", help="As calibrated.")
@text_option(
    "--reference",
    "What the memory was built from; the alternatives learn from it too.",
    required=True,
)
@text_option(
    "--validation",
    "Text of the domain on which the alternatives choose their settings.",
    required=True,
)
@text_option("--text", "Text of the domain to measure on, none of it used before.", required=True)
@text_option("--general", "Text that should stay as it is.")
@click.option(
    "--rows",
    default="all",
    show_default=True,
    help="Names with commas, or all,-full,-oracle to leave some out.",
)
@click.option("--context", type=int, help="Tokens a sequence.  [default: 256, or all positions]")
@tokens_option(10_000, "test text")
@click.option(
    "--explain/--no-explain",
    "explained",
    default=True,
    show_default=True,
    help="Also gates one by one, λ, experts and tokens.",
)
@click.option("--html", type=PATH, metavar="FILE", help="Write a report that needs nothing else.")
@threads_option
@json_option
def compare(
    checkpoint: Path,
    bundle: Path,
    memory: Path,
    reference: tuple[Path, ...],
    validation: tuple[Path, ...],
    text: tuple[Path, ...],
    general: tuple[Path, ...],
    rows: str,
    context: int | None,
    max_tokens: int,
    explained: bool,
    html: Path | None,
    threads: int | None,
    as_json: bool,
) -> None:
    """Measure a memory beside the alternatives, on the same text.

    Variants and controls of the memory, fine-tuning, kNN-LM, other ways to route, and the bound
    that sees the test: change of NLL against the frozen router with 95 % intervals. Settings are
    chosen on validation text only. Needs torch, so it is for a bench machine.
    """
    with outcome(as_json) as result:
        from knnmoe.runtime.atomic import check_file

        from .bench import Inputs
        from .compare import compare as run
        from .page import write_page
        from .rows import choose_rows
        from .tables import print_comparison, status

        check_file("--html", html)
        with status() as say:
            found = run(
                Inputs(checkpoint, bundle, memory, reference, validation, text, general),
                rows=choose_rows(rows),
                context=context,
                max_tokens=max_tokens,
                threads=threads,
                explained=explained,
                say=say,
            )
        if html is not None:
            write_page(html, found)
        result(
            {**found.to_json(), "html": None if html is None else str(html)},
            lambda: print_comparison(found, html),
        )
