"""The benchmark of retrieval measures whole steps, gates and what is inside of one."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import retrieval
from click.testing import CliRunner


def test_it_runs_every_memory_against_the_frozen_model(
    tiny_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(retrieval, "CONTEXT", 16)
    monkeypatch.setattr(retrieval, "CAPACITY", 32)
    (tmp_path / "bundle").symlink_to(tiny_bundle)
    target = tmp_path / "result.json"
    arguments = [str(tmp_path), "--cases", "300-32-4-16", "--tokens", "2", "--json", str(target)]
    result = CliRunner().invoke(retrieval.main, arguments, catch_exceptions=False)
    assert "Inside of a gate" in result.output
    rows = json.loads(target.read_text())["rows"]
    assert rows["frozen"]["cpu_ratio"] == 1
    measured = rows["300-32-4-16"]
    assert measured["gate_ms"] > 0
    assert set(measured["inside_us"]) == {
        "query", "projection", "scan", "selection", "gathering", "widening", "scores", "blend",
        "operators",
    }  # fmt: skip


def test_a_ratio_is_that_of_medians_and_what_is_added_the_median_of_differences() -> None:
    base, other = (retrieval.Contender.__new__(retrieval.Contender) for _ in range(2))
    base.cpu_ms, other.cpu_ms = [10.0, 20.0, 30.0], [22.0, 12.0, 90.0]
    base.wall_ms, other.wall_ms = [10.0, 10.0, 10.0], [15.0, 15.0, 15.0]
    other.gate_ms = [[1.0, 3.0]]
    found = other.report(base)
    assert found["cpu_ratio"] == pytest.approx(1.1)
    assert found["cpu_ms_added"] == 12
    assert (found["wall_ratio"], found["gate_ms"]) == (1.5, 2)
