"""The device check without a device: its comparisons on emulated kernels, stages, reports."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gpu_check
import gpu_plugin
import gpu_report
import gpu_rivals
import gpu_sanitizer
import gpu_steps
import gpu_tensorrt
import gpu_timing
import numpy as np
import pytest
from emulated import compile_emulation
from fake_cupy import EMULATION, fake_cupy
from gpu_cases import (
    KEY_TYPES,
    SIMILARITIES,
    SMALL,
    Case,
    check,
    draw_case,
    every_case,
    in_two_stages,
    round_keys,
)
from gpu_correctness import (
    Host,
    answer,
    check_all,
    check_host,
    cupy_host,
    hosts,
    node_inputs,
    node_outputs,
)
from gpu_environment import absence, packages
from gpu_steps import check_steps
from gpu_tally import Absent, tally
from gpu_timing import Bench, Effort, Shape
from plugin_library import built_harness, find_headers

from knnmoe.runtime.blend import Blended, knn_blend
from knnmoe.runtime.probes import Module
from knnmoe.runtime.two_stage import scan_scores
from knnmoe.trt_plugins import library, step_kernels
from memories import random_memory

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "benchmarks" / "gpu_check.py"
TINY = replace(SMALL, tokens=(1, 3, 8, 17))
BRIEF = Effort(figure_ms=0.01, fewest=2, most=2)


def perfect(case: Case) -> Blended:
    """The reference itself as a host."""
    got = knn_blend(case.x, case.r, case.memory, case.state, case.lengths, dtype=np.float64)
    return Blended(
        *(getattr(got, name).astype(np.float32) for name in ("rows", "confidence")),
        got.neighbors,
        got.similarities.astype(np.float32),
        got.state.astype(np.float32),
    )


# --- comparisons


@pytest.mark.parametrize("which", range(4))
def test_the_kernels_pass_on_the_emulated_device(which: int) -> None:
    cupy = fake_cupy()
    host = list(hosts(cupy))[which]
    tiny = replace(TINY, entries=50, hidden=(1, 24))
    record = check_host(host, every_case(which, tiny), float("inf"))
    assert record["status"] == "passed", record["failures"]
    assert record["cases"] == len(TINY.tokens) * len(host.key_types) * len(SIMILARITIES)
    assert record["largest_deviation"].keys() == set(host.key_types)


@pytest.mark.parametrize("output", ["rows", "confidence", "neighbors", "similarities", "state"])
def test_a_wrong_output_is_caught(output: str) -> None:
    cupy = fake_cupy()
    right = cupy_host(cupy)

    def run(case: Case) -> Blended:
        got = right.run(case)
        wrong = getattr(got, output).copy()
        wrong.reshape(-1)[-1] += 1 if output == "neighbors" else 1e-3
        return replace(got, **{output: wrong})

    record = check_host(Host("wrong", run), every_case(5, TINY), float("inf"))
    assert record["status"] == "failed"
    assert record["failures"][0]["traceback"]
    assert isinstance(record["failures"][0]["seed"], int)


@pytest.mark.parametrize("output", ["rows", "confidence", "neighbors", "similarities", "state"])
def test_an_output_that_was_not_written_is_caught(
    output: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def forgetful(cupy: Any, bound: Any) -> Blended:
        got = answer(cupy, bound)
        stale = np.full_like(getattr(got, output), -7 if output == "neighbors" else np.nan)
        return replace(got, **{output: stale})

    monkeypatch.setattr("gpu_correctness.answer", forgetful)
    record = check_host(cupy_host(fake_cupy()), every_case(6, TINY), float("inf"))
    assert record["status"] == "failed"


def test_ties_that_go_to_the_higher_index_are_caught() -> None:
    caught = 0
    for case in every_case(7, TINY):
        got = perfect(case)
        k = min(case.memory.k, case.memory.n_valid)
        ids = got.neighbors.copy()
        for row in ids:  # the last copy of the best key instead of the first
            copies = np.flatnonzero(case.copies[: case.memory.n_valid] == case.copies[row[0]])
            if k and len(copies) > np.isin(row[:k], copies).sum():
                row[0] = copies[-1]
        if (ids == got.neighbors).all():
            check(case, got)
            continue
        with pytest.raises(AssertionError, match="lower index"):
            check(case, replace(got, neighbors=ids))
        caught += 1
    assert caught


def test_keys_that_were_rounded_too_coarsely_are_caught() -> None:
    case = draw_case(3, SMALL, 5, "i8", "cosine")
    while case.memory.n_valid < 10 or case.memory.keys.shape[1] < 24:
        case = draw_case(case.seed + 1, SMALL, 5, "i8", "cosine")
    check(case, perfect(case))
    other = replace(case.exact, keys=0.5 * case.exact.keys)
    with pytest.raises(AssertionError, match="rounding of the keys"):
        check(replace(case, exact=other), perfect(case))


@pytest.mark.parametrize("key_type", KEY_TYPES)
def test_every_kind_of_case_is_drawn(key_type: Any) -> None:
    cases = [c for c in every_case(1, SMALL, rounds=4) if c.key_type == key_type]
    valid = {(c.memory.n_valid, len(c.memory.keys)) for c in cases}
    assert any(n == 0 for n, _ in valid)
    assert any(n == 1 for n, _ in valid)
    assert any(n == size - 1 for n, size in valid)
    assert any(n == size for n, size in valid)
    assert any(c.memory.k > len(c.memory.keys) for c in cases)
    assert any(len(set(c.lengths)) > 1 for c in cases)
    assert {c.values.dtype.name for c in cases} == {"float16", "float32"}


def test_a_host_that_raises_is_a_failure_and_stops_after_a_few() -> None:
    def run(case: Case) -> Blended:
        raise RuntimeError("the device is gone")

    record = check_host(Host("broken", run), every_case(0, TINY), float("inf"))
    assert record["status"] == "failed"
    assert record["cases"] == len(record["failures"]) == 5
    assert "the device is gone" in record["failures"][0]["error"]


def test_a_host_that_is_absent_says_why() -> None:
    def run(case: Case) -> Blended:
        raise Absent("no such library")

    record = check_host(Host("absent", run), every_case(0, TINY), float("inf"))
    assert (record["status"], record["why"]) == ("absent", "no such library")


def test_at_least_one_case_is_run_when_there_is_no_time() -> None:
    record = check_host(Host("reference", perfect), every_case(0, TINY), 0.0)
    assert (record["cases"], record["all_cases"]) == (1, False)
    tiny = replace(TINY, entries=50, hidden=(8,), tokens=(1,))
    everything = check_all(fake_cupy(), 0, tiny, 0.0)
    assert all(host["cases"] == 1 for host in everything.values())


def test_the_step_kernels_pass_on_the_emulated_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gpu_steps.TOKENS", (1, 5))
    monkeypatch.setattr("gpu_steps.APPENDS", 8)
    record = check_steps(fake_cupy(), 1, float("inf"))
    assert record["status"] == "passed", record["failures"]
    assert record["largest_deviation"].keys() == {"route", "assign", "heaviest", "append"}


@pytest.mark.parametrize("kind", ["route", "assign", "heaviest", "append"])
def test_a_step_kernel_that_writes_too_much_is_caught(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A guard is hit by each kernel that is replaced by one that writes behind its output."""
    monkeypatch.setattr("gpu_steps.Output.read", overrun(gpu_steps.Output.read))
    monkeypatch.setattr("gpu_steps.TOKENS", (1,))
    checks = gpu_steps.Steps(cupy := fake_cupy(), step_kernels.StepKernels(cupy=cupy)).checks(2)
    record = tally([check for check in checks if check.group == kind], float("inf"))
    assert record["status"] == "failed"
    assert "behind the output" in record["failures"][0]["error"]


