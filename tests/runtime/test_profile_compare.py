from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from knnmoe.runtime.cli import main
from knnmoe.runtime.errors import ProfileError, SettingError
from knnmoe.runtime.profiling.compare import WHOLE, Comparison, compare, joined
from knnmoe.runtime.profiling.record import ProfileRecord, write_record
from knnmoe.runtime.profiling.resample import (
    block_correlation,
    block_starts,
    joint_quantile,
    resampled_quantiles,
    student_factor,
    widening,
)
from profiles import synthetic_record

PARTS = [f"segment {n}" for n in range(4)] + [f"gate {n}" for n in range(3)]


def changed(seed: int = 1, part: str = "segment 1", factor: float = 1.1) -> ProfileRecord:
    return synthetic_record(seed=seed, slower={part: factor})


def verdicts(found: Comparison, part: str) -> set[str]:
    return {change.verdict for change in found.changes if change.part == part}


def test_a_record_is_not_slower_than_one_of_the_same() -> None:
    for seed in range(5):
        found = compare(synthetic_record(seed=100 + seed), synthetic_record(seed=200 + seed))
        assert found.slower == ()
        assert found.common == pytest.approx(1, abs=0.02)


def test_a_tenth_more_in_one_segment_is_found_and_nothing_else_is() -> None:
    for seed in range(5):
        found = compare(synthetic_record(seed=seed), changed(seed=300 + seed))
        assert {change.part for change in found.slower} == {"segment 1"}
        decode = [change for change in found.slower if "decode" in change.point]
        assert {change.point for change in decode} == {
            "decode at 128, 2,000 entries", "decode at 128, frozen",
            "decode at 512, 2,000 entries", "decode at 512, frozen",
        }  # fmt: skip


def test_a_slowdown_within_the_limit_is_no_failure() -> None:
    found = compare(synthetic_record(), changed(factor=1.1), limit=0.2)
    assert found.slower == found.unclear == ()
    assert verdicts(found, "segment 1") == {"within"}


def test_what_became_faster_is_said() -> None:
    found = compare(synthetic_record(), changed(factor=0.7))
    assert verdicts(found, "segment 1") == {"faster"}


def test_parts_too_small_to_matter_are_shown_and_not_judged() -> None:
    slow = changed(part="runtime", factor=1.0)
    halved = [
        replace(p, parts=(*p.parts[:-1], replace(p.parts[-1], host_ms=tuple(
            3 * ms for ms in p.parts[-1].host_ms))))
        for p in slow.points
    ]  # fmt: skip
    after = replace(slow, points=tuple(halved))
    assert "slower" in verdicts(compare(synthetic_record(), after, min_share=0), "runtime")
    assert verdicts(compare(synthetic_record(), after, min_share=0.2), "runtime") == {"small"}


def test_too_few_samples_cannot_tell() -> None:
    before, after = synthetic_record(), changed(factor=3.0)

    def few(record: ProfileRecord) -> ProfileRecord:
        points = [
            replace(
                point,
                whole_ms=point.whole_ms[:3],
                rounds=point.rounds[:3],
                parts=tuple(replace(part, host_ms=part.host_ms[:3]) for part in point.parts),
            )
            for point in record.points
        ]
        return replace(record, points=tuple(points))

    found = compare(few(before), few(after))
    assert found.slower == ()
    assert verdicts(found, "segment 1") == {"unclear"}
    assert all(change.low is None for change in found.changes)


def test_points_and_parts_of_one_record_only_are_named() -> None:
    before, after = synthetic_record(gates=2), synthetic_record(gates=3)
    found = compare(replace(before, points=before.points[:-1]), after)
    assert "decode at 128, 2,000 entries, gate 2: only after" in found.unmatched
    assert "prompt of 64, frozen: only after" in found.unmatched
    assert {change.part for change in found.changes} >= {WHOLE, "segment 0", "gate 1", "runtime"}


def test_records_without_a_common_point_are_refused() -> None:
    record = synthetic_record()
    other = replace(record, points=tuple(replace(point, batch=4) for point in record.points))
    with pytest.raises(ProfileError, match="no point in common") as error:
        compare(record, other)
    assert "batch 4" in str(error.value)


def test_another_machine_is_said() -> None:
    before, after = synthetic_record(), synthetic_record(seed=1)
    after = replace(
        after,
        subject=replace(after.subject, threads=4, device="a GPU"),
        environment={**after.environment, "cpu": "another"},
    )
    assert compare(before, after).differences == (
        "device: cpu before, a GPU after",
        "threads: 1 before, 4 after",
        "cpu: a processor before, another after",
    )


