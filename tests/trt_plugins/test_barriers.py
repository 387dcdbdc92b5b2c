"""Every barrier of the kernels matters: without any one of them some schedule gives another result.

So a barrier that is missing would be seen by the other tests, and none is there for nothing.
"""

from __future__ import annotations

import ctypes
import faulthandler
import hashlib
import os
import re
import warnings
from pathlib import Path

import numpy as np
import pytest
from blend_cases import Case, in_two_stages
from emulated import SCHEDULES, build, store

from knnmoe.runtime.calibration import Calibration
from knnmoe.trt_plugins.plan import KERNELS, SOURCE, Device, KeyType
from memories import random_memory

BARRIER = re.compile(r"__sync(?:threads|warp)\(\);")


def included(name: str) -> set[str]:
    """The headers beside a source that it includes, and theirs."""
    direct = set(re.findall(r'#include "(\w+\.cuh)"', (KERNELS / name).read_text()))
    return direct.union(*(included(header) for header in direct))


HEADERS = sorted(included(SOURCE.name))
BARRIERS = [
    f"{header}:{line}"
    for header in HEADERS
    for line, text in enumerate((KERNELS / header).read_text().splitlines(), 1)
    if BARRIER.search(text)
]


@pytest.fixture(scope="module")
def numbered(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    """The emulation of kernels whose barriers can be left out one at a time."""
    folder = tmp_path_factory.mktemp("numbered")
    count = 0
    for file in sorted(KERNELS.iterdir()):
        lines = file.read_text().splitlines(keepends=True)
        for i, text in enumerate(lines):
            if file.name in HEADERS and (barrier := BARRIER.search(text)):
                guarded = f"if (emulation::machine.left_out != {count}) {barrier[0]}"
                lines[i] = text.replace(barrier[0], guarded)
                count += 1
        Path(folder / file.name).write_text("".join(lines))
    assert count == len(BARRIERS)
    return build(folder, flags=("-O1",))


def small_cases() -> list[Case]:
    """One call of each path: one and several tokens, tensor cores, two stages, prefill."""
    cases = []
    paths: list[tuple[KeyType, int, str, int]] = [
        ("f32", 1, "cosine", 0), ("f16", 3, "rbf", 0), ("f16", 1, "cosine", 50),
        ("f32", 6, "rbf", 50), ("f16", 12, "cosine", 0), ("f16", 18, "cosine", 50),
        ("i8", 20, "cosine", 0),
    ]  # fmt: skip
    for key_type, tokens, similarity, candidates in paths:
        memory = random_memory(
            tokens, entries=250, hidden_size=300 if tokens == 1 else 32, k=40,
            similarity=similarity,  # type: ignore[arg-type]
            calibration=Calibration(sharpness=2.0, sequence=1.0, gamma=0.01),
        )  # fmt: skip
        rng = np.random.default_rng(tokens)
        stored = store(memory, key_type, False)
        cases.append(
            Case(
                in_two_stages(stored, candidates) if candidates else stored,
                rng.normal(size=(tokens, memory.keys.shape[1])),
                rng.normal(size=(tokens, 6)), np.zeros((1, 2)), np.array([tokens]),
                {"device": Device(2, 99 * 1024)},
            )
        )  # fmt: skip
    return cases


def outcome(case: Case, emulation: ctypes.CDLL, schedule: str, seed: int) -> bytes:
    try:
        got = case.run(emulation=emulation, schedule=schedule, seed=seed)
    except RuntimeError as error:
        return str(error).encode()
    arrays = (got.rows, got.confidence, got.neighbors, got.similarities, got.state)
    return hashlib.sha256(b"".join(array.tobytes() for array in arrays)).digest()


def outcome_in_child(case: Case, emulation: ctypes.CDLL, schedule: str, seed: int) -> bytes:
    """The same from a process of its own; nothing where it crashed.

    Without a barrier the numbers of entries may be garbage, and what they point to nobody's memory.
    """
    reader, writer = os.pipe()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of threads: the child touches none
        child = os.fork()
    if child == 0:
        faulthandler.disable()
        try:
            os.write(writer, outcome(case, emulation, schedule, seed))
        finally:
            os._exit(0)
    os.close(writer)
    with os.fdopen(reader, "rb") as pipe:
        got = pipe.read()
    os.waitpid(child, 0)
    return got


@pytest.mark.parametrize("barrier", range(len(BARRIERS)), ids=BARRIERS)
def test_a_barrier_left_out_is_noticed(numbered: ctypes.CDLL, barrier: int) -> None:
    prefill = BARRIERS[barrier].startswith("prefill")
    for case in reversed(small_cases()) if prefill else small_cases():
        numbered.knnmoe_leave_out(-1)
        right = outcome(case, numbered, "greedy", 0)
        for schedule in SCHEDULES:
            for seed in range(3 if schedule == "random" else 1):
                numbered.knnmoe_leave_out(barrier)
                if outcome_in_child(case, numbered, schedule, seed) != right:
                    return
    pytest.fail(f"no schedule needs the barrier at {BARRIERS[barrier]}")
