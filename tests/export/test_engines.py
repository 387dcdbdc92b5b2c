"""`knnmoe engines build`: what it writes, what it finds again, and what it refuses."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import onnx
import pytest
from click.testing import CliRunner

from knnmoe.export.engines import build as build_module
from knnmoe.export.engines import cli, settings
from knnmoe.export.engines.build import build
from knnmoe.export.engines.process import environment
from knnmoe.export.engines.settings import BuildSettings, dimension_ranges, limits_for, profile
from knnmoe.export.exporter import export
from knnmoe.export.signed_codes import signed_codes
from knnmoe.runtime.bundle import Bundle, ModelShape, TensorSpec
from knnmoe.runtime.cli import main
from knnmoe.runtime.engines import engine_set
from knnmoe.runtime.engines.engine_set import ENGINES, EngineSet, Limits, find_engines
from knnmoe.runtime.errors import BackendError, EngineError, OutputError, SettingError
from tiny import make_tiny, make_tiny_olmoe

SHAPE = ModelShape(32, 256, 3, 3, 8, 4, 2, 8, 128)
GRAPHS = BuildSettings(backend="onnxruntime", limits=Limits(2, 64, 16, 1000))
RTX = BuildSettings(
    backend="tensorrt_rtx", capabilities=("86", "89", "120"), plugin="none",
    limits=Limits(1, 64, 16, 1000),
)  # fmt: skip


def run(*words: object, **environment: str) -> tuple[int, Any]:
    done = CliRunner(env=environment).invoke(main, ["engines", *map(str, words), "--json"])
    return done.exit_code, json.loads(done.stdout) if done.stdout.startswith("{") else done.output


def needs_rtx() -> None:
    if find_spec("tensorrt_rtx_libs") is None or find_spec("tensorrt_rtx_bindings") is None:
        pytest.skip("tensorrt-rtx is not installed")


def test_the_command_names_what_there_is() -> None:
    assert cli.BACKENDS == engine_set.BACKENDS
    assert sorted(cli.PRECISIONS) == sorted(engine_set.PRECISIONS)
    assert sorted(cli.KEYS) == sorted(engine_set.KEYS)
    assert cli.LAYOUTS == engine_set.LAYOUTS
    assert cli.OPERATORS == settings.OPERATORS


def test_every_free_dimension_has_a_range() -> None:
    limits = Limits(batch=3, context=64, prefill=16, entries=1000)
    specs = (
        TensorSpec("x", "float32", ("tokens", 32)),
        TensorSpec("keys_12", "float32", ("entries_12", 32)),
        TensorSpec("k", "int64", (1,)),
    )
    assert profile(specs, dimension_ranges(limits, "prefill")) == {
        "x": [[1, 32], [16, 32], [48, 32]],
        "keys_12": [[1, 32], [1000, 32], [1000, 32]],
    }
    assert dimension_ranges(limits, "decode")["tokens"] == (1, 1, 3)


def test_limits_fit_the_model_unless_they_are_asked_for() -> None:
    assert limits_for(SHAPE) == Limits(1, 128, 128, 1 << 17)
    assert limits_for(SHAPE, context=64) == Limits(1, 64, 64, 1 << 17)
    too_long = replace(GRAPHS, limits=limits_for(SHAPE, context=4096))
    with pytest.raises(SettingError, match="context: out of range; expected 1 to 128; found 4096"):
        too_long.check(SHAPE)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"backend": "openvino"}, "backend: unknown"),
        ({"layout": "wide"}, "layout: unknown"),
        ({"precision": "int4"}, "precision: unknown"),
        ({"keys": "int4"}, "keys: unknown"),
        ({"capabilities": ("86",)}, "sm: onnxruntime builds for the device it runs on"),
        ({"limits": Limits(0, 64, 16, 1)}, "batch: out of range"),
        ({"limits": Limits(1, 64, 65, 1)}, "prefill: out of range; expected 1 to 64"),
        ({"neighbors": 0}, "neighbors: out of range"),
        (
            {"backend": "tensorrt", "operators": "modern", "precision": "float32"},
            "precision: .*expected float16",
        ),
    ],
)
def test_settings_that_cannot_be_are_refused(change: dict[str, Any], match: str) -> None:
    with pytest.raises(SettingError, match=match):
        replace(GRAPHS, **change).check(SHAPE)


def test_graphs_are_written_once_and_found_again(tiny_bundle: Path, tmp_path: Path) -> None:
    bundle = Bundle.open(tiny_bundle)
    first = build(bundle, GRAPHS, output=tmp_path / "set")
    assert [e.name for e in first.engines] == [
        f"{phase}-{i:02d}" for phase in ("decode", "prefill") for i in range(4)
    ]
    again = build(bundle, GRAPHS, output=tmp_path / "set")
    assert again.cached
    assert not first.cached
    assert again.engine_set == first.engine_set
    other = replace(GRAPHS, prefill=False)
    with pytest.raises(OutputError, match="not empty"):
        build(bundle, other, output=tmp_path / "set")
    assert EngineSet.open(tmp_path / "set", bundle) == first.engine_set
    replaced = build(bundle, other, output=tmp_path / "set", overwrite=True)
    assert set(replaced.engine_set.phases) == {"decode"}


def test_the_cache_keeps_sets_apart_and_repairs_them(
    tiny_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    bundle = Bundle.open(tiny_bundle)
    with pytest.raises(EngineError, match="no engines of this bundle"):
        find_engines(bundle)
    split = build(bundle, GRAPHS).engine_set
    fused = build(bundle, replace(GRAPHS, layout="fused")).engine_set
    assert split.path != fused.path
    assert find_engines(bundle, layout="split") == split.path
    assert find_engines(bundle, layout="fused") == fused.path
    file = split.path / "decode-01.onnx"
    file.write_bytes(b"damaged")
    repaired = build(bundle, GRAPHS)
    assert not repaired.cached
    assert repaired.engine_set.files == split.files
    assert build(bundle, GRAPHS).cached
    (fused.path / ENGINES).write_text("{}")
    assert find_engines(bundle) == split.path


def test_without_a_device_the_error_says_how_to_build_ahead(tiny_bundle: Path) -> None:
    needs_rtx()
    if shutil.which("nvidia-smi"):
        pytest.skip("there is a device here")
    code, error = run("build", tiny_bundle, "--backend", "tensorrt_rtx")
    assert code == 1
    assert error["error"] == "BackendError"
    assert "no CUDA device" in error["problem"]
    assert "--sm 86" in error["fix"]


def test_a_tensorrt_that_is_not_there_is_named(tiny_bundle: Path) -> None:
    if find_spec("tensorrt") is not None:
        pytest.skip("TensorRT is installed")
    code, error = run("build", tiny_bundle)
    assert code == 1
    assert (error["where"], error["problem"]) == ("tensorrt", "is not installed")


@pytest.mark.parametrize("layout", ["split", pytest.param("fused", marks=pytest.mark.slow)])
def test_tensorrt_rtx_builds_ahead_without_a_device(
    tiny_bundle: Path, tmp_path: Path, layout: str
) -> None:
    """Every segment and the fused graph, for three architectures, with the ONNX function."""
    needs_rtx()
    code, report = run(
        "build", tiny_bundle, "--backend", "tensorrt_rtx", "--sm", "sm_86,8.9", "--sm", "120",
        "--layout", layout, "--plugin", "none", "--output", tmp_path / "set",
    )  # fmt: skip
    assert code == 0, report
    assert len(report["engines"]) == (2 if layout == "fused" else 8)
    assert report["plugin_layers"] == 0
    assert report["sm"] == ["86", "89", "120"]
    assert all((tmp_path / "set" / e["file"]).stat().st_size > 10_000 for e in report["engines"])
    (note,) = report["notes"]
    assert "without the plugin" in note
    code, shown = run("info", tiny_bundle, tmp_path / "set")
    assert code == 0
    assert shown["backend"] == "tensorrt_rtx"


def test_a_failed_build_leaves_nothing(
    tiny_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    needs_rtx()
    bundle = Bundle.open(tiny_bundle)
    refused = "does not build for compute capability 87 ahead; expected 75, .* or 121"
    with pytest.raises(BackendError, match=refused):
        build(bundle, replace(RTX, capabilities=("87",)), output=tmp_path / "set")
    crashing = tmp_path / "path"
    crashing.mkdir()
    (crashing / "tensorrt_rtx_libs.py").write_text("import os; os.abort()")
    monkeypatch.setattr(
        "knnmoe.export.engines.process.environment",
        lambda *words: environment(*words) | {"PYTHONPATH": f"{crashing}:{':'.join(sys.path)}"},
    )
    with pytest.raises(EngineError, match="builder: ended with code -6"):
        build(bundle, RTX, output=tmp_path / "set")
    missing = tmp_path / "libabsent.so"
    with pytest.raises(BackendError, match=r"libabsent\.so: no such plugin library"):
        build(bundle, replace(RTX, plugin="require"), plugin=missing, output=tmp_path / "set")
    assert [path.name for path in tmp_path.iterdir()] == ["path"]


@pytest.mark.slow
def test_engines_of_weights_in_blocks_leave_nothing_beside_them(tmp_path: Path) -> None:
    needs_rtx()
    checkpoint = make_tiny_olmoe(tmp_path / "c", hidden_size=128, intermediate_size=64)
    bundle = Bundle.open(export(checkpoint, tmp_path / "b", precision="int4").bundle)
    said: list[tuple[str, str, int, int]] = []
    report = build(bundle, RTX, output=tmp_path / "set", progress=lambda *now: said.append(now))
    assert len(report.engines) == 8
    assert {path.suffix for path in (tmp_path / "set").iterdir()} == {".engine", ".json"}
    written = [(done, total) for _, phase, done, total in said if phase == "signed codes"]
    assert written[-1][0] == written[-1][1] > 0


def test_signed_codes_lie_beside_weights_that_are_the_checkpoints_own(tmp_path: Path) -> None:
    source = make_tiny(tmp_path / "c", "mixtral", dtype="float16", hidden_size=128)
    bundle = Bundle.open(export(source, tmp_path / "b", precision="int4", link=True).bundle)
    jobs = build_module._jobs(bundle, RTX, with_plugin=False)
    target = build_module._Target("1", (), "")
    task = build_module._Task(bundle, target, None, None, False, lambda *_: None)
    folder = tmp_path / "beside"
    folder.mkdir()
    codes = signed_codes(job.graph.content for job in jobs)
    assert build_module._with_signed(task, codes, folder) == folder
    referred = {
        entry.value
        for job in jobs
        for tensor in onnx.load_model_from_string(job.graph.content).graph.initializer
        for entry in tensor.external_data
        if entry.key == "location"
    }
    assert any(location.startswith("checkpoint/") for location in referred)
    assert all((folder / location).is_file() for location in referred)


def test_an_interrupt_ends_the_builder_too(tiny_bundle: Path, tmp_path: Path) -> None:
    needs_rtx()

    class Interrupt(BaseException):
        pass

    def stop(*_: object) -> None:
        raise Interrupt

    before = _workers()
    with pytest.raises(Interrupt):
        build(Bundle.open(tiny_bundle), RTX, output=tmp_path / "set", progress=stop)
    assert _workers() <= before
    assert not any(tmp_path.iterdir())


def _workers() -> set[str]:
    """Those that this process started: another may be building at the same time."""
    command = ["ps", "-o", "pid,args", "--ppid", str(os.getpid())]
    listed = subprocess.run(command, capture_output=True, text=True, check=False)
    return {line for line in listed.stdout.splitlines() if "engines.worker" in line}


def test_the_search_path_of_others_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LD_LIBRARY_PATH", "/opt/mine")
    assert environment("tensorrt", tmp_path)["LD_LIBRARY_PATH"] == "/opt/mine"
    if find_spec("tensorrt_rtx_libs") is not None:
        parts = environment("tensorrt_rtx", tmp_path)["LD_LIBRARY_PATH"].split(os.pathsep)
        assert parts[-1] == "/opt/mine"
        assert (Path(parts[0]) / "libtensorrt_rtx.so").exists()
