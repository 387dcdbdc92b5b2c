"""`knnmoe plugin`: what each command prints, and that what is missing is a stated failure."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result
from plugin_library import built_plugin, find_headers, need_nvcc

from knnmoe.runtime.cli import main
from knnmoe.trt_plugins import flavours, library, toolchain
from knnmoe.trt_plugins.compiler import ARCHITECTURES
from knnmoe.trt_plugins.flavours import Trial


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    for name in ("KNNMOE_PLUGIN", "TENSORRT_ROOT"):
        monkeypatch.delenv(name, raising=False)


def run(*arguments: object) -> Result:
    return CliRunner().invoke(main, ["plugin", *map(str, arguments)])


def ok(*arguments: object) -> str:
    result = run(*arguments)
    assert result.exit_code == 0, result.output
    return result.stdout


def ok_json(*arguments: object) -> Any:
    return json.loads(ok(*arguments, "--json"))


def failed(*arguments: object) -> Any:
    result = run(*arguments, "--json")
    assert result.exit_code == 1, result.output
    return json.loads(result.stdout)


def some_library(folder: Path, tensorrt: str = "10.14.1", source: str = "00ff") -> Path:
    said = {"source": source, "tensorrt": tensorrt, "cuda": 13000, "architectures": [860]}
    file = folder / "libknnmoe_plugin.so"
    file.write_bytes(f"knnmoe-plugin-build:{json.dumps(said)}\0".encode())
    return file


@pytest.mark.parametrize("command", [[], ["build"], ["info"], ["check"]])
def test_help_answers_at_once_and_imports_nothing_heavy(command: list[str]) -> None:
    code = (
        "import sys\n"
        "from knnmoe.runtime.cli import main\n"
        f"main({['plugin', *command, '--help']!r}, standalone_mode=False)\n"
        "heavy = {'numpy', 'rich', 'knnmoe.trt_plugins.library', 'knnmoe.calibration.cli'}\n"
        "sys.exit(str(heavy & set(sys.modules)) if heavy & set(sys.modules) else 0)\n"
    )
    before = os.times()
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, check=False)
    after = os.times()
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(b"Usage: ")
    # Of the processor, not of the clock: other programs run here, too.
    assert after.children_user - before.children_user < 1


def test_the_group_is_listed_without_being_imported() -> None:
    shown = CliRunner().invoke(main, ["--help"]).stdout
    assert "\n  plugin " in shown


class Built:
    """Stands in for nvcc: what a build was asked for."""

    asked: dict[str, Any]

    def __call__(self, source: Path, output: Path, arguments: list[str], *, fix: str) -> None:
        self.asked = {"output": output, "arguments": arguments}
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_bytes(b"library")


@pytest.fixture
def nvcc(monkeypatch: pytest.MonkeyPatch) -> Built:
    stand_in = Built()
    monkeypatch.setattr(library, "link_library", stand_in)
    return stand_in


def headers(folder: Path, version: str = "11.1.0") -> Path:
    include = folder / "sdk" / "include"
    include.mkdir(parents=True)
    (include / "NvInferRuntime.h").write_text("")
    parts = zip(("MAJOR", "MINOR", "PATCH"), version.split("."), strict=True)
    text = "".join(f"#define NV_TENSORRT_{name} {number}\n" for name, number in parts)
    (include / "NvInferVersion.h").write_text(text)
    return folder / "sdk"


def test_build_compiles_for_every_architecture_into_the_cache(tmp_path: Path, nvcc: Built) -> None:
    figures = ok_json("build", "--tensorrt-root", headers(tmp_path))
    assert figures["library"] == str(library.find_library())
    assert figures["tensorrt"] == "11.1.0"
    assert figures["architectures"] == list(ARCHITECTURES)
    assert figures["source"] == library.source_hash()
    codes = [a.rpartition("code=")[2] for a in nvcc.asked["arguments"] if "code=" in a]
    assert codes == [*(f"sm_{a}" for a in ARCHITECTURES), f"compute_{ARCHITECTURES[0]}"]
    assert str(tmp_path / "sdk" / "include") in nvcc.asked["arguments"]
    shown = ok("build", "--tensorrt-root", tmp_path / "sdk")
    assert "for TensorRT 11.1.0, sm_80, sm_86" in shown


def test_build_takes_architectures_jobs_and_a_place(
    tmp_path: Path, nvcc: Built, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(toolchain, "native_architectures", lambda: ["120"])
    output = tmp_path / "there" / "plugin.so"
    figures = ok_json(
        "build", "--tensorrt-root", headers(tmp_path), "--arch", "87", "--arch", "native",
        "--jobs", 3, "--output", output,
    )  # fmt: skip
    assert figures["library"] == str(output)
    assert figures["architectures"] == ["87", "120"]
    codes = [a.rpartition("code=")[2] for a in nvcc.asked["arguments"] if "code=" in a]
    assert codes == ["sm_87", "sm_120"]
    assert "--threads=3" in nvcc.asked["arguments"]


def test_what_a_build_lacks_is_a_stated_failure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    error = failed("build", "--tensorrt-root", tmp_path / "absent")
    assert error["error"] == "BackendError"
    assert error["where"] == "NvInferRuntime.h"
    assert "absent" in error["expected"]
    sdk = headers(tmp_path)
    assert failed("build", "--tensorrt-root", sdk, "--arch", "x")["where"] == "architecture"
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    error = failed("build", "--tensorrt-root", sdk)
    assert error["where"] == "nvcc"
    assert "CUDA toolkit" in error["fix"]
    assert run("build", "--jobs", "-1").exit_code == 2


def test_build_passes_on_what_nvcc_says(tmp_path: Path) -> None:
    need_nvcc()
    sdk = headers(tmp_path)
    (sdk / "include" / "NvInferRuntime.h").write_text("#error of another time\n")
    error = failed("build", "--tensorrt-root", sdk, "--arch", "86")
    assert "nvcc does not compile it" in error["problem"]
    assert "of another time" in error["found"]


def test_info_shows_what_is_missing_and_fails_at_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    monkeypatch.setenv("TENSORRT_ROOT", str(tmp_path))
    figures = ok_json("info")
    assert figures["library"] is None
    assert "knnmoe plugin build" in figures["missing"]
    assert figures["nvcc"] is figures["headers"] is None
    assert figures["source"] == library.source_hash()
    assert "library   not built" in ok("info")


def test_info_shows_the_library_and_whether_it_is_of_these_sources(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KNNMOE_PLUGIN", str(some_library(tmp_path)))
    figures = ok_json("info")
    assert figures["built"]["tensorrt"] == "10.14.1"
    assert figures["built"]["architectures"] == ["86"]
    assert figures["current"] is False
    assert "for TensorRT 10.14.1, CUDA 13.0, sm_86" in ok("info")
    some_library(tmp_path, source=library.source_hash())
    assert ok_json("info")["current"] is True


def test_check_asks_each_tensorrt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = some_library(tmp_path)
    monkeypatch.setattr(flavours, "installed", lambda: ["tensorrt", "tensorrt_rtx"])
    answers = {
        "tensorrt": Trial("tensorrt", "10.3.0", loads=True),
        "tensorrt_rtx": Trial("tensorrt_rtx", "1.7.1", loads=True),
    }
    monkeypatch.setattr(flavours, "try_flavour", lambda name, file: answers[name])
    figures = ok_json("check", path)
    assert [(t["flavour"], t["loads"]) for t in figures["tensorrt"]] == [
        ("tensorrt", True), ("tensorrt_rtx", True),
    ]  # fmt: skip
    assert "tensorrt 10.3.0: loads it" in ok("check", path)
    answers["tensorrt_rtx"] = Trial("tensorrt_rtx", "1.7.1", loads=False, problem="it may not")
    error = failed("check", path)
    assert error["problem"] == "not taken by tensorrt_rtx"
    assert "it may not" in error["found"]
    assert ok_json("check", path, "--flavour", "tensorrt")["library"] == str(path)


def test_check_without_a_library_or_a_tensorrt_is_a_stated_failure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert "not built" in failed("check")["problem"]
    monkeypatch.setattr(flavours, "installed", list)
    assert failed("check", some_library(tmp_path))["where"] == "TensorRT"
    assert "cannot be read" in failed("check", tmp_path / "absent.so")["problem"]


def test_a_flavour_that_is_absent_or_crashes_is_a_finding(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trial = flavours.try_flavour("tensorrt_of_nobody", some_library(tmp_path))
    assert not trial.loads
    assert "cannot be imported" in str(trial.problem)
    (tmp_path / "tensorrt_that_crashes.py").write_text("import os\nos._exit(7)\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    trial = flavours.try_flavour("tensorrt_that_crashes", some_library(tmp_path))
    assert not trial.loads
    assert "exit status 7" in str(trial.problem)


def test_a_library_for_another_major_version_is_found_out_by_the_real_lean_runtime(
    tmp_path: Path,
) -> None:
    if find_spec("tensorrt_lean_bindings") is None:
        pytest.skip("tensorrt-lean-cu13-bindings is not installed")
    path = some_library(tmp_path, tensorrt="9.3.0")
    error = failed("check", path, "--flavour", "tensorrt_lean")
    assert "another major version" in error["found"]
    assert "9.3.0" in error["found"]


@pytest.mark.slow
def test_check_loads_the_real_library(tmp_path: Path) -> None:
    if find_spec("tensorrt_rtx_bindings") is None:
        pytest.skip("tensorrt-rtx-cu13-bindings is not installed")
    figures = ok_json("check", built_plugin(), "--flavour", "tensorrt_rtx")
    assert figures["current"] is True
    assert figures["built"]["tensorrt"] == library.header_version(find_headers())
    assert figures["tensorrt"][0]["loads"] is True