def overrun(read: Any) -> Any:
    def wrong(output: Any) -> Any:
        output.whole[len(output.whole) - 1 :].fill(0)
        return read(output)

    return wrong


def test_candidates_that_a_scan_missed_are_caught() -> None:
    caught = 0
    for drawn in every_case(3, replace(SMALL, entries=200, tokens=(2,)), rounds=4):
        case = in_two_stages(drawn)
        if case.candidates >= case.memory.n_valid:
            continue
        got = perfect(case)  # neighbours of the whole memory, not of the candidates
        scores = scan_scores(case.x.astype(np.float64), case.memory, case.scan, np.float64)
        last = np.argsort(-scores, axis=1)[:, case.candidates + 20 :]
        if not last.size:
            continue
        ids = got.neighbors.copy()
        ids[:, 0] = last[:, 0]
        with pytest.raises(AssertionError):
            check(case, replace(got, neighbors=ids))
        caught += 1
    assert caught


@pytest.fixture(scope="module")
def emulated_plugin() -> gpu_plugin.Libraries:
    headers = find_headers()
    flags = ("-isystem", str(headers), f"-I{library.PLUGIN}", "-Wno-deprecated-declarations")
    return gpu_plugin.Libraries(
        compile_emulation(flags=flags, source="plugin.cpp"), built_harness(headers)
    )


