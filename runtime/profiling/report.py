"""A profile as JSON for scripts and as tables for people."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike

from .measure import Measured, Profile, Samples

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

SCHEMA = "knnmoe.profile/1"
DISTURBED_NOTE = (
    "Whole steps took much longer than their parts typically do: other programs had the cores. "
    "Measure again on a quiet machine."
)


def percentiles(milliseconds: ArrayLike) -> dict[str, float]:
    """Median and tail of a list of times: p50, p90, p99."""
    p50, p90, p99 = np.percentile(np.asarray(milliseconds), [50, 90, 99]).tolist()
    return {"p50": p50, "p90": p90, "p99": p99}


def to_json(profile: Profile) -> dict[str, Any]:
    """The figures by name, times in milliseconds.

    The top level speaks of decode steps of the model as loaded; `frozen` says the same of the model
    without its memory (null if it has none), `prefill` holds one such object a prompt length.
    """
    decode = profile.decode
    return {
        "schema": SCHEMA,
        "context": decode.past,
        **_step_json("decode", decode.loaded),
        "tokens_per_s": _rate(decode),
        "gate_share": decode.gate_share,
        "disturbed": decode.disturbed,
        "frozen": _frozen_json("decode", decode),
        "prefill": [
            {
                "prompt": measured.tokens,
                **_step_json("first_token", measured.loaded),
                "tokens_per_s": _rate(measured),
                "gate_share": measured.gate_share,
                "frozen": _frozen_json("first_token", measured),
            }
            for measured in profile.prefill
        ],
        "steps": profile.settings.steps,
        "prefills": profile.settings.prefills,
        "warmup": profile.settings.warmup,
    }


def _rate(measured: Measured) -> float:
    """Tokens a second at the median step."""
    return 1e3 * measured.tokens / float(np.median(measured.loaded.whole))


def _frozen_json(name: str, measured: Measured) -> dict[str, Any] | None:
    return None if measured.frozen is None else _step_json(name, measured.frozen)


def _step_json(name: str, samples: Samples) -> dict[str, Any]:
    parts = {part: percentiles(times) for part, times in samples.parts.items()}
    return {
        **{f"{name}_ms_{key}": value for key, value in percentiles(samples.whole).items()},
        "parts": {part: times["p50"] for part, times in parts.items()},
        "parts_p90": {part: times["p90"] for part, times in parts.items()},
        "parts_p99": {part: times["p99"] for part, times in parts.items()},
    }


def print_profile(profile: Profile, console: Console) -> None:
    """Print the parts of a decode step, then one line a measured shape."""
    console.print(_parts_table(profile.decode))
    console.print(_summary_table(profile))
    if any(measured.disturbed for measured in (profile.decode, *profile.prefill)):
        console.print(DISTURBED_NOTE, style="yellow")


def _parts_table(decode: Measured) -> Table:
    from rich.table import Table

    table = Table(
        title=f"Where a decode step goes, ms (context {decode.past})", title_justify="left"
    )
    table.add_column("part")
    for name in ("p50", "p90", "p99"):
        table.add_column(name, justify="right")
    if decode.frozen is not None:
        table.add_column("frozen p50", justify="right")
    table.add_column("share", justify="right")
    total = decode.loaded.typical()
    for name, times in decode.loaded.parts.items():
        cells = [f"{value:.3f}" for value in percentiles(times).values()]
        if decode.frozen is not None:
            cells.append(f"{np.median(decode.frozen.parts[name]):.3f}")
        table.add_row(
            name,
            *cells,
            f"{np.median(times) / total:.1%}",
            style="cyan" if name.startswith("gate") else None,
        )
    return table


def _summary_table(profile: Profile) -> Table:
    from rich.table import Table

    table = Table(title="Whole steps, ms", title_justify="left")
    table.add_column("step")
    for name in ("p50", "p90", "p99", "tokens/s", "frozen p50", "retrieval"):
        table.add_column(name, justify="right")
    table.add_row("decode", *_summary(profile.decode))
    for measured in profile.prefill:
        table.add_row(f"first token, prompt of {measured.tokens}", *_summary(measured))
    return table


def _summary(measured: Measured) -> Iterator[str]:
    for value in percentiles(measured.loaded.whole).values():
        yield f"{value:.2f}"
    yield f"{_rate(measured):,.1f}"
    if measured.frozen is None:
        yield from ("–", "–")
        return
    yield f"{np.median(measured.frozen.whole):.2f}"
    yield f"{measured.gate_share:.1%}"
