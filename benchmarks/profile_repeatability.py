"""Do two profiles of the same agree within their intervals, and is a slower segment found?

Pairs of runs over the demo's bundle, one after the other, are compared as `knnmoe profile compare`
does, but for the slowdown that is accepted, which is none here. Then one segment of the second run
takes longer by a tenth of its own time, and the comparison is to name it. Of pairs of the same, the
joint 95 % intervals of all parts should leave out 1 in about one pair of twenty.

    python benchmarks/profile_repeatability.py BUNDLE --memory PACK --output FILE --append

How fast a shared machine runs changes from one run to the next, alike for all parts. `--absolute`
judges parts and whole steps by themselves all the same, `--quantile 50%` compares medians, and
`--together` measures both of a pair turn by turn.
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
from knnmoe.runtime.profiling.compare import QUANTILE, WHOLE, compare
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
@click.option("--steps", default=1500, show_default=True, help="Of a run.")
@click.option("--segment", default=2, show_default=True, help="Which one is made slower.")
@click.option("--more", default=0.1, show_default=True, help="By what share of its time.")
@click.option("--quantile", default=QUANTILE, show_default=True, help="That is compared.")
@click.option("--absolute", is_flag=True, help="Judge parts by themselves.")
@click.option("--threads", default=1, show_default=True)
@click.option("--together", is_flag=True, help="Both runs of a pair turn by turn in one.")
@click.option("--output", type=click.Path(path_type=Path), help="Write the figures here (JSON).")
@click.option("--append", is_flag=True, help="Go on with the pairs that OUTPUT has already.")
def main(
    bundle: Path, memory: Path | None, pairs: int, steps: int, segment: int, more: float,
    quantile: float, absolute: bool, threads: int, together: bool, output: Path | None,
    append: bool,
) -> None:  # fmt: skip
    """Compare pairs of runs of the same, and of one with a slower segment."""
    console = Console(stderr=True)
    model = Model.load(bundle, memory=memory, threads=threads)
    manifest = model.bundle.manifest
    subject = Subject(
        str(bundle), manifest.fingerprint, manifest.model_type, manifest.precision, ("split",),
        "cpu", "onnxruntime", None, None,
    )  # fmt: skip
    entries = model.memory.entries if model.memory else 0
    slower = slowed(model.pipeline, segment, more)
    named = f"segment {segment}"
    settings = {"steps": steps, "segment": segment, "more": more, "quantile": quantile,
                "absolute": absolute, "threads": threads, "together": together}  # fmt: skip
    found: dict[str, Any] = {"same": [], "slower": []}
    if append and output is not None and output.exists():
        earlier = json.loads(output.read_text(encoding="utf-8"))
        if earlier["settings"] != settings:
            raise click.UsageError(f"{output} was measured with {earlier['settings']}")
        found = earlier["found"]
    moments = [{**sensors(), "spin": spin()}]
    for pair in range(len(found["slower"]), pairs):
        for kind, pipeline in (("same", Pipeline(model.pipeline.layout)), ("slower", slower)):
            pipelines = (model.pipeline, pipeline)
            runs = [pipelines] if together else [(each,) for each in pipelines]
            before, after = (r for run in runs for r in records_of(run, subject, steps, entries))
            compared = compare(
                before, after, limit=0.0, quantile=quantile, absolute=absolute, seed=pair
            )
            outside = {
                c.part: round(c.beside, 3)
                for c in compared.changes
                if c.verdict in ("slower", "faster")
            }
            (change,) = (c for c in compared.changes if c.part == named)
            width = None if change.high is None or change.low is None else change.high - change.low
            found[kind].append({"outside": outside, "beside": change.beside, "width": width,
                                "ratio": change.ratio, "common": compared.common})  # fmt: skip
            console.print(f"{pair + 1}/{pairs} {kind}: all parts x{compared.common:.3f}, {named} "
                          f"x{change.beside:.3f} beside them, beyond the interval: "
                          f"{outside or 'nothing'}")  # fmt: skip
        if output is not None:
            moments[1:] = [{**sensors(), "spin": spin()}]
            figures = {"pairs": pair + 1, "settings": settings, **counts(found, named),
                       "found": found, "environment": {**environment(), "before": moments[0],
                                                       "after": moments[1]}}  # fmt: skip
            output.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
    tally = counts(found, named)
    print(f"{tally['same_within']} of {pairs} pairs of the same agree within their intervals.")
    print(f"{named} made {more:.0%} slower was named in {tally['slower_found']} of {pairs} pairs,")
    print(f"another part with it in {tally['others_named']}.")


def counts(found: Mapping[str, Sequence[Mapping[str, Any]]], named: str) -> dict[str, int]:
    """Of the pairs so far, how many came out as they are to."""
    same, hurt = found["same"], found["slower"]
    return {
        "same_within": sum(not pair["outside"] for pair in same),
        "slower_found": sum(pair["outside"].get(named, 0) > 1 for pair in hurt),
        "others_named": sum(any(part not in (named, WHOLE) for part in pair["outside"])
                            for pair in hurt),
    }  # fmt: skip


if __name__ == "__main__":
    main()
