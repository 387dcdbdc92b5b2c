"""Memory packs: what is written is read, and nothing damaged, unsafe or foreign is used."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from conftest import ENTRIES, make_entries, make_identity, write_tiny_pack
from knnmoe.runtime.calibration import Calibration, preset
from knnmoe.runtime.errors import KnnMoeError, MemoryPackError, OutputError, SettingError
from knnmoe.runtime.memory import MemoryPack
from knnmoe.runtime.model import Model
from knnmoe.runtime.pack_writing import rewrite_settings, write_pack
from knnmoe.runtime.routing import RoutingRule

RULE = RoutingRule(2)


@pytest.fixture
def pack(tmp_path: Path, tiny_pack: Path) -> Path:
    """A copy of the tiny pack to damage."""
    return Path(shutil.copytree(tiny_pack, tmp_path / "pack"))


def edit(pack: Path, change: Callable[[dict[str, Any]], object]) -> None:
    path = pack / "memory.json"
    manifest = json.loads(path.read_text())
    change(manifest)
    path.write_text(json.dumps(manifest))


def restate(pack: Path, name: str, tensors: dict[str, Any]) -> None:
    """Replace a file and state its hash truthfully, as an attacker would."""
    from knnmoe.runtime.bundle import describe_file

    save_file(tensors, pack / name)
    stated = describe_file(pack / name)

    def change(manifest: dict[str, Any]) -> None:
        for gate in manifest["gates"]:
            if gate["file"] == name:
                gate |= {"sha256": stated.sha256, "size": stated.size}

    edit(pack, change)


def test_what_is_written_is_read(tiny_pack: Path, tiny_bundle: Path) -> None:
    opened = MemoryPack.open(tiny_pack)
    identity = make_identity(tiny_bundle)
    assert opened.model == identity
    assert (opened.variant, opened.neighbors, opened.similarity) == ("residual", 8, "cosine")
    assert opened.entries == ENTRIES
    for gate in opened.gates:
        stored, given = opened.read(gate), make_entries(identity, gate.gate)
        for name in ("keys", "router_logits", "residuals", "center"):
            np.testing.assert_array_equal(getattr(stored, name), getattr(given, name))
    origins = opened.read_origins()
    assert origins is not None
    assert origins.positions[123] == 23


def test_each_variant_is_made_of_the_same_pack(tiny_pack: Path) -> None:
    opened = MemoryPack.open(tiny_pack)
    entries = opened.read(opened.gates[0])
    learned = entries.router_logits + entries.residuals
    for variant, values, interpolate in (
        ("residual", entries.residuals, 0),
        ("logits", learned, 1),
        ("assignment", RULE.assignments(learned), 1),
    ):
        used = opened.with_settings(variant=variant)  # type: ignore[arg-type]
        memory = used.gate_memory(used.gates[0], RULE)
        np.testing.assert_allclose(memory.values, values, atol=1e-6)
        assert memory.calibration.interpolate == interpolate
        assert memory.rule_first == (variant == "assignment")
        assert memory.calibration.midpoint == opened.gates[0].calibration.midpoint


def test_settings_are_rewritten_and_tensors_left_alone(pack: Path) -> None:
    opened = MemoryPack.open(pack)
    before = {p.name: p.read_bytes() for p in pack.iterdir() if p.name != "memory.json"}
    changed = opened.with_settings(
        variant="logits", neighbors=3, calibration={1: preset("logits", scale=0.25)}
    )
    again = rewrite_settings(changed, {"calibrated": True})
    assert (again.variant, again.neighbors) == ("logits", 3)
    assert again.gates[1].calibration.scale == 0.25
    assert again.gates[0].calibration.scale == opened.gates[0].calibration.scale
    assert again.provenance == {"calibrated": True}
    after = {p.name: p.read_bytes() for p in pack.iterdir() if p.name != "memory.json"}
    assert after == before


ATTACKS: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    "schema": (lambda m: m.update(schema="knnmoe.memory/99"), "schema"),
    "no schema": (lambda m: m.pop("schema"), "schema"),
    "missing field": (lambda m: m.pop("neighbors"), "neighbors"),
    "unknown field": (lambda m: m.update(extra=1), "extra"),
    "no gates": (lambda m: m.update(gates=[]), "gates"),
    "gates twice": (lambda m: m["gates"].append(m["gates"][0]), "gates"),
    "gate beyond the model": (lambda m: m["gates"][-1].update(gate=99), "gate"),
    "path outside": (lambda m: m["gates"][0].update(file="../elsewhere.safetensors"), "file"),
    "absolute path": (lambda m: m["gates"][0].update(file="/etc/passwd"), "file"),
    "no entries": (lambda m: m["gates"][0].update(entries=0), "entries"),
    "huge entries": (lambda m: m["gates"][0].update(entries=1 << 40), "entries"),
    "other entries": (lambda m: m["gates"][0].update(entries=7), "shape"),
    "variant": (lambda m: m.update(variant="magic"), "variant"),
    "similarity": (lambda m: m.update(similarity="dot"), "similarity"),
    "K zero": (lambda m: m.update(neighbors=0), "neighbors"),
    "K too large": (lambda m: m.update(neighbors=65), "neighbors"),
    "K true": (lambda m: m.update(neighbors=True), "neighbors"),
    "scale above one": (lambda m: m["gates"][0]["calibration"].update(scale=1.5), "scale"),
    "scale beyond every float": (
        lambda m: m["gates"][0]["calibration"].update(scale=10**400),
        "scale",
    ),
    "number missing": (lambda m: m["gates"][0]["calibration"].pop("cap"), "calibration"),
    "number as text": (lambda m: m["gates"][0]["calibration"].update(cap="12"), "cap"),
    "size": (lambda m: m["gates"][0].update(size=3), "size"),
    "hash": (lambda m: m["gates"][0].update(sha256="0" * 64), "sha256"),
    "missing file": (lambda m: m["gates"][0].update(file="gate-77.safetensors"), "missing"),
}


@pytest.mark.parametrize("attack", ATTACKS)
def test_a_wrong_manifest_is_refused(pack: Path, tiny_bundle: Path, attack: str) -> None:
    change, named = ATTACKS[attack]
    edit(pack, change)
    with pytest.raises(MemoryPackError, match=named):
        Model.load(tiny_bundle, memory=pack)


@pytest.mark.parametrize(
    "content", [b"", b"[]", b"{", b"\xff\xfe", b'{"schema": NaN}', b"[" * 100_000]
)
def test_a_manifest_that_is_not_json_is_refused(pack: Path, content: bytes) -> None:
    (pack / "memory.json").write_bytes(content)
    with pytest.raises(MemoryPackError):
        MemoryPack.open(pack)


def test_a_changed_byte_is_found(pack: Path) -> None:
    path = pack / "gate-01.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(MemoryPackError, match="changed"):
        MemoryPack.open(pack)


def test_a_truncated_file_is_found_without_hashing(pack: Path) -> None:
    path = pack / "gate-01.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(MemoryPackError, match="size"):
        MemoryPack.open(pack, verify=False)


def test_a_link_is_refused(pack: Path) -> None:
    path = pack / "gate-01.safetensors"
    path.rename(pack.parent / "aside")
    path.symlink_to(pack.parent / "aside")
    with pytest.raises(MemoryPackError, match="link"):
        MemoryPack.open(pack)


@pytest.mark.parametrize("wrong", ["nan", "inf", "shape", "dtype", "extra", "not safetensors"])
def test_wrong_tensors_with_the_right_hash_are_refused(
    pack: Path, tiny_bundle: Path, wrong: str
) -> None:
    name = "gate-00.safetensors"
    tensors = load_file(pack / name)
    if wrong == "nan":
        tensors["residuals"][3, 1] = np.nan
    if wrong == "inf":
        tensors["keys"][0, 0] = np.inf
    if wrong == "shape":
        tensors["keys"] = tensors["keys"][:, :-1].copy()
    if wrong == "dtype":
        tensors["residuals"] = tensors["residuals"].astype(np.int32)
    if wrong == "extra":
        tensors["more"] = np.zeros(1, np.float32)
    restate(pack, name, tensors)
    if wrong == "not safetensors":
        (pack / name).write_bytes(b"\xff" * (pack / name).stat().st_size)
    with pytest.raises(MemoryPackError, match=name):
        Model.load(tiny_bundle, memory=MemoryPack.open(pack, verify=False))


@pytest.mark.parametrize("field", ["fingerprint", "num_gates", "hidden_size", "num_experts"])
def test_a_memory_of_another_model_is_refused_and_the_old_one_keeps_serving(
    pack: Path, tiny_pack: Path, tiny_bundle: Path, field: str
) -> None:
    model = Model.load(tiny_bundle, memory=tiny_pack)
    ids = list(range(40))
    before = model.logits(ids).copy()

    def change(manifest: dict[str, Any]) -> None:
        other = {"fingerprint": "sha256:" + "0" * 64, "num_gates": 4}
        manifest["model"][field] = other.get(field, 128)

    edit(pack, change)
    with pytest.raises(MemoryPackError, match="another model"):
        model.swap_memory(pack)
    np.testing.assert_array_equal(model.logits(ids), before)


@pytest.mark.parametrize("path", ["missing", "file"])
def test_what_is_no_pack_is_refused(tmp_path: Path, path: str) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(MemoryPackError, match="not a memory pack"):
        MemoryPack.open(tmp_path / path)


def test_nothing_is_written_for_entries_that_cannot_be_used(
    tmp_path: Path, tiny_bundle: Path
) -> None:
    identity = make_identity(tiny_bundle)
    good = make_entries(identity, 0)
    holes = replace(good, residuals=np.full_like(good.residuals, np.nan))
    empty = make_entries(identity, 0, entries=1)
    empty = replace(
        empty,
        keys=empty.keys[:0],
        router_logits=empty.router_logits[:0],
        residuals=empty.residuals[:0],
    )
    for gates in ({0: holes}, {0: empty}, {}):
        with pytest.raises(MemoryPackError):
            write_pack(
                tmp_path / "new",
                model=identity,
                gates=gates,
                variant="residual",
                neighbors=8,
                similarity="cosine",
                calibration=Calibration(),
                origins=None,
                provenance={},
            )
    assert list(tmp_path.iterdir()) == []


def test_an_existing_pack_is_not_replaced_unasked(pack: Path, tiny_bundle: Path) -> None:
    before = (pack / "memory.json").read_bytes()
    with pytest.raises(OutputError, match="not empty"):
        write_tiny_pack(pack, tiny_bundle)
    assert (pack / "memory.json").read_bytes() == before


@pytest.mark.parametrize(
    "settings",
    [
        {"neighbors": 0},
        {"neighbors": 65},
        {"neighbors": 2.5},
        {"variant": "none"},
        {"similarity": "dot"},
        {"scale": -0.1},
        {"scale": 1.1},
        {"scale": float("nan")},
    ],
)
def test_settings_out_of_range_are_refused(
    tiny_bundle: Path, tiny_pack: Path, settings: dict[str, Any]
) -> None:
    with pytest.raises(SettingError) as caught:
        Model.load(tiny_bundle, memory=tiny_pack, **settings)
    assert isinstance(caught.value, KnnMoeError)
    assert next(iter(settings)) in str(caught.value)


def test_a_pack_of_the_older_schema_is_used_as_it_was(pack: Path) -> None:
    new = MemoryPack.open(pack)

    def older(manifest: dict[str, Any]) -> None:
        manifest["schema"] = "knnmoe.memory/1"
        del manifest["evidence"], manifest["calibrated"]
        for gate in manifest["gates"]:
            del gate["calibration"]["decay"]

    edit(pack, older)
    old = MemoryPack.open(pack)
    assert (old.evidence, old.calibrated) == ("all", False)
    assert [gate.calibration for gate in old.gates] == [gate.calibration for gate in new.gates]
    assert old.gates[0].calibration.decay == 1
    written = rewrite_settings(old.with_settings(calibrated=True), old.provenance)
    assert json.loads((pack / "memory.json").read_text())["schema"] == "knnmoe.memory/2"
    assert written.calibrated
    edit(pack, lambda manifest: manifest.pop("calibrated"))
    with pytest.raises(MemoryPackError, match="calibrated: missing"):
        MemoryPack.open(pack)


def test_entries_of_background_text_can_be_no_evidence(pack: Path) -> None:
    opened, rule = MemoryPack.open(pack), RULE
    origins = opened.read_origins()
    assert origins is not None
    origins.documents[::3] = -1 - origins.documents[::3]
    gates = {gate.gate: opened.read(gate) for gate in opened.gates}
    written = write_pack(
        pack.parent / "background", model=opened.model, gates=gates, variant="residual",
        neighbors=4, similarity="cosine", calibration=Calibration(interpolate=0.0),
        origins=origins, provenance={}, evidence="reference",
    )  # fmt: skip
    memory = written.gate_memory(written.gates[0], rule)
    np.testing.assert_array_equal(memory.evidence_weights, origins.documents >= 0)
    everyone = written.with_settings(evidence="all")
    assert everyone.gate_memory(written.gates[0], rule).evidence_weights is None
    with pytest.raises(SettingError, match="evidence"):
        written.with_settings(evidence="none")
    edit(written.path, lambda manifest: manifest.update(entries=None))
    silent = MemoryPack.open(written.path)
    with pytest.raises(MemoryPackError, match="does not say which they are"):
        silent.gate_memory(silent.gates[0], rule)


def test_a_pack_that_replaces_logits_uncalibrated_serves_only_if_asked(
    pack: Path, tiny_bundle: Path
) -> None:
    def interpolating(manifest: dict[str, Any]) -> None:
        manifest["variant"] = "logits"
        for gate in manifest["gates"]:
            gate["calibration"]["interpolate"] = 1.0

    edit(pack, interpolating)
    with pytest.raises(MemoryPackError, match=r"is not calibrated.*--variant residual"):
        Model.load(tiny_bundle, memory=pack)
    model = Model.load(tiny_bundle, memory=pack, variant="logits")
    before = model.memory
    with pytest.raises(MemoryPackError, match="is not calibrated"):
        model.swap_memory(pack)
    assert model.memory is before
    edit(pack, lambda manifest: manifest.update(calibrated=True))
    model.swap_memory(pack)


def test_a_gate_that_is_not_used_routes_by_the_frozen_router(pack: Path, tiny_bundle: Path) -> None:
    opened = MemoryPack.open(pack)
    gate = opened.gates[1].gate
    written = rewrite_settings(opened.with_settings(unused={gate}), opened.provenance)
    assert [one.gate for one in written.gates if not one.used] == [gate]
    model = Model.load(tiny_bundle, memory=pack)
    records = model.routing_trace([1, 2, 3, 4]).gates
    assert records[gate].trace.confidence.max() == 0
    assert records[opened.gates[0].gate].trace.confidence.max() > 0
    again = rewrite_settings(written.with_settings(unused=()), opened.provenance)
    assert all(one.used for one in again.gates)
