"""`knnmoe eval`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from ..cli_support import outcome
from .common import (
    PATH,
    json_option,
    load_model,
    model_options,
    output,
    progress_bar,
    run_config_option,
)

EXAMPLE = """\b
Example:
  knnmoe eval bundle --memory pack --text test.jsonl
"""


@click.command(
    "eval", short_help="How likely is a text, with the memory and without?", epilog=EXAMPLE
)
@click.option("--text", "texts", type=PATH, multiple=True, required=True, metavar="FILE",
              help=".txt (one document) or .jsonl (one a line: text, prompt and completion, or "
                   "messages); repeatable.")  # fmt: skip
@click.option("--context", type=int, help="Tokens a sequence.  [default: 256, or all positions]")
@click.option("--max-tokens", type=int, help="Tokens to predict at most, from all over the text.")
@model_options
@run_config_option
@json_option
def evaluate(
    bundle: Path,
    texts: tuple[Path, ...],
    context: int | None,
    max_tokens: int | None,
    as_json: bool,
    **settings: Any,
) -> None:
    """Score text with the memory and without it.

    Of a prompt with its completion, and of a conversation, only the completion or what the
    assistant says is predicted.

    Negative log-likelihood (nats a token), perplexity and next-token accuracy; the difference that
    the memory makes with its 95 % interval (paired bootstrap over documents, or sequences where
    documents are fewer than eight).
    """
    with outcome(as_json) as result:
        model = load_model(bundle, **settings)
        from ..evaluation import Evaluation, read_for, score_sequences

        text = read_for(model, texts, context=context, max_tokens=max_tokens)
        sequences = text.sequences
        documents = [sequence.document for sequence in sequences]
        with_memory = None
        with progress_bar("Scoring", text.read * (2 if model.memory else 1)) as advance:
            if model.memory is not None:
                with_memory = score_sequences(model, sequences, advance)
                model.disable_memory()
            frozen = score_sequences(model, sequences, advance)
        figures = Evaluation(frozen, with_memory, documents).to_json()
        result(figures, lambda: _print_evaluation(figures))


def _print_evaluation(figures: dict[str, Any]) -> None:
    from rich.table import Table

    table = Table(
        title=f"{figures['tokens']:,} tokens in {figures['sequences']:,} "
        f"sequence{'' if figures['sequences'] == 1 else 's'}",
        title_justify="left",
    )
    names = ["frozen", "memory"] if "nll_memory" in figures else ["frozen"]
    table.add_column("")
    for name in names:
        table.add_column(
            {"frozen": "frozen router", "memory": "with the memory"}[name], justify="right"
        )
    for key, label, form in _ROWS:
        table.add_row(label, *(form.format(figures[f"{key}_{name}"]) for name in names))
    console = output()
    console.print(table)
    if "delta" in figures:
        console.print(_verdict(figures))


_ROWS = (
    ("nll", "NLL, nats a token", "{:.4f}"),
    ("perplexity", "perplexity", "{:,.3f}"),
    ("accuracy", "next token right", "{:.2%}"),
)


def _verdict(figures: dict[str, Any]) -> str:
    delta, low, high = (figures[name] for name in ("delta", "delta_low", "delta_high"))
    change = f"The memory changes the NLL by {delta:+.4f}"
    if low is None:
        return f"{change}; one sequence tells nothing about others."
    says = "a gain" if high < 0 else "a loss" if low > 0 else "no certain difference"
    return f"{change} (95 % interval {low:+.4f} to {high:+.4f}): {says}."
