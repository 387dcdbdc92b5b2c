"""bundle → engine set."""

from __future__ import annotations

import hashlib
import json
import platform
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.numpy_helper

from knnmoe import __version__
from knnmoe.runtime.atomic import (
    check_free_space,
    check_replaceable,
    new_directory,
    remove_stale,
)
from knnmoe.runtime.bundle import Bundle, describe_file
from knnmoe.runtime.engines.engine_set import EngineSet, bundle_hash, cache_folder
from knnmoe.runtime.engines.tensorrt import load_tensorrt
from knnmoe.runtime.errors import BackendError, EngineError
from knnmoe.runtime.probes import ask_driver
from knnmoe.trt_plugins import library

from ..graph import KNNMOE
from ..lowering.std_weights import stored_weights
from ..signed_codes import SignedCodes, signed_codes, write_signed
from ..std import StdGraph, StdModel, StdOptions
from .process import Progress, run_worker
from .settings import BuildSettings, Range, dimension_ranges, profile, without_gate

_KEY_TYPES = {
    "float32": onnx.TensorProto.FLOAT,
    "float16": onnx.TensorProto.FLOAT16,
    "int8": onnx.TensorProto.INT8,
}


@dataclass(frozen=True)
class BuiltEngine:
    """One engine of a report; `seconds` is None where it was there already."""

    name: str
    file: str
    bytes: int
    plugin_layers: int
    seconds: float | None


@dataclass(frozen=True)
class BuildReport:
    """What a build did.

    Attributes:
        engine_set: The engine set.
        engines: Its engines, in the order of a step.
        cached: Whether it was there already, so that nothing was built.
        seconds: How long it took.
        notes: What a user should know about it.
    """

    engine_set: EngineSet
    engines: tuple[BuiltEngine, ...]
    cached: bool
    seconds: float
    notes: tuple[str, ...]

    @property
    def plugin_layers(self) -> int:
        """Layers of all engines that are the plugin."""
        return sum(engine.plugin_layers for engine in self.engines)


@dataclass(frozen=True)
class _Job:
    """One engine to build."""

    name: str
    phase: str  # "gate" for a gate graph, which serves both phases
    graph: StdGraph
    ranges: Mapping[str, Range]

    def file(self, extension: str) -> str:
        return f"{self.name}.{extension}"


@dataclass(frozen=True)
class _Target:
    """What builds, and for which devices; `driver` only for engines of this very one."""

    version: str
    capabilities: tuple[str, ...]
    driver: str


@dataclass(frozen=True)
class _Task:
    """What stays the same whatever the graphs are made of."""

    bundle: Bundle
    target: _Target
    plugin: Path | None
    output: Path | None
    overwrite: bool
    progress: Progress


def build(
    bundle: Bundle,
    settings: BuildSettings,
    *,
    output: Path | None = None,
    plugin: Path | None = None,
    overwrite: bool = False,
    progress: Progress = lambda *_: None,
) -> BuildReport:
    """Build the engines of a bundle, unless they are there already.

    Args:
        bundle: What to build of.
        settings: What to build.
        output: The directory to create; in the user's cache if not given.
        plugin: The plugin library to build with; `find_library` decides if not given.
        overwrite: Replace an engine set that is at `output`.
        progress: Called as TensorRT goes on.

    Raises:
        SettingError: If a setting is unknown or out of its range.
        BackendError: If TensorRT, a device or a required plugin is missing.
        EngineError: If TensorRT refuses a graph or ends; nothing is left behind then.
        OutputError: If the directory cannot be written.
    """
    started = time.perf_counter()
    settings.check(bundle.manifest.architecture)
    target = _target(settings)
    chosen, notes = _choose_plugin(settings, plugin)
    if chosen is None:
        settings = replace(settings, keys="float32")  # the function has no others
    in_blocks = bundle.manifest.quantization is not None
    fitting = settings.for_target(target.capabilities, target.version, in_blocks=in_blocks)
    if fitting.experts == "moe":
        moe = "The experts run in TensorRT's MoE layer; --experts gathered does without."
        notes = (*notes, moe)
    task = _Task(bundle, target, chosen, output, overwrite, progress)
    try:
        built = _build_once(task, fitting)
    except EngineError as error:
        if settings.experts != "auto" or fitting.experts != "moe":
            raise
        # That layer is the newest thing here; what has none of it is known to build.
        built = _build_once(task, settings)
        notes = (*notes[:-1], f"TensorRT did not build its MoE layer ({error.found}).")
    engines, seconds = built
    if chosen is not None and not any(engines.plugin_layers.values()):
        notes = (*notes, "TensorRT took the ONNX function and not the plugin.")
    elapsed = time.perf_counter() - started
    listed = _listed(engines, seconds or {})
    return BuildReport(engines, listed, seconds is None, elapsed, notes)


