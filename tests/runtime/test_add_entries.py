"""Entries put into a memory while it serves: as if they had been there, from the next step on."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from conftest import ENTRIES, make_entries, make_identity
from knnmoe.runtime.calibration import Similarity, Variant, preset
from knnmoe.runtime.entries import NewEntries, size_class
from knnmoe.runtime.errors import BackendError, InputError, SettingError
from knnmoe.runtime.memory import MemoryPack
from knnmoe.runtime.model import Model
from knnmoe.runtime.pack_parts import GateEntries
from knnmoe.runtime.pack_writing import write_pack

IDS = np.random.default_rng(2).integers(0, 256, 40)
HOW = [
    *({"gate": gate} for gate in ("onnx", "two-stage")),
    {"layout": "fused"},
    *(pytest.param({"gate": gate}, marks=pytest.mark.slow) for gate in ("numpy", "faiss")),
]
PARTS = (slice(0, 200), slice(200, 230), slice(230, ENTRIES))


def pack_of(
    path: Path, bundle: Path, rows: slice, variant: Variant = "residual",
    similarity: Similarity = "cosine", gates: tuple[int, ...] = (0, 1, 2),
) -> MemoryPack:  # fmt: skip
    """Some of the entries that `make_entries` makes, around the centre of all of them."""
    identity = make_identity(bundle)

    def part(gate: int) -> GateEntries:
        whole = make_entries(identity, gate)
        rest = {name: getattr(whole, name)[rows] for name in ("keys", "router_logits", "residuals")}
        return GateEntries(**rest, center=whole.center)

    numbers = preset(variant, weighting="softmax", midpoint=0.2, sharpness=3.0, sequence=1.0)
    return write_pack(
        path, model=identity, gates={gate: part(gate) for gate in gates}, variant=variant,
        neighbors=8, similarity=similarity, calibration=replace(numbers, gamma=0.02),
        origins=None, provenance={},
    )  # fmt: skip


def new_entries(bundle: Path, rows: slice, gates: Any = (0, 1, 2)) -> dict[int, NewEntries]:
    """The same entries as they are given to a model, for `residual`."""
    found = {gate: make_entries(make_identity(bundle), gate) for gate in gates}
    return {g: NewEntries(one.keys[rows], one.residuals[rows]) for g, one in found.items()}


@pytest.fixture
def packs(tmp_path: Path, tiny_bundle: Path) -> tuple[MemoryPack, MemoryPack]:
    """A memory of the first part, and one of all parts."""
    few = pack_of(tmp_path / "few", tiny_bundle, PARTS[0])
    return few, pack_of(tmp_path / "all", tiny_bundle, slice(None))


@pytest.mark.parametrize("how", HOW, ids=str)
@pytest.mark.parametrize("similarity", ["cosine", pytest.param("rbf", marks=pytest.mark.slow)])
def test_a_memory_with_entries_added_is_the_memory_of_all(
    tiny_bundle: Path, tmp_path: Path, how: dict[str, Any], similarity: Similarity
) -> None:
    if how.get("gate") == "faiss":
        pytest.importorskip("faiss")
    if similarity == "rbf" and "layout" in how:
        pytest.skip("the fused graph is that of cosine")
    few = pack_of(tmp_path / "few", tiny_bundle, PARTS[0], similarity=similarity)
    whole = pack_of(tmp_path / "all", tiny_bundle, slice(None), similarity=similarity)
    model = Model.load(tiny_bundle, memory=few, threads=1, **how)
    before = model.logits(IDS)
    for part in PARTS[1:]:
        model.add_entries(new_entries(tiny_bundle, part), variant="residual")
    expected = Model.load(tiny_bundle, memory=whole, threads=1, **how)
    np.testing.assert_allclose(model.logits(IDS), expected.logits(IDS), atol=2e-5)
    assert np.abs(model.logits(IDS) - before).max() > 1e-3
    for token in IDS[:3]:  # a single token is searched in another way
        alone = model.logits([token])
        np.testing.assert_allclose(alone, expected.logits([token]), atol=2e-5)
    assert model.metrics.added_entries == 3 * 100


@pytest.mark.parametrize("variant", ["assignment", pytest.param("logits", marks=pytest.mark.slow)])
def test_values_are_those_of_the_variant(
    tiny_bundle: Path, tmp_path: Path, variant: Variant
) -> None:
    few = pack_of(tmp_path / "few", tiny_bundle, PARTS[0], variant)
    whole = pack_of(tmp_path / "all", tiny_bundle, slice(None), variant)
    expected = Model.load(tiny_bundle, memory=whole, threads=1)
    memories = [whole.gate_memory(gate, expected.bundle.manifest.routing) for gate in whole.gates]
    entries = {
        gate: NewEntries(make_entries(whole.model, gate).keys[200:], memory.values[200:])
        for gate, memory in enumerate(memories)
    }
    model = Model.load(tiny_bundle, memory=few, threads=1)
    model.add_entries(entries, variant=variant)
    np.testing.assert_allclose(model.logits(IDS), expected.logits(IDS), atol=2e-5)
    with pytest.raises(
        SettingError, match=f"variant: is not that of the memory; expected {variant}"
    ):
        model.add_entries(entries, variant="residual")


def test_entries_without_weight_are_no_evidence(tiny_bundle: Path, packs: Any) -> None:
    models = [Model.load(tiny_bundle, memory=packs[0], threads=1) for _ in range(2)]
    for model, weight in zip(models, (0.0, 1.0), strict=True):
        (part,) = (new_entries(tiny_bundle, PARTS[1], [0]).values(),)
        (new,) = part
        weights = np.full(30, weight)
        model.add_entries({0: replace(new, weights=weights)}, variant="residual")
    low, high = (model.routing_trace(IDS.tolist()).gates[0].trace for model in models)
    np.testing.assert_array_equal(low.neighbors, high.neighbors)
    assert (low.neighbors >= 200).any()
    assert (low.confidence <= high.confidence + 1e-7).all()
    assert low.confidence.sum() < high.confidence.sum()


def test_a_text_goes_on_with_what_it_knows(tiny_bundle: Path, packs: Any) -> None:
    model = Model.load(tiny_bundle, memory=packs[0], threads=1)
    cache = model.pipeline.new_cache(capacity=40)
    model.pipeline.step(cache, IDS[None, :9])
    counted = cache.states[:, 0, 1].copy()
    model.add_entries(new_entries(tiny_bundle, PARTS[1]), variant="residual")
    model.pipeline.step(cache, IDS[None, 9:12])
    assert counted.tolist() == [9.0] * 3
    assert cache.states[:, 0, 1].tolist() == [12.0] * 3
    session = model.session()
    first = session.generate(IDS[:9].tolist(), do_sample=False, max_new_tokens=4)
    model.add_entries(new_entries(tiny_bundle, PARTS[2]), variant="residual")
    session.generate([*IDS[:9].tolist(), *first.token_ids, 3], max_new_tokens=1)
    assert model.metrics.reused_tokens == 9 + 3


def test_a_step_that_was_bound_before_sees_nothing_of_them(tiny_bundle: Path, packs: Any) -> None:
    """As one that runs while entries are added, into room that its arrays have too."""
    model = Model.load(tiny_bundle, memory=packs[0], threads=1, gate="onnx")
    model.add_entries(new_entries(tiny_bundle, PARTS[1]), variant="residual")
    cache = model.pipeline.new_cache(capacity=40)
    logits = model.pipeline.step(cache, IDS[None, :9])
    before = logits.copy()
    (plan,) = cache.plans.values()
    keys = model._memories[0].keys
    model.add_entries(new_entries(tiny_bundle, slice(230, 240)), variant="residual")
    assert model._memories[0].keys is keys  # in place
    cache.states[...] = 0
    plan.bound.run()
    np.testing.assert_array_equal(logits, before)
    cache.lengths[:] = cache.states[...] = 0
    assert np.abs(model.pipeline.step(cache, IDS[None, :9]) - before).max() > 1e-4


def test_room_grows_by_classes_and_a_swap_forgets(tiny_bundle: Path, packs: Any) -> None:
    model = Model.load(tiny_bundle, memory=packs[0], threads=1)
    frozen = model.logits(IDS)
    sizes = []
    for start in range(200, 300, 10):
        part = new_entries(tiny_bundle, slice(start, start + 10), [1])
        model.add_entries(part, variant="residual")
        sizes.append(len(model._memories[1].keys))
    assert sizes == [size_class(n) for n in range(210, 310, 10)] == [256] * 5 + [320] * 5
    assert [memory.n_valid for memory in model._memories] == [200, 300, 200]
    model.swap_memory(packs[0])
    np.testing.assert_array_equal(model.logits(IDS), frozen)


BAD = {
    "no such gate": (SettingError, "gate 3: no such gate; expected 0 to 2"),
    "uncovered": (SettingError, r"gate 2: is left to the frozen router; expected one of \[0, 1\]"),
    "shape of keys": (InputError, r"gate 0: keys: wrong shape.*\[5, 64\].*\[5, 63\]"),
    "shape of values": (InputError, r"gate 0: values: wrong shape.*\[5, 8\].*\[4, 8\]"),
    "type": (InputError, "gate 0: keys: wrong shape or type.*complex"),
    "empty": (InputError, r"gate 0: keys: wrong shape.*\[1, 64\].*\[0, 64\]"),
    "nan": (InputError, "gate 0: values: has NaN or infinite numbers.*in row 3"),
    "too large": (InputError, "gate 0: keys: has NaN or infinite"),
    "weights": (InputError, "gate 0: weights: out of range; expected 0 to 1"),
    "nothing": (InputError, "entries: none given"),
}


@pytest.fixture(scope="module")
def covering_two(tiny_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Model:
    path = tmp_path_factory.mktemp("pack") / "two"
    pack = pack_of(path, tiny_bundle, PARTS[0], gates=(0, 1))
    return Model.load(tiny_bundle, memory=pack, threads=1)


@pytest.mark.parametrize("bad", BAD)
def test_what_cannot_be_added_is_named_and_nothing_is(covering_two: Model, bad: str) -> None:
    model = covering_two
    before = model.logits(IDS)
    keys, values = np.ones((5, 64)), np.ones((5, 8))
    nan = values.copy()
    nan[3, 1] = np.nan
    entries = {
        "no such gate": {0: NewEntries(keys, values), 3: NewEntries(keys, values)},
        "uncovered": {2: NewEntries(keys, values)},
        "shape of keys": {0: NewEntries(keys[:, 1:], values)},
        "shape of values": {0: NewEntries(keys, values[1:])},
        "type": {0: NewEntries(keys.astype(complex), values)},
        "empty": {0: NewEntries(keys[:0], values[:0])},
        "nan": {1: NewEntries(keys, values), 0: NewEntries(keys, nan)},
        "too large": {0: NewEntries(keys * 1e39, values)},
        "weights": {0: NewEntries(keys, values, np.full(5, 1.5))},
        "nothing": {},
    }[bad]
    kind, message = BAD[bad]
    with pytest.raises(kind, match=message):
        model.add_entries(entries, variant="residual")
    np.testing.assert_array_equal(model.logits(IDS), before)
    assert model.metrics.added_entries == 0


def test_memories_that_take_no_entries_say_so(
    tiny_bundle: Path, tmp_path: Path, packs: Any
) -> None:
    from knnmoe.calibration.compress import compress_pack

    new = new_entries(tiny_bundle, PARTS[1])
    model = Model.load(tiny_bundle, threads=1)
    with pytest.raises(BackendError, match=r"there is no memory.*swap_memory"):
        model.add_entries(new, variant="residual")
    compress_pack(packs[1].path, tmp_path / "small")
    model.swap_memory(tmp_path / "small")
    with pytest.raises(BackendError, match="gate 0: its memory is compressed"):
        model.add_entries(new, variant="residual")
    with pytest.raises(SettingError, match="variant: unknown"):
        model.add_entries(new, variant="both")  # type: ignore[arg-type] # what is tested
    model.close()
    with pytest.raises(BackendError, match="was closed"):
        model.add_entries(new, variant="residual")
