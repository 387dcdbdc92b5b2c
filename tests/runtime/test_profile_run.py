"""`knnmoe profile` over a tiny model: what is in its record, and how it ends."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner, Result

from knnmoe.runtime.cli import main
from knnmoe.runtime.compressed import first_entries
from knnmoe.runtime.memory import MemoryPack
from knnmoe.runtime.model import Model
from knnmoe.runtime.pipeline import Pipeline
from knnmoe.runtime.profiling import bounds, run
from knnmoe.runtime.profiling.inside import look_inside, split_runs, sum_stages
from knnmoe.runtime.profiling.record import ProfileRecord, from_json, read_record

QUICK = ("--steps", 3, "--prefills", 2, "--warmup", 1, "--prompt-length", 8, "--context", 16)
PARTS = ["segment 0", "gate 0", "segment 1", "gate 1", "segment 2", "gate 2", "segment 3"]


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine that is looked at for a moment only."""
    monkeypatch.setattr(bounds, "WORKING_SETS", (1 << 16, 1 << 20))
    monkeypatch.setattr(bounds, "PASS_BYTES", 1 << 20)
    monkeypatch.setattr(bounds, "GEMM_SIZE", 64)
    monkeypatch.setattr(run, "INSIDE_SAMPLES", 2)
    monkeypatch.setattr(run, "spin", lambda: {"lost_share": 0.0})


def invoke(*arguments: object) -> Result:
    return CliRunner().invoke(main, ["profile", *(str(a) for a in arguments)])


def profiled(*arguments: object, code: int = 0) -> ProfileRecord:
    done = invoke(*arguments, "--json")
    assert done.exit_code == code, done.output
    return from_json(json.loads(done.stdout, parse_constant=pytest.fail))


def test_the_json_is_a_record_with_every_part(tiny_bundle: Path, tiny_pack: Path) -> None:
    record = profiled(tiny_bundle, "--memory", tiny_pack, *QUICK)
    shapes = [(p.phase, p.tokens, p.past, p.memory_entries) for p in record.points]
    assert shapes == [
        ("decode", 1, 16, 300), ("decode", 1, 16, 0), ("prefill", 8, 0, 300), ("prefill", 8, 0, 0)
    ]  # fmt: skip
    assert [len(point.whole_ms) for point in record.points] == [3, 3, 2, 2]
    for point in record.points:
        assert [part.name for part in point.parts] == [*PARTS, "runtime"]
        assert np.sum([part.ms for part in point.parts], axis=0) == pytest.approx(point.whole_ms)
    gate = record.points[0].parts[1]
    assert gate.backend == "onnx"
    assert set(gate.inside) == {"scan", "select", "gather", "blend", "rule"}
    assert all(len(samples) == 2 for samples in gate.inside.values())
    memory = record.subject.memory
    assert memory is not None
    assert (memory.entries, memory.gates, memory.backends) == (300, 3, ("onnx",))
    assert record.finished
    assert record.machine_bounds is not None
    assert all(part.bound for part in record.points[0].parts[:-1])
    held = record.resident
    assert held.retrieval_memory == sum(
        array.nbytes for array in _inputs(tiny_bundle, tiny_pack).values()
    )
    assert held.weights
    assert (held.peak_rss or 0) > held.weights


