"""Sessions side by side under swaps: each token is what the session writes alone; nothing grows."""

from __future__ import annotations

import gc
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import soak
import soak_counts
from soak_replay import Replay

from knnmoe.runtime import MemoryPack


def run(tmp_path: Path, bundle: Path, pack: Path, seconds: float, sessions: int) -> soak.Report:
    memories = soak.memories_of(MemoryPack.open(pack))
    spool = tmp_path / "conversations.jsonl"
    return soak.soak(
        bundle, memories, spool, seconds=seconds, sessions=sessions, swap_every=0.03,
        rest_every=seconds / 20,
    )  # fmt: skip


def test_texts_under_swaps_are_what_each_session_writes_alone(
    tmp_path: Path, tiny_bundle: Path, tiny_pack: Path
) -> None:
    report = run(tmp_path, tiny_bundle, tiny_pack, 1.0, 6)
    assert report.problems == []
    assert report.swaps > 3
    assert report.swapped_texts > 0
    assert report.tokens == report.steps > 50
    assert report.rests >= 2
    # What was checked can fail: another token, another memory, and one that came too late.
    line = next(
        line
        for line in (tmp_path / "conversations.jsonl").read_text().splitlines()
        if json.loads(line)["calls"][0]["tokens"]
    )
    memories = soak.memories_of(MemoryPack.open(tiny_pack))
    replay = Replay(tiny_bundle, memories, [0] * (report.swaps + 2))
    for change in (wrong_token, late_memory):
        told = json.loads(line)
        change(told["calls"][0])
        assert replay.check(json.dumps(told)).problems


def wrong_token(call: dict) -> None:
    call["tokens"][0] ^= 1


def late_memory(call: dict) -> None:
    call["steps"][0][3] = call["steps"][0][2] + 1


def test_a_step_under_another_memory_than_it_says_is_noticed(
    tmp_path: Path, tiny_bundle: Path, tiny_pack: Path
) -> None:
    report = run(tmp_path, tiny_bundle, tiny_pack, 0.3, 2)
    pack = MemoryPack.open(tiny_pack)
    always = Replay(tiny_bundle, [pack.with_settings(variant="logits")], [0] * (report.swaps + 1))
    lines = (tmp_path / "conversations.jsonl").read_text().splitlines()
    assert any(always.check(line).problems for line in lines)


def test_a_thread_without_a_step_ends_the_run(
    tmp_path: Path, tiny_bundle: Path, tiny_pack: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stop: list[object] = []

    def hang(talker: soak.Talker, draw: object) -> None:
        stop.append(talker.stop.wait(20))

    monkeypatch.setattr(soak.Talker, "_converse", hang)
    with pytest.raises(soak.StuckError, match="no step"):
        soak.soak(
            tiny_bundle, soak.memories_of(MemoryPack.open(tiny_pack)), tmp_path / "spool",
            seconds=5, sessions=1, stuck_after=0.1,
        )  # fmt: skip


@pytest.mark.parametrize("count", ["used", "blocks"])
@pytest.mark.parametrize(("rate", "leaks"), [(0, False), (1 << 18, True)])
def test_growth_is_told_from_noise(rate: int, leaks: bool, count: str) -> None:
    still = soak_counts.Sample(0, 300 << 20, 300 << 20, 300 << 20, 9, 9, 1)
    samples = [
        replace(still, seconds=second, **{count: (300 << 20) + rate * second + (second % 5 << 18)})
        for second in range(100)
    ]
    assert (soak_counts.growth(samples, count) > soak.LEAST_GROWTH) == leaks


@pytest.mark.parametrize("size", [1 << 12, 100 << 20])  # in an arena, and mapped by themselves
def test_bytes_in_use_are_those_of_the_c_library(size: int) -> None:
    if soak_counts.used_bytes() is None:
        pytest.skip("not glibc")
    gc.collect()  # what earlier tests left must not be freed in between
    before = soak_counts.used_bytes() or 0
    held = [np.ones(size, np.uint8) for _ in range((100 << 20) // size)]
    assert (soak_counts.used_bytes() or 0) - before == pytest.approx(size * len(held), rel=0.1)


@pytest.mark.slow
def test_a_minute_of_two_dozen_sessions(tmp_path: Path, tiny_bundle: Path, tiny_pack: Path) -> None:
    report = run(tmp_path, tiny_bundle, tiny_pack, 60.0, 24)
    assert report.problems == []
    assert report.swapped_texts > 100
    assert report.rests >= 15
