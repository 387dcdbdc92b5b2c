"""What happens inside of a gate, or of any graph of ONNX Runtime: stages and their times.

Looked at after the steps were timed, over the buffers of the last one, so that timing a step pays
nothing for it. A gate that consists of several calls tells of its laps; a graph is run once more in
a session of its own with ONNX Runtime's profiler, which adds about a microsecond an operator.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from time import perf_counter_ns
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from ..engines.base import BoundEngine
from ..engines.onnxruntime import OrtEngine
from ..gates.base import Gate, GateBuffers
from ..gates.numpy import NumpyGate
from ..gates.onnx import OnnxGate
from ..gates.scan import BLOCK
from ..gates.two_stage import TwoStageGate
from ..layouts import Parts
from .record import Samples

if TYPE_CHECKING:
    from ..device.cuda import Cuda

Depth = Literal["none", "gates", "all"]
Graph = Literal["gate", "retrieval", "segment"]
Stages = Mapping[str, Samples]
Event = Mapping[str, Any]

WARMUP = 2
FUNCTION = "KnnBlend"  # part of the names of its nodes once it is inlined
# Operators of segments by what they are for; the rest is `other`.
OPERATORS = {
    "GroupQueryAttention": "attention",
    "MoE": "experts",
    "QMoE": "experts",
    "MatMul": "projections",
    "FusedMatMul": "projections",
    "Gemm": "projections",
    "MatMulNBits": "projections",
}


def look_inside(
    parts: Parts, *, samples: int, depth: Depth = "gates", cuda: Cuda | None = None
) -> dict[str, Stages]:
    """Stages of the parts that can be looked into, by the name of the part.

    Args:
        parts: Of a step that has run: its buffers hold what entered each part.
        samples: How often each is run.
        depth: Gates alone, or segments and fused graphs too, whose weights are then loaded twice.
        cuda: The device that the parts run on, if they do.
    """
    if depth == "none":
        return {}
    found: dict[str, Stages] = {}
    graphs: dict[str, BoundEngine] = {}
    for name, bound in parts.gates.items():
        gate, buffers = bound.gate, bound.buffers
        if isinstance(gate, TwoStageGate):
            tokens, sequences = len(buffers.router_input), len(buffers.lengths)
            gate = gate.exact() if gate.searches_exactly(tokens, sequences) else gate
        if cuda is not None:
            if hasattr(gate, "stages"):
                found[name] = _events(gate, buffers, samples, cuda)
        elif isinstance(gate, OnnxGate):
            graphs[name] = gate.bound(buffers)
        elif isinstance(gate, NumpyGate):
            found[name] = _laps(gate, buffers, samples)
            if isinstance(gate, TwoStageGate) and "retrieve" in found[name]:
                found[name] = {**_retrieval(gate, buffers, samples), "rule": found[name]["rule"]}
    if depth == "all" and cuda is None:
        graphs |= parts.engines
    by_engine: dict[int, dict[str, BoundEngine]] = {}
    for name, graph in graphs.items():
        by_engine.setdefault(id(graph.engine), {})[name] = graph
    for same in by_engine.values():
        found |= _profiled(same, samples)
    return {name: found[name] for name in parts.names if name in found}


def _laps(gate: NumpyGate, buffers: GateBuffers, samples: int) -> Stages:
    laps: dict[str, float] = {}
    last = 0

    def lap(stage: str) -> None:
        nonlocal last
        now = perf_counter_ns()
        laps[stage] = laps.get(stage, 0.0) + (now - last) / 1e6
        last = now

    run = gate.watched(lap).bind(buffers)
    runs = []
    for _ in range(WARMUP + samples):
        laps.clear()
        last = perf_counter_ns()
        run()
        runs.append(dict(laps))
    return _transposed(runs[WARMUP:])


def _retrieval(gate: TwoStageGate, buffers: GateBuffers, samples: int) -> Stages:
    """Stages of the graph that retrieves and blends."""
    alone = gate.retrieval
    blended = np.zeros_like(buffers.router_logits)
    with TemporaryDirectory(prefix="knnmoe-profile-") as folder:
        twin = alone.make(profile=Path(folder) / "run")
        run = replace(alone, engine=twin).bind(buffers, blended, None)
        for _ in range(WARMUP + samples):
            run()
        runs = split_runs(json.loads(twin.end_profile().read_bytes()))
    kept = runs[WARMUP:]
    return _transposed([sum_stages(nodes, alone.entries, graph="retrieval") for nodes in kept])


def _events(gate: Any, buffers: GateBuffers, samples: int, cuda: Cuda) -> Stages:
    stages = gate.stages(buffers)
    runs = []
    with cuda.lock, cuda.current():
        for _ in range(WARMUP + samples):
            marks = [cuda.event()]
            for _, launch in stages:
                launch()
                marks.append(cuda.event())
            cuda.synchronize()
            times: dict[str, float] = {}
            for (stage, _), start, end in zip(stages, marks, marks[1:], strict=False):
                times[stage] = times.get(stage, 0.0) + cuda.elapsed_ms(start, end)
            runs.append(times)
    return _transposed(runs[WARMUP:])


def _profiled(graphs: Mapping[str, BoundEngine], samples: int) -> dict[str, Stages]:
    """Graphs that one engine runs, run again in a session that notes every operator's time."""
    engine = next(iter(graphs.values())).engine
    if not isinstance(engine, OrtEngine) or engine.file is None:
        return {}
    with TemporaryDirectory(prefix="knnmoe-profile-") as folder:
        twin = OrtEngine(engine.file, threads=engine.threads, profile=Path(folder) / "run")
        for graph in graphs.values():
            run = twin.bind(graph.inputs, graph.outputs)
            for _ in range(WARMUP + samples):
                run()
        runs = split_runs(json.loads(twin.end_profile().read_bytes()))
    found = {}
    for index, (name, graph) in enumerate(graphs.items()):
        start = index * (WARMUP + samples) + WARMUP
        mine = runs[start : start + samples]
        entries = len(graph.inputs["keys"]) if "keys" in graph.inputs else 0
        kind: Graph = "gate" if "router_logits" in graph.inputs else "segment"
        found[name] = _transposed([sum_stages(run, entries, graph=kind) for run in mine])
    return found


