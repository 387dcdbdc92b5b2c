"""`knnmoe doctor`."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING

import click

from ..cli_support import outcome
from .common import json_option, output

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from ..doctor import Machine
    from ..probes import Module

# Named here again so that `--help` need not import what defines them; a test compares.
FEATURES = (
    "cpu", "export", "memory", "faiss", "faiss-gpu", "cupy", "tensorrt-build", "tensorrt-run",
    "tensorrt-plugin", "onnxruntime-cuda",
)  # fmt: skip

EXAMPLE = """\b
Examples:
  knnmoe doctor
  knnmoe doctor --require tensorrt-run --require tensorrt-plugin
"""


@click.command(short_help="Say what this machine can do, and what it lacks.", epilog=EXAMPLE)
@click.option(
    "--require", "required", type=click.Choice(FEATURES), multiple=True, metavar="FEATURE",
    help="End with exit code 1 unless this is ready; repeatable.  "
         f"[{', '.join(FEATURES)}]",
)  # fmt: skip
@json_option
def doctor(required: tuple[str, ...], as_json: bool) -> None:
    """Say what this machine can do with knnmoe, what is missing for the rest, and what adds it.

    Nothing is changed. Libraries are loaded in processes of their own, so that a broken one is a
    line here and no crash.
    """
    with outcome(as_json) as result:
        from ..doctor import examine, to_json

        machine = examine()
        figures = to_json(machine, required)
        result(figures, lambda: show(machine, output()))
    missing = [name for name in required if not figures["features"][name]["ready"]]
    if missing:
        if not as_json:
            click.echo(f"not ready: {', '.join(missing)}", err=True)
        sys.exit(1)


def show(machine: Machine, console: Console) -> None:
    """Print what was found, what can be done with it, and what adds the rest."""
    from rich.text import Text

    from ..cli_support import printable
    from ..doctor import features

    facts = _table("This machine", ("", ""))
    for name, said in describe(machine):
        facts.add_row(name, printable(said))
    console.print(facts)
    can = _table("What it can do", ("", "", ""))
    wanted: dict[tuple[str, str], list[str]] = {}
    for feature in features(machine):
        state = Text("ready", "green") if feature.ready else Text("not ready", "yellow")
        missing = [lack.what for lack in feature.missing]
        said = f"{feature.title}{'; missing: ' if missing else ''}{', '.join(missing)}"
        can.add_row(feature.name, state, printable(said))
        for lack in feature.missing:
            wanted.setdefault((lack.what, lack.fix), []).append(feature.name)
    console.print(can)
    if wanted:
        steps = _table("What would add the rest", ("missing", "step", "for"))
        for (what, fix), names in wanted.items():
            cells = (what, fix, ", ".join(names))
            steps.add_row(*(printable(cell) for cell in cells))
        console.print(steps)


def _table(title: str, columns: tuple[str, ...]) -> Table:
    from rich import box
    from rich.table import Table

    table = Table(
        title=title, title_justify="left", box=box.SIMPLE_HEAD, show_header=any(columns),
        padding=(0, 1),
    )  # fmt: skip
    for column in columns:
        table.add_column(column, overflow="fold")
    return table


def describe(machine: Machine) -> Iterator[tuple[str, str]]:
    """The facts, one a row."""
    memory = f", {machine.memory_bytes / 2**30:.0f} GiB" if machine.memory_bytes else ""
    yield "CPU", f"{machine.cpu}; {machine.cores:g} cores usable{memory}"
    if machine.jetson:
        yield "Jetson Linux", machine.jetson
    yield "NVIDIA driver", _driver(machine)
    for device in machine.driver.devices:
        size = f"{device.memory_bytes / 2**30:.0f} GiB"
        yield "device", f"{device.name}, compute capability {device.compute_capability}, {size}"
    yield "nvcc", machine.nvcc.version or ("found" if machine.nvcc.path else "–")
    yield "TensorRT headers", machine.headers.version or "–"
    for name, module in machine.modules.items():
        yield name, _module(module)
    yield "TensorRT plugin", _plugin(machine)
    found = [f"{name} {version}" for name, version in machine.packages.items() if version]
    yield "packages", ", ".join(found) or "–"


def _driver(machine: Machine) -> str:
    driver = machine.driver
    if not driver.found:
        return "–"
    cuda = "" if driver.cuda is None else f", supports CUDA {driver.cuda[0]}.{driver.cuda[1]}"
    error = f"; {driver.error}" if driver.error else ""
    return f"{driver.version or 'version unknown'}{cuda}{error}"


def _module(module: Module) -> str:
    if not module.found:
        return "–"
    facts = module.facts
    package = f" ({facts['package']})" if facts.get("package") else ""
    said = [f"{module.version or 'version unknown'}{package}"]
    if module.error:
        said.append(f"does not work: {module.error}")
    if "providers" in facts:
        said.append(", ".join(p.removesuffix("ExecutionProvider") for p in facts["providers"]))
    if "gpu_support" in facts:
        said.append(f"{facts['gpus']} GPUs" if facts["gpu_support"] else "CPU only")
    if "plugin" in facts:
        said.append(f"plugin {facts['plugin']}")
    return "; ".join(said)


def _plugin(machine: Machine) -> str:
    plugin = machine.plugin
    where = [str(plugin.path)] if plugin.path else []
    built = [f"for TensorRT {plugin.built_for}"] if plugin.built_for else []
    state = [plugin.error] if plugin.error else ["of these sources"]
    return "; ".join([*where, *built, *state])
