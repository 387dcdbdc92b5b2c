"""Entries put into a memory on the device: in place while there is room, else bound anew."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from conftest import make_entries, make_identity
from knnmoe.runtime.device.backend import DeviceSettings
from knnmoe.runtime.entries import NewEntries
from knnmoe.runtime.errors import SettingError
from knnmoe.runtime.model import Model

IDS = np.random.default_rng(6).integers(0, 256, 40)


def more(bundle: Path, count: int) -> dict[int, NewEntries]:
    made = {g: make_entries(make_identity(bundle), g + 50, entries=count) for g in range(3)}
    return {gate: NewEntries(one.keys, one.residuals) for gate, one in made.items()}


@pytest.mark.parametrize(
    ("how", "keys"),
    [
        ("split", "float32"),
        pytest.param("split", "int8+float16", marks=pytest.mark.slow),
        pytest.param("fused", "float32", marks=pytest.mark.slow),
    ],
)
def test_a_captured_step_goes_on_with_the_entries(
    load: Any, tiny_bundle: Path, tiny_pack: Path, how: str, keys: str
) -> None:
    model = load(memory=tiny_pack, layout=how, settings=DeviceSettings(keys=keys)).model
    host = Model.load(tiny_bundle, memory=tiny_pack, threads=1)
    caches = [one.pipeline.new_cache(capacity=40) for one in (model, host)]
    new = more(tiny_bundle, 15)  # 300 are there, and room for 320
    atol = 2e-4 if keys == "float32" else 0.02
    found = []
    for one, cache in zip((model, host), caches, strict=True):
        one.pipeline.step(cache, IDS[None, :9])
        for token in IDS[9:13]:
            one.pipeline.step(cache, np.array([[token]]))
        layout = one.pipeline.layout
        one.add_entries(new, variant="residual")
        assert (one.pipeline.layout is layout) == (one is model)
        steps = [one.pipeline.step(cache, np.array([[token]])).copy() for token in IDS[13:16]]
        found.append(np.stack(steps))
    np.testing.assert_allclose(found[0], found[1], atol=atol)
    assert caches[0].states.get()[:, 0, 1].tolist() == [16.0] * 3  # nothing was forgotten
    frozen = Model.load(tiny_bundle, memory=tiny_pack, threads=1)
    assert np.abs(host.logits(IDS) - frozen.logits(IDS)).max() > 1e-3


@pytest.mark.parametrize("how", [pytest.param("split", marks=pytest.mark.slow), "fused"])
def test_more_than_there_is_room_for_is_bound_anew(
    load: Any, tiny_bundle: Path, tiny_pack: Path, how: str
) -> None:
    model = load(memory=tiny_pack, layout=how).model
    host = Model.load(tiny_bundle, memory=tiny_pack, threads=1)
    cache = model.pipeline.new_cache(capacity=40)
    model.pipeline.step(cache, IDS[None, :9])
    layout = model.pipeline.layout
    for one in (model, host):
        one.add_entries(more(tiny_bundle, 60), variant="residual")
    assert model.pipeline.layout is not layout
    np.testing.assert_allclose(model.logits(IDS), host.logits(IDS), atol=2e-4)
    model.pipeline.step(cache, IDS[None, 9:12])
    assert cache.states.get()[:, 0, 1].tolist() == [12.0] * 3
    if how == "fused":  # its engines were built for 512
        before = model.logits(IDS)
        with pytest.raises(SettingError, match="more entries than the engines were built for"):
            model.add_entries(more(tiny_bundle, 160), variant="residual")
        np.testing.assert_array_equal(model.logits(IDS), before)
