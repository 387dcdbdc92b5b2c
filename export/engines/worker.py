"""Builds TensorRT engines in a process of its own: `python -m knnmoe.export.engines.worker JOBS`.

TensorRT's builder ends the process where it meets what it does not expect, and takes all the memory
there is; neither should happen to the caller. JOBS is a JSON file; on standard output goes one JSON
object a line: {"event": "progress" | "built" | "failed", …}.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from knnmoe.runtime.engines.tensorrt import Messages, TensorRT, load_tensorrt
from knnmoe.runtime.errors import BackendError, KnnMoeError
from knnmoe.trt_plugins import library

PROGRESS_EVERY = 0.1  # seconds


def main(path: str) -> int:
    """Build every job of the file; 0 if all were built."""
    task = json.loads(Path(path).read_text())
    try:
        tensorrt = load_tensorrt(task["backend"])
        if task["plugin"]:
            library.load(tensorrt.module, Path(task["plugin"]))
        _check_capabilities(tensorrt, task["capabilities"])
    except KnnMoeError as error:
        _say("failed", name="", error=error.to_json())
        return 1
    messages = Messages(tensorrt)
    for job in task["jobs"]:
        started = time.perf_counter()
        problem, report = _build(tensorrt, messages, task, job)
        if problem is not None:
            _say("failed", name=job["name"], problem=problem, found=messages.last())
            return 1
        _say("built", name=job["name"], seconds=time.perf_counter() - started, **report)
    return 0


def _check_capabilities(tensorrt: TensorRT, capabilities: Sequence[str]) -> None:
    """Raise `BackendError` for a device that this TensorRT does not build for ahead."""
    known = getattr(tensorrt.module, "ComputeCapability", None)
    names = getattr(known, "__members__", {})
    there = tuple(name[2:] for name in names if name.startswith("SM") and name[2:].isdecimal())
    for capability in capabilities:
        if capability not in there:
            raise BackendError(
                tensorrt.flavor, f"does not build for compute capability {capability} ahead",
                expected=tuple(sorted(there, key=int)) or "no --sm", found=capability,
                fix="Build on the device itself: there --sm is left out.",
            )  # fmt: skip


def _build(
    tensorrt: TensorRT, messages: Messages, task: dict[str, Any], job: dict[str, Any]
) -> tuple[str | None, dict[str, Any]]:
    """What went wrong or None, and what was built."""
    trt = tensorrt.module
    builder = trt.Builder(messages.logger)
    # Strongly typed: the graph says which parts are fp16. Newer versions know nothing else.
    flag = getattr(trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED", None)
    network = builder.create_network(0 if flag is None else 1 << int(flag))
    parser = trt.OnnxParser(network, messages.logger)
    # The path tells the parser where the external weights are.
    if not parser.parse(Path(job["graph"]).read_bytes(), job["beside"]):
        errors = [parser.get_error(i) for i in range(parser.num_errors)]
        messages.lines.extend(f"{e.desc()} (node {e.node()})" for e in errors)
        return "TensorRT cannot read the graph", {}
    kinds = [network.get_layer(i).type for i in range(network.num_layers)]
    config = builder.create_builder_config()
    if task["workspace"] is not None:
        config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, task["workspace"])
    if job["profile"]:
        shapes = builder.create_optimization_profile()
        for name, (least, typical, most) in job["profile"].items():
            shapes.set_shape(name, least, typical, most)
        config.add_optimization_profile(shapes)
    if task["capabilities"]:
        config.num_compute_capabilities = len(task["capabilities"])
        for i, capability in enumerate(task["capabilities"]):
            config.set_compute_capability(getattr(trt.ComputeCapability, f"SM{capability}"), i)
    config.progress_monitor = _monitor(trt, job["name"])
    cache = _timing_cache(config, task["timing_cache"])
    plan = builder.build_serialized_network(network, config)
    if plan is None:
        return "TensorRT cannot build the engine", {}
    Path(job["output"]).write_bytes(plan)
    if cache is not None:
        _keep(Path(task["timing_cache"]), cache.serialize())
    return None, {
        "bytes": int(plan.nbytes),
        "layers": network.num_layers,
        "plugin_layers": kinds.count(trt.LayerType.PLUGIN_V3),
    }


def _timing_cache(config: Any, path: str | None) -> Any:
    """How long kernels took when they were last timed; None where TensorRT keeps no such record."""
    if path is None:
        return None
    file = Path(path)
    cache = config.create_timing_cache(file.read_bytes() if file.is_file() else b"")
    # One of another device is refused, and replaced by what this build measures.
    if not config.set_timing_cache(cache, False):
        cache = config.create_timing_cache(b"")
        config.set_timing_cache(cache, False)
    return cache


def _keep(file: Path, content: Any) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_name(f"{file.name}.{time.time_ns()}.partial")
    partial.write_bytes(content)
    partial.replace(file)


def _monitor(trt: Any, job: str) -> Any:
    """TensorRT's progress of one engine, as lines; only of the outermost phase."""

    class Monitor(trt.IProgressMonitor):  # type: ignore[misc] # a module known at run time
        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)
            self.steps: dict[str, int] = {}
            self.outer: str | None = None
            self.said = 0.0

        def phase_start(self, phase: str, parent: str | None, steps: int) -> None:
            self.steps[phase] = steps
            if parent is None:
                self.outer = phase
                _say("progress", name=job, phase=phase, step=0, steps=steps)

        def phase_finish(self, phase: str) -> None:
            if phase == self.outer:
                steps = self.steps[phase]
                _say("progress", name=job, phase=phase, step=steps, steps=steps)

        def step_complete(self, phase: str, step: int) -> bool:
            now = time.perf_counter()
            if phase == self.outer and now - self.said > PROGRESS_EVERY:
                self.said = now
                _say("progress", name=job, phase=phase, step=step, steps=self.steps[phase])
            return True

    return Monitor()


def _say(event: str, **content: Any) -> None:
    print(json.dumps({"event": event, **content}), flush=True)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