def split_runs(events: Iterable[Event]) -> list[list[Event]]:
    """The operators of each run in a file of ONNX Runtime's profiler, in order."""
    kept = list(events)
    runs = sorted(
        (event for event in kept if event["name"] == "model_run"), key=lambda event: event["ts"]
    )
    nodes = [e for e in kept if e["cat"] == "Node" and e["name"].endswith("_kernel_time")]
    return [
        [node for node in nodes if run["ts"] <= node["ts"] < run["ts"] + run["dur"]] for run in runs
    ]


def sum_stages(nodes: Iterable[Event], entries: int, *, graph: Graph) -> dict[str, float]:
    """Milliseconds of each stage of one run.

    Args:
        nodes: Of `split_runs`.
        entries: N of the memory, by which what is done to every entry is known.
        graph: What it is of: a gate, whose operators outside of the blend are its rule; retrieval
            and blend alone; or a segment, perhaps with the blends of gates inside.
    """
    times: dict[str, float] = {}
    for node in nodes:
        stage = _stage(node, entries, graph)
        times[stage] = times.get(stage, 0.0) + node["dur"] / 1e3
    return times


def _stage(node: Event, entries: int, graph: Graph) -> str:
    operator = node["args"].get("op_name", "")
    if graph != "retrieval" and FUNCTION not in node["name"]:
        return "rule" if graph == "gate" else OPERATORS.get(operator, "other")
    if operator == "TopK":
        return "select"
    if (operator == "Gemm" and graph != "retrieval") or _covers(node, entries, graph):
        return "scan"
    return "gather" if operator == "Gather" else "blend"


def _covers(node: Event, entries: int, graph: Graph) -> bool:
    """Whether an operator writes something of every entry: along a dimension, or, where retrieval
    looks at them in blocks, along two.
    """
    outputs = node["args"].get("output_type_shape", [])
    sizes = [shape for output in outputs for shape in output.values()]
    if graph == "retrieval":
        if node["args"].get("op_name") == "ReduceMax":  # of blocks
            return any(shape[-1] * BLOCK >= entries for shape in sizes if shape)
        return any(_scores(shape) >= entries for shape in sizes)
    return entries > 0 and any(max(shape, default=0) >= entries for shape in sizes)


def _scores(shape: Sequence[int]) -> int:
    """Of how many entries an output [T, N] or [T, N / BLOCK, BLOCK] tells, if it is such a one."""
    if len(shape) == 3 and shape[-1] == BLOCK:
        return shape[1] * BLOCK
    return shape[-1] if len(shape) == 2 else 0


def _transposed(runs: list[dict[str, float]]) -> Stages:
    names = dict.fromkeys(name for run in runs for name in run)
    return {name: tuple(round(run.get(name, 0.0), 6) for run in runs) for name in names}


def gate_backends(gates: Mapping[str, Any]) -> dict[str, str]:
    """The backends of gates by the names of their parts."""
    named: dict[str, Gate] = {name: bound.gate for name, bound in gates.items()}
    return {name: gate.backend for name, gate in named.items()}
