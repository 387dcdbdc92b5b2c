"""`knnmoe engines`: build engines and look at them."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from knnmoe.runtime.cli_support import outcome, print_note
from knnmoe.runtime.commands.common import PATH, json_option, output

if TYPE_CHECKING:
    from knnmoe.runtime.engines.engine_set import EngineSet

    from .build import BuildReport
    from .process import Progress

# Named here again so that `--help` need not import what defines them; a test compares.
BACKENDS = ("tensorrt", "tensorrt_rtx", "onnxruntime")
PRECISIONS = ("float16", "float32")
OPERATORS = ("primitive", "modern")
EXPERTS = ("auto", "gathered", "dense", "moe")
KEYS = ("float16", "float32", "int8")
LAYOUTS = ("split", "fused")

BUILD_EXAMPLE = """\b
Examples:
  knnmoe engines build bundle
  knnmoe engines build bundle --backend tensorrt_rtx --sm 86 --sm 120
"""
INFO_EXAMPLE = """\b
Example:
  knnmoe engines info bundle
"""


@click.group(epilog=BUILD_EXAMPLE)
def engines() -> None:
    """Build engines of a bundle for one device, and look at them."""


def _capabilities(_ctx: click.Context, _param: click.Parameter, given: tuple[str, ...]) -> Any:
    """`86`, `8.6`, `sm_86`, or several with commas between them."""
    found = []
    for word in ",".join(given).split(","):
        if not word.strip():
            continue
        match = re.fullmatch(r"(?:sm_?)?(\d{2,3}|\d{1,2}\.\d)", word.strip(), re.IGNORECASE)
        if match is None:
            raise click.BadParameter(f"{word!r} is no compute capability such as 86")
        found.append(match[1].replace(".", ""))
    return tuple(found)


@engines.command(epilog=BUILD_EXAMPLE)
@click.argument("bundle", type=PATH)
@click.option("--backend", type=click.Choice(BACKENDS), default="tensorrt", show_default=True,
              help="What to build with; onnxruntime: its CUDA provider.")  # fmt: skip
@click.option("--layout", type=click.Choice(LAYOUTS), default="split", show_default=True,
              help="The gates between engines, or inside one.")  # fmt: skip
@click.option("--precision", type=click.Choice(PRECISIONS), default="float16", show_default=True,
              help="Of matrix products and the key-value cache.")  # fmt: skip
@click.option("--operators", type=click.Choice(OPERATORS), default="primitive", show_default=True,
              help="What graphs are made of: primitive for TensorRT 10.3 and newer, modern for "
                   "10.15 and newer.")  # fmt: skip
@click.option("--experts", type=click.Choice(EXPERTS), default="auto", show_default=True,
              help="Gather each token's, run all on every token, or TensorRT's layer (moe: "
                   "TensorRT 11, sm 10x and 11x). auto: moe where it is, else gathered for "
                   "single tokens and dense for prompts.")  # fmt: skip
@click.option("--keys", type=click.Choice(KEYS), default="float16", show_default=True,
              help="Of memories where a gate is inside an engine with the plugin.")  # fmt: skip
@click.option("--sm", "capabilities", multiple=True, metavar="CC", callback=_capabilities,
              help="Build ahead for a compute capability, as 86; repeat it for more "
                   "(tensorrt_rtx).  [default: this device]")  # fmt: skip
@click.option("--max-batch", type=int, metavar="B", help="Sequences.  [default: 1]")
@click.option("--max-context", type=int, metavar="N",
              help="Tokens of a sequence.  [default: 4096, or the model's positions]")  # fmt: skip
@click.option("--prefill", type=int, metavar="N",
              help="Tokens of a prompt in one pass; 0 builds no engines for prompts, which then "
                   "run token by token and save their memory.  [default: 128]")  # fmt: skip
@click.option("--max-entries", type=int, metavar="N",
              help="Of a memory, where gates are inside engines.  [default: 131072]")  # fmt: skip
@click.option("--neighbors", type=int, default=8, show_default=True, metavar="K",
              help="Of gates inside engines without the plugin, where K is fixed.")  # fmt: skip
@click.option("--plugin", default="auto", show_default=True, metavar="auto|require|none|FILE",
              help="The plugin library: if found, insist, without, or this one.")  # fmt: skip
@click.option("--workspace", type=int, metavar="MIB",
              help="Memory TensorRT may use for a layer.  [default: all]")  # fmt: skip
@click.option("--output", "target", type=PATH, metavar="DIR",
              help="Directory to create.  [default: in the user's cache]")  # fmt: skip
@click.option("--overwrite", is_flag=True, help="Replace an engine set that is there.")
@json_option
def build(
    bundle: Path,
    backend: Any,
    layout: str,
    precision: str,
    operators: str,
    experts: Any,
    keys: str,
    capabilities: tuple[str, ...],
    max_batch: int | None,
    max_context: int | None,
    prefill: int | None,
    max_entries: int | None,
    neighbors: int,
    plugin: str,
    workspace: int | None,
    target: Path | None,
    overwrite: bool,
    as_json: bool,
) -> None:
    """Build the engines of a bundle.

    What is there already is not built again. Without --sm the engines are for this machine's first
    device.
    """
    with outcome(as_json) as result:
        from knnmoe.runtime.bundle import Bundle

        from .build import build as build_engines
        from .settings import BuildSettings, limits_for

        opened = Bundle.open(bundle)
        known = plugin in ("auto", "require", "none")
        settings = BuildSettings(
            backend=backend,
            layout=layout,
            precision=precision,
            operators=operators,
            experts=experts,
            keys=keys,
            capabilities=capabilities,
            limits=limits_for(
                opened.manifest.architecture,
                batch=max_batch,
                context=max_context,
                prefill=1 if prefill == 0 else prefill,
                entries=max_entries,
            ),
            prefill=prefill != 0,
            neighbors=neighbors,
            plugin=plugin if known else "require",  # type: ignore[arg-type] # one of the three
            workspace=None if workspace is None else workspace << 20,
        )
        with _build_bar() as progress:
            report = build_engines(
                opened,
                settings,
                output=target,
                plugin=None if known else Path(plugin),
                overwrite=overwrite,
                progress=progress,
            )
        result(_to_json(report), lambda: _print(report))


@engines.command(epilog=INFO_EXAMPLE)
@click.argument("bundle", type=PATH)
@click.argument("directory", type=PATH, required=False)
@json_option
def info(bundle: Path, directory: Path | None, as_json: bool) -> None:
    """Check an engine set of a bundle and show what is in it.

    Without a DIRECTORY, the newest in the user's cache.
    """
    with outcome(as_json) as result:
        from knnmoe.runtime.bundle import Bundle
        from knnmoe.runtime.engines.engine_set import EngineSet, find_engines

        opened = Bundle.open(bundle, verify=False)
        found = EngineSet.open(directory or find_engines(opened), opened)
        result(_set_json(found), lambda: _print_set(found))


@contextmanager
def _build_bar() -> Iterator[Progress]:
    """One line that says which engine is built and how far it is."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    quiet = not console.is_terminal
    with Progress(*columns, console=console, transient=True, disable=quiet) as bars:
        task = bars.add_task("Building")

        def report(engine: str, phase: str, step: int, steps: int) -> None:
            bars.update(task, description=f"{engine}: {phase}", completed=step, total=max(steps, 1))

        yield report