@pytest.mark.parametrize(
    "numbers", [{"limit": -0.1}, {"limit": 10.0}, {"min_share": 1.0}, {"quantile": 0.0}]
)
def test_numbers_out_of_range_are_refused(numbers: dict[str, float]) -> None:
    with pytest.raises(SettingError, match="out of range"):
        compare(synthetic_record(), synthetic_record(), **numbers)


def test_runs_that_differ_from_each_other_are_no_evidence_of_a_slowdown() -> None:
    """Runs of one program are 0 to 30 % slower than each other, on both sides: in all parts."""

    def run(seed: int) -> ProfileRecord:
        slow = 1 + 0.15 * (seed % 3)
        return synthetic_record(seed=seed, rounds=6, slower=dict.fromkeys(PARTS, slow))

    one, other = run(0), run(1)
    alike = compare(one, other)
    assert alike.slower == ()
    assert alike.common == pytest.approx(1.15, abs=0.02)
    assert verdicts(alike, WHOLE) == {"unclear"}
    assert compare(one, other, absolute=True).slower
    before, after = joined([run(seed) for seed in range(3, 9)]), joined(
        [run(seed) for seed in range(9, 15)]
    )  # fmt: skip
    assert [len(point.rounds) for point in before.points] == [6 * 6 * 5] * 6
    assert len(set(before.points[0].rounds)) == 36
    assert compare(before, after, runs=6).slower == ()


def test_a_slow_part_is_found_where_the_machine_is_slower_too() -> None:
    for machine in (0.8, 1.3):
        slower = dict.fromkeys([*PARTS, "runtime"], machine) | {"segment 1": 1.1 * machine}
        found = compare(synthetic_record(), synthetic_record(seed=1, slower=slower), limit=0.03)
        assert {change.part for change in found.slower} == {"segment 1"}
        changes = [change for change in found.changes if change.part == "segment 1"]
        assert [c.beside for c in changes] == pytest.approx([1.1] * 6, abs=0.03)
        assert [c.ratio for c in changes] == pytest.approx([1.1 * machine] * 6, abs=0.03)


def test_what_is_slower_in_every_part_is_found_by_several_runs_of_each_side() -> None:
    def side(seed: int, slow: float) -> ProfileRecord:
        slower = dict.fromkeys(PARTS, slow)
        return joined([synthetic_record(seed=seed + n, slower=slower) for n in range(3)])

    before, after = side(10, 1.0), side(20, 1.2)
    assert verdicts(compare(before, after), WHOLE) == {"unclear"}
    found = compare(before, after, runs=3)
    assert {change.part for change in found.slower} == {WHOLE}


def test_of_few_parts_each_is_judged_by_itself() -> None:
    def only(record: ProfileRecord) -> ProfileRecord:
        point = next(point for point in record.points if point.phase == "decode")
        return replace(record, points=(replace(point, parts=point.parts[:3]),))

    found = compare(only(synthetic_record()), only(changed(part="segment 0", factor=1.3)))
    assert found.absolute
    assert "segment 0" in {change.part for change in found.slower}


def test_runs_of_different_threads_are_not_joined() -> None:
    one = synthetic_record()
    with pytest.raises(ProfileError, match="of one side differ in threads"):
        joined([one, replace(one, subject=replace(one.subject, threads=2))])


def test_a_low_quantile_does_not_see_what_other_programs_add() -> None:
    before, after = synthetic_record(), synthetic_record(seed=1)
    point, part = after.points[0], after.points[0].parts[0]
    held_up = tuple(ms * (3 if step % 5 < 3 else 1) for step, ms in enumerate(part.host_ms))
    after = replace(
        after,
        points=(replace(point, parts=(replace(part, host_ms=held_up), *point.parts[1:])),),
    )
    ratios = [
        next(
            change.ratio
            for change in compare(before, after, quantile=quantile).changes
            if change.part == part.name
        )
        for quantile in (0.5, 0.1)
    ]
    assert ratios[0] > 2
    assert ratios[1] == pytest.approx(1, abs=0.03)


# What is drawn


