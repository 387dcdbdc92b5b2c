"""A model on a device does what the same model does on the host."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fake_cupy import fake_cupy

from knnmoe.calibration.compress import CompressSettings, compress_pack
from knnmoe.runtime.device.backend import DeviceSettings
from knnmoe.runtime.memory import MemoryPack
from knnmoe.runtime.model import Model

IDS = np.random.default_rng(5).integers(0, 256, 60)
GREEDY = {"do_sample": False, "max_new_tokens": 12}


def host(bundle: Path, memory: Any = None) -> Model:
    return Model.load(bundle, memory=memory, gate="numpy-float64", threads=1)


@pytest.mark.parametrize("layout", ["split", "fused"])
def test_logits_and_greedy_text_are_those_of_the_host(
    load: Any, tiny_bundle: Path, tiny_pack: Path, layout: str
) -> None:
    for memory in (None, tiny_pack):
        expected = host(tiny_bundle, memory)
        device = load(memory=memory, layout=layout).model
        np.testing.assert_allclose(device.logits(IDS), expected.logits(IDS), atol=2e-4)
        texts = [m.generate(IDS[:9], **GREEDY).token_ids for m in (device, expected)]
        assert texts[0] == texts[1]


def test_threads_use_the_device_that_the_model_was_loaded_on(load: Any, tiny_pack: Path) -> None:
    cupy = fake_cupy(devices=2)
    with cupy.cuda.Device(1):
        model = load(memory=tiny_pack, layout="split", cupy=cupy).model
        expected = model.generate(IDS[:9], **GREEDY).token_ids
    assert cupy.cuda.Device().id == 0

    async def on_threads() -> Any:  # whose device is 0
        pack = MemoryPack.open(tiny_pack)
        await asyncio.to_thread(model.swap_memory, pack.with_settings(neighbors=3))
        await asyncio.to_thread(model.swap_memory, pack)
        return await model.agenerate(IDS[:9].tolist(), **GREEDY)

    assert asyncio.run(on_threads()).token_ids == expected
    assert cupy.cuda.Device().id == 0


@pytest.mark.parametrize("layout", ["split", "fused"])
def test_graphs_that_write_the_cache_themselves(
    load: Any, tiny_bundle: Path, tiny_pack: Path, layout: str
) -> None:
    device = load(memory=tiny_pack, layout=layout, operators="modern").model
    expected = host(tiny_bundle, tiny_pack)
    np.testing.assert_allclose(device.logits(IDS), expected.logits(IDS), atol=2e-4)
    texts = [m.generate(IDS[:9], **GREEDY).token_ids for m in (device, expected)]
    assert texts[0] == texts[1]


def test_half_precision_is_near(load: Any, tiny_bundle: Path, tiny_pack: Path) -> None:
    setup = load(memory=tiny_pack, precision="float16")
    expected = host(tiny_bundle, tiny_pack).logits(IDS)
    found = setup.model.logits(IDS)
    # A token whose experts flip is off by more: the typical row is what is asked about.
    assert np.median(np.abs(found - expected).max(axis=1)) < 0.02
    assert setup.model.pipeline.new_cache(capacity=4).keys[0].dtype == np.float16


@pytest.mark.parametrize("variant", ["logits", "assignment"])
@pytest.mark.parametrize("similarity", ["cosine", "rbf"])
def test_every_variant(
    load: Any, tiny_bundle: Path, tiny_pack: Path, variant: Any, similarity: Any
) -> None:
    pack = MemoryPack.open(tiny_pack).with_settings(variant=variant, similarity=similarity)
    expected = host(tiny_bundle, pack).logits(IDS)
    np.testing.assert_allclose(load(memory=pack).model.logits(IDS), expected, atol=2e-4)


@pytest.mark.parametrize("variant", ["residual", "assignment"])
def test_gates_that_are_engines(
    load: Any, tiny_bundle: Path, tiny_pack: Path, variant: Any
) -> None:
    pack = MemoryPack.open(tiny_pack).with_settings(variant=variant)
    settings = DeviceSettings(gate="plugin")
    device = load(memory=pack, gates=True, keys="float32", settings=settings).model
    expected = host(tiny_bundle, pack)
    np.testing.assert_allclose(device.logits(IDS), expected.logits(IDS), atol=2e-4)
    texts = [m.generate(IDS[:9], **GREEDY).token_ids for m in (device, expected)]
    assert texts[0] == texts[1]
    device.disable_memory()
    np.testing.assert_allclose(device.logits(IDS), host(tiny_bundle).logits(IDS), atol=2e-4)


def test_ragged_batches_and_chunks(load: Any, tiny_bundle: Path, tiny_pack: Path) -> None:
    found = []
    lengths = np.array([5, 9, 2])
    for model in (load(memory=tiny_pack).model, host(tiny_bundle, tiny_pack)):
        cache = model.pipeline.new_cache(batch=3, capacity=40)
        ids = IDS[:27].reshape(3, 9)
        first = model.pipeline.step(cache, ids, lengths).copy()
        second = model.pipeline.step(cache, ids[:, :1]).copy()
        third = model.pipeline.step(cache, ids[:, :4], np.array([4, 1, 3])).copy()
        found.append((first, second, third, cache.lengths.tolist()))
    for one, other in zip(*found, strict=True):
        np.testing.assert_allclose(one, other, atol=2e-4)


def test_a_decode_step_is_one_graph_launch_from_the_third_on(load: Any, tiny_pack: Path) -> None:
    setup = load(memory=tiny_pack)
    cache = setup.model.pipeline.new_cache(capacity=40)
    setup.model.pipeline.step(cache, IDS[None, :9])
    launches = []
    for token in IDS[9:14]:
        setup.cupy.machine.launched.clear()
        setup.model.pipeline.step(cache, np.array([[token]]))
        launches.append(len(setup.cupy.machine.launched))
    plain = load(memory=tiny_pack, settings=DeviceSettings(keys="float32", cuda_graph=False)).model
    other = plain.pipeline.new_cache(capacity=40)
    plain.pipeline.step(other, IDS[None, :9])
    for token in IDS[9:14]:
        logits = plain.pipeline.step(other, np.array([[token]]))
    (bound,) = [p.bound for key, p in cache.plans.items() if key[0] == 1]
    assert bound._graph is not None
    assert len(set(launches)) == 1
    np.testing.assert_array_equal(
        setup.model.pipeline.step(cache, IDS[None, 14:15]),
        plain.pipeline.step(other, IDS[None, 14:15]),
    )
    del logits


@pytest.mark.parametrize("layout", ["split", "fused"])
def test_a_swap_in_place_is_seen_by_captured_graphs(
    load: Any, tmp_path: Path, tiny_bundle: Path, tiny_pack: Path, layout: str
) -> None:
    first = MemoryPack.open(tiny_pack)
    second = first.with_settings(variant="logits")
    setup = load(memory=first, layout=layout)
    model = setup.model
    cache = model.pipeline.new_cache(capacity=60)
    model.pipeline.step(cache, IDS[None, :9])
    for token in IDS[9:13]:
        model.pipeline.step(cache, np.array([[token]]))
    bound = [p.bound for key, p in cache.plans.items() if key[0] == 1]
    model.swap_memory(second)
    logits = [model.pipeline.step(cache, np.array([[token]])).copy() for token in IDS[13:16]]
    assert [p.bound for key, p in cache.plans.items() if key[0] == 1] == bound
    assert cache.states.get()[:, 0, 1].tolist() == [3.0] * 3  # evidence of the first is forgotten
    expected = host(tiny_bundle, first)
    other = expected.pipeline.new_cache(capacity=60)
    expected.pipeline.step(other, IDS[None, :9])
    for token in IDS[9:13]:
        expected.pipeline.step(other, np.array([[token]]))
    expected.swap_memory(second)
    for token, found in zip(IDS[13:16], logits, strict=True):
        want = expected.pipeline.step(other, np.array([[token]]))
        np.testing.assert_allclose(found, want, atol=2e-4)


def test_a_memory_of_another_class_is_bound_anew(
    load: Any, tmp_path: Path, tiny_bundle: Path, tiny_pack: Path
) -> None:
    model = load(memory=tiny_pack).model
    before = model.logits(IDS)
    pack = MemoryPack.open(tiny_pack).with_settings(neighbors=40)
    layout = model.pipeline.layout
    model.swap_memory(pack)
    assert model.pipeline.layout is not layout
    np.testing.assert_allclose(model.logits(IDS), host(tiny_bundle, pack).logits(IDS), atol=2e-4)
    model.disable_memory()
    np.testing.assert_allclose(model.logits(IDS), host(tiny_bundle).logits(IDS), atol=2e-4)
    model.swap_memory(tiny_pack)
    np.testing.assert_array_equal(model.logits(IDS), before)


@pytest.mark.parametrize("layout", ["split", "fused"])
def test_traces_are_those_of_the_host(
    load: Any, tiny_bundle: Path, tiny_pack: Path, layout: str
) -> None:
    found = load(memory=tiny_pack, layout=layout).model.routing_trace(IDS.tolist())
    expected = host(tiny_bundle, tiny_pack).routing_trace(IDS.tolist())
    for one, other in zip(found.gates, expected.gates, strict=True):
        np.testing.assert_array_equal(one.expert_ids, other.expert_ids)
        np.testing.assert_array_equal(one.trace.neighbors, other.trace.neighbors)
        np.testing.assert_allclose(one.trace.confidence, other.trace.confidence, atol=1e-5)
        np.testing.assert_allclose(one.trace.similarities, other.trace.similarities, atol=1e-5)


@pytest.mark.parametrize(
    ("keys", "atol"), [("float16", 0.02), ("int8", 0.3), ("int8+float16", 0.02)]
)
def test_smaller_keys_are_near(
    load: Any, tiny_bundle: Path, tiny_pack: Path, keys: str, atol: float
) -> None:
    model = load(memory=tiny_pack, settings=DeviceSettings(keys=keys)).model
    expected = host(tiny_bundle, tiny_pack).logits(IDS)
    assert np.abs(model.logits(IDS) - expected).max() < atol


def test_more_caches_than_a_launch_takes(
    load: Any, tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("knnmoe.runtime.device.append.MOST_CACHES", 4)  # of the 6 of three layers
    device = load(layout="fused").model
    np.testing.assert_allclose(device.logits(IDS), host(tiny_bundle).logits(IDS), atol=2e-4)


def test_gates_share_kernels_and_scratch_memory(load: Any, tiny_pack: Path) -> None:
    layout = load(memory=tiny_pack).model.pipeline.layout
    blends = [gate.blend for gate in layout._decode.gates]
    assert len({id(blend.workspace) for blend in blends}) == 1
    assert len({id(blend._module) for blend in blends}) == 1
    assert len({blend.ticket.data.ptr for blend in blends}) == len(blends)


def test_a_compressed_memory_is_on_the_device_what_it_is_on_the_host(
    load: Any, tiny_bundle: Path, tiny_pack: Path, tmp_path: Path
) -> None:
    settings = CompressSettings(scan_width=32, scan_bits=4, keys="projected", values="int4")
    small = compress_pack(tiny_pack, tmp_path / "small", settings).pack.path
    expected = host(tiny_bundle, small).logits(IDS)
    device = load(memory=small).model
    np.testing.assert_allclose(device.logits(IDS), expected, atol=2e-4)
    assert np.abs(expected - host(tiny_bundle).logits(IDS)).max() > 1e-3
    texts = [m.generate(IDS[:9], **GREEDY).token_ids for m in (device, host(tiny_bundle, small))]
    assert texts[0] == texts[1]
