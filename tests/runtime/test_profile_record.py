"""A record on disk is the record that was measured; what is no record is refused by name."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from knnmoe.runtime.errors import OutputError, ProfileError
from knnmoe.runtime.profiling.intervals import interval
from knnmoe.runtime.profiling.record import MachineBounds, ReadRate, read_record, write_record
from profiles import STEPS_A_ROUND, synthetic_record


def test_a_record_comes_back_from_its_file_as_it_was(tmp_path: Path) -> None:
    record = synthetic_record(gates=2, finished=False)
    write_record(record, tmp_path / "a.json")
    assert read_record(tmp_path / "a.json") == record
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]


def test_a_record_that_cannot_be_written_leaves_what_was_there(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="cannot be written"):
        write_record(synthetic_record(gates=1, rounds=2), tmp_path / "missing" / "a.json")
    (tmp_path / "there").mkdir()
    with pytest.raises(OutputError):
        write_record(synthetic_record(gates=1, rounds=2), tmp_path / "there")
    assert [path.name for path in tmp_path.iterdir()] == ["there"]


def test_scripts_find_medians_beside_the_samples() -> None:
    record = synthetic_record(gates=1)
    point = record.to_json()["points"][0]
    assert point["figures"]["p50_ms"] == float(np.median(point["whole_ms"]))
    assert point["figures"]["max_ms"] == max(point["whole_ms"])
    assert list(point["figures"]["parts"]) == ["segment 0", "gate 0", "segment 1", "runtime"]
    assert record.points[0].tokens_per_s == pytest.approx(1e3 / point["figures"]["p50_ms"])


Break = Callable[[dict[str, Any]], object]


@pytest.mark.parametrize(
    ("spoil", "named"),
    [
        (lambda r: r.update(schema="knnmoe.profile/1"), "schema: unknown; expected knnmoe.profil"),
        (lambda r: r.pop("schema"), "schema: unknown"),
        (lambda r: r.pop("resident"), "resident: missing"),
        (lambda r: r.update(more=1), "more: unknown field"),
        (lambda r: r.update(finished="yes"), "finished: malformed"),
        (lambda r: r["subject"].pop("threads"), "subject: threads: missing"),
        (lambda r: r["subject"]["memory"].update(bytes=-1), "memory: bytes: out of range"),
        (lambda r: r["settings"].update(prompts=[1.5]), "settings: prompts: malformed"),
        (lambda r: r["points"][1].update(phase="warm"), r"points\[1\]: phase: unknown"),
        (lambda r: r["points"][0]["rounds"].pop(), r"points\[0\]: rounds: of another length"),
        (lambda r: r["points"][0]["whole_ms"].append("1"), "whole_ms: malformed"),
        (lambda r: r["points"][0]["parts"][1].update(kind="x"), r"parts\[1\]: kind: unknown"),
        (lambda r: r["points"][0]["parts"][0]["host_ms"].pop(), "host_ms: of another length"),
        (lambda r: r["points"][0]["parts"][0]["bound"].pop("ms"), "bound: ms: missing"),
        (lambda r: r["points"][0]["parts"][1]["inside"].update(scan=[True]), "scan: malformed"),
        (lambda r: r["machine_bounds"].update(reads=[]), "reads: empty"),
        (lambda r: r["machine_bounds"].update(copy_gb_s=0), "copy_gb_s: out of range"),
    ],
)
def test_what_is_no_such_record_is_refused_by_name(
    spoil: Break, named: str, tmp_path: Path
) -> None:
    content = synthetic_record(gates=1, rounds=2).to_json()
    spoil(content)
    (tmp_path / "a.json").write_text(json.dumps(content), encoding="utf-8")
    with pytest.raises(ProfileError, match=named) as caught:
        read_record(tmp_path / "a.json")
    assert caught.value.where.startswith(str(tmp_path / "a.json"))
    assert caught.value.fix is not None


def test_files_that_hold_no_json_object_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ProfileError, match="cannot be read"):
        read_record(tmp_path / "a.json")
    (tmp_path / "a.json").write_text('{"schema": NaN}', encoding="utf-8")
    with pytest.raises(ProfileError, match="is not valid JSON"):
        read_record(tmp_path / "a.json")


def test_caches_serve_small_working_sets() -> None:
    reads = (ReadRate(1000, 80.0), ReadRate(10_000, 40.0), ReadRate(100_000, 10.0))
    bounds = MachineBounds(reads, 9.0, 50.0, 1, "")
    assert [bounds.read_gb_s(n) for n in (1, 1000, 9999, 10_000, 1 << 40)] == [80, 80, 80, 40, 10]


def test_an_interval_holds_the_true_median_of_95_in_a_hundred_rounds_with_drift() -> None:
    """A bootstrap of single steps would hold it far less often: steps of a round are alike."""
    rng = np.random.default_rng(0)
    rounds = np.repeat(np.arange(20), STEPS_A_ROUND)
    inside = naive = 0
    for trial in range(200):
        drift = rng.normal(0, 1, 20)[rounds]
        samples = 10 + drift + rng.normal(0, 0.1, len(rounds))
        low, high = interval(samples, rounds, seed=trial, draws=300)
        inside += low <= 10 <= high
        low, high = interval(samples, range(len(samples)), seed=trial, draws=300)
        naive += low <= 10 <= high
    assert 180 <= inside <= 200
    assert naive < 150


def test_one_round_says_nothing_of_others() -> None:
    assert interval([1.0, 2.0], [0, 0]) == (-math.inf, math.inf)


def test_rounds_of_different_lengths_are_drawn_whole() -> None:
    low, high = interval([1.0, 1.0, 1.0, 3.0], [0, 0, 0, 1], draws=200)
    assert (low, high) == (1.0, 3.0)