def test_bytes_are_counted_before_what_only_a_profile_takes(
    tiny_bundle: Path, tiny_pack: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Arrays to read from, and graphs that are loaded again to look into."""
    order: list[str] = []

    def noted(name: str) -> None:
        original = getattr(run, name)

        def call(*arguments: Any, **options: Any) -> Any:
            order.append(name)
            return original(*arguments, **options)

        monkeypatch.setattr(run, name, call)

    for name in ("account", "measure_bounds", "look_inside"):
        noted(name)
    profiled(tiny_bundle, "--memory", tiny_pack, *QUICK)
    assert order[:2] == ["account", "measure_bounds"]
    assert "look_inside" in order[2:]


def _inputs(bundle: Path, pack: Path) -> dict[Any, Any]:
    layout: Any = Model.load(bundle, memory=pack).pipeline.layout
    gates = enumerate(layout.wiring.gates)
    return {(n, name): array for n, gate in gates for name, array in gate.inputs.items()}


def test_lists_make_a_grid_and_layouts_are_measured_in_one_run(
    tiny_bundle: Path, tiny_pack: Path
) -> None:
    more = ("--layout", "split,fused", "--entries", "100,all,0", "--batch", "1,3", "--no-bounds")
    record = profiled(tiny_bundle, "--memory", tiny_pack, *QUICK, *more, "--phase", "decode")
    found = {(p.layout, p.batch, p.memory_entries) for p in record.points}
    assert found == {(w, b, n) for w in ("split", "fused") for b in (1, 3) for n in (300, 100, 0)}
    fused = [point for point in record.points if point.layout == "fused"]
    assert [part.name for part in fused[0].parts] == ["fused", "runtime"]
    assert record.machine_bounds is None
    assert record.subject.layouts == ("split", "fused")


def test_a_record_is_written_and_options_of_old_still_work(
    tiny_bundle: Path, tmp_path: Path
) -> None:
    file = tmp_path / "record.json"
    more = ("--prompt-length", "4", "--no-bounds", "--output", file)
    done = invoke(tiny_bundle, *QUICK, *more)
    assert done.exit_code == 0, done.output
    record = read_record(file)
    assert record.settings.prompts == (4, 8)  # given twice
    assert record.subject.memory is None
    assert {point.memory_entries for point in record.points} == {0}
    for word in ("segment 0", "gate 2", "decode after 16", "prompt of 8", "Bytes: weights"):
        assert word in done.stdout


def test_an_interrupt_gives_what_was_measured_and_says_so(
    tiny_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, steps = Pipeline.timed_step, iter(range(100))

    def timed_step(self: Pipeline, *arguments: Any) -> Any:
        if next(steps) == 9:
            raise KeyboardInterrupt
        return whole(self, *arguments)

    monkeypatch.setattr(Pipeline, "timed_step", timed_step)
    file = tmp_path / "record.json"
    more = ("--steps", 40, "--warmup", 1, "--context", 16, "--output", file)
    record = profiled(tiny_bundle, *more, code=130)
    assert not record.finished
    assert sum(len(point.whole_ms) for point in record.points) > 0
    assert "interrupted" in record.warnings[0]
    assert read_record(file) == record


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (("--entries", "100"), "--entries: needs a memory"),
        (("--variant", "logits"), "--variant: needs a memory"),
        (("--output", "missing/record.json"), "--output: names a file in a directory"),
        (("--html", "missing/page.html"), "--html: names a file in a directory"),
        (("--output", "."), "--output: names a directory"),
        (("--batch", "0"), "batch: out of range"),
    ],
)
def test_what_does_not_fit_is_refused(
    tiny_bundle: Path, arguments: tuple[str, ...], named: str
) -> None:
    done = invoke(tiny_bundle, *arguments)
    assert done.exit_code == 1
    assert named in done.stderr


def test_a_list_of_no_numbers_is_wrong_usage(tiny_bundle: Path) -> None:
    done = invoke(tiny_bundle, "--context", "16,many")
    assert done.exit_code == 2
    assert "is no list of numbers" in done.output


@pytest.mark.parametrize(
    ("backend", "tokens", "stages"),
    [
        ("onnx", 1, {"scan", "select", "gather", "blend", "rule"}),
        ("numpy", 8, {"scan", "select", "blend", "rule"}),
        ("two-stage", 1, {"scan", "select", "gather", "blend", "rule"}),
        ("two-stage", 8, {"scan", "select", "gather", "blend", "rule"}),  # scored exactly
    ],
)
def test_gates_are_looked_into_without_changing_what_they_do(
    tiny_bundle: Path, tiny_pack: Path, backend: str, tokens: int, stages: set[str]
) -> None:
    model = Model.load(tiny_bundle, memory=tiny_pack, gate=backend)
    cache = model.pipeline.new_cache(1, 20)
    model.pipeline.step(cache, np.arange(tokens)[None] % 50)
    parts = model.pipeline.bound_parts(cache, tokens)
    ids = parts.gates["gate 1"].buffers.expert_ids
    before = ids.copy()
    cache.states[...] = 0  # what the gates knew before that step
    found = look_inside(parts, samples=3)
    assert list(found) == ["gate 0", "gate 1", "gate 2"]
    assert set(found["gate 1"]) == stages
    assert {len(times) for times in found["gate 1"].values()} == {3}
    np.testing.assert_array_equal(ids, before)


def test_segments_and_fused_graphs_are_looked_into_if_asked_for(
    tiny_bundle: Path, tiny_pack: Path
) -> None:
    model = Model.load(tiny_bundle, memory=tiny_pack, layout="fused")
    cache = model.pipeline.new_cache(1, 20)
    model.pipeline.step(cache, np.arange(8)[None])
    parts = model.pipeline.bound_parts(cache, 8)
    assert look_inside(parts, samples=1) == {}
    (stages,) = look_inside(parts, samples=1, depth="all").values()
    assert {"attention", "experts", "projections", "scan", "select", "blend"} <= set(stages)


def test_operators_are_told_apart_by_what_they_do_to_how_much() -> None:
    def node(name: str, operator: str, width: int, ts: int) -> dict[str, Any]:
        shape = [{"float": [1, width]}]
        args = {"op_name": operator, "output_type_shape": shape}
        return {"cat": "Node", "name": f"{name}_kernel_time", "ts": ts, "dur": 1000, "args": args}

    run_ = {"cat": "Session", "name": "model_run", "ts": 10, "dur": 50, "args": {}}
    events = [
        run_,
        node("_inlfunc_KnnBlend_node_1", "Gemm", 500, 11),
        node("_inlfunc_KnnBlend_node_2", "Where", 500, 12),  # the mask over all entries
        node("_inlfunc_KnnBlend_node_3", "TopK", 8, 13),
        node("_inlfunc_KnnBlend_node_4", "Gather", 8, 14),
        node("_inlfunc_KnnBlend_node_5", "Mul", 8, 15),
        node("node_6", "Softmax", 16, 16),
        node("node_7", "Softmax", 16, 99),  # of no run
    ]
    (nodes,) = split_runs(events)
    found = sum_stages(nodes, 500, graph="gate")
    assert found == {"scan": 2.0, "select": 1.0, "gather": 1.0, "blend": 1.0, "rule": 1.0}
    assert sum_stages(nodes[-1:], 0, graph="segment") == {"other": 1.0}
    assert sum_stages(nodes[-1:], 500, graph="retrieval") == {"blend": 1.0}


def test_operators_over_all_entries_are_the_scan_also_where_they_look_at_blocks() -> None:
    def node(op: str, *shape: int) -> dict[str, Any]:
        return {"name": op, "dur": 1000,
                "args": {"op_name": op, "output_type_shape": [{"float": list(shape)}]}}  # fmt: skip

    scan = [node("MatMulNBits", 2, 4096), node("Reshape", 2, 128, 32), node("ReduceMax", 2, 128)]
    # Candidates have many numbers, and more of them than there are entries.
    others = [node("Gather", 2, 32, 2048), node("TopK", 2, 32), node("ReduceMax", 2, 1)]
    found = sum_stages([*scan, *others], 4096, graph="retrieval")
    assert found == {"scan": 3.0, "gather": 1.0, "select": 1.0, "blend": 1.0}


def test_a_smaller_memory_is_the_first_entries_of_the_whole(
    tiny_bundle: Path, tiny_pack: Path
) -> None:
    model = Model.load(tiny_bundle, memory=tiny_pack, gate="numpy-float64")
    part = model.beside(100)
    ids = np.arange(12)[None]
    cache = part.new_cache(1, 12)
    _, records = part.traced_step(cache, ids)
    assert max(record.trace.neighbors.max() for record in records) < 100
    pack = MemoryPack.open(tiny_pack)
    whole = pack.gate_memory(pack.gates[0], model.bundle.manifest.routing)
    cut = first_entries(whole, 100)
    assert cut is not None
    np.testing.assert_array_equal(cut.keys, whole.keys[:100])
    assert cut.n_valid == 100
    assert first_entries(whole, 0) is None
    # The model itself goes on with all of them.
    _, records = model.pipeline.traced_step(model.pipeline.new_cache(1, 12), ids)
    assert max(record.trace.neighbors.max() for record in records) >= 100
