"""Every host of the blend on the device against the reference, case by case.

A host is a function from a case to an answer. What is not there, or not built, is reported as
absent with the reason; a wrong answer, or an exception, as a failure with the case's seed and its
traceback. A host stops after `MOST_FAILURES`: what follows rarely says more.
"""

from __future__ import annotations

import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, fields
from itertools import islice
from typing import Any

import numpy as np
from gpu_cases import KEY_TYPES, TOLERANCE, Case, Errors, KeyType, check, every_case

from knnmoe.runtime.blend import Blended
from knnmoe.trt_plugins.cupy_prototype import CupyBlend, MemoryArrays

Run = Callable[[Case], Blended]
Records = dict[str, Any]
MOST_FAILURES = 5
POISONED_ID = -7


class Absent(Exception):  # noqa: N818 - not an error: a host that this machine lacks
    """A host that cannot run here; the text says what is missing."""


@dataclass(frozen=True)
class Host:
    """One way to run the blend."""

    name: str
    run: Run
    key_types: tuple[KeyType, ...] = KEY_TYPES


def check_host(
    host: Host,
    cases: Iterable[Case],
    deadline: float,
    *,
    clock: Callable[[], float] = time.monotonic,
) -> Records:
    """Run a host over cases until the deadline; at least over one."""
    count, worst, failures = 0, dict[str, Errors](), list[Records]()
    exhausted = True
    for case in cases:
        if case.key_type not in host.key_types:
            continue
        if count and clock() > deadline:
            exhausted = False
            break
        count += 1
        try:
            errors = check(case, host.run(case))
        except Absent as reason:
            return {"status": "absent", "why": str(reason)}
        except Exception as error:
            failures.append(
                {
                    "case": case.name,
                    "seed": case.seed,
                    "error": f"{type(error).__name__}: {error}"[:2000],
                    "traceback": traceback.format_exc()[-4000:],
                }
            )
            if len(failures) == MOST_FAILURES:
                break
            continue
        of_type = worst.setdefault(case.key_type, {})
        for name, deviation in errors.items():
            of_type[name] = max(of_type.get(name, 0.0), deviation)
    return {
        "status": "failed" if failures else "passed",
        "cases": count,
        "all_cases": exhausted,
        "tolerance": TOLERANCE,
        "largest_deviation": worst,
        "failures": failures,
    }


def memory_arrays(case: Case, **changed: Any) -> MemoryArrays:
    """The memory of a case as `CupyBlend` takes it."""
    arrays: dict[str, Any] = {
        "keys": case.keys,
        "key_scales": case.key_scales,
        "values": case.values,
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


def has_two_stages() -> bool:
    """Whether this CupyBlend can scan compressed keys and rescore."""
    return "scan_keys" in {field.name for field in fields(MemoryArrays)}


def hosts(cupy: Any) -> Iterator[Host]:
    """All hosts this checkout has; a host may still turn out to be absent on the machine."""
    yield cupy_host(cupy)
    yield graph_host(cupy)
    yield in_place_host(cupy)


def check_all(
    cupy: Any,
    seed: int,
    limits: Any,
    deadline: float,
    *,
    only_first_host: bool = False,
    most_cases: int | None = None,
    rounds: int = 1,
    save: Callable[[Records], None] = lambda records: None,
) -> Records:
    """Every host over a fresh set of cases; each has an equal share of the time that is left."""
    records: Records = {}
    chosen = list(hosts(cupy))[: 1 if only_first_host else None]
    for position, host in enumerate(chosen):
        now = time.monotonic()
        share = max(0.0, deadline - now) / (len(chosen) - position)
        records[host.name] = check_host(
            host, islice(every_case(seed, limits, rounds=rounds), most_cases), now + share
        )
        save(records)
    return records
