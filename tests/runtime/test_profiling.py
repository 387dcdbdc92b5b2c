"""The arithmetic of a profile, with a clock that says what it is told."""

from __future__ import annotations

import io
import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from datetime import datetime
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from rich.console import Console

from fake_pipeline import FakeCache
from knnmoe.runtime.errors import SettingError
from knnmoe.runtime.layouts import StepTimes
from knnmoe.runtime.profiling.environment import environment
from knnmoe.runtime.profiling.figures import disturbed, gate_share, summed, typical_ms, unexplained
from knnmoe.runtime.profiling.intervals import median, percentiles
from knnmoe.runtime.profiling.measure import Bench, Target, points_of, ticks
from knnmoe.runtime.profiling.noise import noise_warnings, spin
from knnmoe.runtime.profiling.plan import Shape, fit_grid, memory_sizes, rounds, visits
from knnmoe.runtime.profiling.record import Grid, Part, Point, from_json
from knnmoe.runtime.profiling.report import print_record
from profiles import synthetic_record

MS = 1_000_000  # nanoseconds
PARTS = {"segment 0": 2.0, "gate 0": 0.5, "segment 1": 1.0}
AROUND = 0.25  # milliseconds that a step takes beside its parts


@dataclass
class Clock:
    """Nanoseconds that pass only when a step says so."""

    now: int = 0

    def __call__(self) -> int:
        return self.now


@dataclass
class Recorder:
    """A pipeline that notes each step: (name, way, tokens before, tokens of the step)."""

    name: str
    clock: Clock
    calls: list[tuple[str, str, int, int]]
    parts: Mapping[str, float] = field(default_factory=lambda: PARTS)
    device: bool = False
    interrupt_at: int | None = None
    vocab_size: int = 1000
    max_positions: int = 40
    seen: list[list[list[int]]] = field(default_factory=list)

    def new_cache(self, batch: int, capacity: int) -> FakeCache:
        return FakeCache(capacity, np.zeros(batch, np.int64))

    def _advance(self, way: str, cache: FakeCache, ids: NDArray[np.int64]) -> None:
        self.calls.append((self.name, way, int(cache.lengths[0]), ids.shape[1]))
        if way == "timed":
            self.seen.append(ids.tolist())
        cache.lengths += ids.shape[1]
        assert cache.lengths[0] <= cache.capacity <= self.max_positions

    def step(self, cache: FakeCache, input_ids: NDArray[np.int64]) -> NDArray[np.float32]:
        self._advance("step", cache, input_ids)
        return np.zeros((1, self.vocab_size), np.float32)

    def timed_step(self, cache: FakeCache, input_ids: NDArray[np.int64]) -> StepTimes:
        if self.interrupt_at is not None and len(self.calls) >= self.interrupt_at:
            raise KeyboardInterrupt
        self._advance("timed", cache, input_ids)
        times = dict(self.parts)
        self.clock.now += round((sum(times.values()) + AROUND) * MS)
        if self.device:  # launches take no time, the device all
            return StepTimes(dict.fromkeys(times, 0.01), times)
        return StepTimes(times)


def grid(**settings: Any) -> Grid:
    return fit_grid(40, **settings)


def run(
    *entries: int, graph: bool | None = None, more: dict[str, Any] | None = None, **settings: Any
) -> tuple[Bench, list[Recorder], int]:
    clock, calls = Clock(), []  # type: ignore[var-annotated]
    asked = grid(entries=entries, **settings)
    recorders = [Recorder(str(size), clock, calls, **(more or {})) for size in entries]
    targets = [
        Target(recorder, "split", size, graph)
        for recorder, size in zip(recorders, entries, strict=True)
    ]
    points = points_of(targets, asked)
    done: list[None] = []
    bench = Bench(points, asked, clock)
    try:
        bench.measure(lambda: done.append(None))
    finally:
        assert len(done) <= ticks(points, asked)
    assert len(done) == ticks(points, asked)
    return bench, recorders, len(done)


SMALL = {"contexts": (12,), "prompts": (4, 9), "steps": 6, "prefills": 2, "warmup": 1}