@pytest.mark.parametrize("which", range(3))
def test_the_plugin_passes_on_the_emulated_device(
    emulated_plugin: gpu_plugin.Libraries, which: int
) -> None:
    host = gpu_plugin.plugin_hosts(fake_cupy(), emulated_plugin)[which]
    # The emulated plugin knows no streams: it runs when it is called, captured or not.
    tiny = replace(TINY, entries=100 if which == 2 else 50, hidden=(1, 24))
    with EMULATION:
        record = check_host(host, every_case(4, tiny), float("inf"))
    assert record["status"] == "passed", record["failures"]


def test_a_plugin_that_cannot_be_compiled_is_absent_with_the_way_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    record = gpu_plugin.check_plugin(fake_cupy(), 0, TINY, 0.0, folder=tmp_path)
    assert record["status"] == "absent"
    assert "--prepare" in record["why"]


# --- timing


def python_kernels(cupy: Any) -> Any:
    """The stand-in for CuPy, with what gpu_kernels.cu does written in NumPy."""
    emulated = cupy.RawModule

    def launch_unit_rows(grid: Any, block: Any, args: Any) -> None:
        f32, f16, i8, scales, scales_i8, hidden, seed = args
        rows = np.random.default_rng(int(seed)).normal(size=(grid[0], int(hidden)))
        memory = random_memory(0, entries=2)
        keys = (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)
        ones = np.ones((len(keys), 2), np.float32)
        memory = replace(memory, keys=keys, key_scales=ones)
        for target, key_type in ((f32, "f32"), (f16, "f16"), (i8, "i8")):
            if not isinstance(target, np.uint64):
                target.set(round_keys(memory, key_type)[0])  # type: ignore[arg-type]
        scales.set(ones)
        scales_i8.set(round_keys(memory, "i8")[1])

    kernels: dict[str, Any] = {
        "knnmoe_unit_rows": launch_unit_rows,
        "knnmoe_read": lambda *_: None,
    }

    def make(code: str, options: tuple[str, ...]) -> Any:
        if "knnmoe_unit_rows" in code:
            return SimpleNamespace(get_function=kernels.__getitem__)
        return emulated(code=code, options=options)

    cupy.RawModule = make
    return cupy


@pytest.fixture
def device() -> Any:
    return python_kernels(fake_cupy())


def test_our_kernels_are_timed_in_every_way(device: Any) -> None:
    saved: list[Any] = []
    records = gpu_timing.measure_ours(
        device, BRIEF, float("inf"), lambda r: saved.append(len(r["rows"])), tokens=(1, 4),
        which=[Shape(50, 16), Shape(20, 24)],
    )  # fmt: skip
    rows = records["rows"]
    plain = [row for row in rows if row["key_type"] in KEY_TYPES]
    assert len(plain) == 2 * 3 * 2
    assert saved[-1] == len(rows)
    assert records["left_out"] == []
    for row in rows:
        for kind in ("warm", "cold", "call"):
            assert row[kind]["q1_us"] <= row[kind]["median_us"] <= row[kind]["q3_us"]
            assert row[kind]["repetitions"] >= 2
    assert plain[0]["key_bytes"] == 50 * (16 * 2 + 4)


def test_what_does_not_fit_or_has_no_time_is_named(device: Any) -> None:
    small = python_kernels(fake_cupy(memory_bytes=(1 << 30) + (8 << 20)))
    records = gpu_timing.measure_ours(
        small, BRIEF, float("inf"), lambda r: None, tokens=(1,), which=[Shape(100_000, 256)]
    )
    assert records["rows"] == []
    assert {left["key_type"] for left in records["left_out"]} == set(KEY_TYPES)
    assert all("do not fit" in left["why"] for left in records["left_out"])
    records = gpu_timing.measure_ours(device, BRIEF, 0.0, lambda r: None, which=[Shape(9, 8)])
    assert {left["why"] for left in records["left_out"]} == {"out of time"}


def test_the_bandwidth_of_a_copy_counts_reads_and_writes() -> None:
    device = python_kernels(fake_cupy(memory_bytes=64 << 20))
    found = gpu_timing.measure_bandwidth(device, BRIEF)
    seconds = found["copy"]["median_us"] / 1e6
    assert found["copy_gb_s"] == pytest.approx(2 * found["bytes"] / seconds / 1e9)
    assert found["read_gb_s"] > 0


