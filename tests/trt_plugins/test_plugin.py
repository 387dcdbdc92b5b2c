"""The TensorRT plugin: built by nvcc, taken by a real TensorRT-RTX that has no GPU."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
from blend_cases import Case, check, random_case
from emulated import aligned, compile_emulation
from plugin_library import built_plugin, find_headers

from knnmoe.runtime.blend import Blended
from knnmoe.runtime.errors import BackendError
from knnmoe.trt_plugins import library
from knnmoe.trt_plugins.plan import KEY_TYPES, KeyType

SCRIPT = Path(__file__).parent / "plugin_in_tensorrt.py"


@pytest.fixture(scope="module")
def plugin() -> Path:
    """The library as TensorRT would load it."""
    return built_plugin()


def test_the_library_needs_no_tensorrt_and_exports_two_functions(plugin: Path) -> None:
    def lines(*command: str) -> list[str]:
        return subprocess.run(
            [*command, plugin], capture_output=True, text=True, check=True
        ).stdout.splitlines()

    exported = [line.split()[-1] for line in lines("nm", "-D", "--defined-only")]
    assert exported == ["getCreators", "setLoggerFinder"]
    needed = "\n".join(line for line in lines("readelf", "-d") if "NEEDED" in line)
    for absent in ("nvinfer", "libcuda", "tensorrt"):
        assert absent not in needed


def test_tensorrt_takes_the_plugin_and_builds_engines_with_it(plugin: Path, tmp_path: Path) -> None:
    pytest.importorskip("onnx_ir")
    spec = find_spec("tensorrt_rtx_libs")
    if spec is None or spec.origin is None or find_spec("tensorrt_rtx_bindings") is None:
        pytest.skip("tensorrt-rtx is not installed")
    libraries = Path(spec.origin).parent
    (found,) = libraries.glob("libtensorrt_rtx.so.?")
    (tmp_path / "libtensorrt_rtx.so").symlink_to(found)
    done = subprocess.run(
        [sys.executable, SCRIPT, plugin], capture_output=True, text=True, check=False,
        env={**os.environ, "LD_LIBRARY_PATH": f"{tmp_path}:{libraries}"}, timeout=300,
    )  # fmt: skip
    assert done.stdout.endswith("taken\n"), done.stdout[-2000:] + done.stderr[-4000:]
    # Which of the two TensorRT's logger writes to is its own affair.
    said = done.stdout + done.stderr
    assert 'similarity must be "cosine" or "rbf", is "dot"' in said
    assert "calibration must have size 12, has 7" in said
    assert "max_neighbors must be 1 to 64, is 65" in said
    assert "takes 12 inputs, or 14 to search in two stages" in said


@pytest.fixture(scope="module")
def emulated_plugin() -> ctypes.CDLL:
    flags = ("-isystem", str(find_headers()), f"-I{library.PLUGIN}", "-Wno-deprecated-declarations")
    loaded = ctypes.CDLL(str(compile_emulation(flags=flags, source="plugin.cpp")))
    loaded.setLoggerFinder(None)  # a harness of this process may have given one
    return loaded


@pytest.mark.parametrize("key_type", KEY_TYPES)
@pytest.mark.parametrize("seed", range(6))
def test_enqueue_blends(emulated_plugin: ctypes.CDLL, key_type: KeyType, seed: int) -> None:
    """Driven as TensorRT would: created, attached, told the shapes, enqueued twice."""
    case = random_case(seed, key_type=key_type, prefill=seed % 3 == 2)
    check(case, enqueue(emulated_plugin, case, max_neighbors=64))


@pytest.mark.parametrize("key_type", ["f32", "f16"])
@pytest.mark.parametrize("seed", range(6))
def test_enqueue_blends_in_two_stages(
    emulated_plugin: ctypes.CDLL, key_type: KeyType, seed: int
) -> None:
    case = random_case(seed, key_type=key_type, prefill=seed % 3 == 2, two_stage=True)
    check(case, enqueue(emulated_plugin, case, max_neighbors=case.settings["columns"]))


def test_the_fields_bound_each_other(
    emulated_plugin: ctypes.CDLL, capfd: pytest.CaptureFixture[str]
) -> None:
    case = random_case(1, key_type="f16", two_stage=True)
    for max_neighbors, candidates, message in (
        (0, 64, "max_neighbors must be 1 to 64, is 0"),
        (65, 64, "max_neighbors must be 1 to 64, is 65"),
        (9, 8, "candidates must be 9 (max_neighbors) to 64, is 8"),
        (1, 65, "candidates must be 1 to 64, is 65"),
    ):
        stored = replace(case.stored, candidates=candidates)
        with pytest.raises(RuntimeError, match="-1"):
            enqueue(emulated_plugin, replace(case, stored=stored), max_neighbors)
        assert message in capfd.readouterr().err


def test_two_stages_take_no_int8_keys_and_no_other_count_of_inputs(
    emulated_plugin: ctypes.CDLL, capfd: pytest.CaptureFixture[str]
) -> None:
    case = random_case(1, key_type="f16", two_stage=True)
    assert case.stored.scan is not None
    int8 = replace(case, stored=replace(case.stored, keys=case.stored.scan.keys))
    with pytest.raises(RuntimeError, match="-5"):
        enqueue(emulated_plugin, int8, 64)
    with pytest.raises(RuntimeError, match="-2"):
        enqueue(emulated_plugin, case, 64, left_out=1)
    assert "takes 12 inputs, or 14 to search in two stages" in capfd.readouterr().err


def enqueue(plugin: ctypes.CDLL, case: Case, max_neighbors: int, left_out: int = 0) -> Blended:
    """What the plugin answers.

    Raises:
        RuntimeError: With the number of the step that refused; see emulation/plugin.cpp.
    """
    memory, stored = case.stored.memory, case.stored
    columns = min(max_neighbors, len(stored.keys))
    inputs = [
        case.x, case.r, aligned(stored.keys), stored.key_scales, aligned(stored.values),
        memory.entry_evidence(), np.array([memory.n_valid]), np.array([memory.k]), memory.center,
        memory.calibration.vector(), case.state, case.lengths,
    ]  # fmt: skip
    if stored.scan:
        inputs += [aligned(stored.scan.keys), stored.scan.scales]
    inputs = inputs[: len(inputs) - left_out]
    count = len(inputs)
    tokens = len(case.x)
    outputs = [
        np.full(case.r.shape, np.nan, np.float32), np.full(case.state.shape, np.nan, np.float32),
        np.full(tokens, np.nan, np.float32), np.full((tokens, columns), -7),
        np.full((tokens, columns), np.nan, np.float32),
    ]  # fmt: skip
    # DataType of TensorRT: kFLOAT, kHALF, kINT8, kINT64.
    types = {"float32": 0, "float16": 1, "int8": 2, "int64": 8}
    dimensions = [size for a in inputs for size in (*a.shape, 0)[:2]]
    result = plugin.knnmoe_enqueue(
        memory.similarity.encode(), max_neighbors, stored.candidates or 64, count,
        (ctypes.c_longlong * (2 * count))(*dimensions),
        (ctypes.c_int * count)(*(types[a.dtype.name] for a in inputs)),
        (ctypes.c_void_p * count)(*(a.ctypes.data for a in inputs)),
        (ctypes.c_void_p * 5)(*(a.ctypes.data for a in outputs)),
    )  # fmt: skip
    if result != 0:
        raise RuntimeError(result)
    rows, state, confidence, neighbors, similarities = outputs
    return Blended(rows, confidence, neighbors, similarities, state)


def test_without_the_library_the_error_says_how_to_build_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("KNNMOE_PLUGIN", str(tmp_path / "absent.so"))
    with pytest.raises(BackendError, match=r"absent\.so: the TensorRT plugin is not built.*build"):
        library.find_library()
    monkeypatch.delenv("KNNMOE_PLUGIN")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with pytest.raises(BackendError, match=library.source_hash()):
        library.find_library()


def test_headers_that_are_not_there_are_named(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("TENSORRT_ROOT", str(tmp_path))
    with pytest.raises(BackendError, match=r"NvInferRuntime\.h: not found"):
        library.find_tensorrt_headers()
