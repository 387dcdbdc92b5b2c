"""Every host of the blend on the device against the reference, case by case.

A host is a function from a case to an answer. What is not there, or not built, is reported as
absent with the reason; a wrong answer, or an exception, as a failure with the case's seed and its
traceback. A host stops after `MOST_FAILURES`: what follows rarely says more.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import Any

import numpy as np
from gpu_cases import KEY_TYPES, TOLERANCE, Case, KeyType, check, every_case, in_two_stages
from gpu_steps import check_steps
from gpu_tally import Check, Errors, Records, tally

from knnmoe.runtime.blend import Blended
from knnmoe.trt_plugins.cupy_prototype import CupyBlend, MemoryArrays
from knnmoe.trt_plugins.plan import MAX_NEIGHBORS

Run = Callable[[Case], Blended]
POISONED_ID = -7


@dataclass(frozen=True)
class Host:
    """One way to run the blend."""

    name: str
    run: Run
    key_types: tuple[KeyType, ...] = KEY_TYPES
    adapted: Callable[[Case], Case] = lambda case: case  # to what this host takes


def check_host(host: Host, cases: Iterable[Case], deadline: float) -> Records:
    """Run a host over cases until the deadline; at least over one."""

    def checks() -> Iterator[Check]:
        for drawn in cases:
            if drawn.key_type in host.key_types:
                case = host.adapted(drawn)
                yield Check(case.name, case.seed, case.key_type, partial(run, case))

    def run(case: Case) -> Errors:
        return check(case, host.run(case))

    return {**tally(checks(), deadline), "tolerance": TOLERANCE}


def memory_arrays(case: Case, **changed: Any) -> MemoryArrays:
    """The memory of a case as `CupyBlend` takes it."""
    arrays: dict[str, Any] = {
        "keys": case.keys,
        "key_scales": case.key_scales,
        "values": case.values,
        "evidence_weights": case.memory.evidence_weights,
        "center": case.memory.center,
        "calibration": case.memory.calibration.vector(),
        "n_valid": case.memory.n_valid,
        "k": case.memory.k,
        "similarity": case.memory.similarity,
    }
    return MemoryArrays(**(arrays | changed))


def answer(cupy: Any, bound: Any) -> Blended:
    """What a bound call has written, on the host."""
    outputs = (bound.rows, bound.confidence, bound.neighbors, bound.similarities, bound.state)
    return Blended(*(cupy.asnumpy(output) for output in outputs))


def poison(bound: Any) -> None:
    """Fill all outputs with what no right answer holds."""
    for output in (bound.rows, bound.confidence, bound.similarities, bound.state):
        output.fill(np.nan)
    bound.neighbors.fill(POISONED_ID)


def cupy_host(cupy: Any) -> Host:
    """CupyBlend as it is called; outputs and scratch memory are poisoned before."""

    def run(case: Case) -> Blended:
        blend = CupyBlend(
            memory_arrays(case),
            max_tokens=len(case.x),
            max_neighbors=case.max_neighbors,
            cupy=cupy,
        )
        bound = blend.bind(case.x, case.r, case.state, case.lengths)
        blend.workspace.fill(0xFF)
        poison(bound)
        bound.run()
        return answer(cupy, bound)

    return Host("CupyBlend", run)


def graph_host(cupy: Any) -> Host:
    """CupyBlend captured over other inputs, replayed three times, the last time over the case's."""

    def run(case: Case) -> Blended:
        stream = cupy.cuda.Stream(non_blocking=True)
        with stream:
            blend = CupyBlend(memory_arrays(case), max_tokens=len(case.x), cupy=cupy)
            inputs = [cupy.asarray(a) for a in (-case.x, -case.r, case.state + 1, case.lengths * 0)]
            bound = blend.bind(*inputs)
            bound.run()  # loads the kernels, which a capture may not
            stream.synchronize()
            stream.begin_capture()
            bound.run()
            graph = stream.end_capture()
            graph.launch(stream)
            poison(bound)
            graph.launch(stream)
            stream.synchronize()
            for resident, array in zip(
                inputs, (case.x, case.r, case.state, case.lengths), strict=True
            ):
                resident[...] = cupy.asarray(array)
            poison(bound)
            graph.launch(stream)
            stream.synchronize()
            return answer(cupy, bound)

    return Host("CupyBlend, CUDA graph", run)


