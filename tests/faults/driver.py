"""Runs a scenario again and again, each time with a fault at another of its operations on files.

Started by the tests with `shim.c` preloaded; prints one JSON list. Each run is a fork, so that a
point costs some milliseconds. What is checked after each is said in `_examine`.
"""

from __future__ import annotations

import ctypes
import errno
import json
import os
import shutil
import sys
from pathlib import Path
from typing import Any

from scenarios import SCENARIOS, TARGET, Scenario

from knnmoe.runtime import atomic
from knnmoe.runtime.errors import KnnMoeError

MODES = {"count": 1, "kill": 2, "power": 3, "fail": 4, "full": 5}


def main(name: str, faults: list[tuple[str, str, int, int]], work: Path) -> list[dict[str, Any]]:
    """A scenario under some faults: for each the points tried, and what went wrong at which.

    Args:
        name: Of the scenario.
        faults: Mode, name of an error, first point, and every how manieth from there on.
        work: An empty directory.
    """
    scenario = SCENARIOS[name]
    atomic.STALE_AFTER_SECONDS = 0.0  # what a killed writer left is cleared away at once
    (work / "source").mkdir()
    scenario.prepare(work / "source")
    old = _fresh(scenario, work, "before")
    before = scenario.open(old / TARGET) if scenario.old else None
    whole = _fresh(scenario, work, "whole")
    scenario.write(work / "source", whole / TARGET)
    after = scenario.open(whole / TARGET)
    assert before != after, "old and new must differ"
    return [_try(scenario, work, before, after, *fault) for fault in faults]


def _try(
    scenario: Scenario,
    work: Path,
    before: object,
    after: object,
    mode: str,
    error: str,
    first: int,
    stride: int,
) -> dict[str, Any]:
    wrong: list[str] = []
    at, points = first, 0
    while True:
        place = _fresh(scenario, work, "here")
        found = _run(scenario, work, place, at, mode, getattr(errno, error, 0))
        points += 1
        problem = _examine(scenario, work, place, found, before, after, mode)
        if problem:
            wrong.append(f"at operation {at}: {problem}")
        shutil.rmtree(place)
        if not found["reached"]:  # once behind the last operation, for what was never flushed
            break
        at += stride
    return {"points": points, "wrong": wrong}


def _fresh(scenario: Scenario, work: Path, name: str) -> Path:
    place = work / name
    place.mkdir()
    if scenario.old is not None:
        scenario.old(work / "source", place / TARGET)
    return place


def _run(
    scenario: Scenario, work: Path, place: Path, at: int, mode: str, error: int
) -> dict[str, Any]:
    """One run in a child: how it ended, and whether it came to the operation."""
    shim = ctypes.CDLL(os.environ["LD_PRELOAD"])
    shim.fault_count.restype = ctypes.c_long
    reading, writing = os.pipe()
    child = os.fork()
    if not child:
        said: dict[str, Any] = {"ended": "done"}
        shim.fault_arm(os.fsencode(place), ctypes.c_long(at), MODES[mode], error)
        try:
            scenario.write(work / "source", place / TARGET)
        except KnnMoeError as stated:
            said = {"ended": "stated", "kind": type(stated).__name__, "text": str(stated)}
        except BaseException as other:
            said = {"ended": "other", "kind": type(other).__name__, "text": str(other)[:300]}
        said["reached"] = shim.fault_count() > at
        if mode == "power":
            shim.fault_lose()
        shim.fault_arm(b"", ctypes.c_long(0), 0, 0)
        os.write(writing, json.dumps(said).encode())
        os._exit(0)
    os.close(writing)
    with os.fdopen(reading) as stream:
        text = stream.read()
    status = os.waitpid(child, 0)[1]
    if os.WIFEXITED(status) and os.WEXITSTATUS(status) == 9:
        return {"ended": "killed", "reached": True}
    if not text:
        return {"ended": "other", "kind": "crash", "text": f"status {status}", "reached": True}
    return dict(json.loads(text))


def _examine(
    scenario: Scenario,
    work: Path,
    place: Path,
    found: dict[str, Any],
    before: object,
    after: object,
    mode: str,
) -> str | None:
    """What is not as it must be, if anything.

    The target is what it was, or the new one, whole, as its reader finds it. A failure is a stated
    one about the output, and leaves nothing beside the target but work that can be gone on with.
    Then the same command succeeds, and leaves nothing but the new target.
    """
    target = place / TARGET
    try:
        there = scenario.open(target) if target.exists() else None
    except (KnnMoeError, AssertionError, OSError, ValueError) as error:
        return f"neither the old nor the new one is there: {error}"
    if there != before and there != after:
        return "neither the old nor the new one is there"
    if found["ended"] == "done" and there != after:
        return "the command ended well, and the new one is not there"
    if found["ended"] == "other":
        return f"not a stated failure: {found['kind']}: {found['text']}"
    if found["ended"] == "stated":
        if found["kind"] != "OutputError" or str(place) not in found["text"]:
            return f"not a failure of the output: {found['kind']}: {found['text']}"
        if mode == "full" and "free" not in found["text"].lower():
            return f"says nothing of room: {found['text']}"
    if mode in ("fail", "full"):
        kept = {TARGET, *([f"{TARGET}.partial"] if scenario.keeps_work else [])}
        left = {entry.name for entry in place.iterdir()} - kept
        if mode == "full" and left:
            return f"left behind: {left}"
    try:
        scenario.write(work / "source", target)
    except KnnMoeError as error:
        return f"the same command does not go on: {error}"
    if scenario.open(target) != after:
        return "the same command then wrote something else"
    left = {entry.name for entry in place.iterdir()} - {TARGET}
    return f"left behind by the second run: {left}" if left else None


if __name__ == "__main__":
    print(json.dumps(main(sys.argv[1], json.loads(sys.argv[2]), Path(sys.argv[3]))))
