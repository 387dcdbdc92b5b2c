"""The harness that drives the built plugin library as TensorRT would, without TensorRT.

What needs a GPU is run on the emulated one: the plugin's sources, compiled for it, are driven
through the same harness. The shipped library itself is driven here as far as the CPU goes.
"""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from blend_cases import Case, check, random_case
from emulated import compile_emulation
from fake_cupy import EMULATION, fake_cupy
from plugin_library import built_harness, built_plugin, find_headers, need_nvcc

from knnmoe.runtime.blend import Blended
from knnmoe.runtime.errors import BackendError, SettingError
from knnmoe.trt_plugins import library
from knnmoe.trt_plugins.harness import PluginHarness, build_harness
from knnmoe.trt_plugins.plan import KEY_TYPES, MAX_TILES, KeyType


@pytest.fixture(scope="module")
def harness() -> Path:
    return built_harness()


@pytest.fixture(scope="module")
def emulated() -> Path:
    """The plugin's sources on the emulated device, as a plugin library."""
    flags = ("-isystem", str(find_headers()), f"-I{library.PLUGIN}", "-Wno-deprecated-declarations")
    return compile_emulation(flags=flags, source="plugin.cpp")


def hosts(case: Case, most: int = 64) -> tuple[list[Any], list[Any]]:
    """Inputs and poisoned outputs of the node."""
    memory, stored = case.stored.memory, case.stored
    tokens, columns = len(case.x), min(most, len(stored.keys))
    f32, i64 = np.float32, np.int64
    inputs = [
        case.x.astype(f32), case.r.astype(f32), stored.keys, stored.key_scales.astype(f32),
        stored.values, memory.entry_evidence(), np.array([memory.n_valid], i64),
        np.array([memory.k], i64), memory.center,
        memory.calibration.vector(), case.state.astype(f32), case.lengths.astype(i64),
    ]  # fmt: skip
    if stored.scan:
        inputs += [stored.scan.keys, stored.scan.scales]
    outputs = [
        np.full(case.r.shape, np.nan, f32), np.full(case.state.shape, np.nan, f32),
        np.full(tokens, np.nan, f32), np.full((tokens, columns), -7, i64),
        np.full((tokens, columns), np.nan, f32),
    ]  # fmt: skip
    return inputs, outputs


@pytest.mark.parametrize("key_type", KEY_TYPES)
@pytest.mark.parametrize("seed", [0, 2])
def test_enqueue_blends_what_lies_on_the_device(
    harness: Path, emulated: Path, key_type: KeyType, seed: int
) -> None:
    case = random_case(seed, key_type=key_type, prefill=seed == 2)
    cupy = fake_cupy()
    inputs, outputs = ([cupy.asarray(a) for a in side] for side in hosts(case))
    fields = {"similarity": case.stored.memory.similarity}
    driven = PluginHarness(emulated, fields=fields, harness=harness, cupy=cupy)
    bound = driven.bind(inputs, outputs)
    cupy.machine.synchronize()  # the emulated plugin knows no streams
    with EMULATION:
        bound.run()
        bound.run()
    assert bound.workspace_bytes == driven.workspace_bytes(inputs, outputs) > 0
    rows, state, confidence, neighbors, similarities = (a.get() for a in outputs)
    check(case, Blended(rows, confidence, neighbors, similarities, state))


@pytest.mark.parametrize("seed", [0, 2])
def test_enqueue_searches_in_two_stages(harness: Path, emulated: Path, seed: int) -> None:
    case = random_case(seed, key_type="f16", prefill=seed == 2, two_stage=True)
    cupy, most = fake_cupy(), case.settings["columns"]
    inputs, outputs = ([cupy.asarray(a) for a in side] for side in hosts(case, most))
    fields = {
        "similarity": case.stored.memory.similarity,
        "max_neighbors": np.int32(most),
        "candidates": np.int32(case.stored.candidates or 64),
    }
    driven = PluginHarness(emulated, fields=fields, harness=harness, cupy=cupy)
    assert driven.serialized() == fields
    bound = driven.bind(inputs, outputs)
    cupy.machine.synchronize()
    with EMULATION:
        bound.run()
    rows, state, confidence, neighbors, similarities = (a.get() for a in outputs)
    check(case, Blended(rows, confidence, neighbors, similarities, state))


def test_contexts_of_several_shapes_live_at_the_same_time(harness: Path, emulated: Path) -> None:
    cupy = fake_cupy()
    cases = [random_case(seed, key_type="f16", prefill=seed == 2) for seed in (0, 2)]
    similarity = cases[0].stored.memory.similarity
    driven = PluginHarness(emulated, fields={"similarity": similarity}, harness=harness, cupy=cupy)
    arrays = [[[cupy.asarray(a) for a in side] for side in hosts(case)] for case in cases]
    bound = [driven.bind(*sides) for sides in arrays]
    cupy.machine.synchronize()
    with EMULATION:
        for call in (*bound, *reversed(bound)):
            call.run()
    assert all(np.isfinite(outputs[0].get()).all() for _, outputs in arrays)


