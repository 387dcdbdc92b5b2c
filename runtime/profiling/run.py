"""A whole profile: load, measure turn by turn, look inside, count what it could cost at least."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from datetime import datetime, timezone
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Any

from ..memory import MemoryPack
from ..model import Model
from ..pipeline import Pipeline
from .account import account, cache_bytes, memory_bytes, resident_bytes, weight_bytes
from .bounds import measure_bounds, measure_device_bounds, physical_cores
from .environment import environment, usable_cores
from .figures import disturbed, unexplained
from .inside import Depth, gate_backends, look_inside
from .measure import Bench, PointSteps, Target, points_of, ticks
from .noise import noise_warnings, spin
from .plan import Shape, fit_grid, memory_sizes, shapes
from .record import (
    Bound,
    Grid,
    MachineBounds,
    Point,
    ProfiledMemory,
    ProfileRecord,
    Subject,
)
from .roofline import Cost, Weights, bound, exact_search, gate_cost, read_weights, segment_cost
from .sensors import sensors, throttled

if TYPE_CHECKING:
    from ..device.backend import DeviceBackend

INSIDE_SAMPLES = 10
UNEXPLAINED = 0.03  # of a median step, that the medians of its parts may miss

Progress = Callable[[int], AbstractContextManager[Callable[[int], None]]]


@dataclass(frozen=True)
class ProfileOptions:
    """What to measure; what is None or empty is chosen to fit the model.

    Attributes:
        layouts: `split`, `fused` or both; empty takes the default of the device.
        batches, prompts, contexts: See `Grid`.
        entries: Memory sizes: numbers, `all`; `0` is the frozen router.
        phases: `decode`, `prefill` or both.
        steps, prefills, warmup, seed: See `Grid`.
        inside: How deep to look into the parts.
        bounds: Whether to measure what the machine can do.
        cuda_graph: CUDA: measure decode steps with a captured graph, without (False), or both
            (None).
        load: Further arguments of `Model.load`.
    """

    layouts: Sequence[str] = ()
    batches: Sequence[int] = (1,)
    prompts: Sequence[int] = ()
    contexts: Sequence[int] = ()
    entries: Sequence[str] = ()
    phases: Sequence[Any] = ("decode", "prefill")
    steps: int = 100
    prefills: int = 10
    warmup: int = 5
    seed: int = 0
    inside: Depth = "gates"
    bounds: bool = True
    cuda_graph: bool | None = None
    load: Mapping[str, Any] | None = None


def run_profile(
    bundle: str | Path,
    memory: str | Path | None,
    options: ProfileOptions,
    progress: Progress,
) -> ProfileRecord:
    """Profile a bundle, perhaps with a memory.

    An interrupt (Ctrl-C) while steps are timed ends the measurement, not the call: the record then
    has what was measured, and `finished` is False.

    Args:
        bundle, memory: Directories.
        options: What to measure.
        progress: Given the number of ticks, a context that yields what counts them.

    Raises:
        KnnMoeError: As `Model.load` does; `SettingError` for what does not fit the model.
    """
    started = datetime.now(timezone.utc).isoformat(timespec="seconds")
    before_bytes = resident_bytes()
    before = _moment()
    models = _load(bundle, memory, options)
    first = models[0]
    grid = fit_grid(
        first.pipeline.max_positions,
        contexts=options.contexts,
        prompts=options.prompts,
        batches=options.batches,
        entries=memory_sizes(options.entries, first.memory.entries if first.memory else None),
        phases=options.phases,
        steps=options.steps,
        prefills=options.prefills,
        warmup=options.warmup,
        seed=options.seed,
    )
    targets = [target for model in models for target in _targets(model, grid, options)]
    points = points_of(targets, grid)
    begun = perf_counter()
    bench, finished = Bench(points, grid), True
    try:
        with progress(ticks(points, grid)) as advance:
            bench.measure(lambda: advance(1))
    except KeyboardInterrupt:
        finished = False
    seconds = perf_counter() - begun
    # What is measured below is not the model's: arrays to read, and graphs loaded once more.
    resident = _resident(models, targets, grid, before_bytes)
    after = _moment()
    machine = _machine_bounds(first) if options.bounds and finished else None
    counter = _Counter(first, machine)
    depth: Depth = options.inside if finished else "none"
    measured = tuple(_measured(bench, point, counter, depth, _cuda(first)) for point in points)
    kept = tuple(point for point in measured if point.whole_ms)
    return ProfileRecord(
        subject=_subject(str(bundle), models, kept),
        environment={**environment(), "before": before, "after": after},
        settings=grid,
        points=kept,
        machine_bounds=machine,
        resident=resident,
        started=started,
        finished=finished,
        warnings=_warnings(kept, before, after, seconds, finished),
    )


def _load(
    bundle: str | Path, memory: str | Path | None, options: ProfileOptions
) -> tuple[Model, ...]:
    """One model a layout; all of one pack that is read once for each."""
    arguments = dict(options.load or {})
    if arguments.get("device", "cpu") != "cpu":
        arguments["cuda_graph"] = options.cuda_graph
    layouts = tuple(dict.fromkeys(options.layouts)) or (None,)
    return tuple(
        Model.load(bundle, memory=memory, layout=layout, **arguments)  # type: ignore[arg-type]
        for layout in layouts
    )


def _targets(model: Model, grid: Grid, options: ProfileOptions) -> list[Target]:
    """The model at every memory size, and with and without a graph where it can be captured."""
    found = []
    whole = model.memory.entries if model.memory else 0
    for size in grid.entries:
        pipeline = model.pipeline if size == whole else model.beside(size)
        captures = getattr(pipeline.layout, "captures", None)
        graph: bool | None = None if captures is None else bool(captures)
        found.append(Target(pipeline, model.layout, size, graph))
        if graph and options.cuda_graph is None:
            launched = Pipeline(pipeline.layout.launching())  # type: ignore[attr-defined]
            found.append(Target(launched, model.layout, size, False))
    return found


def _moment() -> dict[str, Any]:
    return {**sensors(), "spin": spin()}


def _device(model: Model) -> DeviceBackend | None:
    """The device backend, if the model runs on one."""
    backend: Any = model.backend
    return backend if hasattr(backend, "cuda") else None


def _cuda(model: Model) -> Any:
    device = _device(model)
    return None if device is None else device.cuda


def threads_of(model: Model) -> int:
    """Threads of one operator on the host: those asked for, or what ONNX Runtime takes."""
    asked: int | None = getattr(model.backend, "threads", None)
    return asked if asked is not None else physical_cores()


def _machine_bounds(model: Model) -> MachineBounds:
    cuda = _cuda(model)
    return measure_bounds(threads_of(model)) if cuda is None else measure_device_bounds(cuda)


class _Counter:
    """Counts the least that the parts of a step cost."""

    def __init__(self, model: Model, machine: MachineBounds | None) -> None:
        self._manifest = model.bundle.manifest
        self._machine = machine
        device = _device(model)
        half = device is not None and device.engine_set.precision == "float16"
        self._item_bytes = 2 if half else 4
        weights = read_weights(model.bundle)
        if half and self._manifest.precision == "fp32":
            weights = tuple(_halved(each) for each in weights)
        self._weights = weights

    def bounds(self, pipeline: Pipeline, parts: Any, shape: Shape) -> dict[str, Bound]:
        """The bounds of the parts that have one, by name."""
        if self._machine is None:
            return {}
        costs = self._costs(pipeline, parts, shape)
        working_set = sum(cost.bytes for cost in costs.values())
        machine = self._machine
        return {
            name: bound(cost, machine, working_set)
            for name, cost in costs.items()
            if cost != Cost()  # a gate that routes frozen
        }

    def _costs(self, pipeline: Pipeline, parts: Any, shape: Shape) -> dict[str, Cost]:
        tokens = shape.batch * shape.tokens
        costs: dict[str, Cost] = {
            name: gate_cost(bound.gate, tokens, shape.batch) for name, bound in parts.gates.items()
        }
        segments = [self._segment(index, shape) for index in range(len(self._weights))]
        if "fused" in parts.engines:
            inputs = parts.engines["fused"].inputs
            total = sum(segments, Cost())
            wiring: Any = getattr(pipeline.layout, "wiring", None)
            neighbors = getattr(wiring, "neighbors", ())
            for gate in range(self._manifest.architecture.num_gates):
                keys, values = inputs[f"keys_{gate}"], inputs[f"values_{gate}"]
                count = neighbors[gate] if neighbors else 1
                total += exact_search(keys, values, count, tokens)
            costs["fused"] = total
        else:
            costs |= {f"segment {index}": cost for index, cost in enumerate(segments)}
        return costs | {"graph": sum(costs.values(), Cost())}

    def _segment(self, index: int, shape: Shape) -> Cost:
        manifest = self._manifest
        return segment_cost(
            self._weights[index],
            len(manifest.segments[index].layers),
            manifest.architecture,
            manifest.experts_per_token,
            shape,
            rows=shape.batch,
            cache_item_bytes=self._item_bytes,
        )


def _halved(weights: Weights) -> Weights:
    """fp32 weights that an engine has in fp16."""

    def half(pair: tuple[int, int]) -> tuple[int, int]:
        return pair[0] // 2, pair[1]

    return replace(
        weights,
        dense=half(weights.dense),
        experts=half(weights.experts),
        head=half(weights.head),
        row_bytes=weights.row_bytes // 2,
    )


def _measured(bench: Bench, point: PointSteps, counter: _Counter, depth: Depth, cuda: Any) -> Point:
    """A point with all that is known of its parts."""
    if not point.steps:
        return point.point()
    pipeline: Any = point.target.pipeline
    parts = pipeline.bound_parts(bench.cache(point), point.shape.tokens)
    bounds = counter.bounds(pipeline, parts, point.shape)
    inside = {} if point.target.cuda_graph else look_inside(
        parts, samples=INSIDE_SAMPLES, depth=depth, cuda=cuda
    )  # fmt: skip
    return point.point(inside=inside, bounds=bounds, backends=gate_backends(parts.gates))


def _subject(bundle: str, models: Sequence[Model], points: Sequence[Point]) -> Subject:
    model = models[0]
    manifest = model.bundle.manifest
    device = _device(model)
    backends = dict.fromkeys(
        part.backend for point in points for part in point.parts if part.backend
    )
    return Subject(
        bundle=bundle,
        fingerprint=manifest.fingerprint,
        model_type=manifest.model_type,
        precision=manifest.precision,
        layouts=tuple(each.layout for each in models),
        device="cpu" if device is None else f"{device.cuda.name} (sm_{device.cuda.capability})",
        backend="onnxruntime" if device is None else device.engine_set.backend,
        threads=None if device is not None else threads_of(model),
        memory=None if model.memory is None else _memory(model.memory, tuple(backends)),
    )


def _memory(pack: MemoryPack, backends: tuple[str, ...]) -> ProfiledMemory:
    return ProfiledMemory(
        path=str(pack.path),
        entries=pack.entries,
        gates=sum(gate.used for gate in pack.gates),
        variant=pack.variant,
        similarity=pack.similarity,
        neighbors=pack.neighbors,
        bytes=pack.bytes,
        backends=backends,
    )


def _resident(
    models: Sequence[Model], targets: Sequence[Target], grid: Grid, before: int | None
) -> Any:
    device = _device(models[0])
    half = device is not None and device.engine_set.precision == "float16"
    model = models[0].bundle.manifest.architecture
    item_bytes = 2 if half else 4
    largest = max((cache_bytes(model, s, item_bytes) for s in shapes(grid)), default=0)
    held: list[Any] = [memory_bytes(target.pipeline.layout) for target in targets]  # type: ignore[attr-defined]
    return account(
        weights=weight_bytes(models[0].bundle, len(models)),
        kv_cache=largest,
        retrieval=None if None in held else max(held, default=0),
        before=before,
        device=None if device is None else _device_bytes(device.cuda),
    )


def _device_bytes(cuda: Any) -> int:
    """Taken of the device by everybody, this process above all."""
    free, total = cuda.device.mem_info
    return int(total - free)


def _warnings(
    points: Sequence[Point],
    before: Mapping[str, Any],
    after: Mapping[str, Any],
    seconds: float,
    finished: bool,
) -> tuple[str, ...]:
    found = [] if finished else ["The measurement was interrupted: this is what it had until then."]
    cores = usable_cores() or os.cpu_count() or 1
    found += noise_warnings(before, after, seconds, cores)
    found += [f"Meanwhile {clause}." for clause in throttled(before, after)]
    if any(disturbed(point) for point in points):
        found.append(
            "Whole steps took much longer than their parts typically do: other programs had the "
            "cores. Measure again on a quiet machine."
        )
    else:
        worst = max((abs(unexplained(point)) for point in points), default=0.0)
        if worst > UNEXPLAINED:
            found.append(
                f"The medians of the parts miss the median step by up to {worst:.0%}: steps waited "
                "now in one part, now in another."
            )
    return tuple(found)