def test_every_decode_step_has_its_context_and_every_prompt_none() -> None:
    bench, recorders, _ = run(100, 0, contexts=(5, 12), prompts=(4,), steps=3, prefills=2)
    timed = [call for call in recorders[0].calls if call[1] == "timed"]
    assert {call[2:] for call in timed} == {(5, 1), (12, 1), (0, 4)}
    assert [point.shape.past for point in bench.points if point.shape.phase == "decode"] == [
        5, 5, 12, 12,
    ]  # fmt: skip


def test_steps_that_warm_up_or_lead_in_are_run_but_not_counted() -> None:
    bench, recorders, _ = run(100, 0, **SMALL)
    decode = bench.points[0]
    assert len(decode.steps) == 6
    mine = [call for call in recorders[0].calls if call == ("100", "timed", 12, 1)]
    assert len(mine) == 6 + 1 + 6  # one step a visit is led in, as the others had the caches


def test_all_targets_run_the_same_tokens_and_each_step_others() -> None:
    _, (loaded, frozen), _ = run(100, 0, **SMALL)
    assert sorted(loaded.seen) == sorted(frozen.seen)
    prompts = [str(ids) for ids in loaded.seen if len(ids[0]) > 1]
    assert len(set(prompts)) == len(prompts)


def test_points_take_turns_so_that_drift_hits_all_alike() -> None:
    """A machine that grows twice as slow leaves the ratio of two equal models alone."""
    clock, calls = Clock(), []  # type: ignore[var-annotated]

    @dataclass
    class Slowing(Recorder):
        def timed_step(self, cache: FakeCache, input_ids: NDArray[np.int64]) -> StepTimes:
            self._advance("timed", cache, input_ids)
            times = {name: ms * (1 + len(calls) / 500) for name, ms in PARTS.items()}
            clock.now += round(sum(times.values()) * MS)
            return StepTimes(times)

    asked = grid(contexts=(3,), entries=(1, 0), steps=200, phases=("decode",))
    targets = [Target(Slowing("a", clock, calls), "split", 1), Target(
        Slowing("b", clock, calls), "split", 0)]  # fmt: skip
    bench = Bench(points_of(targets, asked), asked, clock)
    bench.measure()
    one, other = (median(point.point().whole_ms) for point in bench.points)
    assert max(s.whole for s in bench.points[0].steps) > 1.8 * bench.points[0].steps[0].whole
    assert one == pytest.approx(other, rel=0.03)


def test_the_order_within_a_round_is_drawn_anew() -> None:
    _, (loaded, _), _ = run(100, 0, contexts=(3,), prompts=(), phases=("decode",), steps=100)
    names = [call[0] for call in loaded.calls if call[1] == "timed"][10:]  # after the warm-up
    first = [names[start] for start in range(0, len(names), 12)]
    assert set(first) == {"100", "0"}


def test_parts_and_runtime_add_up_to_each_step() -> None:
    bench, _, _ = run(100, **SMALL)
    point = bench.points[0].point()
    assert [part.name for part in point.parts] == [*PARTS, "runtime"]
    assert point.parts[-1].ms == pytest.approx([AROUND] * 6)
    total = np.sum([part.ms for part in point.parts], axis=0)
    assert total == pytest.approx(np.array(point.whole_ms))
    assert unexplained(point) == pytest.approx(0)


def test_on_a_device_its_own_clock_counts_and_the_rest_is_runtime() -> None:
    bench, _, _ = run(100, graph=False, more={"device": True}, **SMALL)
    point = bench.points[0].point()
    assert point.parts[0].host_ms == (0.01,) * 6
    assert point.parts[0].ms == point.parts[0].device_ms == (2.0,) * 6
    assert point.parts[-1].ms == pytest.approx([AROUND] * 6)


def test_prompts_are_measured_without_a_graph_only() -> None:
    clock, calls = Clock(), []  # type: ignore[var-annotated]
    asked = grid(contexts=(3,), prompts=(4,))
    ways = [Target(Recorder(str(g), clock, calls), "split", 0, g) for g in (True, False)]
    found = [(p.shape.phase, p.target.cuda_graph) for p in points_of(ways, asked)]
    assert found == [("decode", True), ("decode", False), ("prefill", False)]
    alone = points_of(ways[:1], asked)
    assert [point.shape.phase for point in alone] == ["decode", "prefill"]
    assert alone[1].point().cuda_graph is False


