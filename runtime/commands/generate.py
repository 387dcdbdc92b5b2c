"""`knnmoe generate`."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ..cli_support import outcome
from .common import (
    chosen_config,
    json_option,
    load_model,
    model_options,
    prompt_options,
    read_prompt,
    run_config_option,
    sampling_options,
    shown_text,
    take_sampling,
)

if TYPE_CHECKING:
    from ..generation import Event

EXAMPLE = """\b
Examples:
  knnmoe generate bundle --prompt "In the beginning"
  knnmoe generate bundle --memory pack --prompt-file text.txt --seed 1
"""


@click.command(short_help="Continue a prompt.", epilog=EXAMPLE)
@prompt_options
@sampling_options
@model_options
@run_config_option
@json_option
def generate(
    bundle: Path,
    prompt: str | None,
    prompt_file: Path | None,
    as_json: bool,
    **settings: Any,
) -> None:
    """Continue a prompt and print the text as it comes.

    Options left out are those of the bundle's generation_config.json. Any of --temperature,
    --top-p, --top-k and --seed turns sampling on.
    """
    sampling = take_sampling(settings)
    with outcome(as_json) as result:
        text, where = read_prompt(prompt, prompt_file)
        model = load_model(bundle, **settings)
        from ..generation import collect

        config = chosen_config(model, sampling)
        ids = model.tokenizer.encode(text, where=where)
        events = model.stream(ids, config)
        completion = collect(events if as_json else _echoed(events), len(ids))
        timings = completion.timings
        figures = {
            "text": completion.text,
            "token_ids": completion.token_ids,
            "logprobs": completion.logprobs,
            "finish_reason": completion.finish_reason,
            "prompt_tokens": completion.prompt_tokens,
            "new_tokens": len(completion.token_ids),
            "first_token_ms": timings.first_token_ms,
            "total_ms": timings.total_ms,
            "tokens_per_s": timings.tokens_per_s,
        }
        result(figures, lambda: _print_cost(figures))


def _echoed(events: Iterator[Event]) -> Iterator[Event]:
    for event in events:
        click.echo(shown_text(event.text), nl=False)
        sys.stdout.flush()
        yield event
    click.echo()


def _print_cost(figures: dict[str, Any]) -> None:
    """What it took, for a person: never in the way of the text."""
    if not sys.stderr.isatty():
        return
    rate = figures["tokens_per_s"]
    line = (
        f"{figures['new_tokens']} tokens after {figures['prompt_tokens']}, "
        f"first in {figures['first_token_ms']:.0f} ms"
        + (f", then {rate:.1f} tokens/s" if rate is not None else "")
        + f" · {figures['finish_reason']}"
    )
    click.secho(line, dim=True, err=True)
