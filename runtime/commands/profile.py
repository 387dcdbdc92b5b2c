"""`knnmoe profile`."""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import click

from ..cli_support import INTERRUPTED, outcome
from .common import (
    LAYOUTS,
    PATH,
    check_needs_memory,
    json_option,
    model_options_but_layout,
    output,
    progress_bar,
)
from .profile_command import ProfileCommand
from .profile_outputs import Outputs, output_options, print_answer

EXAMPLE = """\b
Examples:
  knnmoe profile bundle --memory pack --context 512 --prompt-length 256
  knnmoe profile bundle --memory pack --entries 1000,10000,all,0 --batch 1,4
  knnmoe profile bundle --memory pack --layout split,fused --output today.json
"""
DEPTHS = ("none", "gates", "all")
PHASES = ("decode", "prefill")


class Listed(click.ParamType):  # type: ignore[type-arg]  # generic in newer versions only
    """One or more values with commas between them.

    Args:
        name: What help calls a value.
        read: Makes a value of its text; ValueError if it is none.
    """

    def __init__(self, name: str, read: Callable[[str], Any]) -> None:
        self.name, self._read = name, read

    def convert(self, value: Any, param: Any, ctx: Any) -> tuple[Any, ...]:
        """The values of one option."""
        if isinstance(value, tuple):
            return value
        try:
            return tuple(self._read(text.strip()) for text in value.split(","))
        except ValueError:
            self.fail(f"{value!r} is no list of {self.name}", param, ctx)


def _one_of(*choices: str) -> Callable[[str], str]:
    def read(text: str) -> str:
        if text not in choices:
            raise ValueError(text)
        return text

    return read


NUMBERS = Listed("numbers", int)


@click.command(
    cls=ProfileCommand,
    short_help="Measure what each segment and gate costs.",
    epilog=EXAMPLE,
)
@model_options_but_layout
@click.option(
    "--layout",
    "layouts",
    type=Listed("layouts", _one_of(*LAYOUTS)),
    multiple=True,
    help="Gates between engines (split) or inside one (fused), or both: split,fused.",
)
@click.option(
    "--phase",
    "phases",
    type=Listed("phases", _one_of(*PHASES)),
    multiple=True,
    help="decode, prefill or both.  [default: decode,prefill]",
)
@click.option(
    "--context",
    "contexts",
    type=NUMBERS,
    multiple=True,
    help="Tokens before each decode step, a list.  [default: 128, or what fits]",
)
@click.option(
    "--prompt-length",
    "prompts",
    type=NUMBERS,
    multiple=True,
    help="Prompts to measure the first token at, a list; repeatable.  [default: 32,128]",
)
@click.option(
    "--batch",
    "batches",
    type=NUMBERS,
    multiple=True,
    help="Sequences side by side, a list.  [default: 1]",
)
@click.option(
    "--entries",
    type=Listed("memory sizes", str),
    multiple=True,
    help="Memory sizes, a list: numbers of a gate's entries, all; 0 is frozen.  [default: all,0]",
)
@click.option(
    "--steps", type=int, default=100, show_default=True, help="Decode steps, at each point."
)
@click.option("--prefills", type=int, default=10, show_default=True, help="Prompts, at each point.")
@click.option("--warmup", type=int, default=5, show_default=True, help="Steps not counted.")
@click.option(
    "--inside",
    type=click.Choice(DEPTHS),
    default="gates",
    show_default=True,
    help="Look into gates, or into segments and fused graphs too (weights are loaded twice).",
)
@click.option("--no-bounds", is_flag=True, help="Do not measure what the machine can do.")
@click.option("--all-parts", is_flag=True, help="Show every segment and gate of a large model.")
@click.option("--output", "file", type=PATH, metavar="FILE", help="Write the record (JSON).")
@output_options
@json_option
def profile(
    bundle: Path,
    memory: Path | None,
    layouts: tuple[tuple[str, ...], ...],
    phases: tuple[tuple[str, ...], ...],
    contexts: tuple[tuple[int, ...], ...],
    prompts: tuple[tuple[int, ...], ...],
    batches: tuple[tuple[int, ...], ...],
    entries: tuple[tuple[str, ...], ...],
    steps: int,
    prefills: int,
    warmup: int,
    inside: str,
    no_bounds: bool,
    all_parts: bool,
    file: Path | None,
    as_json: bool,
    cuda_graph: bool | None,
    **load: Any,
) -> None:
    """Measure decode steps and prompts, by segment and gate, in milliseconds.

    Every combination of the lists is a point. Points take turns, a few steps each, so that whatever
    else the machine does hits all alike; intervals are 95 %, by drawing whole rounds. "x bound" is
    how many times the least time that bytes and arithmetic of a part need on this machine.
    The tokens are random, always the same ones. What each number is: docs/profiling.md.

    With --budget-ms the record is reported first and then which memory fits; with --json only the
    record is printed.

    Ctrl-C ends the measurement: what was measured is reported, with exit code 130.
    """
    outputs = Outputs.taken_from(load)
    outputs.check_sizes(_flat(entries))
    with outcome(as_json) as result:
        from ..atomic import check_file
        from ..profiling.record import write_record
        from ..profiling.report import print_record
        from ..profiling.run import ProfileOptions, run_profile

        check_needs_memory(memory, load)
        check_file("--output", file)
        outputs.check_files()
        options = ProfileOptions(
            layouts=_flat(layouts),
            phases=_flat(phases) or PHASES,
            contexts=_flat(contexts),
            prompts=_flat(prompts),
            batches=_flat(batches) or (1,),
            entries=_flat(entries),
            steps=steps,
            prefills=prefills,
            warmup=warmup,
            inside=inside,  # type: ignore[arg-type]
            bounds=not no_bounds,
            cuda_graph=cuda_graph,
            load=load,
        )
        record = run_profile(bundle, memory, options, _progress)
        if file is not None:
            write_record(record, file)
        if not as_json:
            print_record(record, output(), every_part=all_parts)
        answer = outputs.answer_of_a_run(record, memory)
        result(
            record.to_json(),
            lambda: None if answer is None else print_answer(answer, output()),
        )
        if not record.finished:
            sys.exit(INTERRUPTED)


def _progress(total: int) -> AbstractContextManager[Callable[[int], None]]:
    return progress_bar("Measuring", total)


def _flat(lists: tuple[tuple[Any, ...], ...]) -> tuple[Any, ...]:
    return tuple(value for each in lists for value in each)