def test_an_interrupt_leaves_what_was_measured() -> None:
    clock, calls = Clock(), []  # type: ignore[var-annotated]
    asked = grid(contexts=(3,), prompts=(4,), steps=20, warmup=0)
    recorder = Recorder("a", clock, calls, interrupt_at=15)
    bench = Bench(points_of([Target(recorder, "split", 0)], asked), asked, clock)
    with pytest.raises(KeyboardInterrupt):
        bench.measure()
    points = [point.point() for point in bench.points]
    assert 0 < len(points[0].whole_ms) < 20
    for point in points:
        assert all(len(part.ms) == len(point.whole_ms) for part in point.parts)


def test_rounds_spread_the_steps_of_every_point_evenly() -> None:
    asked = grid(contexts=(3,), prompts=(4,), steps=100, prefills=5)
    table = rounds(asked)
    assert len(table) == 20
    assert sum(steps for each in table for shape, steps in each if shape.tokens == 1) == 100
    prompts = [n for n, each in enumerate(table) for shape, _ in each if shape.tokens == 4]
    assert prompts == [0, 4, 8, 12, 16]


@pytest.mark.parametrize(
    ("steps", "sizes"), [(3, (1,) * 3), (40, (4,) * 10), (52, (5,) * 10 + (2,))]
)
def test_there_are_ten_rounds_at_least_where_steps_allow(
    steps: int, sizes: tuple[int, ...]
) -> None:
    assert visits(grid(steps=steps), Shape("decode", 1, 1, 8)) == sizes


def test_settings_are_made_to_fit_the_model() -> None:
    assert fit_grid(2048).contexts == (128,)
    small = fit_grid(64)
    assert (small.contexts, small.prompts) == ((63,), (32, 64))
    assert fit_grid(16).prompts == (16,)
    assert fit_grid(64, phases=("decode",)).prompts == ()


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"contexts": (64,)}, "context: out of range; expected 1 to 63; found 64"),
        ({"contexts": (0,)}, "context"),
        ({"prompts": (8, 65)}, "prompt length: out of range; expected 1 to 64; found 65"),
        ({"batches": (0,)}, "batch"),
        ({"steps": 0}, "steps"),
        ({"prefills": 0}, "prefills"),
        ({"warmup": -1}, "warmup"),
    ],
)
def test_settings_that_do_not_fit_are_refused(settings: dict[str, Any], named: str) -> None:
    with pytest.raises(SettingError, match=named):
        fit_grid(64, **settings)


def test_memory_sizes_are_numbers_all_or_none() -> None:
    assert memory_sizes((), 500) == (500, 0)
    assert memory_sizes(("100", "all", "0", "500"), 500) == (500, 100, 0)
    assert memory_sizes((), None) == memory_sizes(("0",), None) == (0,)
    for asked, entries in ((("501",), 500), (("many",), 500), (("-1",), 500), (("all",), None)):
        with pytest.raises(SettingError, match="--entries"):
            memory_sizes(asked, entries)


def point(whole: list[float], **parts: list[float]) -> Point:
    made = tuple(
        Part(name.replace("_", " "), name.split("_")[0], tuple(times))  # type: ignore[arg-type]
        for name, times in parts.items()
    )
    rounds_ = tuple(range(len(whole)))
    return Point("decode", "split", 1, 1, 5, 10, None, tuple(whole), rounds_, made)


def test_the_gates_share_is_what_they_take_beyond_routing_alone() -> None:
    loaded = point([10, 10], segment_0=[4, 4], gate_0=[1.5, 1.5], gate_1=[2.5, 2.5])
    frozen = point([8, 8], segment_0=[4, 4], gate_0=[0.5, 0.5], gate_1=[0.5, 0.5])
    assert gate_share(loaded, frozen) == pytest.approx((4.0 - 1.0) / 8)
    assert gate_share(loaded, None) == 0


def test_a_machine_that_stalls_each_step_elsewhere_is_seen_and_leaves_the_share_alone() -> None:
    loaded = point([12, 12, 12], segment_0=[10, 1, 1], gate_0=[1, 10, 1], segment_1=[1, 1, 10])
    frozen = point([2, 2, 2], segment_0=[1, 1, 1], gate_0=[0, 0, 0], segment_1=[1, 1, 1])
    assert gate_share(loaded, frozen) == pytest.approx(1 / 3)
    assert disturbed(loaded)
    assert unexplained(loaded) == pytest.approx(1 - 3 / 12)
    assert not disturbed(frozen)