def test_blocks_are_of_whole_rounds_and_twelve_at_most() -> None:
    assert block_starts([0, 0, 1, 1, 1, 2, 2, 3, 4, 5]).tolist() == [0, 2, 5, 7, 8, 9]
    assert len(block_starts(np.repeat(np.arange(40), 5).tolist())) == 12
    assert block_starts([0] * 24).tolist() == list(range(0, 24, 2))  # one round: of steps
    assert len(block_starts([0, 0, 0])) == 3


def test_the_spread_of_independent_samples_is_the_known_one() -> None:
    rng = np.random.default_rng(0)
    found = [
        resampled_quantiles([rng.normal(10, 1, 240)], [0] * 240, seed=seed).std()
        for seed in range(30)
    ]
    assert np.mean(found) == pytest.approx(np.sqrt(np.pi / 2 / 240), rel=0.2)


def test_drift_that_outlasts_a_block_widens_the_spread() -> None:
    steps = np.arange(240)
    still = np.random.default_rng(1).normal(10, 1, (20, 240))
    drifting = still + 3 * np.sin(steps / 240 * 2 * np.pi)
    alike = [block_correlation([(parts, [0] * 240)]) for parts in (still, drifting)]
    assert alike[0] < 0.2
    assert alike[1] > 0.6
    spread = [
        resampled_quantiles(parts, [0] * 240).std(axis=0).mean() * widening([0] * 240, correlation)
        for parts, correlation in zip((still, drifting), alike, strict=True)
    ]
    assert spread[1] > 4 * spread[0]
    # What all parts have in common says nothing about one of them beside the others.
    assert block_correlation([(drifting, [0] * 240)], beside=True) < 0.2


def test_many_parts_ask_for_a_wider_interval_than_one_unless_they_move_together() -> None:
    moves = np.random.default_rng(2).normal(size=(4000, 50))
    one = joint_quantile(moves[:, :1], np.ones(1), 0.95)
    many = joint_quantile(moves, np.ones(50), 0.95)
    together = joint_quantile(np.repeat(moves[:, :1], 50, axis=1), np.ones(50), 0.95)
    assert one == pytest.approx(1.96, abs=0.06)
    assert many == pytest.approx(3.28, abs=0.1)  # of 50 independent normal numbers
    assert together == one


@pytest.mark.parametrize(("z", "degrees", "t"), [(1.96, 22, 2.074), (1.96, 10, 2.228)])
def test_few_blocks_ask_for_students_quantile(z: float, degrees: int, t: float) -> None:
    assert z * student_factor(z, degrees) == pytest.approx(t, abs=0.002)


# The command


@pytest.fixture
def records(tmp_path: Path) -> tuple[Path, Path, Path]:
    paths = tuple(tmp_path / f"{name}.json" for name in ("before", "same", "slower"))
    for path, record in zip(
        paths, (synthetic_record(), synthetic_record(seed=1), changed()), strict=True
    ):
        write_record(record, path)
    return paths  # type: ignore[return-value]


def run(*words: object) -> tuple[int, str, str]:
    result = CliRunner().invoke(main, ["profile", *map(str, words)])
    assert result.exception is None or isinstance(result.exception, SystemExit)
    return result.exit_code, result.stdout, result.stderr


def test_the_exit_code_says_whether_something_became_slower(
    records: tuple[Path, Path, Path],
) -> None:
    before, same, slower = records
    assert run("compare", before, same)[0] == 0
    code, out, _ = run("compare", before, slower)
    assert code == 1
    assert "segment 1" in out
    assert "slower" in out
    assert run("compare", before, slower, "--fail-above", "20%")[0] == 0
    assert run("compare", before, slower, "--fail-above", "much")[0] == 2


def test_the_json_is_one_object_also_when_it_fails(records: tuple[Path, Path, Path]) -> None:
    before, _, slower = records
    code, out, _ = run("compare", before, slower, "--json")
    found = json.loads(out)
    assert (code, found["limit"], len(found["slower"])) == (1, 0.05, 6)
    assert found["changes"][0]["part"] == WHOLE
    code, out, _ = run("compare", before, before.with_name("none.json"), "--json")
    assert (code, json.loads(out)["error"]) == (1, "ProfileError")


def test_a_bundle_of_a_commands_name_is_reached_by_its_path(tmp_path: Path) -> None:
    (tmp_path / "compare").mkdir()
    code, _, err = run(f"{tmp_path}/compare")
    assert code == 1
    assert "manifest.json" in err
    assert "BEFORE AFTER" in run("compare", "--help")[1]
    assert "compare" in run("--help")[1]
    assert "BUNDLE" in run("--help")[1]