def in_place_host(cupy: Any) -> Host:
    """CupyBlend that writes its rows and state over those it reads."""

    def run(case: Case) -> Blended:
        blend = CupyBlend(memory_arrays(case), max_tokens=len(case.x), cupy=cupy)
        r, state = cupy.asarray(case.r), cupy.asarray(case.state)
        bound = blend.bind(case.x, r, state, case.lengths, rows=r, state_out=state)
        bound.run()
        return answer(cupy, bound)

    return Host("CupyBlend, in place", run)


def two_stage_host(cupy: Any) -> Host:
    """CupyBlend that scans int8 keys and scores the candidates again with the keys."""

    def run(case: Case) -> Blended:
        assert case.scan is not None
        memory = memory_arrays(
            case,
            scan_keys=case.scan.keys,
            scan_scales=case.scan.scales,
            candidates=case.candidates,
        )
        blend = CupyBlend(
            memory, max_tokens=len(case.x), max_neighbors=case.max_neighbors, cupy=cupy
        )
        bound = blend.bind(case.x, case.r, case.state, case.lengths)
        blend.workspace.fill(0xFF)
        poison(bound)
        bound.run()
        return answer(cupy, bound)

    return Host("CupyBlend, two stages", run, ("f16", "f32"), in_two_stages)


def hosts(cupy: Any) -> Iterator[Host]:
    """All hosts through CuPy."""
    yield cupy_host(cupy)
    yield graph_host(cupy)
    yield in_place_host(cupy)
    yield two_stage_host(cupy)


INPUTS = (
    "x", "r", "keys", "key_scales", "values", "evidence_weights", "n_valid", "k", "center",
    "calibration", "state", "lengths",
)  # fmt: skip
OUTPUTS = ("rows", "state_out", "confidence", "neighbors", "similarities")


def node_inputs(case: Case) -> dict[str, Any]:
    """The inputs of the blend node, in its order."""
    memory = case.memory
    values = (
        case.x, case.r, case.keys, case.key_scales, case.values,
        memory.entry_evidence(), np.array([memory.n_valid], np.int64),
        np.array([memory.k], np.int64), memory.center,
        memory.calibration.vector(), case.state, case.lengths.astype(np.int64),
    )  # fmt: skip
    return dict(zip(INPUTS, values, strict=True))


def node_outputs(cupy: Any, case: Case, max_neighbors: int = MAX_NEIGHBORS) -> dict[str, Any]:
    """The outputs of the blend node as the plugin gives them, poisoned."""
    tokens, columns = len(case.x), min(max_neighbors, len(case.keys))
    values = (
        cupy.full(case.r.shape, np.nan, np.float32),
        cupy.full(case.state.shape, np.nan, np.float32),
        cupy.full((tokens,), np.nan, np.float32),
        cupy.full((tokens, columns), POISONED_ID, np.int64),
        cupy.full((tokens, columns), np.nan, np.float32),
    )
    return dict(zip(OUTPUTS, values, strict=True))


def node_answer(cupy: Any, outputs: dict[str, Any]) -> Blended:
    """What the node has written, on the host."""
    host = {name: cupy.asnumpy(array) for name, array in outputs.items()}
    return Blended(
        host["rows"], host["confidence"], host["neighbors"], host["similarities"],
        host["state_out"],
    )  # fmt: skip


def check_all(
    cupy: Any,
    seed: int,
    limits: Any,
    deadline: float,
    *,
    most_cases: int | None = None,
    rounds: int = 1,
    save: Callable[[Records], None] = lambda records: None,
) -> Records:
    """Every host over a fresh set of cases; each has an equal share of the time that is left."""

    def of_host(host: Host) -> Callable[[float], Records]:
        drawn = every_case(seed, limits, rounds=rounds)
        cases = (case for case in drawn if case.key_type in host.key_types)
        return lambda until: check_host(host, islice(cases, most_cases), until)

    checks = {host.name: of_host(host) for host in hosts(cupy)}
    checks["StepKernels"] = lambda until: check_steps(cupy, seed, until, most_cases=most_cases)
    records: Records = {}
    for position, (name, run) in enumerate(checks.items()):
        now = time.monotonic()
        share = max(0.0, deadline - now) / (len(checks) - position)
        records[name] = run(now + share)
        save(records)
    return records
