from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

from knnmoe.runtime import Model
from knnmoe.runtime.blend import GateMemory
from knnmoe.runtime.cli import main
from knnmoe.runtime.errors import ProfileError, SettingError
from knnmoe.runtime.memory import MemoryPack
from knnmoe.runtime.profiling.budget import fit_budget, run_config
from knnmoe.runtime.profiling.record import ProfileRecord
from knnmoe.runtime.run_config import RunConfig, limited, pack_hash, used_gates
from memories import random_memory
from profiles import synthetic_record

IDS = [3, 1, 4, 1, 5]


@pytest.fixture
def config(tiny_bundle: Path, tiny_pack: Path) -> RunConfig:
    pack = MemoryPack.open(tiny_pack)
    return RunConfig(pack.model.fingerprint, "fp32", pack_hash(pack), 7, used_gates(pack)[-1:])


def test_a_file_says_what_was_written(config: RunConfig, tmp_path: Path) -> None:
    config = replace(config, expected={"budget_ms": 12.0})
    config.write(tmp_path / "run.json")
    assert RunConfig.read(tmp_path / "run.json") == config


def test_entries_kept_are_spread_over_all() -> None:
    memory = random_memory(0, entries=50)
    kept = limited(memory, 5)
    assert isinstance(kept, GateMemory)
    np.testing.assert_array_equal(kept.keys, memory.keys[[0, 10, 20, 30, 40]])
    np.testing.assert_array_equal(kept.values[:], memory.values[:][[0, 10, 20, 30, 40]])
    assert (kept.n_valid, kept.key_scales.shape) == (5, (5, 2))
    assert limited(memory, 50) is limited(memory, None) is memory


def test_room_of_a_memory_is_not_among_the_entries_kept() -> None:
    kept = limited(random_memory(0, entries=50, n_valid=10, weighted=True), 5)
    full = random_memory(0, entries=50, n_valid=10, weighted=True)
    np.testing.assert_array_equal(kept.keys, full.keys[[0, 2, 4, 6, 8]])
    assert kept.evidence_weights is not None
    assert full.evidence_weights is not None
    np.testing.assert_array_equal(kept.evidence_weights, full.evidence_weights[[0, 2, 4, 6, 8]])


def test_a_model_uses_so_many_entries_of_these_gates(
    config: RunConfig, tiny_bundle: Path, tiny_pack: Path, tmp_path: Path
) -> None:
    config.write(tmp_path / "run.json")
    options: dict[str, Any] = {"memory": tiny_pack, "variant": "logits", "gate": "numpy"}
    model = Model.load(tiny_bundle, run_config=tmp_path / "run.json", **options)
    trace = model.routing_trace(IDS)
    (gate,) = config.gates
    for number, record in enumerate(trace.gates):
        neighbors = np.asarray(record.trace.neighbors)
        assert neighbors.size == 0 if number != gate else neighbors.max() < 7
    full = Model.load(tiny_bundle, **options)
    assert not np.array_equal(full.logits(IDS), model.logits(IDS))
    everything = replace(config, entries=10**6, gates=used_gates(MemoryPack.open(tiny_pack)))
    same = Model.load(tiny_bundle, run_config=everything, **options)
    np.testing.assert_array_equal(full.logits(IDS), same.logits(IDS))


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"fingerprint": "sha256:1"}, "another checkpoint"),
        ({"precision": "int4"}, "another precision of the bundle"),
        ({"memory": "sha256:2"}, "another memory pack"),
        ({"gates": (77,)}, "not those of the memory"),
        ({"gates": ()}, "not those of the memory"),
    ],
)
def test_one_of_another_model_or_memory_is_refused(
    config: RunConfig, tiny_bundle: Path, tiny_pack: Path, changes: dict[str, Any], problem: str
) -> None:
    other = replace(config, **changes)
    with pytest.raises(SettingError, match=problem):
        Model.load(tiny_bundle, memory=tiny_pack, variant="logits", run_config=other)


def test_without_a_memory_it_is_refused(config: RunConfig, tiny_bundle: Path) -> None:
    with pytest.raises(SettingError, match="there is none"):
        Model.load(tiny_bundle, run_config=config)


