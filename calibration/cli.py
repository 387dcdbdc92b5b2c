"""`knnmoe memory`: build, inspect, calibrate and compress memory packs.

Nothing heavy is imported before a command runs: `--help` answers at once. The defaults and choices
below are those of `settings.py`, named again for that reason; a test compares.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from knnmoe.runtime.cli_support import outcome, resumable
from knnmoe.runtime.commands.common import PATH, json_option
from knnmoe.runtime.errors import BackendError

from .compress_cli import compress
from .options import loss_options, text_option, threads_option, tokens_option

BUILD_EXAMPLE = """\b
Example:
  knnmoe memory build checkpoint reference.jsonl pack --background general.txt
"""
CALIBRATE_EXAMPLE = """\b
Example:
  knnmoe memory calibrate bundle pack --domain held.txt --general other.txt
"""
INSPECT_EXAMPLE = """\b
Example:
  knnmoe memory inspect pack
"""
EXAMPLES = """\b
Examples:
  knnmoe memory build checkpoint reference.txt pack
  knnmoe memory calibrate bundle pack --domain held.txt --general other.txt
"""


@click.group(epilog=EXAMPLES)
def memory() -> None:
    """Build, inspect, calibrate and compress memories."""


@memory.command(short_help="Build a memory pack from reference text.", epilog=BUILD_EXAMPLE)
@click.argument("checkpoint", type=PATH)
@click.argument("references", nargs=-1, required=True, type=PATH, metavar="REFERENCE...")
@click.argument("pack", type=PATH)
@text_option(
    "--background", "Text the memory is not for: it finds entries that change nothing; repeatable."
)
@click.option(
    "--background-ratio",
    default=1.0,
    show_default=True,
    help="Background entries for each entry of reference text, at most.",
)
@click.option("--steps", default=3, show_default=True, help="Gradient steps.")
@click.option("--learning-rate", default=0.1, show_default=True, help="Their size.")
@click.option(
    "--rate",
    type=click.Choice(["relative", "absolute"]),
    default="relative",
    show_default=True,
    help="relative: to the size of each gate's logits; absolute: one rate, as in the paper.",
)
@click.option(
    "--gates", default="all", show_default=True, help="all, last:N, or numbers such as 0,3."
)
@click.option(
    "--max-length",
    default=256,
    show_default=True,
    help="Tokens of a sequence; no more than the model's positions.",
)
@click.option("--max-tokens", type=int, help="Entries from the reference text at most.")
@click.option("--batch-tokens", default=1024, show_default=True, help="Tokens learned together.")
@click.option(
    "--precision",
    type=click.Choice(["fp16", "fp32"]),
    default="fp16",
    show_default=True,
    help="Of the stored tensors.",
)
@click.option(
    "--objective",
    type=click.Choice(["future", "next"]),
    default="future",
    show_default=True,
    help="What a token's logits are moved for: all that follows, or the next token alone.",
)
@click.option(
    "--gradient",
    type=click.Choice(["plain", "straight-through"]),
    default="plain",
    show_default=True,
    help="straight-through: experts that were not chosen count too; slower.",
)
@click.option(
    "--deduplicate",
    type=float,
    metavar="COSINE",
    help="Make one of entries of the same token whose keys are this near, such as 0.99.",
)
@click.option(
    "--device",
    default="auto",
    show_default=True,
    help="To compute on: auto (CUDA if it is there), cpu, cuda, cuda:1.",
)
@click.option(
    "--dtype",
    type=click.Choice(["auto", "fp32", "bf16", "fp16"]),
    default="auto",
    show_default=True,
    help="To compute in.  [auto: fp32 on a CPU, bf16 elsewhere]",
)
@click.option(
    "--workers",
    type=int,
    metavar="N",
    help="Processes, each with the model in it. Any N gives the same pack.",
)
@click.option(
    "--threads", type=int, help="Of each worker.  [default: 1; without workers: torch's own]"
)
@click.option("--ray", is_flag=True, help="Workers are Ray actors, on all machines Ray has.")
@click.option(
    "--variant",
    type=click.Choice(["logits", "assignment", "residual"]),
    default="residual",
    show_default=True,
    help="What is blended.",
)
@click.option("--neighbors", default=8, show_default=True, help="Neighbours K.")
@click.option(
    "--similarity",
    type=click.Choice(["cosine", "rbf"]),
    default="cosine",
    show_default=True,
    help="What a neighbour is near by.",
)
@click.option(
    "--confidence",
    type=click.Choice(["mean", "sum"]),
    default="mean",
    show_default=True,
    help="Evidence: the neighbours' mean similarity, or its sum up to 1.",
)
@click.option(
    "--weighting",
    type=click.Choice(["similarity", "softmax"]),
    default="softmax",
    show_default=True,
    help="Weights of the neighbours.",
)
@click.option("--temperature", default=0.05, show_default=True, help="Of the softmax.")
@click.option("--scale", default=0.25, show_default=True, help="λ is scale · evidence ^ power.")
@click.option("--power", default=2.0, show_default=True, help="λ is scale · evidence ^ power.")
@click.option("--overwrite", is_flag=True, help="Replace a pack that is there.")
@click.option("--restart", is_flag=True, help="Discard an interrupted build of this pack.")
@json_option
def build(
    checkpoint: Path,
    references: tuple[Path, ...],
    pack: Path,
    background: tuple[Path, ...],
    overwrite: bool,
    restart: bool,
    workers: int | None,
    threads: int | None,
    ray: bool,
    as_json: bool,
    **options: Any,
) -> None:
    """Build a memory pack from a checkpoint and reference text.

    CHECKPOINT is a Hugging Face directory, PACK the directory to write, each REFERENCE a text file:
    .txt is one document, .jsonl a document a line, {"text"}, {"prompt", "completion"} or
    {"messages": [{"role", "content"}, …]}; of these only completions and what the assistant says
    are learned. FILE@0.5 takes half of a file. What an interrupted build has done lies in
    PACK.partial: the same command goes on from there.
    """
    with outcome(as_json) as result:
        try:
            from .build import build_memory
        except ModuleNotFoundError as error:
            raise BackendError(
                "knnmoe memory build",
                f"needs the package {error.name}, which is not installed",
                fix="Run `pip install 'knnmoe[train]'`.",
            ) from error
        from .progress import token_bar
        from .settings import BuildSettings, UseSettings, Workers
        from .tables import print_build

        with resumable(pack), token_bar("Building") as progress:
            report = build_memory(
                checkpoint,
                references,
                pack,
                settings=BuildSettings(**_fields(BuildSettings, options)),
                use=UseSettings(**_fields(UseSettings, options)),
                background=background,
                workers=Workers.of(workers, threads, ray=ray),
                overwrite=overwrite,
                restart=restart,
                progress=progress,
            )
        result(report.to_json(), lambda: print_build(report))


@memory.command(short_help="Show what is in a memory pack.", epilog=INSPECT_EXAMPLE)
@click.argument("pack", type=PATH)
@json_option
def inspect(pack: Path, as_json: bool) -> None:
    """Show what is in a memory pack: gates, settings, statistics and where it comes from.

    Every file is checked against its hash.
    """
    with outcome(as_json) as result:
        from knnmoe.runtime.memory import MemoryPack

        from .summary import summarize
        from .tables import print_summary

        summary = summarize(MemoryPack.open(pack))
        result(summary.to_json(), lambda: print_summary(summary))


@memory.command(short_help="Fit on held-out text how far to trust it.", epilog=CALIBRATE_EXAMPLE)
@click.argument("bundle", type=PATH)
@click.argument("pack", type=PATH)
@text_option(
    "--domain", "Held-out text of the domain, none of it in the memory; repeatable.", required=True
)
@text_option("--general", "Text that must not suffer; repeatable.", required=True)
@loss_options
@click.option(
    "--max-latency",
    default=5.0,
    show_default=True,
    metavar="PERCENT",
    help="Warn if the memory adds more to a decode step on this machine.",
)
@click.option(
    "--thorough",
    is_flag=True,
    help="Try more ways, each gate frozen, the shuffled memory, and memories of less text.",
)
@tokens_option(6000, "text to measure on")
@threads_option
@json_option
def calibrate(
    bundle: Path,
    pack: Path,
    domain: tuple[Path, ...],
    general: tuple[Path, ...],
    max_general_loss: float,
    max_switch_loss: float,
    max_latency: float,
    max_tokens: int,
    thorough: bool,
    threads: int | None,
    as_json: bool,
) -> None:
    """Choose on held-out text how a memory is used, and write that into PACK.

    Tries variants, K, scales and gates on the text given and takes what gains most on the domain
    among what spares general text, also where it follows the domain's. If the domain's gain is not
    certain on text that took no part in the choice, or looking entries up adds nothing to their
    mean correction, nothing is written and the command fails.
    """
    with outcome(as_json) as result:
        from .calibrate import calibrate as run
        from .progress import token_bar
        from .tables import print_calibration

        with token_bar("Measuring") as progress:
            report = run(
                bundle,
                pack,
                domain,
                general,
                max_general_loss=max_general_loss,
                max_switch_loss=max_switch_loss,
                max_latency=max_latency,
                max_tokens=max_tokens,
                thorough=thorough,
                threads=threads,
                progress=progress,
            )
        result(report.to_json(), lambda: print_calibration(report))


memory.add_command(compress)


def _fields(kind: Any, options: dict[str, Any]) -> dict[str, Any]:
    """The options that a settings class has, by its names."""
    return {name: options[name] for name in kind.__dataclass_fields__}
