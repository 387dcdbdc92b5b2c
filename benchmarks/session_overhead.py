"""What a session adds to its engines: a decode step minus the engines' time in it.

    .venv/bin/python benchmarks/session_overhead.py

The model has the demo's shape four times as wide (D = 512, random weights), made once under
`build/`. A step is all that happens between two events of `Session.stream`. The runs of its
segments and gates, which follow each other, are timed inside of it. What of a step is not theirs is
its overhead, which the bar is for. Looking at clocks counts as overhead too, so they are those that
cost little: the overhead is wall time, since the clock of CPU time is a system call, which takes
8 us behind an engine that left no cache warm. And what the overhead consists of, the pipeline's
step and the choice of the token, is timed in further steps, which do not count for the overhead.

After each step its engines run once more, *bare*, one call behind the other over the same buffers,
so that what the session's own work does to their caches is seen: a step minus the bare runs is
reported beside the overhead.

Figures are medians over steps. Whole steps and bare runs are CPU time of the thread, which the
engines run on too: a step that waits for other programs is no longer for it, and has no smaller
share of overhead.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from itertools import count
from pathlib import Path
from time import perf_counter_ns, thread_time_ns
from typing import Any

import click
import numpy as np
from make_checkpoint import make_checkpoint
from rich.console import Console
from rich.table import Table
from versions import environment

from knnmoe.runtime import MemoryPack, Model
from knnmoe.runtime.cache import Cache
from knnmoe.runtime.calibration import preset
from knnmoe.runtime.engines.base import Run
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
    """Nanoseconds inside something, since they were last taken."""

    spent: int = 0

    def timed(self, call: Callable[..., Any]) -> Callable[..., Any]:
        def run(*arguments: Any, **named: Any) -> Any:
            start = perf_counter_ns()
            try:
                return call(*arguments, **named)
            finally:
                self.spent += perf_counter_ns() - start

        return run

    def take(self) -> int:
        spent, self.spent = self.spent, 0
        return spent


@dataclass(frozen=True)
class Measured:
    """Medians over decode steps, microseconds.

    Attributes:
        step: From one event to the next, CPU time.
        overhead: What of it is no run of a segment or gate.
        bare: These runs once more, right behind each other, CPU time.
        pipeline: The pipeline's step without the engines: checks, buffers.
        choice: Of the token and its text.
        rest: The session's own loop.
        share: Of a step, that is overhead.
        share_bare: Of a step, that the bare runs do not take.
    """

    memory: str
    choosing: str
    step: float
    overhead: float
    bare: float
    pipeline: float
    choice: float
    rest: float
    share: float
    share_bare: float


def measure(model: Model, name: str, choosing: str, *, steps: int, context: int) -> Measured:
    """Decode one text behind a prompt, step by step; after each its engines once more, bare."""
    engines, stepping, choice = Clock(), Clock(), Clock()
    pipeline, write = model.pipeline, Writer.next
    plain: list[tuple[int, ...]] = []
    apart: list[tuple[int, ...]] = []
    try:
        prompt = np.random.default_rng(0).integers(0, 256, context).tolist()
        config = {**CONFIGS[choosing], "eos_token_ids": (), "max_new_tokens": 2 * steps + WARM_UP}
        session = model.session()
        events = session.stream(prompt, **config)
        next(events)
        next(events)  # from here on each step is of one token, bound already
        runs = watch_engines(session._cache, engines)
        engines.take()
        for step in count():
            if step == WARM_UP + steps:
                pipeline.next = stepping.timed(pipeline.next)  # type: ignore[method-assign]
                Writer.next = choice.timed(write)  # type: ignore[method-assign]
            cpu, wall = thread_time_ns(), perf_counter_ns()
            if next(events, None) is None:
                break
            wall, cpu = perf_counter_ns() - wall, thread_time_ns() - cpu
            start = thread_time_ns()
            for run in runs:  # writes what is there already
                run()
            bare = thread_time_ns() - start
            ran = engines.take()
            row = (cpu, bare, wall - ran, stepping.take() - ran, choice.take())
            if step >= WARM_UP:
                (plain if step < WARM_UP + steps else apart).append(row)
    finally:
        Writer.next = write  # type: ignore[method-assign]
        vars(pipeline).pop("next", None)  # the class's own again
    whole_us, bare_us, overhead_us, *_ = np.array(plain, float).T / 1e3
    _, _, apart_us, pipeline_us, choice_us = np.array(apart, float).T / 1e3
    step_median, overhead = float(np.median(whole_us)), float(np.median(overhead_us))
    return Measured(
        memory=name,
        choosing=choosing,
        step=step_median,
        overhead=overhead,
        bare=float(np.median(bare_us)),
        pipeline=float(np.median(pipeline_us)),
        choice=float(np.median(choice_us)),
        rest=float(np.median(apart_us - pipeline_us - choice_us)),
        share=overhead / step_median,
        share_bare=float(np.median(whole_us - bare_us)) / step_median,
    )


def watch_engines(cache: Cache, clock: Clock) -> tuple[Run, ...]:
    """Time the runs of the step that a cache used last, from now on; they themselves, untimed."""
    key, plan = next(reversed(cache.plans.items()))
    parts = plan.bound.parts
    runs: tuple[Run, ...] = parts.runs

    def all_of_them() -> None:  # as a step has them; a clock for each would cost 30 us a step
        for run in runs:
            run()

    timed = replace(parts, runs=(clock.timed(all_of_them),))
    cache.plans[key] = replace(plan, bound=replace(plan.bound, parts=timed))
    return runs


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
    table = Table(title="A decode step of a session, median microseconds")
    for name in ("memory", "token", "step", "overhead", "share", "pipeline", "choice", "rest",
                 "bare", "less bare"):  # fmt: skip
        justify: Any = "left" if name in ("memory", "token") else "right"
        table.add_column(name, justify=justify, no_wrap=True)
    for one in found:
        cells = (f"{one.step:.0f}", f"{one.overhead:.0f}", f"{one.share:.1%}")
        parts = (f"{number:.0f}" for number in (one.pipeline, one.choice, one.rest, one.bare))
        table.add_row(one.memory, one.choosing, *cells, *parts, f"{one.share_bare:.1%}")
    Console(width=110).print(table)


@click.command()
@click.option("--folder", type=click.Path(path_type=Path), default=ROOT / "build/demo-512")
@click.option("--entries", default=1000, show_default=True, help="Of each gate's memory.")
@click.option("--steps", default=150, show_default=True, help="That count, and as many apart.")
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
    beside = max(one.share_bare for one in found)
    click.echo(
        f"largest overhead {worst:.1%}, bar {BAR:.0%}; of a step minus bare runs {beside:.1%}"
    )
    sys.exit(1 if worst > BAR else 0)


if __name__ == "__main__":
    main()
