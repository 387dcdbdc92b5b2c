"""A damaged bundle, pack or engine set is a stated failure that names it; nothing is half used."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from damage import files, wrong_bytes, wrong_manifests
from knnmoe.runtime.errors import BundleError, KnnMoeError, MemoryPackError
from knnmoe.runtime.memory import MemoryPack
from knnmoe.runtime.model import Model

IDS = list(range(12))
# What a person may set: other values of these are other settings, not damage.
SETTINGS = ("neighbors", "calibration", "variant", "similarity", "evidence", "gates.", "used")


def refused(root: Path, use: Callable[[], object], what: str) -> bool:
    """Whether using a damaged directory is a stated failure, which must name it."""
    stated = None
    try:
        use()
    except KnnMoeError as error:
        stated = error
    if stated is None:
        return False
    assert str(root) in str(stated), f"{what}: {stated}"
    assert json.dumps(stated.to_json()), what
    return True


@pytest.fixture
def served(tiny_bundle: Path, tiny_pack: Path, tmp_path: Path) -> tuple[Model, Path]:
    """A model that serves a pack, and a copy of the pack to damage."""
    shutil.copytree(tiny_pack, tmp_path / "pack")
    return Model.load(tiny_bundle, memory=tiny_pack, threads=1), tmp_path / "pack"


@pytest.mark.parametrize("each", [1, pytest.param(12, marks=pytest.mark.slow)])
def test_a_pack_with_another_field_is_refused_or_means_it(
    served: tuple[Model, Path], each: int
) -> None:
    model, pack = served
    before = model.logits(IDS)
    good = (pack / "memory.json").read_bytes()
    count = 0
    for what, content in wrong_manifests(json.loads(good), random.Random(each), each):
        (pack / "memory.json").write_bytes(content)
        if refused(pack, lambda: model.swap_memory(pack), what):
            count += 1
            continue
        found = model.logits(IDS)
        assert np.isfinite(found).all(), what
        assert np.array_equal(found, before) or what.startswith(SETTINGS), what
        (pack / "memory.json").write_bytes(good)
        model.swap_memory(pack)
    assert count > 40
    np.testing.assert_array_equal(model.logits(IDS), before)  # the old one served on


@pytest.mark.parametrize("count", [2, pytest.param(200, marks=pytest.mark.slow)])
def test_a_pack_with_another_byte_is_refused(served: tuple[Model, Path], count: int) -> None:
    model, pack = served
    for path in files(pack):
        if path.name == "memory.json":
            continue
        good = path.read_bytes()
        for what, content in wrong_bytes(good, random.Random(count), count):
            path.write_bytes(content)
            with pytest.raises(MemoryPackError, match=path.name):
                model.swap_memory(pack)
            assert what
        path.write_bytes(good)
    model.swap_memory(pack)


@pytest.mark.parametrize("share", [0.06, pytest.param(1.0, marks=pytest.mark.slow)])
def test_a_bundle_with_another_field_is_refused_or_runs(
    tiny_bundle: Path, tmp_path: Path, share: float
) -> None:
    bundle = tmp_path / "bundle"
    shutil.copytree(tiny_bundle, bundle)
    good = (bundle / "manifest.json").read_bytes()
    draw = random.Random(0)
    count = 0

    def use() -> None:
        model = Model.load(bundle, threads=1)
        assert np.isfinite(model.logits(IDS)).all()
        model.generate(IDS, max_new_tokens=2)

    for what, content in wrong_manifests(json.loads(good), draw, 1):
        if draw.random() < share:
            (bundle / "manifest.json").write_bytes(content)
            count += refused(bundle, use, what)
    assert count > 10


@pytest.mark.parametrize("count", [0, pytest.param(20, marks=pytest.mark.slow)])
def test_a_bundle_with_another_byte_is_refused(
    tiny_bundle: Path, tmp_path: Path, count: int
) -> None:
    bundle = tmp_path / "bundle"
    shutil.copytree(tiny_bundle, bundle)
    for path in files(bundle):
        if path.name == "manifest.json":
            continue
        good = path.read_bytes()
        for what, content in wrong_bytes(good, random.Random(count), count):
            path.write_bytes(content)
            with pytest.raises(BundleError, match=path.name):
                Model.load(bundle, threads=1)
            assert what
        path.write_bytes(good)


def test_a_file_that_is_replaced_between_opening_and_swapping_is_refused(
    served: tuple[Model, Path], tmp_path: Path
) -> None:
    model, pack = served
    before = model.logits(IDS)
    opened = MemoryPack.open(pack)
    first, second = (pack / f"gate-0{gate}.safetensors" for gate in (0, 1))
    shutil.copy(second, tmp_path / "other")
    (tmp_path / "other").replace(first)  # of the same size and shapes, and whole
    with pytest.raises(MemoryPackError, match=r"gate-00\.safetensors: was changed"):
        model.swap_memory(opened)
    np.testing.assert_array_equal(model.logits(IDS), before)


def test_a_file_that_was_only_touched_is_hashed_again_and_taken(
    served: tuple[Model, Path],
) -> None:
    model, pack = served
    opened = MemoryPack.open(pack)
    (pack / "gate-00.safetensors").touch()
    model.swap_memory(opened)


@pytest.mark.parametrize("outside", ["../gate.safetensors", "/tmp/gate.safetensors", "a/../../g"])
def test_a_pack_that_leads_out_of_its_directory_is_refused(
    served: tuple[Model, Path], outside: str
) -> None:
    model, pack = served
    stated = json.loads((pack / "memory.json").read_text())
    stated["gates"][0]["file"] = outside
    (pack / "memory.json").write_text(json.dumps(stated))
    with pytest.raises(MemoryPackError, match=r"memory\.json: gates\[0\]: file"):
        model.swap_memory(pack)


def test_values_that_overflow_when_they_are_added_are_refused(
    served: tuple[Model, Path], tiny_bundle: Path, tmp_path: Path
) -> None:
    from dataclasses import replace

    from conftest import make_entries, make_identity
    from knnmoe.runtime.calibration import preset
    from knnmoe.runtime.pack_writing import write_pack

    identity = make_identity(tiny_bundle)
    huge = np.full((300, identity.num_experts), 3e38, np.float32)
    entries = replace(make_entries(identity, 0), router_logits=huge, residuals=huge)
    write_pack(
        tmp_path / "huge", model=identity, gates={0: entries}, variant="logits", neighbors=8,
        similarity="cosine", calibration=preset("logits"), origins=None, provenance={},
    )  # fmt: skip
    model, before = served[0], served[0].logits(IDS)
    with pytest.raises(MemoryPackError, match=r"gate-00\.safetensors: .* not finite"):
        model.swap_memory(MemoryPack.open(tmp_path / "huge"))
    np.testing.assert_array_equal(model.logits(IDS), before)
    far = replace(make_entries(identity, 0), keys=np.full((300, 64), 3e38, np.float32))
    far = replace(far, center=np.full(64, -3e38, np.float32))
    write_pack(
        tmp_path / "far", model=identity, gates={0: far}, variant="residual", neighbors=8,
        similarity="cosine", calibration=preset("residual"), origins=None, provenance={},
    )  # fmt: skip
    with pytest.raises(MemoryPackError, match=r"gate-00\.safetensors: .* not finite"):
        model.swap_memory(MemoryPack.open(tmp_path / "far"))
