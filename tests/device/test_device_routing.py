"""A model whose gates select in groups and by a bias does on a device what it does on the host."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from biased import biased_family, make_biased
from conftest import write_tiny_pack
from knnmoe.runtime.device.backend import DeviceSettings
from knnmoe.runtime.memory import MemoryPack
from knnmoe.runtime.model import Model

pytest.importorskip("onnx_ir")
IDS = np.random.default_rng(5).integers(0, 256, 60)
GREEDY = {"do_sample": False, "max_new_tokens": 12}


@pytest.fixture(scope="module", autouse=True)
def _family() -> Iterator[None]:
    from knnmoe.export.families import FAMILIES

    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(FAMILIES, "olmoe", biased_family())
        yield


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory, _family: None) -> Path:
    from knnmoe.export.exporter import export

    target = tmp_path_factory.mktemp("bundle") / "biased"
    export(make_biased(tmp_path_factory.mktemp("biased")), target)
    return target


@pytest.fixture(scope="module")
def pack(tmp_path_factory: pytest.TempPathFactory, bundle: Path) -> MemoryPack:
    return write_tiny_pack(tmp_path_factory.mktemp("pack") / "random", bundle)


def host(bundle: Path, memory: Any = None) -> Model:
    return Model.load(bundle, memory=memory, gate="numpy-float64", threads=1)


def check(device: Model, expected: Model) -> None:
    np.testing.assert_allclose(device.logits(IDS), expected.logits(IDS), atol=5e-4)
    texts = [model.generate(IDS[:9], **GREEDY).token_ids for model in (device, expected)]
    assert texts[0] == texts[1]


@pytest.mark.parametrize("variant", ["residual", "assignment"])
def test_kernel_gates(load: Any, bundle: Path, pack: MemoryPack, variant: Any) -> None:
    used = pack.with_settings(variant=variant)
    check(load(bundle_path=bundle, memory=used).model, host(bundle, used))


def test_frozen_gates(load: Any, bundle: Path) -> None:
    check(load(bundle_path=bundle).model, host(bundle))


@pytest.mark.parametrize("operators", ["primitive", "modern"])
def test_gates_inside_the_one_engine(
    load: Any, bundle: Path, pack: MemoryPack, operators: str
) -> None:
    options = {"bundle_path": bundle, "layout": "fused", "operators": operators}
    check(load(memory=pack, **options).model, host(bundle, pack))
    check(load(**options).model, host(bundle))


def test_gates_that_are_engines(load: Any, bundle: Path, pack: MemoryPack) -> None:
    settings = DeviceSettings(gate="plugin")
    options = {"bundle_path": bundle, "gates": True, "keys": "float32", "settings": settings}
    device = load(memory=pack, **options).model
    check(device, host(bundle, pack))
    device.disable_memory()
    check(device, host(bundle))


def test_a_swap_keeps_the_biases(load: Any, bundle: Path, pack: MemoryPack) -> None:
    device = load(bundle_path=bundle, memory=pack).model
    other = pack.with_settings(neighbors=2)
    device.generate(IDS[:9], **GREEDY)  # captured
    device.swap_memory(other)
    check(device, host(bundle, other))