Break = Callable[[dict[str, Any]], object]


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (lambda c: c.update(schema="knnmoe.run/9"), "schema"),
        (lambda c: c.update(entries=0), "entries"),
        (lambda c: c.update(entries="7"), "entries"),
        (lambda c: c.update(gates=[-1]), "gates"),
        (lambda c: c.update(more=1), "more"),
        (lambda c: c.pop("memory"), "memory"),
    ],
)
def test_a_damaged_file_is_refused(
    config: RunConfig, tmp_path: Path, change: Break, problem: str
) -> None:
    path = tmp_path / "run.json"
    config.write(path)
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))
    with pytest.raises(SettingError, match=problem):
        RunConfig.read(path)


@pytest.mark.parametrize("content", [None, b"{", b"\xff"])
def test_what_is_no_file_of_json_is_refused(tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "run.json"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(SettingError, match=r"cannot be read|not valid JSON"):
        RunConfig.read(path)


def measured(pack: MemoryPack) -> ProfileRecord:
    """A record that says it is of this pack, with steps of three sizes that take 1, 2 and 3 ms."""
    record = synthetic_record(gates=3)
    assert record.subject.memory is not None
    memory = replace(record.subject.memory, entries=pack.entries, gates=len(used_gates(pack)))
    subject = replace(record.subject, fingerprint=pack.model.fingerprint, memory=memory)
    point = record.points[0]
    points = [
        replace(point, memory_entries=entries, parts=(), whole_ms=(ms,) * len(point.rounds))
        for entries, ms in ((0, 1.0), (pack.entries // 2, 2.0), (pack.entries, 3.0))
    ]
    return replace(record, subject=subject, points=tuple(points))


def test_the_answer_to_a_budget_is_a_configuration_that_the_model_takes(
    tiny_bundle: Path, tiny_pack: Path, tmp_path: Path
) -> None:
    pack = MemoryPack.open(tiny_pack)
    record = measured(pack)
    found = run_config(record, fit_budget(record, 2.5), pack)
    assert found.entries == pytest.approx(0.75 * pack.entries, abs=1)
    assert found.gates == used_gates(pack)
    assert found.expected["budget_ms"] == 2.5
    found.write(tmp_path / "run.json")
    words = ["generate", tiny_bundle, "--memory", tiny_pack, "--variant", "logits", "--prompt", "a"]
    words += ["--max-new-tokens", 1, "--run-config", tmp_path / "run.json"]
    assert CliRunner().invoke(main, list(map(str, words))).exit_code == 0


def test_a_pack_that_was_not_measured_gets_no_configuration(tiny_pack: Path) -> None:
    pack = MemoryPack.open(tiny_pack)
    record = measured(pack)
    answer = fit_budget(record, 2.5)
    other = replace(record, subject=replace(record.subject, fingerprint="sha256:other"))
    with pytest.raises(SettingError, match="not the memory that was measured"):
        run_config(other, answer, pack)
    with pytest.raises(ProfileError, match="too few memory sizes"):
        fit_budget(replace(record, points=record.points[:2]), 2.5)


def test_measuring_answers_a_budget_and_writes_page_and_configuration(
    tiny_bundle: Path, tiny_pack: Path, tmp_path: Path
) -> None:
    page, config, record = (tmp_path / name for name in ("page.html", "run.json", "record.json"))
    half = MemoryPack.open(tiny_pack).entries // 2
    words = ["profile", tiny_bundle, "--memory", tiny_pack, "--variant", "logits", "--no-bounds"]
    words += ["--phase", "decode", "--context", 4, "--steps", 12, "--warmup", 1, "--inside", "none"]
    words += ["--entries", f"0,{half},all", "--html", page, "--output", record]
    asked = [*words, "--budget-ms", 1e6, "--write-run-config", config]
    result = CliRunner().invoke(main, list(map(str, asked)))
    assert result.exit_code == 0, result.output
    assert "Memory for 1e+06 ms" in result.stdout
    assert "Latency over memory size" in page.read_text(encoding="utf-8")
    pack = MemoryPack.open(tiny_pack)
    written = RunConfig.read(config)
    assert (written.entries, written.gates) == (pack.entries, used_gates(pack))
    Model.load(tiny_bundle, memory=tiny_pack, variant="logits", run_config=config)

    impossible = [*words, "--budget-ms", 1e-6]
    result = CliRunner().invoke(main, list(map(str, impossible)))
    assert result.exit_code == 1
    assert "less than the frozen router takes" in result.stderr
    assert "segment 0" in result.stdout  # what was measured is not lost
    two_sizes = [*words[:-6], "--entries", "0,all", "--budget-ms", 1.0]
    assert CliRunner().invoke(main, list(map(str, two_sizes))).exit_code == 2
