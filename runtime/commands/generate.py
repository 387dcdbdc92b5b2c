"""`knnmoe generate`."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ..cli_support import outcome
from .common import json_option, load_model, model_options, prompt_options, read_prompt

if TYPE_CHECKING:
    from ..generation import Event

EXAMPLE = """\b
Example:
  knnmoe generate bundle --memory pack --prompt "In the beginning" --temperature 0.8 --seed 1
"""


@click.command(short_help="Continue a prompt.", epilog=EXAMPLE)
@model_options
@prompt_options
@click.option("--max-new-tokens", type=int, help="Tokens to generate at most.")
@click.option("--temperature", type=float, help="Divides the logits; samples.")
@click.option("--top-p", type=float, help="Sample from the likeliest tokens of this mass.")
@click.option("--top-k", type=int, help="Sample from the k likeliest tokens; 0: from all.")
@click.option("--greedy", is_flag=True, help="Take the likeliest token each time.")
@click.option("--seed", type=int, help="Of the samples; the same seed gives the same text.")
@click.option("--stop", multiple=True, metavar="TEXT", help="Text to stop before; repeatable.")
@json_option
def generate(
    bundle: Path,
    prompt: str | None,
    prompt_file: Path | None,
    greedy: bool,
    stop: tuple[str, ...],
    as_json: bool,
    max_new_tokens: int | None,
    temperature: float | None,
    top_p: float | None,
    top_k: int | None,
    seed: int | None,
    **settings: Any,
) -> None:
    """Continue a prompt and print the text as it comes.

    Options left out are those of the bundle's generation_config.json. Any of --temperature,
    --top-p, --top-k and --seed turns sampling on.
    """
    sampling = {"temperature": temperature, "top_p": top_p, "top_k": top_k, "seed": seed}
    sampled = any(value is not None for value in sampling.values())
    if greedy and sampled:
        raise click.UsageError("--greedy cannot be combined with options of sampling.")
    with outcome(as_json) as result:
        text, where = read_prompt(prompt, prompt_file)
        model = load_model(bundle, **settings)
        from ..generation import collect

        config = model.generation_config.with_overrides(
            do_sample=False if greedy else True if sampled else None,
            max_new_tokens=max_new_tokens,
            stop=stop or None,
            **sampling,
        )
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
        click.echo(_shown(event.text), nl=False)
        sys.stdout.flush()
        yield event
    click.echo()


def _shown(text: str) -> str:
    """Text without what a terminal would obey; a pipe gets it as it is."""
    return text.translate(_CONTROLS) if sys.stdout.isatty() else text


_CONTROLS = {
    code: "\N{REPLACEMENT CHARACTER}"
    for code in (*range(0x20), *range(0x7F, 0xA0))
    if chr(code) not in "\t\n"
}


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
