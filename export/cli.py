"""The command line `knnmoe-export`. Everything heavy is imported when a checkpoint is exported."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from knnmoe import __version__
from knnmoe.runtime.cli_support import EXIT_CODES, CommandLine, outcome, resumable
from knnmoe.runtime.commands.common import PATH, json_option
from knnmoe.runtime.errors import BackendError

from .frontends import DESCRIPTION, FRONTENDS, TORCH, TRACED_FAMILIES

if TYPE_CHECKING:
    from knnmoe.runtime.bundle import Bundle

    from .exporter import ExportReport
    from .verification.differences import VerifyReport

# Named here again so that `--help` need not import what defines them; a test compares.
PRECISIONS = ("fp32", "fp16", "int8", "int4")
BLOCK_SIZES = (32, 64, 128)
ENTRIES = 10_000  # of a gate, where --dry-run is not told


def _families() -> dict[str, list[str]]:
    """Model types by the frontend that exports them."""
    from .families import FAMILIES

    return {DESCRIPTION: sorted(FAMILIES), TORCH: list(TRACED_FAMILIES)}


def _show_families(families: dict[str, list[str]]) -> None:
    click.echo("By the description of their family (model_type in config.json):")
    for model_type in families[DESCRIPTION]:
        click.echo(f"  {model_type}")
    click.echo("By tracing the model that transformers has (--frontend torch), among others:")
    for model_type in families[TORCH]:
        click.echo(f"  {model_type}")


EPILOG = f"""\b
Examples:
  knnmoe-export checkpoint --dry-run
  knnmoe-export checkpoint bundle --verify
  knnmoe-export checkpoint bundle --precision int4 --head-bits 8

