"""`knnmoe memory compress`: a memory that is faster to search, or within a budget of bytes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from knnmoe.runtime.atomic import check_file
from knnmoe.runtime.cli_support import outcome
from knnmoe.runtime.commands.common import PATH, json_option
from knnmoe.runtime.errors import SettingError

from .options import loss_options, text_option, threads_option, tokens_option

EXAMPLES = """\b
Examples:
  knnmoe memory compress pack fast
      the same memory, scanned by few dimensions; everything else stays
  knnmoe memory compress pack small --keys projected --values int4
      without full keys, and with values in 4 bits
  knnmoe memory compress pack small --budget 25% --bundle bundle \\
      --domain validation.jsonl --general general.jsonl --front front.svg
      what keeps most of the gain in a quarter of the bytes, measured on text
  knnmoe memory compress pack small --budget 64MB
      the same without text: by how many neighbours are found
"""
# Options that say how, where a budget says how much.
_HOW = ("scan_width", "scan_bits", "keys", "key_widths", "values", "recall")
# Options that a budget alone understands.
_BUDGET = ("bundle", "domain", "general", "front", "costs")


@click.command(short_help="Make a memory faster to search, or smaller.", epilog=EXAMPLES)
@click.argument("pack", type=PATH)
@click.argument("output", type=PATH)
@click.option(
    "--scan-width",
    default="auto",
    show_default=True,
    metavar="W|auto",
    help="Dimensions that are scanned, a multiple of 32; auto: as few as find the neighbours.",
)
@click.option(
    "--scan-bits",
    type=click.Choice(["auto", "4", "8"]),
    default="auto",
    show_default=True,
    help="Of each dimension.",
)
@click.option(
    "--candidates", default=32, show_default=True, help="Scored again with the full keys, R ≤ 64."
)
@click.option(
    "--recall",
    default=0.999,
    show_default=True,
    help="Share of the K nearest that auto must find among the candidates.",
)
@click.option(
    "--keys",
    type=click.Choice(["as-stored", "fp16", "int8", "graded", "projected"]),
    default="as-stored",
    show_default=True,
    help="The full keys; int8 also rounds the similarities; graded keeps their widest directions in"
    " 8 bits and others in 4; projected keeps what is scanned.",
)
@click.option(
    "--key-widths",
    metavar="F,C",
    help="Of graded keys: directions in 8 and in 4 bits.  [default: a quarter, and the rest]",
)
@click.option(
    "--values",
    type=click.Choice(["as-stored", "fp16", "int8", "int4"]),
    default="as-stored",
    show_default=True,
    help="Of the pack's variant alone, unless as-stored.",
)
@click.option(
    "--budget",
    metavar="64MB|25%",
    help="Bytes that the runtime may hold, or their share of what it holds of PACK: chooses keys,"
    " values, entries and gates.",
)
@click.option("--bundle", type=PATH, help="With --budget: the model's, to run text.")
@text_option(
    "--domain", "With --budget: held-out text of the domain, none of it in the memory; repeatable."
)
@text_option("--general", "With --budget: text that must not suffer; repeatable.")
@loss_options
@tokens_option(12_000, "text to measure on")
@click.option(
    "--front",
    type=PATH,
    metavar="FILE.svg",
    help="With --budget: also measure other sizes, and draw what each keeps.",
)
@click.option(
    "--costs",
    type=PATH,
    metavar="FILE.json",
    help="With --budget: what a device takes for what; measured here if the file is not there.",
)
@click.option("--device", default="this machine", show_default=True, help="Its name, for --costs.")
@threads_option
@click.option("--overwrite", is_flag=True, help="Replace a pack that is there.")
@json_option
def compress(
    pack: Path,
    output: Path,
    budget: str | None,
    overwrite: bool,
    as_json: bool,
    **options: Any,
) -> None:
    """Write a copy of PACK to OUTPUT that the CPU searches in a fraction of the time.

    Keys are projected to few dimensions, which are scanned; the best candidates are scored with
    the full keys. How many dimensions that takes is measured on keys of the memory itself, held
    back. Gates that do not use the projection ignore it.

    With --budget the copy is also small: of ways to store keys and values, to leave entries out
    or merge them, and to leave gates to the frozen router, the one is taken that keeps most of
    what the memory gains on the text given, while general text stays within its limit. PACK stays
    as it is.
    """
    context = click.get_current_context()
    with outcome(as_json) as result:
        given = [
            name
            for name in (_HOW if budget is not None else _BUDGET)
            if context.get_parameter_source(name) is click.core.ParameterSource.COMMANDLINE
        ]
        if given:
            raise SettingError(
                f"--{given[0].replace('_', '-')}",
                "says how, where --budget chooses" if budget is not None else "needs --budget",
                fix="Leave one of the two out." if budget is not None else "Give a budget too.",
            )
        if budget is None:
            from .compress import compress_pack
            from .tables import print_compression

            plain = compress_pack(pack, output, _settings(options), overwrite=overwrite)
            result(plain.to_json(), lambda: print_compression(plain))
            return
        if options["front"] is not None:
            from .front import check_front

            check_front(options["front"])
        from .budget import Budget, compress_to_budget
        from .budget_search import BudgetSettings
        from .progress import token_bar
        from .tables import print_budget

        check_file("--front", options["front"])
        check_file("--costs", options["costs"])
        with token_bar("Measuring") as progress:
            report = compress_to_budget(
                pack,
                output,
                Budget.parse(budget),
                BudgetSettings(
                    candidates=options["candidates"],
                    max_general_loss=options["max_general_loss"],
                    max_switch_loss=options["max_switch_loss"],
                    max_tokens=options["max_tokens"],
                    front=options["front"] is not None,
                    device=options["device"],
                    threads=options["threads"],
                ),
                bundle=options["bundle"],
                domain=options["domain"],
                general=options["general"],
                costs=options["costs"],
                overwrite=overwrite,
                progress=progress,
            )
        if options["front"] is not None:
            from .front import write_front

            write_front(report, options["front"])
        result(report.to_json(), lambda: print_budget(report))


def _settings(options: dict[str, Any]) -> Any:
    from .compress import CompressSettings

    width, bits = options["scan_width"], options["scan_bits"]
    if width != "auto" and not width.isdecimal():
        raise click.BadParameter("a whole number or auto", param_hint="--scan-width")
    return CompressSettings(
        scan_width=None if width == "auto" else int(width),
        scan_bits=None if bits == "auto" else int(bits),
        candidates=options["candidates"],
        recall=options["recall"],
        keys=options["keys"],
        key_widths=_widths(options["key_widths"]),
        values=options["values"],
    )


def _widths(text: str | None) -> tuple[int, int] | None:
    if text is None:
        return None
    numbers = text.split(",")
    if len(numbers) != 2 or not all(number.strip().isdecimal() for number in numbers):
        raise click.BadParameter("two whole numbers, as in 32,96", param_hint="--key-widths")
    return int(numbers[0]), int(numbers[1])