def test_what_the_plugin_says_is_in_the_error(harness: Path, emulated: Path) -> None:
    with pytest.raises(BackendError, match='similarity must be "cosine" or "rbf", is "dot"'):
        PluginHarness(emulated, fields={"similarity": "dot"}, harness=harness)
    with pytest.raises(BackendError, match='takes no field "unheard_of"'):
        PluginHarness(
            emulated, fields={"similarity": "rbf", "unheard_of": np.int32(3)}, harness=harness
        )
    driven = PluginHarness(emulated, fields={"similarity": "rbf"}, harness=harness)
    inputs, outputs = hosts(random_case(0, key_type="f16"))
    for position, wrong, said in (
        (9, np.zeros(7, np.float32), "calibration must have size 12, has 7"),
        (8, np.zeros(3, np.float32), "center and x disagree"),
        (5, np.zeros(3, np.float32), "evidence_weights and keys disagree"),
        (6, np.zeros(1, np.int32), "input 6 has a type that the plugin does not take"),
    ):
        changed = [*inputs]
        changed[position] = wrong
        with pytest.raises(BackendError, match=said):
            driven.workspace_bytes(changed, outputs)
    with pytest.raises(BackendError, match="the plugin has 5 outputs"):
        driven.workspace_bytes(inputs, outputs[:4])
    with pytest.raises(BackendError, match="output 3 must have type 8"):
        driven.workspace_bytes(inputs, [*outputs[:3], outputs[3].astype(np.int32), outputs[4]])
    with pytest.raises(SettingError, match="of a type or rank"):
        driven.workspace_bytes([a.astype(np.complex64) for a in inputs], outputs)
    with pytest.raises(SettingError, match="input 0: not on the device"):
        driven.bind(inputs, outputs)


def test_more_rows_than_a_grid_has_are_refused(harness: Path, emulated: Path) -> None:
    cupy, most = fake_cupy(), 8 * MAX_TILES
    driven = PluginHarness(emulated, fields={"similarity": "rbf"}, harness=harness, cupy=cupy)
    for rows, taken in ((most, True), (most + 1, False)):
        shapes = [(rows, 1), (rows, 1), (1, 1), (1, 2), (1, 1), 1, 1, 1, 1, 12, (1, 2), 1]
        types = {6: np.int64, 7: np.int64, 11: np.int64}
        inputs = [cupy.empty(s, types.get(i, np.float32)) for i, s in enumerate(shapes)]
        shapes = [(rows, 1), (1, 2), rows, (rows, 1), (rows, 1)]
        outputs = [cupy.empty(s, np.int64 if i == 3 else np.float32) for i, s in enumerate(shapes)]
        if taken:
            driven.bind(inputs, outputs)
            continue
        with pytest.raises(BackendError, match=f"more rows than a call takes: {rows}"):
            driven.bind(inputs, outputs)


def test_fields_come_back_as_they_were_given(harness: Path, emulated: Path) -> None:
    for similarity in ("cosine", "rbf"):
        driven = PluginHarness(emulated, fields={"similarity": similarity}, harness=harness)
        fields = driven.serialized()
        assert fields["similarity"] == similarity
        again = PluginHarness(emulated, fields=fields, harness=harness)
        assert again.serialized().keys() == fields.keys()


def test_what_is_no_plugin_library_is_refused(harness: Path, tmp_path: Path) -> None:
    empty = tmp_path / "empty.so"
    empty.write_bytes(b"")
    with pytest.raises(BackendError, match="cannot be loaded as a plugin library"):
        PluginHarness(empty, fields={}, harness=harness)
    with pytest.raises(BackendError, match="exports no getCreators"):
        PluginHarness(harness, fields={}, harness=harness)
    with pytest.raises(BackendError, match="cannot be loaded"):
        PluginHarness(empty, fields={}, harness=empty)
    other = tmp_path / "other.so"
    other.write_bytes(
        b'knnmoe-plugin-build:{"source":"0","tensorrt":"3.0.0","cuda":13000,"architectures":[860]}\0'
    )
    with pytest.raises(BackendError, match="another major version of TensorRT than the harness"):
        PluginHarness(other, fields={}, harness=harness)


def test_the_harness_needs_no_tensorrt_and_is_built_once(
    harness: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    listing = subprocess.run(["readelf", "-d", harness], capture_output=True, text=True, check=True)
    needed = [line for line in listing.stdout.splitlines() if "NEEDED" in line]
    assert not [
        line for line in needed if "nvinfer" in line or "tensorrt" in line or "cuda" in line
    ]
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    first = build_harness(headers=find_headers())
    stamp = first.stat().st_mtime_ns
    assert build_harness(headers=find_headers()) == first
    assert first.stat().st_mtime_ns == stamp


def test_headers_that_do_not_compile_are_a_stated_failure(tmp_path: Path) -> None:
    need_nvcc()
    (tmp_path / "NvInferRuntime.h").write_text("#error no headers\n")
    with pytest.raises(BackendError, match=r"(?s)harness\.cpp: nvcc does not compile.*no headers"):
        build_harness(tmp_path / "harness.so", headers=tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == ["NvInferRuntime.h"]


@pytest.mark.slow
def test_the_shipped_library_is_driven_as_far_as_a_machine_without_a_driver_goes(
    harness: Path,
) -> None:
    path = built_plugin()
    case = random_case(1, key_type="i8")
    driven = PluginHarness(path, fields={"similarity": "rbf"}, harness=harness, cupy=fake_cupy())
    assert driven.serialized()["similarity"] == "rbf"
    inputs, outputs = hosts(case)
    assert driven.workspace_bytes(inputs, outputs) > 0
    with pytest.raises(BackendError, match="calibration must have size 12, has 7"):
        driven.workspace_bytes([*inputs[:9], np.zeros(7, np.float32), *inputs[10:]], outputs)
    # Without a driver CUDA says so, and the plugin passes it on; with one it gets further.
    said = r"knnmoe::KnnBlend: no device: |input 0: not on the device"
    with pytest.raises((BackendError, SettingError), match=said):
        driven.bind(inputs, outputs)
    assert driven.workspace_bytes(inputs, outputs) > 0
