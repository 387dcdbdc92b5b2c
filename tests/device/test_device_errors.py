"""What a device cannot do is said clearly, and leaves what runs as it was."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from fake_cupy import fake_cupy

from conftest import make_entries, make_identity, write_tiny_pack
from fake_tensorrt import fake_tensorrt
from knnmoe.runtime.bundle import Bundle
from knnmoe.runtime.calibration import preset
from knnmoe.runtime.device.backend import DeviceBackend, DeviceSettings, engine_loader
from knnmoe.runtime.device.cuda import Cuda
from knnmoe.runtime.device.resident import ResidentMemory
from knnmoe.runtime.engines.engine_set import EngineSet, check_producer
from knnmoe.runtime.engines.tensorrt import Scratch, TensorRT, TensorRTEngine, load_tensorrt
from knnmoe.runtime.entries import size_class
from knnmoe.runtime.errors import BackendError, DeviceError, EngineError, SettingError
from knnmoe.runtime.memory import MemoryPack
from knnmoe.runtime.model import Model
from knnmoe.runtime.pack_parts import EntryOrigins
from knnmoe.runtime.pack_writing import write_pack
from memories import random_memory

IDS = np.random.default_rng(6).integers(0, 256, 40)


def large_pack(path: Path, bundle: Path, entries: int) -> MemoryPack:
    identity = make_identity(bundle)
    numbers = np.arange(entries, dtype=np.int32)
    return write_pack(
        path, model=identity,
        gates={g: make_entries(identity, g, entries=entries) for g in range(identity.num_gates)},
        variant="residual", neighbors=8, similarity="cosine", calibration=preset("residual"),
        origins=EntryOrigins(numbers % 256, numbers // 100, numbers % 100),
        provenance={"made": "at random"},
    )  # fmt: skip


def test_a_memory_larger_than_the_engines_is_refused_and_the_old_one_serves(
    load: Any, tmp_path: Path, tiny_bundle: Path, tiny_pack: Path
) -> None:
    model = load(memory=tiny_pack, layout="fused").model
    before = model.logits(IDS)
    with pytest.raises(SettingError, match=r"more entries.*at most 512.*found 600.*--max-entries"):
        model.swap_memory(large_pack(tmp_path / "large", tiny_bundle, 600))
    np.testing.assert_array_equal(model.logits(IDS), before)
    assert model.memory is not None
    assert model.memory.path == tiny_pack


def test_without_room_on_the_device_the_old_memory_serves(
    load: Any, tmp_path: Path, tiny_bundle: Path, tiny_pack: Path
) -> None:
    setup = load(memory=tiny_pack)
    before = setup.model.logits(IDS)
    setup.cupy.machine.memory_bytes = setup.cupy.machine.used_bytes + (1 << 16)
    for pack in (large_pack(tmp_path / "large", tiny_bundle, 5000), MemoryPack.open(tiny_pack)):
        with pytest.raises(DeviceError, match=r"device memory: not enough is free; found .*of "):
            setup.model.swap_memory(pack)
    setup.cupy.machine.memory_bytes = 4 << 30
    np.testing.assert_array_equal(setup.model.logits(IDS), before)


def test_a_step_that_cannot_be_captured_says_how_to_do_without(load: Any) -> None:
    setup = load()
    cuda = setup.model.backend.cuda
    before = setup.model.logits(IDS)
    with pytest.raises(
        DeviceError, match=r"CUDA graph: .*cannot be captured.*waited for.*cuda_graph=False"
    ):
        cuda.capture(cuda.synchronize)
    assert not cuda.stream.is_capturing()
    np.testing.assert_array_equal(setup.model.logits(IDS), before)


def test_a_cache_beyond_the_engines_is_refused(load: Any) -> None:
    pipeline = load().model.pipeline
    with pytest.raises(SettingError, match=r"capacity: more than .*at most 96; found 97"):
        pipeline.new_cache(capacity=97)
    with pytest.raises(SettingError, match=r"batch: more than .*at most 3; found 4"):
        pipeline.new_cache(batch=4, capacity=10)


def test_fixed_neighbors_are_stated(load: Any, engine_sets: Any, tiny_pack: Path) -> None:
    setup = load(layout="fused")
    fixed = replace(setup.backend._set, neighbors=8)
    setup.backend._set = fixed
    pack = MemoryPack.open(tiny_pack).with_settings(neighbors=5)
    with pytest.raises(SettingError, match=r"another K; expected 8; found \[5\].*neighbors=8"):
        setup.model.swap_memory(pack)
    setup.model.swap_memory(tiny_pack)


def test_plugin_gates_need_their_engines(load: Any) -> None:
    with pytest.raises(BackendError, match=r"no engine of the gate frozen.*plugin build"):
        load(settings=DeviceSettings(gate="plugin"))
    with pytest.raises(BackendError, match="gate: no backend of the device"):
        load(settings=DeviceSettings(gate="faiss"))  # type: ignore[arg-type]


def test_an_engine_that_tensorrt_refuses_is_named(
    engine_sets: Callable[..., Path], tiny_bundle: Path
) -> None:
    cupy = fake_cupy()
    cuda = Cuda(cupy=cupy, cupyx=cupy.cupyx)
    refusing = TensorRT("tensorrt", fake_tensorrt(cupy, refuses="platform specific tag"), "10.9")
    path = engine_sets(precision="float32") / "decode-00.onnx"
    with pytest.raises(EngineError, match=r"decode-00.*10\.9 refuses.*platform specific tag"):
        TensorRTEngine(refusing, path, cuda, Scratch(cuda))


def test_shapes_and_types_beyond_an_engine_are_named(load: Any) -> None:
    setup = load()
    (engine, *_) = setup.backend._engines.values()
    zeros = setup.cuda.zeros
    good = {
        "input_ids": zeros((1, 1), np.int64), "past_lengths": zeros(1, np.int64),
        "past_key_0": zeros((1, 2, 8, 8), np.float32),
    }  # fmt: skip
    with pytest.raises(DeviceError, match=r"input_ids: a shape beyond.*\(4, 1\).*--max-batch"):
        engine.bind({**good, "input_ids": zeros((4, 1), np.int64)}, {})
    with pytest.raises(DeviceError, match=r"input_ids: of another type.*int64; found float32"):
        engine.bind({**good, "input_ids": zeros((1, 1), np.float32)}, {})


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"backend_version": "11.0"}, r"another version of tensorrt; expected 10\.9.*found 11\.0"),
        ({"capabilities": ["87"]}, "another device; expected compute capability 86; found 87"),
        ({"driver": "12.4"}, r"another driver; expected 13\.0; found 12\.4"),
        ({"plugin": "ab" * 32}, "another plugin library; expected sha256 abababab"),
        ({"bundle": "0" * 64}, "belongs to another bundle"),
        ({"schema": "knnmoe.engines/9"}, "schema: unknown"),
        ({"layout": "wide"}, "layout: unknown; expected split or fused"),
        ({"limits": {"batch": 0, "context": 9, "prefill": 1, "entries": 1}}, "batch: out of range"),
        ({"phases": {"prefill": []}}, "lacks the phase decode"),
        ({"phases": {"decode": ["../x"]}}, "names a file that is not there"),
        ({"gates": {"cosine": "x"}}, "not among the files"),
        ({"files": {"../x": {"sha256": "0" * 64, "size": 1}}}, "not a plain file name"),
        ({"surprise": 1}, "unknown field"),
    ],
)
def test_engine_sets_that_do_not_fit_are_refused(
    engine_sets: Callable[..., Path], tiny_bundle: Path, tmp_path: Path,
    change: dict[str, Any], match: str,
) -> None:  # fmt: skip
    import shutil

    folder = tmp_path / "set"
    shutil.copytree(engine_sets(precision="float32"), folder)
    file = folder / "engines.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    here = {"backend_version": "10.9", "capability": "86", "driver": "13.0", "plugin": None}
    with pytest.raises(EngineError, match=match):
        check_producer(EngineSet.open(folder, Bundle.open(tiny_bundle)), here)


def test_a_damaged_engine_is_refused(
    engine_sets: Callable[..., Path], tiny_bundle: Path, tmp_path: Path
) -> None:
    import shutil

    folder = tmp_path / "set"
    shutil.copytree(engine_sets(precision="float32"), folder)
    bundle = Bundle.open(tiny_bundle)
    EngineSet.open(folder, bundle)
    engine = folder / "decode-01.onnx"
    content = bytearray(engine.read_bytes())
    content[len(content) // 2] ^= 1
    engine.write_bytes(content)
    with pytest.raises(EngineError, match=r"decode-01.*changed since it was built.*Build"):
        EngineSet.open(folder, bundle)
    engine.write_bytes(content[:-1])
    with pytest.raises(EngineError, match=r"decode-01.*another size"):
        EngineSet.open(folder, bundle)
    with pytest.raises(EngineError, match="not an engine set"):
        EngineSet.open(tmp_path / "nowhere", bundle)


def test_a_machine_without_what_the_engines_need_says_so(
    engine_sets: Callable[..., Path], tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cupy = fake_cupy()
    cuda = Cuda(cupy=cupy, cupyx=cupy.cupyx)
    bundle = Bundle.open(tiny_bundle)
    engines = EngineSet.open(engine_sets(precision="float32"), bundle)
    monkeypatch.setitem(__import__("sys").modules, "tensorrt", None)
    with pytest.raises(BackendError, match=r"tensorrt: is not installed.*JetPack"):
        engine_loader(engines, bundle, cuda)
    old = SimpleNamespace(__version__="8.6.1")
    monkeypatch.setitem(__import__("sys").modules, "tensorrt", old)
    with pytest.raises(BackendError, match=r"too old; expected TensorRT 10 or newer; found 8\.6"):
        load_tensorrt("tensorrt")
    with pytest.raises(BackendError, match=r"CUDAExecutionProvider is missing.*onnxruntime-gpu"):
        engine_loader(replace(engines, backend="onnxruntime"), bundle, cuda)


def test_without_a_driver_the_device_is_refused_and_the_cpu_serves(
    engine_sets: Callable[..., Path], tiny_bundle: Path
) -> None:
    with pytest.raises(BackendError, match=r"(driver|cupy|CUDA).*"):
        Model.load(tiny_bundle, device="cuda", engines=engine_sets(precision="float32"))
    Model.load(tiny_bundle, threads=1).logits(IDS)


def test_options_of_the_other_device_are_refused(
    engine_sets: Callable[..., Path], tiny_bundle: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    for options, match in (
        ({"engines": tmp_path}, r"engines: has no meaning on device='cpu'"),
        ({"keys": "int8"}, r"keys: has no meaning on device='cpu'"),
        ({"device": "cuda", "threads": 2}, r"threads: has no meaning on device='cuda'"),
    ):
        with pytest.raises(SettingError, match=match):
            Model.load(tiny_bundle, **options)  # type: ignore[arg-type]
    with pytest.raises(BackendError, match=r"device: unknown; expected .*cpu.*cuda"):
        Model.load(tiny_bundle, device="tpu")  # type: ignore[arg-type]
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with pytest.raises(EngineError, match=r"no engines of this bundle.*knnmoe engines build"):
        Model.load(tiny_bundle, device="cuda")


def test_threads_and_swaps_see_whole_memories(
    load: Any, tmp_path: Path, tiny_bundle: Path, tiny_pack: Path
) -> None:
    packs = [
        MemoryPack.open(tiny_pack),
        write_tiny_pack(tmp_path / "other", tiny_bundle).with_settings(variant="logits"),
    ]
    model = load(memory=packs[0]).model
    expected = []
    for pack in packs:
        model.swap_memory(pack)
        expected.append(model.logits(IDS[:20]).tobytes())
    problems: list[str] = []
    stop = threading.Event()

    def serve() -> None:
        while not stop.is_set():
            if model.logits(IDS[:20]).tobytes() not in expected:
                problems.append("logits of neither memory")

    threads = [threading.Thread(target=serve) for _ in range(2)]
    for thread in threads:
        thread.start()
    for turn in range(6):
        model.swap_memory(packs[turn % 2])
    stop.set()
    for thread in threads:
        thread.join()
    assert not problems


def test_the_resident_block_is_aligned_and_has_room_by_classes() -> None:
    cupy = fake_cupy()
    cuda = Cuda(cupy=cupy, cupyx=cupy.cupyx)
    memories = [random_memory(1, entries=300), None, random_memory(2, entries=17, k=3)]
    resident = ResidentMemory(cuda, memories)
    for gate in (0, 2):
        for name, array in resident.arrays(gate).items():
            assert array.data.ptr % 256 == 0, name
    assert resident.capacity(0) == 320
    assert resident.capacity(1) == 0
    assert resident.capacity(2) == 256
    assert resident.fits([random_memory(3, entries=320), None, random_memory(2, entries=1, k=1)])
    for other in (
        [random_memory(3, entries=321), None, memories[2]],
        [None, None, memories[2]],
        [random_memory(1, entries=300, similarity="rbf"), None, memories[2]],
        [random_memory(1, entries=300, k=9), None, memories[2]],
    ):
        assert not resident.fits(other)
        with pytest.raises(ValueError, match="size class"):
            resident.swap(other)
    for entries in range(1, 5000, 7):
        assert entries <= size_class(entries) <= max(256, entries * 1.25)
    assert size_class(500, 510) == 510
    with pytest.raises(SettingError, match="keys: of an unknown type"):
        ResidentMemory(cuda, memories, key_dtype="bf16")


def test_a_backend_needs_a_bundle_of_its_own(
    engine_sets: Callable[..., Path], tiny_bundle: Path, tmp_path: Path
) -> None:
    import shutil

    other = tmp_path / "other"
    shutil.copytree(tiny_bundle, other)
    manifest = other / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"producer"', ' "producer"'))
    with pytest.raises(EngineError, match="belongs to another bundle"):
        DeviceBackend(Bundle.open(other, verify=False), engine_sets(precision="float32"))