{EXIT_CODES}"""


@click.command(
    cls=CommandLine, epilog=EPILOG, context_settings={"help_option_names": ["-h", "--help"]}
)
@click.argument("checkpoint", type=PATH, required=False, metavar="CHECKPOINT")
@click.argument("bundle", type=PATH, required=False)
@click.option("--dry-run", is_flag=True,
              help="Only say what the bundle would hold, and what it fits.")  # fmt: skip
@click.option("--context", type=click.IntRange(min=1), metavar="N",
              help="--dry-run: tokens of a sequence.  [default: up to 4096]")  # fmt: skip
@click.option("--entries", type=click.IntRange(min=0), metavar="N",
              help=f"--dry-run: entries of each gate's memory.  [default: {ENTRIES}]")  # fmt: skip
@click.option("--verify", "verified", is_flag=True,
              help="Compare with transformers before the bundle takes its name.")  # fmt: skip
@click.option("--precision", type=click.Choice(PRECISIONS), default="fp32", show_default=True,
              help="Of the stored weights; int8 and int4 of experts and projections, with the rest "
                   "in fp16. Routers stay fp32.")  # fmt: skip
@click.option("--block-size", type=click.Choice([str(size) for size in BLOCK_SIZES]),
              help="int8, int4: weights that share a scale; by default the largest that suits the "
                   "shapes, the fastest. Smaller is more accurate.")  # fmt: skip
@click.option("--zero-points", is_flag=True,
              help="int8, int4: a zero point for each block.")  # fmt: skip
@click.option("--exact-activations", is_flag=True,
              help="int4: multiply with fp32, not with activations rounded to 8 bits; up to three "
                   "times slower.")  # fmt: skip
@click.option("--head-bits", type=click.Choice(["8", "4"]),
              help="int8, int4: store the head in so many bits too, not in fp16.")  # fmt: skip
@click.option("--no-scale-search", is_flag=True,
              help="int8, int4: take each block's range as it is; exports sooner, and is less "
                   "accurate.")  # fmt: skip
@click.option("--experts-per-token", type=click.IntRange(min=1), metavar="N",
              help="Room for experts a token; more than the model's own lets the assignment "
                   "variant mix further experts in.")  # fmt: skip
@click.option("--link", is_flag=True,
              help="Do not write what the checkpoint stores as the bundle would (embedding, head, "
                   "attention output, router, norms; not the experts): hard-link its files. For "
                   "fp32 checkpoints, or fp16 ones with a --precision other than fp32; on one "
                   "file system. --dry-run --link says what it saves.")  # fmt: skip
@click.option("--frontend", type=click.Choice(FRONTENDS), default=DESCRIPTION, show_default=True,
              help="How the model is read. description: by that of its family. torch: by tracing "
                   "the model that transformers has, for families without a description; what "
                   "cannot be expressed is refused. Needs knnmoe[train] and all of the model in "
                   "memory in fp32, for --dry-run too (twice for --verify), and gives fp32 or fp16 "
                   "for the CPU: no int8 or int4, no engines for GPUs.")  # fmt: skip
@click.option("--no-fused", is_flag=True, help="Leave the fused layout out.")
@click.option("--overwrite", is_flag=True, help="Replace a bundle that is there.")
@click.option("--restart", is_flag=True, help="Discard an interrupted export of this bundle.")
@json_option
@click.option("--list-families", is_flag=True, help="List the families that can be exported.")
@click.version_option(__version__, prog_name="knnmoe-export")
def main(
    checkpoint: Path | None,
    bundle: Path | None,
    dry_run: bool,
    context: int | None,
    entries: int | None,
    verified: bool,
    precision: str,
    block_size: str | None,
    zero_points: bool,
    exact_activations: bool,
    head_bits: str | None,
    no_scale_search: bool,
    experts_per_token: int | None,
    link: bool,
    frontend: str,
    no_fused: bool,
    overwrite: bool,
    restart: bool,
    as_json: bool,
    list_families: bool,
) -> None:
    """Export a Mixture-of-Experts checkpoint as a bundle of ONNX segments.

    CHECKPOINT is a Hugging Face directory (config.json, safetensors, tokenizer.json), BUNDLE the
    directory to create. What an interrupted export has finished lies in BUNDLE.partial: the same
    command goes on from there.
    """
    if list_families:
        with outcome(as_json) as result:
            families = _families()
            result({"families": families}, lambda: _show_families(families))
        return
    if checkpoint is None:
        raise click.UsageError("Missing argument 'CHECKPOINT'.")
    if bundle is None and not dry_run:
        raise click.UsageError("Missing argument 'BUNDLE'.")
    if not dry_run and (context is not None or entries is not None):
        raise click.UsageError("--context and --entries are for --dry-run.")
    with outcome(as_json) as result:
        try:
            from .exporter import export, plan_export
        except ModuleNotFoundError as error:
            raise BackendError(
                "knnmoe-export",
                f"needs the package {error.name}, which is not installed",
                fix="Run `pip install 'knnmoe[export]'`.",
            ) from error
        from .progress import export_bars
        from .storage import QuantizeOptions
        from .verification.reference import require_reference
        from .verification.verify import verify

        options = QuantizeOptions(
            block_size=None if block_size is None else int(block_size),
            zero_points=zero_points,
            exact_activations=exact_activations,
            head_bits=None if head_bits is None else int(head_bits),
            search=not no_scale_search,
        )
        if dry_run:
            from .report import fit_json, print_fit

            plan = plan_export(
                checkpoint,
                precision=precision,
                options=options,
                experts_per_token=experts_per_token,
                link=link,
                frontend=frontend,
            )
            room = ENTRIES if entries is None else entries
            result(fit_json(plan, context, room), lambda: print_fit(plan, context, room))
            return
        assert bundle is not None
        if verified:
            require_reference()  # now, and not after the weights are written
        checks: list[VerifyReport] = []
        with resumable(bundle), export_bars() as progress:

            def compare(written: Bundle) -> None:
                checks.append(verify(checkpoint, written, progress=progress))

            report = export(
                checkpoint,
                bundle,
                precision=precision,
                options=options,
                experts_per_token=experts_per_token,
                fused=not no_fused,
                link=link,
                frontend=frontend,
                overwrite=overwrite,
                restart=restart,
                progress=progress,
                check=compare if verified else None,
            )
        check = checks[0] if checks else None
        result(to_json(report, check), lambda: _show(report, check))


def to_json(report: ExportReport, check: VerifyReport | None) -> dict[str, Any]:
    """What `--json` prints."""
    figures: dict[str, Any] = {
        "bundle": str(report.bundle),
        "gates": report.gates,
        "segments": report.segments,
        "fused": report.fused,
        "precision": report.storage.precision,
        "bytes": report.total_bytes,
        "seconds": round(report.seconds, 3),
    }
    if report.linked_bytes:
        figures["linked_bytes"] = report.linked_bytes
    if report.storage.quantization is not None:
        figures["quantization"] = asdict(report.storage.quantization)
    if report.errors:
        figures["weight_errors"] = [asdict(error) for error in report.errors]
    if report.left_out:
        figures["tensors_left_out"] = len(report.left_out)
    if check is not None:
        figures |= {
            "max_abs_error": check.max_abs_error,
            "gate_errors": list(check.gates),
            "logits_error": check.logits,
            "case_errors": check.cases,
            "ties": check.ties,
            "tolerance": check.tolerance,
        }
        if check.activations is not None:
            figures["activation_error"] = check.activations
    return figures


def _show(report: ExportReport, check: VerifyReport | None) -> None:
    from .report import print_report

    print_report(report, check)


if __name__ == "__main__":
    main()
