"""What several commands share: which model to load and how, the prompt, progress."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from ..errors import InputError, SettingError

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from ..model import Model
    from ..sampling import GenerationConfig

Command = TypeVar("Command", bound=Callable[..., Any])
Advance = Callable[[int], None]

# Named here again so that `--help` need not import what defines them; a test compares.
LAYOUTS = ("split", "fused")
BACKENDS = ("auto", "onnx", "numpy", "numpy-float64", "two-stage", "faiss", "faiss-gpu")
VARIANTS = ("logits", "assignment", "residual")
DEVICES = ("cpu", "cuda")
DEVICE_GATES = ("cuda", "plugin")
KEYS = ("float32", "float16", "int8", "int8+float16")

PATH = click.Path(path_type=Path)

json_option = click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")


def model_options(command: Command) -> Command:
    """BUNDLE, --memory and how to run them; `load_model` takes the values."""
    return _optioned(command, _MODEL_OPTIONS)


def model_options_but_layout(command: Command) -> Command:
    """As `model_options`, for a command that takes several layouts."""
    return _optioned(command, (*_MODEL_OPTIONS[:_LAYOUT], *_MODEL_OPTIONS[_LAYOUT + 1 :]))


_MODEL_OPTIONS = (
    click.argument("bundle", type=PATH),
    click.option(
        "--memory",
        type=PATH,
        metavar="PACK",
        help="Memory pack; else the frozen router routes.",
    ),
    click.option(
        "--device",
        type=click.Choice(DEVICES),
        default="cpu",
        show_default=True,
        help="cpu runs the bundle as it is, cuda the engines built of it.",
    ),
    click.option(
        "--engines",
        type=PATH,
        metavar="DIR",
        help="cuda: engine set.  [default: the newest of this bundle in the cache]",
    ),
    click.option(
        "--layout",
        type=click.Choice(LAYOUTS),
        help="The gates between engines, or inside one.  [default: split; cuda: the engines']",
    ),
    click.option(
        "--gate",
        type=click.Choice((*BACKENDS, *DEVICE_GATES)),
        help="Backend of the gates in the split layout.  [default: auto; cuda: cuda]",
    ),
    click.option(
        "--keys",
        type=click.Choice(KEYS),
        help="cuda: dtype of the memory's keys on the device.  [default: float16]",
    ),
    click.option(
        "--no-cuda-graph",
        "cuda_graph",
        flag_value=False,
        default=None,
        help="cuda: launch decode steps one by one.",
    ),
    click.option(
        "--variant",
        type=click.Choice(VARIANTS),
        help="What to blend, instead of the pack's own.",
    ),
    click.option(
        "--neighbors", type=int, metavar="K", help="Neighbours, instead of the pack's own."
    ),
    click.option(
        "--scale", type=float, help="Scale of the confidence λ, instead of the pack's own."
    ),
    click.option(
        "--threads",
        type=int,
        help="Threads of an operator.  [default: physical cores, 1 if tiny]",
    ),
)
_LAYOUT = 4  # of the options above, the one that chooses a layout


def _optioned(command: Command, options: Sequence[Callable[[Command], Command]]) -> Command:
    for option in reversed(options):
        command = option(command)
    return command


def run_config_option(command: Command) -> Command:
    """--run-config; `load_model` takes it with the values of `model_options`."""
    return click.option(
        "--run-config",
        type=PATH,
        metavar="FILE",
        help="How much of the memory to use, as `knnmoe profile --budget-ms` wrote it.",
    )(command)


def percent(_ctx: click.Context, _param: click.Parameter, value: str) -> float:
    """`5%` or `5`, as 0.05: the callback of an option."""
    try:
        return float(value.removesuffix("%")) / 100
    except ValueError as error:
        raise click.BadParameter(f"{value!r} is not a percentage such as 5%") from error


def load_model(bundle: Path, **settings: Any) -> Model:
    """The model that `model_options` describe.

    Raises:
        KnnMoeError: As `Model.load` does.
        SettingError: For a setting of the memory where there is none.
    """
    check_needs_memory(settings["memory"], settings)
    from ..model import Model

    return Model.load(bundle, **settings)


def check_needs_memory(memory: Path | None, settings: Mapping[str, Any]) -> None:
    """Raise `SettingError` for a setting of the memory where there is none."""
    for name in ("variant", "neighbors", "scale"):
        if memory is None and settings[name] is not None:
            raise SettingError(f"--{name}", "needs a memory", fix="Give one with --memory PACK.")


def sampling_options(command: Command) -> Command:
    """How tokens are chosen, and how many; `chosen_config` takes the values."""
    options = (
        click.option("--max-new-tokens", type=int, metavar="N", help="Tokens to generate at most."),
        click.option("--temperature", type=float, help="Divides the logits; samples."),
        click.option("--top-p", type=float, help="Sample from the likeliest tokens of this mass."),
        click.option("--top-k", type=int, help="Sample from the k likeliest tokens; 0: from all."),
        click.option("--greedy", is_flag=True, help="Take the likeliest token each time."),
        click.option("--seed", type=int, help="Of the samples; the same seed, the same text."),
        click.option(
            "--stop", multiple=True, metavar="TEXT", help="Text to stop before; repeatable."
        ),
    )
    for option in reversed(options):
        command = option(command)
    return command


SAMPLING = ("temperature", "top_p", "top_k", "seed")


def take_sampling(settings: dict[str, Any]) -> dict[str, Any]:
    """The values of `sampling_options`, taken out of a command's; `chosen_config` takes them.

    Raises:
        click.UsageError: If greedy and sampling are both asked for.
    """
    names = ("max_new_tokens", *SAMPLING, "greedy", "stop")
    taken = {name: settings.pop(name) for name in names}
    if taken["greedy"] and any(taken[name] is not None for name in SAMPLING):
        raise click.UsageError("--greedy cannot be combined with options of sampling.")
    return taken


def chosen_config(model: Model, taken: dict[str, Any]) -> GenerationConfig:
    """The bundle's generation settings with what was asked for in their place.

    Raises:
        SettingError: If a setting is out of its range.
    """
    sampling = {name: taken[name] for name in SAMPLING}
    sampled = any(value is not None for value in sampling.values())
    return model.generation_config.with_overrides(
        do_sample=False if taken["greedy"] else True if sampled else None,
        max_new_tokens=taken["max_new_tokens"],
        stop=taken["stop"] or None,
        **sampling,
    )


def shown_text(text: str) -> str:
    """Text without what a terminal would obey; a pipe gets it as it is."""
    return text.translate(_CONTROLS) if sys.stdout.isatty() else text


_CONTROLS = {
    code: "\N{REPLACEMENT CHARACTER}"
    for code in (*range(0x20), *range(0x7F, 0xA0))
    if chr(code) not in "\t\n"
}


def prompt_options(command: Command) -> Command:
    """--prompt and --prompt-file; `read_prompt` takes the values."""
    text = click.option("--prompt", metavar="TEXT", help="The text to start from.")
    file = click.option(
        "--prompt-file", type=PATH, metavar="FILE", help="File with the text; - is standard input."
    )
    return text(file(command))


def read_prompt(prompt: str | None, prompt_file: Path | None) -> tuple[str | bytes, str]:
    """The prompt and what to call it in errors.

    Raises:
        click.UsageError: Unless exactly one of the two is given.
        InputError: If the file cannot be read.
    """
    if (prompt is None) == (prompt_file is None):
        raise click.UsageError("Give either --prompt or --prompt-file.")
    if prompt is not None:
        return prompt, "--prompt"
    assert prompt_file is not None
    if str(prompt_file) == "-":
        return sys.stdin.buffer.read(), "standard input"
    try:
        return prompt_file.read_bytes(), str(prompt_file)
    except OSError as error:
        raise InputError(prompt_file, "cannot be read", found=error.strerror) from error


def output(width: int = 100) -> Console:
    """Where tables go: standard output; wide enough to stay whole where nobody watches.

    What looks like rich's markup is printed as it is: names of files may.
    """
    from rich.console import Console

    console = Console(highlight=False, markup=False, emoji=False)
    if not console.is_terminal:
        console.width = width
    return console


def fitting(
    console: Console, table_without: Callable[[Sequence[str]], Table], least: Sequence[str]
) -> Table:
    """A table, on a narrow terminal without as many of its least important columns as it takes.

    Args:
        console: Where it goes.
        table_without: Makes the table without columns of these names.
        least: Names of columns that may be left out, the least important first.
    """
    from rich.measure import Measurement

    endless = console.options.update(width=1000)
    for count in range(len(least) + 1):
        table = table_without(least[:count])
        if Measurement.get(console, endless, table).maximum <= console.width:
            break
    return table


@contextmanager
def progress_bar(description: str, total: int) -> Iterator[Advance]:
    """A bar with the time left, on standard error and gone at the end; yields what advances it."""
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        Progress,
        TaskProgressColumn,
        TextColumn,
        TimeRemainingColumn,
    )

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TaskProgressColumn(),
        TimeRemainingColumn(),
    )
    console = Console(stderr=True)
    # Of a bar that nobody sees, rich would leave an empty line.
    watched = console.is_terminal
    with Progress(*columns, console=console, transient=True, disable=not watched) as bars:
        task = bars.add_task(description, total=total)
        yield lambda amount: bars.advance(task, amount)