def _build_once(
    task: _Task, settings: BuildSettings
) -> tuple[EngineSet, Mapping[str, float] | None]:
    """The engine set, and the seconds that each file took; None where the set was there already."""
    bundle = task.bundle
    jobs = _jobs(bundle, settings, with_plugin=task.plugin is not None)
    engines = _stated(task, settings)
    engines = replace(engines, key=_key(engines, settings, jobs))
    place, overwrite = task.output, task.overwrite
    if place is None:
        place, overwrite = cache_folder() / engines.key[:16], True
        place.parent.mkdir(parents=True, exist_ok=True)
    remove_stale(place.absolute())
    there = _already_there(place, bundle, engines.key)
    if there is not None:
        return there, None
    check_replaceable(place.absolute(), overwrite=overwrite)
    extension = "onnx" if settings.backend == "onnxruntime" else "engine"
    files = {job.file(extension): job for job in jobs}
    with new_directory(place, overwrite=overwrite) as directory:
        built = _build_jobs(task, settings, jobs, directory)
        engines = replace(
            engines,
            path=directory,
            phases={
                phase: tuple(name for name, job in files.items() if job.phase == phase)
                for phase in settings.phases
            },
            gates={
                job.name.removeprefix("gate-"): name
                for name, job in files.items()
                if job.phase == "gate"
            },
            plugin_layers={name: built[job.name]["plugin_layers"] for name, job in files.items()},
            files={name: describe_file(directory / name) for name in files},
        )
        engines.write()
    return replace(engines, path=place), {n: built[job.name]["seconds"] for n, job in files.items()}


def _stated(task: _Task, settings: BuildSettings) -> EngineSet:
    """What is known of a set before it is built."""
    return EngineSet(
        path=Path(),
        key="",
        backend=settings.backend,
        backend_version=task.target.version,
        bundle=bundle_hash(task.bundle),
        layout=settings.layout,
        precision=settings.precision,
        keys=settings.keys,
        neighbors=settings.neighbors if task.plugin is None and _fixes_k(settings) else None,
        operators=settings.operators,
        capabilities=task.target.capabilities,
        driver=task.target.driver,
        plugin=None if task.plugin is None else describe_file(task.plugin).sha256,
        limits=settings.limits,
        phases={},
        gates={},
        plugin_layers={},
        files={},
        producer={"knnmoe": __version__, "onnx": onnx.__version__, "machine": platform.machine()},
    )


def _listed(engines: EngineSet, seconds: Mapping[str, float]) -> tuple[BuiltEngine, ...]:
    return tuple(
        BuiltEngine(
            name=file.rsplit(".", 1)[0],
            file=file,
            bytes=spec.size,
            plugin_layers=engines.plugin_layers[file],
            seconds=seconds.get(file),
        )
        for file, spec in engines.files.items()
    )


def _backend_version(settings: BuildSettings) -> str:
    if settings.backend == "onnxruntime":
        import onnxruntime

        return str(onnxruntime.__version__)
    return load_tensorrt(settings.backend).version