def test_fused_gates_show_in_whole_steps_only() -> None:
    loaded, frozen = point([12, 12], fused=[11, 11]), point([9, 9], fused=[9, 9])
    assert gate_share(loaded, frozen) == pytest.approx(2 / 11)


def test_parts_of_a_kind_are_added_step_by_step() -> None:
    parts = [Part("gate 0", "gate", (1.0, 5.0), None, {"scan": (1.0, 2.0)}),
             Part("gate 1", "gate", (5.0, 1.0), None, {"scan": (3.0, 4.0)})]  # fmt: skip
    both = summed("2 gates", parts)
    assert both.ms == (6.0, 6.0)
    assert both.inside == {"scan": (4.0, 6.0)}
    assert both.bound is None


def test_typical_times_leave_the_runtime_out() -> None:
    record = synthetic_record(gates=1)
    first = record.points[0]
    assert typical_ms(first) == pytest.approx(sum(median(part.ms) for part in first.parts[:-1]))
    assert typical_ms(first, "gate") == median(first.parts[1].ms)


def test_percentiles_are_those_of_the_samples() -> None:
    found = percentiles(range(101))
    assert found == {"p50_ms": 50, "p90_ms": 90, "p99_ms": 99, "max_ms": 100}


@pytest.mark.parametrize("width", [60, 80, 120])
@pytest.mark.parametrize("gates", [2, 16])
def test_the_tables_fit_and_say_what_matters(width: int, gates: int) -> None:
    out = io.StringIO()
    print_record(synthetic_record(gates=gates), Console(file=out, width=width))
    lines = out.getvalue().splitlines()
    assert max(len(line) for line in lines) <= width
    assert "…" not in out.getvalue()
    expected = ["segment 0", "gate 1", "2 gates"] if gates == 2 else ["17 segments", "16 gates"]
    for name in (*expected, "scan", "runtime", "decode after 128", "prompt of 64", "p50"):
        assert any(name in line for line in lines), name
    assert any("Time to first token" in line for line in lines)


def test_every_part_is_shown_if_asked_for() -> None:
    out = io.StringIO()
    print_record(synthetic_record(gates=16), Console(file=out, width=100), every_part=True)
    assert "segment 16" in out.getvalue()


def test_a_record_of_nothing_is_printed_with_its_warnings() -> None:
    out = io.StringIO()
    record = replace(synthetic_record(gates=1), points=(), warnings=("Interrupted early.",))
    print_record(record, Console(file=out, width=80))
    assert "Interrupted early." in out.getvalue()
    assert from_json(record.to_json()).points == ()


def test_a_loop_that_looks_at_the_clock_sees_gaps() -> None:
    stamps = iter(range(0, 10**9, 1000))  # a microsecond a look
    times: list[int] = []

    def clock() -> int:
        stolen = 3_000_000 if len(times) > 500 else 0  # once, for 3 ms
        times.append(next(stamps) + stolen)
        return times[-1]

    found = spin(10.0, clock)
    assert found["longest_gap_us"] == pytest.approx(3001)
    assert found["lost_share"] == pytest.approx(0.3, abs=0.01)


def test_a_noisy_machine_is_named_and_a_quiet_one_is_not() -> None:
    quiet = {"spin": {"lost_share": 0.001}, "load_average": [0.1, 0, 0], "steal_jiffies": 0}
    assert noise_warnings(quiet, {**quiet, "steal_jiffies": 10}, 10.0, 4) == []
    busy = {"spin": {"lost_share": 0.3}, "load_average": [9.5, 0, 0], "steal_jiffies": 0}
    found = noise_warnings(busy, {**quiet, "steal_jiffies": 1000}, 10.0, 4)
    assert [
        word for word in ("30%", "9.5 on 4 cores", "25%") if not any(word in f for f in found)
    ] == []


def test_the_environment_says_where_and_when() -> None:
    where = environment()
    json.dumps(where)
    assert where["cpu"]
    assert where["cores"] >= 1
    assert "CPUExecutionProvider" in where["onnxruntime_providers"]
    assert {"numpy", "onnxruntime", "python", "knnmoe"} <= set(where)
    assert datetime.fromisoformat(where["date"]).utcoffset() is not None
