"""Every barrier of the kernels matters: without any one of them some schedule gives another result.

So a barrier that is missing would be seen by the other tests, and none is there for nothing.
"""

from __future__ import annotations

import ctypes
import re
from pathlib import Path

import numpy as np
import pytest
from blend_cases import Case
from emulated import SCHEDULES, build, store

from knnmoe.runtime.calibration import Calibration
from knnmoe.trt_plugins.plan import KERNELS, Device, KeyType
from memories import random_memory

BARRIER = re.compile(r"__sync(?:threads|warp)\(\);")
BARRIERS = [
    f"{file.name}:{line}"
    for file in sorted(KERNELS.glob("*.cuh"))
    for line, text in enumerate(file.read_text().splitlines(), 1)
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
            if file.suffix == ".cuh" and (barrier := BARRIER.search(text)):
                guarded = f"if (emulation::machine.left_out != {count}) {barrier[0]}"
                lines[i] = text.replace(barrier[0], guarded)
                count += 1
        Path(folder / file.name).write_text("".join(lines))
    assert count == len(BARRIERS)
    return build(folder, flags=("-O1",))


def small_cases() -> list[Case]:
    """One call of each path: one and several tokens, tensor cores, prefill."""
    cases = []
    paths: list[tuple[KeyType, int, str]] = [
        ("f32", 1, "cosine"), ("f16", 3, "rbf"), ("f16", 12, "cosine"), ("i8", 20, "cosine"),
    ]  # fmt: skip
    for key_type, tokens, similarity in paths:
        memory = random_memory(
            tokens, entries=250, hidden_size=300 if tokens == 1 else 32, k=40,
            similarity=similarity,  # type: ignore[arg-type]
            calibration=Calibration(sharpness=2.0, sequence=1.0, gamma=0.01),
        )  # fmt: skip
        rng = np.random.default_rng(tokens)
        cases.append(
            Case(
                store(memory, key_type, False), rng.normal(size=(tokens, memory.keys.shape[1])),
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
    return b"".join(array.tobytes() for array in arrays)


@pytest.mark.parametrize("barrier", range(len(BARRIERS)), ids=BARRIERS)
def test_a_barrier_left_out_is_noticed(numbered: ctypes.CDLL, barrier: int) -> None:
    prefill = BARRIERS[barrier].startswith("prefill")
    for case in reversed(small_cases()) if prefill else small_cases():
        numbered.knnmoe_leave_out(-1)
        right = outcome(case, numbered, "greedy", 0)
        for schedule in SCHEDULES:
            for seed in range(3 if schedule == "random" else 1):
                numbered.knnmoe_leave_out(barrier)
                if outcome(case, numbered, schedule, seed) != right:
                    return
    pytest.fail(f"no schedule needs the barrier at {BARRIERS[barrier]}")
