"""`knnmoe plugin`: build the TensorRT plugin library, and see which TensorRT takes it.

Nothing heavy is imported before a command runs: `--help` answers at once.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import click

from knnmoe.runtime.cli_support import outcome, print_note
from knnmoe.runtime.commands.common import PATH, json_option
from knnmoe.runtime.errors import BackendError

BUILD_EXAMPLE = """\b
Example:
  knnmoe plugin build --tensorrt-root /opt/tensorrt --arch native
"""
INFO_EXAMPLE = """\b
Example:
  knnmoe plugin info
"""
CHECK_EXAMPLE = """\b
Example:
  knnmoe plugin check --flavour tensorrt
"""


@click.group(epilog=BUILD_EXAMPLE)
def plugin() -> None:
    """Build and check the TensorRT plugin.

    The library is found in the user's cache, where `build` puts it, or where KNNMOE_PLUGIN says.
    """


@plugin.command(short_help="Build the plugin library with nvcc.", epilog=BUILD_EXAMPLE)
@click.option("--output", type=PATH, help="The library to write; in the user's cache if not given.")
@click.option(
    "--tensorrt-root",
    type=PATH,
    metavar="DIR",
    help="TensorRT's SDK or its include folder; else TENSORRT_ROOT, else where packages put it.",
)
@click.option(
    "--arch",
    "arches",
    multiple=True,
    metavar="NUMBER",
    help="Compute capability, as 87, or native for this machine's; repeatable. All that are "
    "supported, and PTX for newer ones, if not given.",
)
@click.option(
    "--jobs",
    type=click.IntRange(min=0),
    metavar="N",
    default=0,
    show_default=True,
    help="Architectures compiled at a time; 0: one a core.",
)
@json_option
def build(
    output: Path | None,
    tensorrt_root: Path | None,
    arches: tuple[str, ...],
    jobs: int,
    as_json: bool,
) -> None:
    """Build the plugin library.

    It needs CUDA's nvcc (CUDA_HOME or PATH) and the headers of the TensorRT that will load it, of
    the same major version. It links neither TensorRT nor the driver.
    """
    with outcome(as_json) as result:
        from . import library
        from .compiler import ARCHITECTURES
        from .toolchain import native_architectures

        headers = library.find_tensorrt_headers(tensorrt_root)
        version = library.header_version(headers)
        chosen: list[str] = []
        for arch in arches:
            chosen += native_architectures() if arch == "native" else [arch]
        start = time.perf_counter()
        built = library.build(
            output,
            headers=headers,
            architectures=chosen or ARCHITECTURES,
            ptx=None if chosen else ARCHITECTURES[0],
            jobs=jobs,
        )
        seconds, size = time.perf_counter() - start, built.stat().st_size
        architectures = list(dict.fromkeys(chosen or ARCHITECTURES))
        figures = {
            "library": str(built),
            "bytes": size,
            "seconds": round(seconds, 1),
            "tensorrt": version,
            "architectures": architectures,
            "source": library.source_hash(),
        }

        def show() -> None:
            click.echo(f"{built}")
            click.echo(
                f"for TensorRT {version}, sm_{', sm_'.join(architectures)}; "
                f"{size / 1e6:.1f} MB in {seconds:.1f} s"
            )

        result(figures, show)


@plugin.command(
    short_help="Show the library, the tools and the TensorRTs that are here.", epilog=INFO_EXAMPLE
)
@json_option
def info(as_json: bool) -> None:
    """Show what is here: the library, the compiler, the headers, the installed TensorRTs.

    Loads nothing and fails at nothing that is missing.
    """
    with outcome(as_json) as result:
        from . import library
        from .flavours import installed
        from .toolchain import find_nvcc

        def found(find: Any) -> tuple[Any, str | None]:
            try:
                return find(), None
            except BackendError as error:
                return None, str(error)

        path, missing = found(library.find_library)
        figures: dict[str, Any] = {"source": library.source_hash(), "library": None}
        figures |= _described(path) if path else {"missing": missing}
        nvcc, _ = found(find_nvcc)
        headers, _ = found(library.find_tensorrt_headers)
        version, _ = found(lambda: library.header_version(headers)) if headers else (None, None)
        figures |= {
            "nvcc": str(nvcc) if nvcc else None,
            "headers": str(headers) if headers else None,
            "headers_version": version,
            "tensorrt": installed(),
        }

        def show() -> None:
            _show_library(figures)
            click.echo(f"nvcc      {figures['nvcc'] or 'not found'}")
            where = f"{headers} ({version})" if headers else "not found"
            click.echo(f"headers   {where}")
            click.echo(f"TensorRT  {', '.join(figures['tensorrt']) or 'none for this Python'}")

        result(figures, show)


@plugin.command(
    short_help="Load the library into every TensorRT that is installed.", epilog=CHECK_EXAMPLE
)
@click.argument("library_path", type=PATH, metavar="[LIBRARY]", required=False)
@click.option(
    "--flavour",
    "wanted",
    multiple=True,
    type=click.Choice(["tensorrt", "tensorrt_lean", "tensorrt_rtx"]),
    help="Ask this TensorRT only; repeatable.",
)
@json_option
def check(library_path: Path | None, wanted: tuple[str, ...], as_json: bool) -> None:
    """Load the library into every installed TensorRT and create the plugin there.

    Needs no GPU. Fails if there is no library, no TensorRT, or one that does not take it.
    """
    with outcome(as_json) as result:
        from dataclasses import asdict

        from . import library
        from .flavours import installed, try_flavour

        path = library_path or library.find_library()
        figures = {"source": library.source_hash(), **_described(path)}
        flavours = list(wanted) or installed()
        if not flavours:
            raise BackendError(
                "TensorRT", "no flavour of it is installed for this Python",
                expected="the package tensorrt, tensorrt_lean or tensorrt_rtx",
                fix="Install one, or see `knnmoe plugin info` for the library alone.",
            )  # fmt: skip
        trials = [try_flavour(name, path) for name in flavours]
        refused = [trial for trial in trials if not trial.loads]
        if refused:
            raise BackendError(
                path,
                f"not taken by {', '.join(trial.flavour for trial in refused)}",
                found="; ".join(f"{t.flavour} {t.version}: {t.problem}" for t in refused),
                fix="Build it for that version with `knnmoe plugin build --tensorrt-root`.",
            )
        figures["tensorrt"] = [asdict(trial) for trial in trials]

        def show() -> None:
            _show_library(figures)
            for trial in trials:
                click.echo(f"{trial.flavour} {trial.version}: loads it and creates the plugin")

        result(figures, show)


def _described(path: Path) -> dict[str, Any]:
    """What a library says of itself."""
    from dataclasses import asdict

    from . import library

    built = library.build_info(path)
    return {
        "library": str(path),
        "built": asdict(built) if built else None,
        "current": built is not None and built.source == library.source_hash(),
    }


def _show_library(figures: dict[str, Any]) -> None:
    click.echo(f"sources   {figures['source']}")
    if figures["library"] is None:
        click.echo("library   not built")
        print_note(figures["missing"])
        return
    click.echo(f"library   {figures['library']}")
    if built := figures["built"]:
        click.echo(
            f"          for TensorRT {built['tensorrt']}, CUDA {built['cuda']}, "
            f"sm_{', sm_'.join(built['architectures'])}"
        )
    if not figures["current"]:
        print_note("The library was built from other sources than these.")
