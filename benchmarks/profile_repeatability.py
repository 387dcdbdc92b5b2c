"""Do two profiles of the same agree within their intervals, and is a slower segment found?

Pairs of runs over the demo's bundle, one after the other, are compared as `knnmoe profile compare`
does. Then one segment of the second run takes longer by a tenth of its own time, and the comparison
is to name it, and nothing else. Of pairs of the same, the joint 95 % intervals of all parts should
leave out 1 in about one pair of twenty.

How fast a shared machine runs changes from one run to the next, which no interval of one run can
know: `--together` measures both of a pair turn by turn instead.

    python benchmarks/profile_repeatability.py BUNDLE --memory PACK
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from time import perf_counter_ns
from typing import Any

import click
from rich.console import Console

from knnmoe.runtime.engines.base import Array, Engine, Run
from knnmoe.runtime.layouts import HostLayout, SplitWiring
from knnmoe.runtime.model import Model
from knnmoe.runtime.pipeline import Pipeline
from knnmoe.runtime.profiling.compare import compare
from knnmoe.runtime.profiling.environment import environment
from knnmoe.runtime.profiling.measure import Bench, Target, points_of
from knnmoe.runtime.profiling.noise import spin
from knnmoe.runtime.profiling.plan import fit_grid
from knnmoe.runtime.profiling.record import ProfileRecord, Resident, Subject
from knnmoe.runtime.profiling.sensors import sensors


@dataclass(frozen=True)
class SlowEngine:
    """An engine that takes longer than another by a share of each run's own time."""

    engine: Engine
    more: float

    def bind(self, inputs: Mapping[str, Array], outputs: Mapping[str, Array]) -> Run:
        run = self.engine.bind(inputs, outputs)

        def slowly() -> None:
            start = perf_counter_ns()
            run()
            now = perf_counter_ns()
            end = now + round(self.more * (now - start))
            while perf_counter_ns() < end:
                pass

        return slowly


def slowed(pipeline: Pipeline, segment: int, more: float) -> Pipeline:
    """The same pipeline with one segment that is slower by that share."""
    layout = pipeline.layout
    assert isinstance(layout, HostLayout)
    wiring = layout.wiring
    assert isinstance(wiring, SplitWiring)
    segments = list(wiring.segments)
    segments[segment] = SlowEngine(segments[segment], more)
    return Pipeline(HostLayout(replace(wiring, segments=tuple(segments))))


def records_of(
    pipelines: Sequence[Pipeline], subject: Subject, steps: int, entries: int
) -> list[ProfileRecord]:
    """Decode steps of some pipelines, measured turn by turn, as a record each."""
    grid = fit_grid(
        pipelines[0].max_positions, phases=("decode",), entries=(entries,), steps=steps, warmup=10
    )
    targets = [Target(pipeline, "split", entries) for pipeline in pipelines]
    bench = Bench(points_of(targets, grid), grid)
    bench.measure()
    nothing = Resident(None, None, None, None, None, None)
    return [
        ProfileRecord(subject, {}, grid, (point.point(),), None, nothing, "", True)
        for point in bench.points
    ]


@click.command()
@click.argument("bundle", type=click.Path(path_type=Path, exists=True))
@click.option("--memory", type=click.Path(path_type=Path, exists=True))
@click.option("--pairs", default=20, show_default=True)
@click.option("--steps", default=200, show_default=True)
@click.option("--segment", default=2, show_default=True, help="Which one is made slower.")
@click.option("--more", default=0.1, show_default=True, help="By what share of its time.")
@click.option("--quantile", default=0.5, show_default=True, help="That is compared.")
@click.option("--together", is_flag=True, help="Both runs of a pair turn by turn in one.")
@click.option("--output", type=click.Path(path_type=Path), help="Write the figures here (JSON).")
def main(
    bundle: Path, memory: Path | None, pairs: int, steps: int, segment: int, more: float,
    quantile: float, together: bool, output: Path | None,
) -> None:  # fmt: skip
    """Compare pairs of runs of the same, and of one with a slower segment."""
    console = Console(stderr=True)
    model = Model.load(bundle, memory=memory)
    manifest = model.bundle.manifest
    subject = Subject(
        str(bundle), manifest.fingerprint, manifest.model_type, manifest.precision, ("split",),
        "cpu", "onnxruntime", None, None,
    )  # fmt: skip
    entries = model.memory.entries if model.memory else 0
    slower = slowed(model.pipeline, segment, more)
    named = f"segment {segment}"
    found: dict[str, Any] = {"same": [], "slower": []}
    moments = [{**sensors(), "spin": spin()}]
    for pair in range(pairs):
        for kind, pipeline in (("same", Pipeline(model.pipeline.layout)), ("slower", slower)):
            pipelines = (model.pipeline, pipeline)
            runs = [pipelines] if together else [(each,) for each in pipelines]
            before, after = (r for run in runs for r in records_of(run, subject, steps, entries))
            compared = compare(before, after, limit=0.0, quantile=quantile, seed=pair)
            outside = {
                c.part: round(c.ratio, 3)
                for c in compared.changes
                if c.verdict in ("slower", "faster")
            }
            (change,) = (c for c in compared.changes if c.part == named)
            width = None if change.high is None or change.low is None else change.high - change.low
            found[kind].append({"outside": outside, "ratio": change.ratio, "width": width})
            console.print(f"{pair + 1}/{pairs} {kind}: {named} x{change.ratio:.3f}, "
                          f"beyond the interval: {outside or 'nothing'}")  # fmt: skip
    moments.append({**sensors(), "spin": spin()})
    same, hurt = found["same"], found["slower"]
    figures = {
        "pairs": pairs,
        "steps": steps,
        "quantile": quantile,
        "together": together,
        "same_within": sum(not pair["outside"] for pair in same),
        "slower_found": sum(pair["outside"].get(named, 0) > 1 for pair in hurt),
        "others_named": sum(any(part not in (named, "whole step") for part in pair["outside"])
                            for pair in hurt),
        "found": found,
        "environment": {**environment(), "before": moments[0], "after": moments[1]},
    }  # fmt: skip
    print(f"{figures['same_within']} of {pairs} pairs of the same agree within their intervals.")
    print(
        f"{named} made {more:.0%} slower was named in {figures['slower_found']} of {pairs} pairs,"
    )
    print(f"another part with it in {figures['others_named']}.")
    if output is not None:
        output.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