def _target(settings: BuildSettings) -> _Target:
    version = _backend_version(settings)
    if settings.backend == "onnxruntime":
        return _Target(version, (), "")
    if settings.capabilities:
        return _Target(version, tuple(sorted(set(settings.capabilities), key=int)), "")
    driver = ask_driver()
    if not driver.devices:
        ahead = (
            " Or name what to build for, as --sm 86."
            if settings.backend == "tensorrt_rtx"
            else " Or build ahead with --backend tensorrt_rtx --sm 86."
        )
        raise BackendError(
            settings.backend, "there is no CUDA device to build for", found=driver.error,
            fix=f"Build on the target.{ahead}",
        )  # fmt: skip
    capability = driver.devices[0].compute_capability.replace(".", "")
    return _Target(version, (capability,), ".".join(map(str, driver.cuda or ())))


def _choose_plugin(
    settings: BuildSettings, named: Path | None
) -> tuple[Path | None, tuple[str, ...]]:
    """The plugin library to build with, and what to say about it."""
    if settings.backend == "onnxruntime":
        return None, ()
    found = named
    if found is None and settings.plugin != "none":
        try:
            found = library.find_library()
        except BackendError:
            if settings.plugin == "require":
                raise
    if found is None:
        note = (
            f"Built without the plugin: TensorRT runs the gates' ONNX function, with K = "
            f"{settings.neighbors}. `knnmoe plugin build` makes the plugin."
            if settings.layout == "fused"
            else "Built without the plugin: there are no gate engines, and the model runs its "
            "gates through CuPy."
        )
        return None, (note,)
    if not found.is_file():
        raise BackendError(found, "no such plugin library", fix="Build it: `knnmoe plugin build`.")
    return found, ()


def _jobs(bundle: Bundle, settings: BuildSettings, *, with_plugin: bool) -> list[_Job]:
    jobs = []
    for phase in settings.phases:
        options = StdOptions(
            operators=settings.operators,  # type: ignore[arg-type] # checked
            precision=settings.precision,  # type: ignore[arg-type] # checked
            experts=settings.experts_of(phase),
            capacity=settings.limits.context if settings.operators == "modern" else None,
            host="onnxruntime" if settings.backend == "onnxruntime" else "tensorrt",
        )
        model = StdModel.of(bundle, options)
        ranges = dimension_ranges(settings.limits, phase)
        if settings.layout == "fused":
            graph = _fitted(model.fused(), settings, with_plugin=with_plugin)
            jobs.append(_Job(f"{phase}-fused", phase, graph, ranges))
            continue
        jobs.extend(
            _Job(f"{phase}-{index:02d}", phase, model.segment(index), ranges)
            for index in range(len(bundle.manifest.segments))
        )
    if settings.layout == "split" and with_plugin:
        for name in bundle.manifest.gates:
            graph = _fitted(model.gate(name), settings, with_plugin=True)
            jobs.append(_Job(f"gate-{name}", "gate", graph, ranges))
    return jobs


def _fixes_k(settings: BuildSettings) -> bool:
    """Whether the backend wants to know K before an engine runs."""
    return settings.backend != "onnxruntime"


def _fitted(graph: StdGraph, settings: BuildSettings, *, with_plugin: bool) -> StdGraph:
    """A graph with gates in it, for the plugin or for the function that does without.

    The plugin takes keys of several types. The function does not, and TensorRT wants to know on the
    host how many neighbours it looks for: K is written into the graph.
    """
    model = onnx.load_model_from_string(graph.content)
    inputs = {value.name: value for value in model.graph.input}
    gone = set()
    for name, value in inputs.items():
        stem = without_gate(name)
        if with_plugin and stem == "keys":
            value.type.tensor_type.elem_type = _KEY_TYPES[settings.keys]
        elif not with_plugin and stem == "k" and _fixes_k(settings):
            gone.add(name)
            fixed = np.array([settings.neighbors], np.int64)
            model.graph.initializer.append(onnx.numpy_helper.from_array(fixed, name))
            model.graph.input.remove(value)
    if with_plugin:  # what the function says of fp32 keys would be wrong of others
        kept = [function for function in model.functions if function.domain != KNNMOE]
        del model.functions[:]
        model.functions.extend(kept)
    left = tuple(spec for spec in graph.inputs if spec.name not in gone)
    return replace(graph, content=model.SerializeToString(), inputs=left)


