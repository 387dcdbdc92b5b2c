"""What a session adds to its engines: a decode step minus the calls of ONNX Runtime.

    .venv/bin/python benchmarks/session_overhead.py

The model has the demo's shape four times as wide (D = 512, random weights), made once under
`build/`. A step is all that happens between two events of `Session.stream`. After each its engines
run once more, bare, one call behind the other over the same buffers: that is what a step could not
do without. The pipeline's step and the choice of the token are timed within, so that what is left
is told apart. Figures are medians over steps, of the thread's CPU time: engines run on the same
thread, and other work of the machine counts by what it drives out of the caches alone.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from time import thread_time_ns
from typing import Any

import click
import numpy as np
from make_checkpoint import make_checkpoint
from rich.console import Console
from rich.table import Table
from versions import environment

from knnmoe.runtime import MemoryPack, Model
from knnmoe.runtime.calibration import preset
from knnmoe.runtime.generation import Writer
from knnmoe.runtime.pack_parts import GateEntries
from knnmoe.runtime.pack_writing import write_pack

ROOT = Path(__file__).resolve().parents[1]
BAR = 0.05  # of a step
WARM_UP = 10
CONFIGS: dict[str, dict[str, Any]] = {
    "greedy": {"do_sample": False},
    "sampled": {"do_sample": True, "seed": 1, "temperature": 0.8, "top_p": 0.95},
}


@dataclass
class Clock:
    """Nanoseconds of CPU time inside something, since they were last taken."""

    spent: int = 0

    def timed(self, call: Callable[..., Any]) -> Callable[..., Any]:
        def run(*arguments: Any, **named: Any) -> Any:
            start = thread_time_ns()
            try:
                return call(*arguments, **named)
            finally:
                self.spent += thread_time_ns() - start

        return run

    def take(self) -> int:
        spent, self.spent = self.spent, 0
        return spent


@dataclass(frozen=True)
class Measured:
    """Medians over decode steps, microseconds of CPU time.

    Attributes:
        step: From one event to the next.
        engines: The calls of all segments and gates, bare.
        pipeline: The pipeline's step without them: checks, buffers.
        choice: Of the token and its text.
        rest: The session's own loop.
        share: Of a step, that is not the engines'.
    """

    memory: str
    choosing: str
    step: float
    engines: float
    pipeline: float
    choice: float
    rest: float
    share: float


def measure(model: Model, name: str, choosing: str, *, steps: int, context: int) -> Measured:
    """Decode one text behind a prompt, step by step; after each its engines once more, bare."""
    pipeline_clock, choice = Clock(), Clock()
    pipeline, write = model.pipeline, Writer.next
    pipeline.step = pipeline_clock.timed(pipeline.step)  # type: ignore[method-assign]
    Writer.next = choice.timed(write)  # type: ignore[method-assign]
    rows = []
    try:
        prompt = np.random.default_rng(0).integers(0, 256, context).tolist()
        config = {**CONFIGS[choosing], "eos_token_ids": (), "max_new_tokens": steps + WARM_UP}
        session = model.session()
        events = session.stream(prompt, **config)
        next(events)
        next(events)
        runs = next(reversed(session._cache.plans.values())).bound.parts.runs
        for clock in (pipeline_clock, choice):
            clock.take()
        while True:
            start = thread_time_ns()
            if next(events, None) is None:
                break
            whole = thread_time_ns() - start
            start = thread_time_ns()
            for run in runs:  # writes what is there already
                run()
            bare = thread_time_ns() - start
            rows.append((whole, bare, pipeline_clock.take(), choice.take()))
    finally:
        Writer.next = write  # type: ignore[method-assign]
        del pipeline.step  # the class's own again
    whole_us, bare_us, step_us, choice_us = np.median(np.array(rows[WARM_UP:], float), 0) / 1e3
    return Measured(
        memory=name,
        choosing=choosing,
        step=whole_us,
        engines=bare_us,
        pipeline=step_us - bare_us,
        choice=choice_us,
        rest=whole_us - step_us - choice_us,
        share=(whole_us - bare_us) / whole_us,
    )


def made_bundle(folder: Path) -> Path:
    """The model's bundle, exported once."""
    if not (folder / "bundle").exists():
        from knnmoe.export.exporter import export

        folder.mkdir(parents=True, exist_ok=True)
        if not (folder / "checkpoint").exists():
            make_checkpoint("demo-512", folder / "checkpoint")
        export(folder / "checkpoint", folder / "bundle")
    return folder / "bundle"


def random_pack(path: Path, model: Model, entries: int) -> MemoryPack:
    """Random entries for every gate."""
    identity, random = model.identity, np.random.default_rng(0)

    def rows(width: int) -> Any:
        return random.standard_normal((entries, width), np.float32)

    gates = {}
    for gate in range(identity.num_gates):
        keys = rows(identity.hidden_size)
        logits, residuals = rows(identity.num_experts), rows(identity.num_experts)
        gates[gate] = GateEntries(keys, logits, residuals, keys.mean(axis=0))
    return write_pack(
        path, model=identity, gates=gates, variant="residual", neighbors=8, similarity="cosine",
        calibration=preset("residual"), origins=None, provenance={}, overwrite=True,
    )  # fmt: skip


def show(found: list[Measured]) -> None:
    table = Table(title="A decode step of a session, median microseconds of CPU time")
    for name in ("memory", "token", "step", "engines", "pipeline", "choice", "rest", "overhead"):
        table.add_column(name, justify="left" if name in ("memory", "token") else "right")
    for one in found:
        numbers = (one.step, one.engines, one.pipeline, one.choice, one.rest)
        cells = (f"{number:.1f}" for number in numbers)
        table.add_row(one.memory, one.choosing, *cells, f"{one.share:.1%}")
    Console().print(table)


@click.command()
@click.option("--folder", type=click.Path(path_type=Path), default=ROOT / "build/demo-512")
@click.option("--entries", default=1000, show_default=True, help="Of each gate's memory.")
@click.option("--steps", default=300, show_default=True)
@click.option("--context", default=64, show_default=True, help="Tokens of the prompt.")
@click.option("--output", type=click.Path(path_type=Path), help="Write the figures as JSON.")
def main(folder: Path, entries: int, steps: int, context: int, output: Path | None) -> None:
    """Print where the time of a decode step goes; exit code 1 if the overhead is above the bar."""
    model = Model.load(made_bundle(folder), threads=1)
    found: list[Measured] = []
    for name in ("none", f"{entries} entries"):
        if name != "none":
            model.swap_memory(random_pack(folder / "pack", model, entries))
        found += [measure(model, name, one, steps=steps, context=context) for one in CONFIGS]
    show(found)
    content = {"bar": BAR, "rows": [asdict(one) for one in found], "environment": environment()}
    if output is not None:
        output.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    worst = max(one.share for one in found)
    click.echo(f"largest overhead {worst:.1%}, bar {BAR:.0%}")
    sys.exit(1 if worst > BAR else 0)


if __name__ == "__main__":
    main()