def test_torch_blends_as_the_reference_does() -> None:
    torch = pytest.importorskip("torch")
    memory = random_memory(3, entries=60, hidden_size=32, k=8)
    rng = np.random.default_rng(0)
    x = (memory.keys[:5] + memory.center + 0.1 * rng.normal(size=(5, 32))).astype(np.float32)
    r = rng.normal(size=(5, 6)).astype(np.float32)
    exact = knn_blend(x, r, memory, np.zeros((1, 2)), np.array([5]))
    arrays = (x, r, memory.keys, memory.values, memory.center)
    rows, ids = gpu_rivals.torch_blend(*(torch.from_numpy(a) for a in arrays), 8)
    np.testing.assert_array_equal(ids.numpy(), exact.neighbors)
    np.testing.assert_allclose(rows.numpy(), exact.rows, atol=1e-5)


def test_faiss_reads_the_keys_where_they_are_and_agrees(
    device: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    faiss = pytest.importorskip("faiss")
    stand_in = SimpleNamespace(
        **{
            **vars(faiss),
            "get_num_gpus": lambda: 1,
            "StandardGpuResources": lambda: None,
            "GpuIndexFlatConfig": SimpleNamespace,
            "GpuIndexFlatIP": lambda resources, hidden, config: faiss.IndexFlatIP(hidden),
        }
    )
    monkeypatch.setitem(sys.modules, "faiss", stand_in)
    records = gpu_rivals.measure_rival(
        device, gpu_rivals.Faiss, BRIEF, float("inf"), lambda r: None, tokens=(1, 4),
        which=[Shape(60, 16)],
    )  # fmt: skip
    assert [row["tokens"] for row in records["rows"]] == [1, 4, 1, 4]
    assert {row["key_type"] for row in records["rows"]} == {"f16", "f32"}
    assert all(row["agreement"] == 1 for row in records["rows"])


def test_cuvs_is_asked_for_inner_products(device: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def search(index: Any, queries: Any, k: int) -> Any:
        scores = queries.get().astype(np.float64) @ index.T
        ids = np.argsort(-scores, axis=1, kind="stable")[:, :k]
        return None, device.asarray(ids)

    def build(keys: Any, metric: str) -> Any:
        assert metric == "inner_product"
        return keys.get().astype(np.float64)

    module = SimpleNamespace(brute_force=SimpleNamespace(build=build, search=search))
    monkeypatch.setitem(sys.modules, "cuvs", SimpleNamespace(neighbors=module))
    monkeypatch.setitem(sys.modules, "cuvs.neighbors", module)
    records = gpu_rivals.measure_rival(
        device, gpu_rivals.Cuvs, BRIEF, float("inf"), lambda r: None, tokens=(2,),
        which=[Shape(60, 16)],
    )  # fmt: skip
    assert all(row["agreement"] > 0.9 for row in records["rows"])
    assert len(records["rows"]) == 2


@pytest.mark.parametrize("rival", [gpu_rivals.Faiss, gpu_rivals.Cuvs])
def test_a_rival_that_is_missing_is_absent(
    rival: Any, device: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("faiss", "cuvs", "cuvs.neighbors"):
        monkeypatch.setitem(sys.modules, name, None)
    record = gpu_rivals.measure_rival(device, rival, BRIEF, float("inf"), lambda r: None)
    assert record["status"] == "absent"
    assert "not installed" in record["why"]


# --- stages


def options(tmp_path: Path, *more: str) -> Any:
    return gpu_check.parse(["--output", str(tmp_path / "report.json"), "--seed", "3", *more])


def test_a_stage_that_raises_is_recorded_and_the_others_run(
    tmp_path: Path, device: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(job: Any) -> Any:
        raise RuntimeError("out of paper")

    stages = {
        **gpu_check.STAGES,
        "bandwidth": gpu_check.Stage(broken, 1),
        "correctness": gpu_check.Stage(lambda job: {"status": "passed", "hosts": {}}, 1),
    }
    monkeypatch.setattr(gpu_check, "STAGES", stages)

    def run(name: str, seconds: float) -> Any:
        deadline = time.monotonic() + seconds
        job = gpu_check.Job(device, 3, True, deadline, None, lambda record: None)
        return gpu_check.run_stage(name, job)

    chosen = options(tmp_path, "--stages", "bandwidth,correctness")
    assert gpu_check.check(chosen, device, run) == 0
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["stages"]["bandwidth"]["status"] == "failed"
    assert "out of paper" in report["stages"]["bandwidth"]["traceback"]
    assert report["stages"]["correctness"]["status"] == "passed"
    assert report["device"] == "emulated device"
    assert report["seed"] == 3


def test_a_wrong_kernel_gives_exit_code_1_and_is_printed(
    tmp_path: Path, device: Any, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    def wrong(cupy: Any, bound: Any) -> Blended:
        got = answer(cupy, bound)
        return replace(got, rows=got.rows + np.float32(0.01))

    monkeypatch.setattr("gpu_correctness.answer", wrong)
    monkeypatch.setattr(gpu_check, "WIDE", TINY)

    def run(name: str, seconds: float) -> Any:
        job = gpu_check.Job(device, 3, True, time.monotonic(), None, lambda record: None)
        return gpu_check.run_stage(name, job)

    assert gpu_check.check(options(tmp_path, "--stages", "correctness"), device, run) == 1
    printed = capsys.readouterr().out
    assert "[failed] CupyBlend: 1 cases, 1 WRONG" in printed
    assert "seed " in printed


def test_a_stage_gets_its_share_of_the_time_that_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[tuple[str, float]] = []

    def run(name: str, seconds: float) -> Any:
        given.append((name, seconds))
        return {"status": "done"}

    gpu_check.run_stages(
        ["bandwidth", "decode"], run, {"stages": {}, "seed": 0}, 100.0, lambda report: None
    )
    assert given[0][1] == gpu_check.LEAST_SECONDS  # its weight gives less
    assert 99 < given[1][1] <= 100
    report = gpu_check.run_stages(["decode"], run, {"stages": {}}, 1.0, lambda report: None)
    assert report["stages"]["decode"]["why"] == "out of time"


@pytest.mark.parametrize(
    ("code", "left", "status", "why"),
    [
        (-11, None, "failed", "signal 11"),
        (1, {"status": "done"}, "failed", "exit code 1"),
        (-9, {"status": "not finished", "rows": [1]}, "not finished", "by force"),
        (-9, {"hosts": {"a": {"status": "failed"}}}, "failed", "by force"),
        (0, {"status": "done", "rows": []}, "done", None),
        (0, None, "failed", "exit code 0"),
    ],
)
def test_how_a_stage_process_ended_is_in_its_record(
    tmp_path: Path, code: int, left: Any, status: str, why: str | None
) -> None:
    file = tmp_path / "records.json"
    if left is not None:
        file.write_text(json.dumps(left))
    record = gpu_check.read_records(file, code, "last words", 12.0)
    assert record["status"] == status
    assert (why or "") in record.get("why", "")
    if left and "rows" in left:
        assert record["rows"] == left["rows"]


def test_stages_run_in_processes_of_their_own(tmp_path: Path) -> None:
    """The whole way from the command line and back, on a stand-in for CuPy."""
    (tmp_path / "cupy.py").write_text(
        "import sys\n"
        f"sys.path += [{str(ROOT / 'tests' / 'trt_plugins')!r}, {str(ROOT / 'tests')!r}]\n"
        "import fake_cupy\n"
        "sys.modules['cupy'] = fake_cupy.fake_cupy()\n"
    )
    target = tmp_path / "report.json"
    done = subprocess.run(
        [
            sys.executable, str(SCRIPT), "--stages", "compile,bandwidth,cuvs", "--seconds", "40",
            "--output", str(target), "--commit", "abc",
        ],
        env={**os.environ, "PYTHONPATH": str(tmp_path)}, capture_output=True, text=True,
        cwd=tmp_path, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    report = json.loads(target.read_text())
    assert report["commit"] == "abc"
    states = {name: stage["status"] for name, stage in report["stages"].items()}
    assert states == {"compile": "done", "bandwidth": "failed", "cuvs": "absent"}
    assert "run_read" in report["stages"]["bandwidth"]["traceback"]  # no stand-in for that kernel
    assert "[absent] cuvs" in done.stdout
    assert "Targets:" in done.stdout


def test_every_kernel_is_compiled_and_its_resources_are_kept(device: Any) -> None:
    job = gpu_check.Job(device, 0, True, time.monotonic(), None, lambda record: None)
    files = gpu_check.compilation(job)["files"]
    kernels = [name for file in files.values() for name in file["kernels"]]
    assert {"knnmoe_decode_f16_1", "knnmoe_step_append", "knnmoe_unit_rows"} <= set(kernels)
    assert len(kernels) == len(set(kernels))


def test_without_nvcc_nothing_is_prepared_and_the_reason_is_said(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: Any
) -> None:
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    monkeypatch.setattr(gpu_check, "PREPARED", tmp_path / "gpu")
    assert gpu_check.main(["--prepare"]) == 1
    assert "nvcc" in capsys.readouterr().err
    assert not (tmp_path / "gpu").exists()


def test_without_tensorrt_its_stage_is_absent(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("tensorrt", "tensorrt_rtx", "tensorrt_rtx_libs", "tensorrt_rtx_bindings"):
        monkeypatch.setitem(sys.modules, name, None)
    record = gpu_tensorrt.check_engines(fake_cupy(), 0, time.monotonic())
    assert record["status"] == "absent"
    assert set(record["hosts"]) == {"tensorrt", "tensorrt_rtx"}


def test_the_model_of_the_node_is_valid_and_fits_the_case() -> None:
    onnx = pytest.importorskip("onnx")
    case = draw_case(1, SMALL, 3, "f16", "rbf")
    outputs = node_outputs(fake_cupy(), case)
    content = gpu_tensorrt.node_model(node_inputs(case), outputs, "rbf")
    model = onnx.load_from_string(content)
    (node,) = model.graph.node
    assert (node.op_type, node.domain) == ("KnnBlend", "knnmoe")
    assert {a.name: a.s for a in node.attribute}["similarity"] == b"rbf"
    types = {i.name: i.type.tensor_type.elem_type for i in model.graph.input}
    assert types["keys"] == onnx.TensorProto.FLOAT16
    assert types["n_valid"] == onnx.TensorProto.INT64


def test_unknown_stages_are_refused() -> None:
    with pytest.raises(SystemExit) as stopped:
        gpu_check.parse(["--stages", "decode,lunch"])
    assert stopped.value.code == 2


def test_engines_are_built_only_when_asked_for() -> None:
    assert "tensorrt" not in gpu_check.parse([]).stages
    assert gpu_check.parse(["--tensorrt"]).stages[-1] == "tensorrt"
    assert gpu_check.parse(["--quick"]).seconds < gpu_check.parse([]).seconds < 600


def has_device() -> bool:
    cupy = pytest.importorskip("cupy")
    try:
        return bool(cupy.cuda.runtime.getDeviceCount())
    except cupy.cuda.runtime.CUDARuntimeError:
        return False


def test_without_a_device_it_says_so_and_writes_nothing(tmp_path: Path) -> None:
    if has_device():
        pytest.skip("there is a device")
    target = tmp_path / "report.json"
    done = subprocess.run(
        [sys.executable, str(SCRIPT), "--output", str(target)], capture_output=True, text=True,
        cwd=tmp_path, check=False,
    )  # fmt: skip
    assert done.returncode == 1
    assert "CUDA driver: missing, or too old" in done.stderr
    assert not done.stdout
    assert not target.exists()


def test_the_script_needs_no_package_but_numpy_and_cupy() -> None:
    """Nor an installed knnmoe: it finds the checkout's own."""
    program = (
        "import sys\n"
        "class Refuse:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name.partition('.')[0] in sys.argv[2].split(','):\n"
        "            raise ModuleNotFoundError(name, name=name)\n"
        "sys.meta_path.insert(0, Refuse())\n"
        "sys.path = [p for p in sys.path if not p.endswith('/src')]\n"
        "sys.path.insert(0, sys.argv[1])\n"
        "import gpu_check\n"
        "print(sys.modules['knnmoe'].__file__)\n"
    )
    absent = "click,rich,safetensors,tokenizers,onnxruntime,onnx,torch,faiss,pytest,transformers"
    done = subprocess.run(
        [sys.executable, "-c", program, str(SCRIPT.parent), absent], capture_output=True,
        text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == str(ROOT / "src" / "knnmoe" / "__init__.py")


# --- compute-sanitizer


CLEAN = "subset: 12 cases\n========= ERROR SUMMARY: 0 errors\n"
RACES = (
    "========= Error: Race reported between Write access at knnmoe_decode_f16_1\n"
    "========= RACECHECK SUMMARY: 2 hazards displayed (1 errors, 1 warnings)\n"
)


@pytest.mark.parametrize(
    ("output", "code", "status"),
    [
        (CLEAN, 0, "passed"),
        ("========= RACECHECK SUMMARY: 0 hazards displayed (0 errors, 0 warnings)\n", 0, "passed"),
        (RACES, 0, "failed"),
        (CLEAN, 1, "failed"),
        ("========= Error: Device not supported\n", 0, "failed"),
    ],
)
def test_a_sanitizer_passes_only_with_a_summary_of_zeros(
    output: str, code: int, status: str
) -> None:
    record = gpu_sanitizer.read_summary(output, code)
    assert record["status"] == status
    if output is RACES:
        assert "Race reported" in record["output"]


def test_every_tool_is_run_over_the_subset(tmp_path: Path, monkeypatch: Any) -> None:
    tool = tmp_path / "compute-sanitizer"
    tool.write_text(f"#!/bin/sh\necho 'subset: 12 cases'\necho '{CLEAN.splitlines()[1]}'\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    found = gpu_sanitizer.sanitize(["unused.py"], time.monotonic() + 20)
    assert found["status"] == "passed"
    assert list(found["tools"]) == list(gpu_sanitizer.TOOLS)
    assert all(record["cases"] == 12 for record in found["tools"].values())


def test_a_tool_that_is_stopped_leaves_nothing_running(tmp_path: Path, monkeypatch: Any) -> None:
    tool, started = tmp_path / "compute-sanitizer", tmp_path / "watched"
    tool.write_text(f'#!/bin/sh\nsleep 60 &\necho $! > "{started}"\necho begun\nwait\n')
    tool.chmod(0o755)
    monkeypatch.setattr(gpu_sanitizer, "TOOLS", ("memcheck",))
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setattr(gpu_sanitizer, "LEAST_SECONDS", 0.5)
    found = gpu_sanitizer.sanitize(["unused.py"], time.monotonic())
    assert found["status"] == "not finished"
    assert found["tools"]["memcheck"]["output"] == "begun\n"
    watched = int(started.read_text())
    until = time.monotonic() + 10  # a signal takes a moment to arrive
    while running(watched) and time.monotonic() < until:
        time.sleep(0.01)
    assert not running(watched)


def running(process: int) -> bool:
    """Whether a process is there, and has not ended without anybody asking how."""
    stat = Path("/proc", str(process), "stat")
    return stat.exists() and stat.read_text().rpartition(")")[2].split()[0] != "Z"


def test_without_a_sanitizer_the_stage_is_absent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.which", lambda *args, **kwargs: None)
    found = gpu_sanitizer.sanitize(["unused.py"], time.monotonic() + 20)
    assert found["status"] == "absent"


def test_the_subset_for_the_sanitizer_runs(capsys: Any) -> None:
    chosen = SimpleNamespace(seed=1)
    assert gpu_check.run_subset(chosen, fake_cupy()) == 0
    several = gpu_check.SUBSET_CASES * len([*hosts(fake_cupy()), "steps"])
    assert f"subset: {several} cases" in capsys.readouterr().out


# --- environment and report


def test_every_package_is_found_or_absent_with_a_reason() -> None:
    modules = {
        "cupy": Module("cupy", True, "14.2.0", {"devices": 1}),
        "torch": Module("torch", True, "2.13.0+cpu", {"cuda": None, "cuda_available": False}),
        "triton": Module("triton", True, "3.6.0"),
        "tensorrt": Module("tensorrt", False),
        "tensorrt_rtx": Module("tensorrt_rtx", True, error="OSError: no library"),
        "faiss": Module("faiss", True, "1.15.1", {"gpu_support": False}),
        "cuvs": Module("cuvs", False),
        "onnxruntime": Module("onnxruntime", True, "1.30", {"providers": ["CPUExecutionProvider"]}),
    }
    said = packages(modules)
    assert {name for name, package in said.items() if package["status"] == "found"} == {
        "cupy",
        "triton",
    }
    assert said["faiss-gpu"]["why"] == "faiss 1.15.1 was built without GPU support"
    assert said["tensorrt-rtx"]["why"] == "installed: OSError: no library"
    assert all(package.get("why") for package in said.values() if package["status"] == "absent")
    with_cuda = Module("onnxruntime", True, "1.30", {"providers": ["CUDAExecutionProvider"]})
    assert absence(with_cuda) == ""


def row(host: str, entries: int, warm: float, call: float, **more: Any) -> dict[str, Any]:
    times = {
        kind: {"median_us": t, "q1_us": t, "q3_us": t, "repetitions": 9}
        for kind, t in (("warm", warm), ("cold", warm), ("call", call))
    }
    if host in ("faiss-gpu", "cuvs"):
        times = {"call": times["call"]}
    key_bytes = entries * (2048 * 2 + 4)
    common = {"entries": entries, "hidden": 2048, "tokens": 1, "key_type": "f16"}
    return {"host": host, **common, "key_bytes": key_bytes, **times, **more}


def synthetic(warm: float = 170.0, two_stage: float = 90.0, torch: float = 400.0) -> dict[str, Any]:
    fast = row("knnmoe", 100_000, warm, warm + 20)
    two = row("knnmoe", 100_000, two_stage, 99.0, key_type=gpu_timing.TWO_STAGE)
    return {
        "schema": gpu_report.SCHEMA,
        "seed": 1,
        "stages": {
            "bandwidth": {"status": "done", "copy_gb_s": 3000.0, "read_gb_s": 3100.0,
                          "bytes": 1 << 30, "seconds": 1.0},
            "decode": {"status": "done", "rows": [fast, two], "left_out": [
                {"entries": 10, "hidden": 256, "key_type": "f32", "why": "out of time"}]},
            "torch": {"status": "done", "rows": [row("torch", 100_000, torch, torch)]},
            "faiss-gpu": {"status": "absent", "why": "faiss is not installed"},
        },
    }  # fmt: skip


def by_name(report: dict[str, Any]) -> dict[str, str]:
    return {v["name"].split(" (")[0]: v["status"] for v in gpu_report.finish(report)["verdicts"]}


def test_targets_that_are_met_are_said_to_be() -> None:
    found = by_name(synthetic())
    assert list(found.values()) == ["met", "met", "met", "not measured", "not measured", "met"]


@pytest.mark.parametrize(
    ("changed", "position"),
    [({"warm": 230.0}, 0), ({"torch": 100.0}, 1), ({"two_stage": 150.0}, 5)],
)
def test_targets_that_are_missed_are_said_to_be(changed: Any, position: int) -> None:
    assert list(by_name(synthetic(**changed)).values())[position] == "missed"


def test_what_was_not_measured_says_why() -> None:
    found = gpu_report.finish(synthetic())["verdicts"]
    whys = {verdict["name"]: verdict.get("why", "") for verdict in found}
    assert any("faiss is not installed" in why for why in whys.values())
    assert any(why == "stage cuvs was not run" for why in whys.values())
    nothing = gpu_report.finish({"stages": {}})["verdicts"]
    assert {verdict["status"] for verdict in nothing} == {"not measured"}
    crashed = synthetic()
    crashed["stages"]["decode"] = {"status": "failed", "why": "signal 11"}
    assert "signal 11" in gpu_report.finish(crashed)["verdicts"][0]["why"]


def test_the_share_of_the_bandwidth_is_of_the_bytes_of_the_keys() -> None:
    report = gpu_report.finish(synthetic(warm=200.0))
    warm = report["stages"]["decode"]["rows"][0]["warm"]
    assert warm["gb_s"] == pytest.approx(100_000 * 4100 / 200e-6 / 1e9)
    assert warm["share_of_copy"] == pytest.approx(warm["gb_s"] / 3000)


def test_the_text_names_stages_times_gaps_and_targets() -> None:
    report = gpu_report.finish(synthetic())
    parts = [gpu_report.describe_stage(name, stage) for name, stage in report["stages"].items()]
    text = "\n".join([*parts, gpu_report.summarize(report)])
    assert "[absent] faiss-gpu" in text
    assert "copy 3000 GB/s, read 3100 GB/s (1024 MiB)" in text
    assert "not measured: 1 (out of time): N=10 D=256 f32" in text
    assert "[met] decode, share of the copy bandwidth" in text
    assert "100,000" in text


@pytest.mark.parametrize(
    ("stage", "status", "code"),
    [
        ("correctness", "failed", 1),
        ("correctness", "not finished", 1),  # what hangs is wrong, too
        ("plugin", "failed", 1),
        ("plugin", "absent", 0),
        ("sanitizer", "failed", 1),
        ("sanitizer", "not finished", 0),
        ("tensorrt", "failed", 1),
        ("decode", "failed", 0),
        ("torch", "failed", 0),
    ],
)
def test_only_stages_that_check_results_decide_the_exit_code(
    stage: str, status: str, code: int
) -> None:
    assert gpu_report.exit_code({"stages": {stage: {"status": status}}}) == code


def test_the_report_is_named_after_the_device(tmp_path: Path) -> None:
    path = gpu_report.default_path(tmp_path / "results", "NVIDIA H100 80GB HBM3")
    assert path.name == "gpu_check-nvidia-h100-80gb-hbm3.json"
    gpu_report.write({"a": np.float32(1)}, path)
    assert [file.name for file in path.parent.iterdir()] == [path.name]


def test_a_bench_on_the_device_makes_rows_of_length_one(device: Any) -> None:
    bench = Bench(device, BRIEF)
    with bench.stream:
        keys = bench.unit_rows(5, 12, ("f32", "i8"))
        lengths = np.linalg.norm(keys["f32"][0].get(), axis=1)
        restored = keys["i8"][0].get() * keys["i8"][1].get()[:, :1]
        np.testing.assert_allclose(lengths, 1, atol=1e-6)
        np.testing.assert_allclose(restored, keys["f32"][0].get(), atol=0.01)