def _key(engines: EngineSet, settings: BuildSettings, jobs: Sequence[_Job]) -> str:
    """sha256 of all that the engines depend on."""
    stated = {
        name: value
        for name, value in asdict(engines).items()
        if name not in ("path", "key", "phases", "gates", "plugin_layers", "files")
    }
    digest = hashlib.sha256(json.dumps([stated, settings.workspace], sort_keys=True).encode())
    for job in jobs:
        digest.update(json.dumps([job.name, profile(job.graph.inputs, job.ranges)]).encode())
        digest.update(hashlib.sha256(job.graph.content).digest())
    return digest.hexdigest()


def _already_there(target: Path, bundle: Bundle, key: str) -> EngineSet | None:
    if not target.is_dir():
        return None
    try:
        found = EngineSet.open(target, bundle)
    except EngineError:  # something else, or damaged: built anew where it may be replaced
        return None
    return found if found.key == key else None


def _build_jobs(
    task: _Task, settings: BuildSettings, jobs: Sequence[_Job], directory: Path
) -> dict[str, dict[str, Any]]:
    """Write the engine of every job into the directory; what was built, by job."""
    if settings.backend == "onnxruntime":
        for job in jobs:
            (directory / job.file("onnx")).write_bytes(job.graph.content)
        return {job.name: {"plugin_layers": 0, "seconds": 0.0} for job in jobs}
    with (
        tempfile.TemporaryDirectory(prefix="knnmoe-") as name,
        tempfile.TemporaryDirectory(dir=directory) as beside,
    ):
        temporary, weights = Path(name), task.bundle.path.absolute() / "segments"
        codes = signed_codes(job.graph.content for job in jobs)
        if codes:
            weights = _with_signed(task, codes, Path(beside))
        listed = []
        for job in jobs:
            graph = temporary / job.file("onnx")
            graph.write_bytes(job.graph.content)
            listed.append({
                "name": job.name,
                "graph": str(graph),
                "beside": str(weights / "graph.onnx"),
                "output": str(directory.absolute() / job.file("engine")),
                "profile": profile(job.graph.inputs, job.ranges),
            })  # fmt: skip
        content = {
            "backend": settings.backend,
            "plugin": None if task.plugin is None else str(task.plugin.absolute()),
            "capabilities": settings.capabilities,
            "workspace": settings.workspace,
            "timing_cache": _timing_cache(settings, task.target),
            "jobs": listed,
        }
        file = temporary / "jobs.json"
        file.write_text(json.dumps(content))
        return run_worker(file, settings.backend, temporary, task.progress)


def _with_signed(task: _Task, codes: Sequence[SignedCodes], folder: Path) -> Path:
    """Fill a folder with links to the bundle's weights, and signed codes beside them."""
    source, stored = task.bundle.path.absolute() / "segments", stored_weights(task.bundle)
    total = sum(stored[each.name].length for each in codes)
    check_free_space(folder, total)
    for location in {tensor.location for tensor in stored.values()}:
        (folder / location).parent.mkdir(exist_ok=True)  # of linked files
        (folder / location).symlink_to(source / location)
    done = 0

    def count(written: int) -> None:
        nonlocal done
        done += written
        task.progress("weights", "signed codes", done, total)

    write_signed(codes, stored, source, folder, count)
    return folder


def _timing_cache(settings: BuildSettings, target: _Target) -> str | None:
    """Where the builder's timings are kept; building ahead measures nothing."""
    if settings.backend != "tensorrt":
        return None
    name = f"tensorrt-{target.version}-sm{target.capabilities[0]}-{target.driver}.cache"
    return str(cache_folder() / "timing" / name)
