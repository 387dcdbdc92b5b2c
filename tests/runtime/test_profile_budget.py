from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from knnmoe.runtime.cli import main
from knnmoe.runtime.errors import ProfileError, SettingError
from knnmoe.runtime.profiling.budget import fit_budget, memory_cost
from knnmoe.runtime.profiling.record import Part, Point, ProfileRecord, write_record
from profiles import synthetic_record

GATES = 4
FROZEN, FIXED, EACH = 4.0, 0.2, 0.001  # ms: frozen; a gate with a memory; 1000 of its entries


def step(entries: int, *, noise: float = 0.01, past: int = 128, slower: float = 0.0) -> Point:
    """60 steps in 12 rounds that take FROZEN + GATES · (FIXED + EACH · entries / 1000) ms."""
    rng = np.random.default_rng(entries + past)
    gate = (FIXED + EACH * entries) if entries else 0.0
    parts = []
    for number in range(GATES):
        parts += [
            Part(f"segment {number}", "segment", times(rng, FROZEN / GATES, noise)),
            Part(f"gate {number}", "gate", times(rng, gate + 0.01 + slower, noise)),
        ]
    whole = np.sum([part.host_ms for part in parts], axis=0)
    rounds = tuple(np.repeat(np.arange(12), 5).tolist())
    return Point("decode", "split", 1, 1, past, entries, None, tuple(whole), rounds, tuple(parts))


def times(rng: np.random.Generator, ms: float, noise: float) -> tuple[float, ...]:
    return tuple((ms * rng.normal(1, noise, 60)).tolist())


def record(*points: Point) -> ProfileRecord:
    some = synthetic_record(gates=GATES)
    assert some.subject.memory is not None
    memory = replace(some.subject.memory, gates=GATES, entries=4000)
    return replace(some, points=points, subject=replace(some.subject, memory=memory))


MEASURED = record(step(0), step(1000), step(2000), step(4000))


def truth(entries: int, gates: int = GATES) -> float:
    return FROZEN + GATES * 0.01 + gates * (FIXED + EACH * entries)


def test_the_line_is_what_an_entry_costs() -> None:
    cost = memory_cost(MEASURED)
    assert cost.line.slope == pytest.approx(GATES * EACH, rel=0.02)
    assert cost.line.base == pytest.approx(truth(0), rel=0.02)
    assert cost.frozen.ms == pytest.approx(FROZEN + GATES * 0.01, rel=0.01)
    assert [size.entries for size in cost.sizes] == [1000, 2000, 4000]
    assert cost.bent == ()


@pytest.mark.parametrize("entries", [500, 1500, 3000])
def test_the_most_entries_that_fit_are_found(entries: int) -> None:
    found = fit_budget(MEASURED, truth(entries))
    all_gates = found.choices[0]
    assert all_gates.gates == GATES
    assert 0.9 * entries < all_gates.step.entries <= entries
    assert all_gates.step.high <= found.budget_ms


def test_nothing_beyond_what_was_measured_is_promised() -> None:
    assert fit_budget(MEASURED, 1000).best.step.entries == 4000


def test_fewer_gates_hold_more_entries_and_the_most_in_all_is_best() -> None:
    found = fit_budget(MEASURED, truth(1000))
    choices = found.choices
    assert found.best is max(choices, key=lambda choice: choice.gates * choice.step.entries)
    assert [choice.gates for choice in choices] == [4, 3, 2, 1][: len(choices)]
    entries = [choice.step.entries for choice in choices]
    assert entries == sorted(entries)
    assert entries[1] == pytest.approx((4 * 1.2 / 3 - 0.2) * 1000, rel=0.05)


def test_gates_without_a_memory_are_not_counted() -> None:
    assert MEASURED.subject.memory is not None
    memory = replace(MEASURED.subject.memory, gates=2)
    two = replace(MEASURED, subject=replace(MEASURED.subject, memory=memory))
    assert fit_budget(two, truth(1000)).choices[0].gates == 2


def test_where_all_gates_are_too_many_fewer_are_offered() -> None:
    found = fit_budget(MEASURED, FROZEN + 0.04 + 2.5 * FIXED)
    assert [choice.gates for choice in found.choices] == [2, 1]


def test_a_budget_for_most_steps_holds_less_than_one_for_half_of_them() -> None:
    noisy = record(*(step(entries, noise=0.05) for entries in (0, 1000, 2000, 4000)))
    half, most = (
        fit_budget(noisy, truth(2500), quantile=quantile).choices[0].step.entries
        for quantile in (0.5, 0.9)
    )
    assert most < half


def test_a_budget_below_the_frozen_router_is_refused_with_what_would_fit() -> None:
    shorter = record(*MEASURED.points, replace(step(0, past=16), whole_ms=(2.0,) * 60))
    with pytest.raises(SettingError, match="less than the frozen router takes") as error:
        fit_budget(shorter, 3.0)
    assert "16 tokens of context" in str(error.value)
    assert "expected at least 4.0" in str(error.value)
    with pytest.raises(SettingError, match="Nothing that was measured fits"):
        fit_budget(shorter, 1.0)


def test_a_budget_between_frozen_and_the_smallest_memory_is_refused() -> None:
    with pytest.raises(SettingError, match="leaves no room for a memory") as error:
        fit_budget(MEASURED, FROZEN + 0.04 + 0.5 * FIXED)
    assert "The frozen router alone fits" in str(error.value)


def test_a_size_off_the_line_is_said_and_counted() -> None:
    bent = record(step(0), step(1000), step(2000, slower=0.5), step(4000))
    cost = memory_cost(bent)
    assert any(words.startswith("2,000 entries") for words in cost.bent)
    even = fit_budget(MEASURED, truth(2000) + 0.3).choices[0].step.entries
    assert fit_budget(bent, truth(2000) + 0.3).choices[0].step.entries < even


@pytest.mark.parametrize(
    "points",
    [(step(0), step(1000)), (step(1000), step(2000)), ()],
    ids=["one", "no frozen", "none"],
)
def test_too_few_sizes_are_refused(points: tuple[Point, ...]) -> None:
    with pytest.raises(ProfileError, match="too few memory sizes") as error:
        memory_cost(record(*points))
    assert "--entries" in str(error.value)


def test_steps_launched_one_by_one_are_not_fitted_with_those_of_a_graph() -> None:
    launched = [replace(step(entries, slower=2.0), cuda_graph=False) for entries in (0, 1000, 4000)]
    captured = [replace(point, cuda_graph=True) for point in MEASURED.points]
    assert memory_cost(record(*captured, *launched)).line == memory_cost(MEASURED).line


def test_the_shape_that_was_asked_for_is_the_one_that_is_fitted() -> None:
    longer = [step(entries, past=512, slower=1.0) for entries in (0, 1000, 4000)]
    both = record(*MEASURED.points, *longer)
    assert memory_cost(both, context=512).context == 512
    assert memory_cost(both).context == 128
    with pytest.raises(ProfileError, match="at past 64"):
        memory_cost(both, context=64)
    with pytest.raises(SettingError, match="out of range"):
        fit_budget(both, -1.0)


def test_a_page_is_written_though_nothing_fits(tmp_path: Path) -> None:
    write_record(MEASURED, tmp_path / "record.json")
    words = ("profile", "show", tmp_path / "record.json", "--budget-ms", "0.5")
    done = CliRunner().invoke(main, [*map(str, words), "--html", str(tmp_path / "page.html")])
    assert done.exit_code == 1
    assert "--budget-ms: is less than the frozen router takes" in done.stderr
    assert (tmp_path / "page.html").read_text().startswith("<!doctype html>")
