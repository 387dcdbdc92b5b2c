"""`knnmoe profile`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ..cli_support import outcome
from .common import json_option, load_model, model_options, output, progress_bar
from .profile_command import ProfileCommand

if TYPE_CHECKING:
    from ..model import Model
    from ..pipeline import Pipeline

EXAMPLE = """\b
Example:
  knnmoe profile bundle --memory pack --context 512 --prompt-length 256
"""


@click.command(
    cls=ProfileCommand,
    short_help="Measure what each segment and gate costs.",
    epilog=EXAMPLE,
)
@model_options
@click.option(
    "--context", type=int, help="Tokens before each decode step.  [default: 128, or what fits]"
)
@click.option(
    "--prompt-length",
    "prompts",
    type=int,
    multiple=True,
    help="Prompt to measure the first token at; repeatable.  [default: 32 and 128]",
)
@click.option("--steps", type=int, default=100, show_default=True, help="Decode steps measured.")
@click.option("--prefills", type=int, default=10, show_default=True, help="Prompts measured.")
@click.option("--warmup", type=int, default=5, show_default=True, help="Steps not counted.")
@json_option
def profile(
    bundle: Path,
    context: int | None,
    prompts: tuple[int, ...],
    steps: int,
    prefills: int,
    warmup: int,
    as_json: bool,
    **settings: Any,
) -> None:
    """Measure decoding and time to first token, by segment and gate, in milliseconds.

    With a memory, the frozen model is measured too, in turn with it. The share of retrieval is
    what the gates take beyond routing alone: (gates with the memory - gates frozen) / all parts,
    sums of medians. The tokens are random, always the same ones.
    """
    with outcome(as_json) as result:
        from ..profiling.environment import environment
        from ..profiling.measure import ProfileSettings, measure
        from ..profiling.report import print_profile, to_json

        model = load_model(bundle, **settings)
        plan = ProfileSettings.fitting(
            model.pipeline.max_positions,
            context=context,
            prompts=prompts,
            steps=steps,
            prefills=prefills,
            warmup=warmup,
        )
        subject = {"bundle": str(bundle), **_described(model), "threads": settings["threads"]}
        loaded, frozen = _loaded_and_frozen(model)
        with progress_bar("Measuring", plan.ticks) as advance:
            measured = measure(loaded, frozen, plan, lambda: advance(1))
        result(
            {**to_json(measured), **subject, "environment": environment()},
            lambda: print_profile(measured, output()),
        )


def _loaded_and_frozen(model: Model) -> tuple[Pipeline, Pipeline | None]:
    """The model with its memory and without as two pipelines over the same engines."""
    from ..pipeline import Pipeline

    loaded = Pipeline(model.pipeline.layout)
    if model.memory is None:
        return loaded, None
    model.disable_memory()
    return loaded, Pipeline(model.pipeline.layout)


def _described(model: Model) -> dict[str, Any]:
    pack = model.memory
    return {
        "layout": model.layout,
        "memory": None
        if pack is None
        else {
            "path": str(pack.path),
            "entries": pack.entries,
            "gates": len(pack.gates),
            "variant": pack.variant,
            "neighbors": pack.neighbors,
            "similarity": pack.similarity,
            "bytes": pack.bytes,
        },
    }