def _set_json(found: EngineSet) -> dict[str, Any]:
    return {
        "path": str(found.path),
        "backend": found.backend,
        "backend_version": found.backend_version,
        "layout": found.layout,
        "precision": found.precision,
        "operators": found.operators,
        "keys": found.keys,
        "sm": list(found.capabilities),
        "plugin": found.plugin,
        "limits": asdict(found.limits),
        "bytes": found.total_bytes,
        "plugin_layers": sum(found.plugin_layers.values()),
    }


def _to_json(report: BuildReport) -> dict[str, Any]:
    return {
        **_set_json(report.engine_set),
        "engines": [asdict(engine) for engine in report.engines],
        "cached": report.cached,
        "seconds": report.seconds,
        "notes": list(report.notes),
    }


def _print(report: BuildReport) -> None:
    from rich.table import Table

    from knnmoe.runtime.atomic import readable_size

    table = Table(box=None, pad_edge=False)
    for name, justify in (
        ("engine", "left"), ("size", "right"), ("plugin layers", "right"), ("seconds", "right"),
    ):  # fmt: skip
        table.add_column(name, justify=justify)  # type: ignore[arg-type] # left or right
    for engine in report.engines:
        seconds = "there" if engine.seconds is None else f"{engine.seconds:.1f}"
        layers = str(engine.plugin_layers or "")
        table.add_row(engine.name, readable_size(engine.bytes), layers, seconds)
    console = output()
    console.print(table)
    _print_set(report.engine_set)
    for note in report.notes:
        print_note(note)


def _print_set(found: EngineSet) -> None:
    from knnmoe.runtime.atomic import readable_size

    devices = ", ".join(f"sm_{c}" for c in found.capabilities) or "any CUDA device"
    limits = found.limits
    output().print(
        f"\n{found.backend} {found.backend_version}, {found.layout}, {found.precision}, for "
        f"{devices}; up to {limits.batch} x {limits.context} tokens, "
        f"{readable_size(found.total_bytes)} in all\n{found.path}",
        soft_wrap=True,
        markup=False,
    )
