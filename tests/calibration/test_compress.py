"""`knnmoe memory compress`, and the gate over what it writes."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from safetensors.numpy import load_file, save_file

import knnmoe.runtime.memory as memory_module
from conftest import make_identity
from knnmoe.calibration.budget import Budget, compress_to_budget
from knnmoe.calibration.cli import memory as memory_commands
from knnmoe.calibration.compress import CompressSettings, Kept, compress_pack
from knnmoe.calibration.recall import Exact, measure_recall, principal, project_keys, turned
from knnmoe.runtime.blend import knn_blend, prepare_queries, search
from knnmoe.runtime.bundle import Bundle, describe_file
from knnmoe.runtime.calibration import preset
from knnmoe.runtime.compressed import CompressedMemory
from knnmoe.runtime.engines.onnxruntime import OrtEngine
from knnmoe.runtime.errors import MemoryPackError, OutputError, SettingError
from knnmoe.runtime.gates.base import GateBuffers, GateTrace
from knnmoe.runtime.gates.numpy import NumpyGate
from knnmoe.runtime.gates.onnx import OnnxGate, graph_name
from knnmoe.runtime.gates.retrieval import Retrieval
from knnmoe.runtime.gates.select import choose, make_gate
from knnmoe.runtime.gates.two_stage import TwoStageGate
from knnmoe.runtime.memory import MemoryPack
from knnmoe.runtime.model import Model
from knnmoe.runtime.pack_parts import EntryOrigins, GateEntries, PackGate
from knnmoe.runtime.pack_writing import write_pack
from knnmoe.runtime.routing import RoutingRule
from knnmoe.runtime.stored_values import store_values, value_types
from knnmoe.runtime.two_stage import projected_scores, search_compressed

SIZE, EXPERTS, ENTRIES = 64, 8, 600
RULE = RoutingRule(2)


def entries_of(gate: int, count: int = ENTRIES, size: int = SIZE) -> GateEntries:
    """Keys whose spectrum decays, as that of router inputs does, far from the origin."""
    rng = np.random.default_rng(gate)
    spread = np.arange(1, size + 1) ** -0.7
    keys = (rng.normal(size=(count, size)) * spread + 0.5).astype(np.float16)
    logits = rng.normal(size=(2, count, EXPERTS)).astype(np.float16)
    return GateEntries(keys, logits[0], logits[1], keys.mean(axis=0, dtype=np.float32))


@pytest.fixture(scope="module")
def pack(tmp_path_factory: pytest.TempPathFactory, tiny_bundle: Path) -> Path:
    """A memory of the tiny model that is worth compressing; do not write into it."""
    identity = make_identity(tiny_bundle)
    assert (identity.hidden_size, identity.num_experts) == (SIZE, EXPERTS)
    written = write_pack(
        tmp_path_factory.mktemp("pack") / "plain",
        model=identity,
        gates={gate: entries_of(gate) for gate in range(identity.num_gates)},
        variant="residual",
        neighbors=8,
        similarity="cosine",
        calibration=preset("residual", weighting="softmax"),
        origins=None,
        provenance={"made": "at random"},
    )
    return written.path


@pytest.fixture(scope="module")
def compressed(pack: Path) -> Path:
    """Its compressed copy; do not write into it."""
    return compress_pack(pack, pack.parent / "compressed").pack.path


def memory_from(
    path: Path, similarity: Any = "cosine", *, n_valid: int = ENTRIES, variant: Any = "residual"
) -> CompressedMemory:
    opened = MemoryPack.open(path).with_settings(variant=variant)
    found = opened.compressed_memory(opened.gates[0], RULE)
    assert found is not None
    assert found.similarity == similarity
    return replace(found, n_valid=n_valid)


@pytest.fixture(scope="module", params=["cosine", "rbf"])
def by_similarity(request: Any, pack: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A compressed pack of each similarity, and which it is."""
    folder = tmp_path_factory.mktemp(request.param)
    opened = MemoryPack.open(pack)
    identity, numbers = opened.model, replace(opened.gates[0].calibration, gamma=0.2)
    plain = write_pack(
        folder / "plain", model=identity, gates={0: entries_of(0)}, variant="residual",
        neighbors=8, similarity=request.param, calibration=numbers, origins=None, provenance={},
    )  # fmt: skip
    return compress_pack(plain.path, folder / "compressed").pack.path, request.param


def queries(memory: CompressedMemory, tokens: int, seed: int = 5) -> Any:
    """Router inputs as near to entries as those of a domain are."""
    rng = np.random.default_rng(seed)
    near = memory.centred(rng.integers(0, max(1, memory.n_valid), tokens)) + memory.center
    spread = np.arange(1, SIZE + 1) ** -0.7
    return (near + 0.3 * spread * rng.normal(size=near.shape)).astype(np.float32)


def engine_for(bundle: Path, memory: Any, threads: int = 1) -> OrtEngine:
    opened = Bundle.open(bundle)
    return OrtEngine(opened.file(opened.manifest.gates[graph_name(memory)].file), threads=threads)


def route(gate: Any, x: Any, rows: Any) -> tuple[GateBuffers, GateTrace]:
    """One call for one sequence of T tokens, traced."""
    tokens = len(x)
    buffers = GateBuffers(
        router_input=x,
        router_logits=rows.astype(np.float32),
        state=np.zeros((1, 2), np.float32),
        lengths=np.array([tokens]),
        expert_ids=np.zeros((tokens, 2), np.int32),
        expert_weights=np.zeros((tokens, 2), np.float32),
        state_out=np.zeros((1, 2), np.float32),
    )
    trace = GateTrace.empty(tokens, gate.neighbors)
    gate.bind(buffers, trace)()
    return buffers, trace


# --- the reference and the gate ----------------------------------------------------------------


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("tokens", [1, 19])
def test_the_gate_routes_as_the_exact_one_where_all_neighbours_are_candidates(
    tiny_bundle: Path, by_similarity: Any, tokens: int, threads: int
) -> None:
    path, similarity = by_similarity
    memory = memory_from(path, similarity)
    x = queries(memory, tokens)
    rows = np.random.default_rng(1).normal(size=(tokens, EXPERTS))
    engine = engine_for(tiny_bundle, memory, threads)
    exact, exact_trace = route(OnnxGate.over(engine, memory.widened()), x, rows)
    gate = TwoStageGate.over(engine, memory, RULE, 2, candidates=64)
    found = search_compressed(x, memory, 64, np.float64, int8_queries=True)[0]
    assert (np.sort(found) == np.sort(search(x, memory.widened(), np.float64)[0])).all()
    buffers, trace = route(gate, x, rows)
    np.testing.assert_array_equal(trace.neighbors, exact_trace.neighbors)
    np.testing.assert_allclose(trace.similarities, exact_trace.similarities, atol=2e-6)
    np.testing.assert_array_equal(buffers.expert_ids, exact.expert_ids)
    np.testing.assert_allclose(buffers.expert_weights, exact.expert_weights, atol=1e-5)
    np.testing.assert_allclose(buffers.state_out, exact.state_out, atol=1e-5)


def test_candidates_are_those_that_the_reference_scores_best(by_similarity: Any) -> None:
    path, similarity = by_similarity
    # As many neighbours as candidates: all of them are named.
    memory = replace(memory_from(path, similarity, n_valid=500), k=20)
    x = queries(memory, 6) * np.array([[1e-2], [1], [1], [30], [1], [0]], np.float32)
    found = Retrieval.over(memory, 20, threads=1).search(x)[0]
    scores = projected_scores(x, memory, np.float64, int8_queries=True)
    best = -np.sort(-scores, axis=1)[:, :20]
    got = -np.sort(-np.take_along_axis(scores, found, axis=1), axis=1)
    # Of two roundings to the nearest that are as near, either may be taken.
    slack = 0.02 * np.abs(best).max(axis=1, keepdims=True)
    assert (got >= best - slack).all()
    assert all(len(set(row)) == 20 for row in found.tolist())


def test_estimates_of_scores_are_not_biased(by_similarity: Any) -> None:
    path, similarity = by_similarity
    memory = memory_from(path, similarity)
    x = queries(memory, 200)
    estimated = projected_scores(x, memory, np.float64)
    centred = x - memory.center
    exact = centred.astype(np.float64) @ memory.rows(slice(None)).T
    if similarity == "rbf":
        exact = 2 * exact - memory.norms
    off = estimated - exact
    assert abs(off.mean()) < 0.05 * np.abs(off).mean()
    assert np.abs(off).mean() < 0.1 * np.abs(exact).mean()


@pytest.mark.parametrize("tokens", [1, 5])
@pytest.mark.parametrize("n_valid", [0, 1, 9, 300])
def test_entries_from_n_valid_count_for_nothing(
    tiny_bundle: Path, by_similarity: Any, n_valid: int, tokens: int
) -> None:
    path, similarity = by_similarity
    memory = memory_from(path, similarity, n_valid=n_valid)
    memory.values[n_valid:] = np.nan
    x = queries(memory, tokens)
    rows = np.random.default_rng(2).normal(size=(tokens, EXPERTS))
    gate = TwoStageGate.over(engine_for(tiny_bundle, memory), memory, RULE, 2, candidates=64)
    buffers, trace = route(gate, x, rows)
    state, lengths = np.zeros((1, 2)), np.array([tokens])
    expected = knn_blend(x, rows, memory.widened(), state, lengths, dtype=np.float64)
    real = min(8, n_valid)
    np.testing.assert_array_equal(trace.neighbors[:, :real], expected.neighbors[:, :real])
    np.testing.assert_allclose(trace.similarities, expected.similarities, atol=2e-5)
    ids, weights = RULE.apply(expected.rows)
    np.testing.assert_array_equal(buffers.expert_ids, ids)
    np.testing.assert_allclose(buffers.expert_weights, weights, atol=2e-5)


def test_fewer_entries_than_candidates_are_all_scored(tiny_bundle: Path, compressed: Path) -> None:
    whole = memory_from(compressed)
    few = replace(
        whole, keys=whole.keys[:12], multipliers=whole.multipliers[:12], norms=whole.norms[:12],
        lengths=whole.lengths[:12], values=whole.values[:12], n_valid=12, k=20,
        scan=replace(whole.scan, codes=whole.scan.codes[:12], scales=whole.scan.scales[:12]),
    )  # fmt: skip
    gate = TwoStageGate.over(engine_for(tiny_bundle, few), few, RULE, 2)
    assert (gate.candidates, gate.neighbors) == (12, 12)
    x = queries(few, 1)
    _, trace = route(gate, x, np.zeros((1, EXPERTS)))
    np.testing.assert_array_equal(trace.neighbors, search(x, few.widened(), np.float64)[0])


def test_more_neighbours_than_candidates_are_refused(tiny_bundle: Path, compressed: Path) -> None:
    memory = replace(memory_from(compressed), k=33)
    with pytest.raises(SettingError, match=r"^neighbors: .*; expected at most 32; found 33"):
        TwoStageGate.over(engine_for(tiny_bundle, memory), memory, RULE, 2)


# --- in a model --------------------------------------------------------------------------------


def test_auto_takes_the_projection_and_other_gates_ignore_it(
    tiny_bundle: Path, compressed: Path
) -> None:
    memory = memory_from(compressed)
    engine_of: Callable[[str], OrtEngine] = lambda _: engine_for(tiny_bundle, memory)  # noqa: E731
    assert choose(memory) == "two-stage"
    for backend in ("onnx", "numpy"):
        gate: Any = make_gate(backend, memory, RULE, 2, engine_of)  # type: ignore[arg-type]
        assert gate.backend == backend


def test_a_compressed_memory_serves_a_model_and_is_swapped(
    tiny_bundle: Path, pack: Path, tmp_path: Path
) -> None:
    # Router inputs of a random model are like no key: they need all the directions.
    settings = CompressSettings(scan_width=SIZE, scan_bits=8, candidates=64)
    compressed = compress_pack(pack, tmp_path / "wide", settings).pack.path
    exact = Model.load(tiny_bundle, memory=pack, gate="onnx", threads=1)
    model = Model.load(tiny_bundle, memory=compressed, gate="two-stage", threads=1)
    frozen = Model.load(tiny_bundle, threads=1)
    ids = np.random.default_rng(0).integers(0, 256, 20)
    logits = model.logits(ids)
    np.testing.assert_allclose(logits, exact.logits(ids), atol=1e-4)
    assert np.abs(logits - frozen.logits(ids)).max() > 1e-3
    model.disable_memory()
    np.testing.assert_array_equal(model.logits(ids), frozen.logits(ids))
    model.swap_memory(compressed)
    np.testing.assert_array_equal(model.logits(ids), logits)
    ignored = Model.load(tiny_bundle, memory=compressed, gate="onnx", threads=1)
    np.testing.assert_allclose(ignored.logits(ids), exact.logits(ids), atol=1e-5)


def test_a_use_that_recall_was_not_measured_for_does_without_the_projection(
    compressed: Path,
) -> None:
    opened = MemoryPack.open(compressed)
    for settings, served in (
        ({}, True),
        ({"neighbors": 4}, True),
        ({"neighbors": 9}, False),
        ({"similarity": "rbf"}, False),
    ):
        used = opened.with_settings(**settings)  # type: ignore[arg-type]
        found = used.memory_of(used.gates[0], RULE)
        assert isinstance(found, CompressedMemory) == served


# --- the command -------------------------------------------------------------------------------


def test_the_pack_keeps_everything_but_what_was_asked_for(pack: Path, compressed: Path) -> None:
    before, after = MemoryPack.open(pack), MemoryPack.open(compressed)
    assert (after.model, after.neighbors, after.variant) == (
        before.model, before.neighbors, before.variant,
    )  # fmt: skip
    assert after.provenance["compressed"]["candidates"] == 32
    for old, new in zip(before.gates, after.gates, strict=True):
        assert (new.calibration, new.entries) == (old.calibration, old.entries)
        for name, tensor in vars(before.read(old)).items():
            np.testing.assert_array_equal(getattr(after.read(new), name), tensor)


def test_a_pack_of_some_gates_knows_where_their_entries_came_from(
    pack: Path, tmp_path: Path
) -> None:
    numbers, few = np.arange(ENTRIES, dtype=np.int32), np.arange(0, ENTRIES, 2, dtype=np.int32)
    merged = dict.fromkeys((1, 2), few)
    origins = EntryOrigins(numbers, numbers // 60, numbers % 60, merged, merged)
    written = write_pack(
        tmp_path / "merged", model=MemoryPack.open(pack).model,
        gates={0: entries_of(0)} | {gate: entries_of(gate, len(few)) for gate in merged},
        variant="residual", neighbors=8, similarity="cosine", calibration=preset("residual"),
        origins=origins, provenance={},
    )  # fmt: skip
    some = compress_pack(written, tmp_path / "some", gates=[0, 2]).pack.read_origins()
    assert some is not None
    np.testing.assert_array_equal(some.documents_of(0), numbers // 60)
    np.testing.assert_array_equal(some.documents_of(2), few // 60)
    assert set(some.merged) == {2}


def test_int8_keys_are_within_half_a_step_and_are_what_every_gate_reads(
    pack: Path, tmp_path: Path
) -> None:
    settings = CompressSettings(keys="int8")
    small = compress_pack(pack, tmp_path / "int8", settings).pack
    gate = small.gates[0]
    stored = load_file(small.path / gate.stored.file)
    assert stored["keys"].dtype == np.int8
    whole, original = small.read(gate), entries_of(0)
    off = np.abs(whole.keys - original.keys.astype(np.float32))
    assert (off <= 0.501 * stored["key_steps"][:, None] + 1e-6).all()
    memory = small.compressed_memory(gate, RULE)
    assert memory is not None
    exact = small.gate_memory(gate, RULE)
    np.testing.assert_allclose(memory.widened().keys, exact.keys, atol=1e-5)
    x = queries(memory, 1)
    entries, similarities = Retrieval.over(memory, 16, threads=1).search(x)
    products = exact.keys[entries[0]] @ prepare_queries(x, exact)[0]
    np.testing.assert_allclose(similarities[0], np.clip(products, 0, 1), atol=1e-5)


def test_the_width_chosen_is_the_smallest_that_finds_the_neighbours() -> None:
    rng = np.random.default_rng(0)
    # All that tells these keys apart lies in 40 directions of 128.
    basis = np.linalg.qr(rng.normal(size=(128, 128)))[0][:40]
    keys = (rng.normal(size=(2000, 40)) @ basis).astype(np.float32)
    exact = Exact.of(keys[:200], keys[200:], 8, "cosine")
    directions = principal(keys[200:])
    recalls = [measure_recall(exact, turned(directions, w, 0), 8, 32) for w in (32, 64, 128)]
    assert recalls[0] < 0.99
    assert min(recalls[1:]) > 0.999


def test_a_projection_has_orthonormal_rows_and_codes_as_long_as_what_they_stand_for() -> None:
    keys = entries_of(3).keys.astype(np.float32)
    keys -= keys.mean(axis=0)
    for bits in (4, 8):
        scan = project_keys(keys, turned(principal(keys), 32, 0), bits)
        matrix = scan.matrix()
        np.testing.assert_allclose(matrix @ matrix.T, np.eye(32), atol=0.02)
        assert (scan.width, scan.bits) == (32, bits)
        from knnmoe.runtime.projection import decode

        stands_for = decode(scan.codes, bits) * scan.scales[:, None]
        lengths = np.linalg.norm(keys @ matrix.T, axis=1)
        np.testing.assert_allclose(np.linalg.norm(stands_for, axis=1), lengths, rtol=1e-4)


def call(*arguments: object) -> Any:
    return CliRunner().invoke(memory_commands, ["compress", *map(str, arguments)])


def test_the_command_prints_a_row_a_gate_and_one_json_object(pack: Path, tmp_path: Path) -> None:
    shown = call(pack, tmp_path / "a", "--scan-width", 32, "--scan-bits", 8)
    assert shown.exit_code == 0, shown.output
    assert "recall@8" in shown.output
    printed = call(pack, tmp_path / "b", "--keys", "fp16", "--candidates", 64, "--json")
    found = json.loads(printed.stdout)
    assert [gate["gate"] for gate in found["gates"]] == [0, 1, 2]
    for gate in found["gates"]:
        assert gate["recall"] >= 0.999
        assert gate["bytes_after"] > gate["bytes_before"]
        assert gate["scanned_bytes"] == gate["entries"] * gate["width"] * gate["bits"] // 8
    first = MemoryPack.open(tmp_path / "a").gates[0].scan
    assert first is not None
    assert (first.width, first.bits, first.candidates) == (32, 8, 32)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (("--scan-width", 40), "scan width: out of range expected: a multiple of 32"),
        (("--scan-width", 96), "scan width: does not fit the model"),
        (("--candidates", 4), "candidates: out of range expected: 8"),
        (("--candidates", 65), "candidates: out of range"),
        (("--recall", 1.5), "recall: out of range"),
        (("--scan-width", 32, "--recall", 0), "recall: out of range"),
    ],
)
def test_what_cannot_be_done_is_refused_and_nothing_written(
    pack: Path, tmp_path: Path, options: Any, says: str
) -> None:
    result = call(pack, tmp_path / "out", *options)
    assert result.exit_code == 1
    assert says in " ".join(result.output.split())
    assert not list(tmp_path.iterdir())


def test_keys_that_no_projection_suits_and_packs_that_are_compressed_are_refused(
    tiny_bundle: Path, tiny_pack: Path, compressed: Path, tmp_path: Path
) -> None:
    # Entries are too few to lose any among 64 candidates, but with 8 candidates for 8 neighbours.
    settings = CompressSettings(candidates=8, recall=1.0, scan_bits=4)
    with pytest.raises(MemoryPackError, match="no projection finds enough of the neighbours"):
        compress_pack(tiny_pack, tmp_path / "out", settings)
    with pytest.raises(MemoryPackError, match="is compressed already"):
        compress_pack(compressed, tmp_path / "out")
    assert not list(tmp_path.iterdir())


# --- damaged packs -----------------------------------------------------------------------------


def damage(pack: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Change the tensors of gate 0 and state their hash truthfully, as an attacker would."""
    path = pack / "gate-00.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)
    stated = describe_file(path)
    manifest = json.loads((pack / "memory.json").read_text())
    manifest["gates"][0] |= {"sha256": stated.sha256, "size": stated.size}
    (pack / "memory.json").write_text(json.dumps(manifest))


DAMAGES: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    "a row twice": (
        lambda t: t["scan_projection"].__setitem__(1, t["scan_projection"][0]),
        "scan_projection: its rows are not orthonormal",
    ),
    "lengths": (
        lambda t: t.update(scan_projection_scales=t["scan_projection_scales"] * 2),
        "scan_projection: its rows are not orthonormal",
    ),
    "codes of other entries": (
        lambda t: t.update(scan_codes=t["scan_codes"][::-1].copy()),
        "scan_codes: not the projection of the keys",
    ),
    "scales": (
        lambda t: t.update(scan_scales=t["scan_scales"] * 3),
        "scan_codes: not the projection of the keys",
    ),
    "NaN scales": (lambda t: t["scan_scales"].__setitem__(5, np.nan), "scan_scales has NaN"),
    "NaN lengths": (lambda t: t["key_lengths"].__setitem__(5, np.nan), "key_lengths has NaN"),
    "lengths of other keys": (
        lambda t: t.update(key_lengths=t["key_lengths"][::-1].copy()),
        "key_lengths: not the lengths of the keys",
    ),
    "NaN among the keys looked at": (
        lambda t: t["keys"].__setitem__((0, 3), np.nan),
        "key_lengths: not the lengths of the keys",
    ),
    "narrower": (lambda t: t.update(scan_codes=t["scan_codes"][:, :8].copy()), "scan_codes has"),
    "missing": (lambda t: t.pop("scan_scales"), "holds other tensors"),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_a_damaged_projection_is_refused_and_the_old_memory_keeps_serving(
    tiny_bundle: Path, compressed: Path, tmp_path: Path, name: str
) -> None:
    copy = Path(shutil.copytree(compressed, tmp_path / "copy"))
    change, says = DAMAGES[name]
    damage(copy, change)
    model = Model.load(tiny_bundle, memory=compressed, gate="two-stage", threads=1)
    before = model.logits([1, 2, 3])
    with pytest.raises(MemoryPackError, match=says):
        model.swap_memory(copy)
    np.testing.assert_array_equal(model.logits([1, 2, 3]), before)


def older(pack: Path) -> None:
    """Make a pack one that was written before lengths were stored."""
    manifest = json.loads((pack / "memory.json").read_text())
    for gate in manifest["gates"]:
        del gate["scan"]["lengths"]
        path = pack / gate["file"]
        tensors = load_file(path)
        del tensors["key_lengths"]
        save_file(tensors, path)
        stated = describe_file(path)
        gate |= {"sha256": stated.sha256, "size": stated.size}
    (pack / "memory.json").write_text(json.dumps(manifest))


def test_a_pack_without_lengths_is_what_one_with_them_is_and_its_keys_are_looked_through(
    compressed: Path, tmp_path: Path
) -> None:
    copy = Path(shutil.copytree(compressed, tmp_path / "copy"))
    older(copy)
    new, old = memory_from(compressed), memory_from(copy)
    np.testing.assert_array_equal(old.lengths, new.lengths)
    np.testing.assert_array_equal(old.multipliers, new.multipliers)
    damage(copy, lambda tensors: tensors["keys"].__setitem__((7, 3), np.nan))
    with pytest.raises(MemoryPackError, match="keys has NaN"):
        memory_from(copy)


def test_stored_lengths_spare_reading_the_keys(
    compressed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> Any:
        raise AssertionError("all keys were read")

    monkeypatch.setattr(memory_module, "key_lengths", fail)
    memory_from(compressed)


def flip_last_bit(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)


def test_bytes_changed_after_writing_are_found_by_the_hash(
    compressed: Path, tmp_path: Path
) -> None:
    copy = Path(shutil.copytree(compressed, tmp_path / "copy"))
    flip_last_bit(copy / "gate-00.safetensors")
    with pytest.raises(MemoryPackError, match="sha256 differs"):
        MemoryPack.open(copy)


@pytest.mark.parametrize("file", ["entries.safetensors", "gate-01.safetensors"])
@pytest.mark.parametrize("when", ["before it is opened", "after it was opened", "meanwhile"])
def test_a_pack_with_changed_bytes_is_not_compressed(
    pack: Path, tmp_path: Path, file: str, when: str
) -> None:
    opened, numbers = MemoryPack.open(pack), np.arange(ENTRIES, dtype=np.int32)
    damaged = write_pack(
        tmp_path / "damaged", model=opened.model, gates={g: entries_of(g) for g in range(2)},
        variant="residual", neighbors=8, similarity="cosine", calibration=preset("residual"),
        origins=EntryOrigins(numbers, numbers, numbers), provenance={},
    )  # fmt: skip

    def during(gate: PackGate, entries: GateEntries) -> Kept:
        if when == "meanwhile" and gate.gate == 1:
            flip_last_bit(damaged.path / file)
        return Kept(entries, np.arange(ENTRIES), np.ones(ENTRIES, np.int64))

    if when != "meanwhile":
        flip_last_bit(damaged.path / file)
    source = damaged.path if when == "before it is opened" else damaged
    with pytest.raises(MemoryPackError, match=rf"{file}: was changed \(sha256 differs\)"):
        compress_pack(source, tmp_path / "small", CompressSettings(32, 8), reduced=during)
    assert [path.name for path in tmp_path.iterdir()] == ["damaged"]


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("width", 33), ("width", 1 << 20), ("bits", 5), ("recall", 1.5), ("candidates", 65),
        ("candidates", 7), ("similarity", "dot"), ("extra", 1),
    ],
)  # fmt: skip
def test_a_manifest_that_states_an_impossible_projection_is_refused(
    compressed: Path, tmp_path: Path, field: str, value: Any
) -> None:
    copy = Path(shutil.copytree(compressed, tmp_path / "copy"))
    manifest = json.loads((copy / "memory.json").read_text())
    manifest["gates"][0]["scan"][field] = value
    (copy / "memory.json").write_text(json.dumps(manifest))
    with pytest.raises(MemoryPackError, match=field):
        MemoryPack.open(copy)


# --- values in fewer bits, and memories without full keys ---------------------------------------


@pytest.mark.parametrize("experts", [2, 7, 16, 96])
@pytest.mark.parametrize("kind", ["fp16", "int8", "int4"])
def test_stored_values_are_within_half_a_step_and_are_widened_by_row(
    kind: Any, experts: int
) -> None:
    rng = np.random.default_rng(experts)
    values = (rng.normal(size=(40, experts)) * 3 - 5).astype(np.float32)
    values[3] = values[3, 0]  # nothing to tell apart
    if kind == "int4" and experts % 2:
        assert kind not in value_types(experts)
        return
    stored = store_values(values, kind)
    assert stored.shape == values.shape
    steps = 1e-2 if stored.steps is None else stored.steps.astype(np.float32).max(axis=1)
    off = np.abs(stored.widened() - values).max(axis=1)
    assert (off <= 0.51 * steps + 8e-3).all()
    np.testing.assert_array_equal(
        stored[np.array([[5, 3], [39, 0]])], stored.widened()[[[5, 3], [39, 0]]]
    )
    bits = {"fp16": 16, "int8": 8, "int4": 4}[kind]
    assert (stored.bits, stored.codes.nbytes) == (bits, 40 * experts * bits // 8)


def all_routes(bundle: Path, pack: MemoryPack, x: Any, rows: Any) -> dict[str, Any]:
    """The same tokens through NumPy, ONNX, and the two stages, at once and one by one."""
    memory = pack.compressed_memory(pack.gates[0], RULE)
    assert memory is not None
    engine = engine_for(bundle, memory)
    exact = memory.widened()
    two_stage = TwoStageGate.over(engine, memory, RULE, 2)
    found = {
        "numpy": route(NumpyGate(RULE, 2, exact), x, rows),
        "onnx": route(OnnxGate.over(engine, exact), x, rows),
        "two-stage": route(two_stage, x, rows),
    }
    for token in range(len(x)):
        one = slice(token, token + 1)
        found[f"two-stage, token {token}"] = route(two_stage, x[one], rows[one])
    return found


@pytest.mark.parametrize(
    ("keys", "values"),
    [("projected", "int4"), ("projected", "as-stored"), ("int8", "int8"), ("fp16", "fp16"),
     ("as-stored", "int4"), ("graded", "int8")],
)  # fmt: skip
def test_every_route_blends_the_same_widened_values(
    tiny_bundle: Path, by_similarity: Any, tmp_path: Path, keys: Any, values: Any
) -> None:
    path, _ = by_similarity
    settings = CompressSettings(scan_width=SIZE, candidates=64, keys=keys, values=values)
    pack = compress_pack(path.parent / "plain", tmp_path / "small", settings).pack
    memory = pack.compressed_memory(pack.gates[0], RULE)
    assert memory is not None
    x = queries(memory, 7)
    logits = np.random.default_rng(3).normal(size=(7, EXPERTS))
    found = all_routes(tiny_bundle, pack, x, logits)
    reference, trace = found.pop("numpy")
    assert trace.confidence.max() > 0.05
    for name, (buffers, seen) in found.items():
        rows = slice(None) if "token" not in name else slice(int(name[-1]), int(name[-1]) + 1)
        np.testing.assert_array_equal(seen.neighbors, trace.neighbors[rows], err_msg=name)
        np.testing.assert_allclose(seen.similarities, trace.similarities[rows], atol=1e-5)
        np.testing.assert_array_equal(buffers.expert_ids, reference.expert_ids[rows], err_msg=name)
        np.testing.assert_allclose(
            buffers.expert_weights, reference.expert_weights[rows], atol=1e-5, err_msg=name
        )


@pytest.mark.parametrize("keys", ["projected", "graded"])
def test_without_full_keys_similarities_come_out_as_large_as_with_them(
    pack: Path, tmp_path: Path, keys: Any
) -> None:
    whole, settings = MemoryPack.open(pack), CompressSettings(scan_width=32, keys=keys)
    small = compress_pack(pack, tmp_path / "small", settings).pack
    gate = small.gates[0]
    exact, found = whole.gate_memory(whole.gates[0], RULE), small.gate_memory(gate, RULE)
    rng = np.random.default_rng(9)
    near = exact.keys[rng.integers(0, ENTRIES, 200)] + 0.05 * rng.normal(size=(200, SIZE))
    x = (near + exact.center).astype(np.float32)
    means = [search(x, memory, np.float64)[1].mean() for memory in (exact, found)]
    assert means[1] == pytest.approx(means[0], rel=0.02)
    stored = load_file(small.path / gate.stored.file)
    assert "keys" not in stored
    assert stored["key_lengths"].shape == (ENTRIES,)


def test_graded_keys_are_nearer_to_the_keys_than_as_many_bytes_of_projected_ones(
    pack: Path, tmp_path: Path
) -> None:
    whole = MemoryPack.open(pack)
    right = whole.gate_memory(whole.gates[0], RULE).keys

    def error(name: str, **settings: Any) -> float:
        small = compress_pack(pack, tmp_path / name, CompressSettings(**settings)).pack
        memory = small.compressed_memory(small.gates[0], RULE)
        assert memory is not None
        for part in memory.parts:
            assert part.codes.nbytes == ENTRIES * 32 * part.bits // 8
        return float(((memory.rows(slice(None)) - right) ** 2).sum())

    # 48 bytes a key, and 64.
    graded = error("graded", scan_width=32, keys="graded", key_widths=(32, 32))
    assert graded < 0.5 * error("projected", scan_width=64, scan_bits=4, keys="projected")
    # What is kept in 8 bits is the widest directions.
    fine = MemoryPack.open(tmp_path / "graded").gates[0]
    assert fine.key_widths == (32, 32)
    tensors = load_file(tmp_path / "graded" / fine.stored.file)
    sizes = {n: np.linalg.norm(tensors[f"{n}_scales"]) for n in ("fine", "coarse")}
    assert tensors["fine_projection"].shape == tensors["coarse_projection"].shape == (32, SIZE)
    assert sizes["fine"] * 127 > 3 * sizes["coarse"] * 7


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"keys": "graded", "key_widths": (32, 64)}, "key widths: do not fit the model"),
        ({"keys": "graded", "key_widths": (16, 32)}, "two multiples of 32 with a sum up to 64"),
        ({"keys": "int8", "key_widths": (32, 32)}, "key widths: are of graded keys alone"),
    ],
)
def test_impossible_widths_of_graded_keys_are_refused(
    pack: Path, tmp_path: Path, settings: Any, says: str
) -> None:
    with pytest.raises(SettingError, match=says):
        compress_pack(pack, tmp_path / "small", CompressSettings(**settings))
    assert not list(tmp_path.iterdir())


def test_the_command_takes_widths_of_graded_keys(pack: Path, tmp_path: Path) -> None:
    command = ["compress", str(pack), str(tmp_path / "small"), "--keys", "graded", "--key-widths"]
    assert CliRunner().invoke(memory_commands, [*command, "32,thin"]).exit_code == 2
    result = CliRunner().invoke(memory_commands, [*command, "32,32", "--json"])
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["settings"]["key_widths"] == [32, 32]


def test_what_a_compressed_pack_no_longer_knows_is_said(pack: Path, tmp_path: Path) -> None:
    settings = CompressSettings(keys="projected", values="int4")
    small = compress_pack(pack, tmp_path / "small", settings).pack
    assert (small.variant, small.serves("residual"), small.serves("logits")) == (
        "residual", True, False,
    )  # fmt: skip
    with pytest.raises(SettingError, match="variant: cannot be made of what this compressed"):
        small.with_settings(variant="logits")
    with pytest.raises(MemoryPackError, match="no longer has what it was compressed from"):
        small.read(small.gates[0])
    with pytest.raises(MemoryPackError, match="is compressed already"):
        compress_pack(small.path, tmp_path / "again")
    shown = CliRunner().invoke(memory_commands, ["inspect", str(small.path), "--json"])
    assert json.loads(shown.stdout)["gates"][0]["logit_rms"] is None


LESS: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    "a length below zero": (
        lambda t: t["key_lengths"].__setitem__(3, -1), "key_lengths: has negative numbers",
    ),
    "NaN lengths": (lambda t: t["key_lengths"].__setitem__(3, np.nan), "key_lengths has NaN"),
    "infinite steps": (lambda t: t["value_steps"].__setitem__(3, np.inf), "value_steps has NaN"),
    "fewer codes": (lambda t: t.update(values=t["values"][:, :2].copy()), "values has another"),
    "fewer coarse codes": (
        lambda t: t.update(coarse_codes=t["coarse_codes"][:, :8].copy()), "coarse_codes has another"
    ),
    "a slanted projection": (
        lambda t: t["fine_projection"].__setitem__(1, t["fine_projection"][0]),
        "fine_projection: its rows are not orthonormal",
    ),
    "codes of other keys": (
        lambda t: t.update(fine_codes=np.roll(t["fine_codes"], 1, axis=0)),
        "scan_codes: not the projection of the keys",
    ),
}  # fmt: skip


GRADED = ("coarse_", "fine_", "scan_codes")  # what is damaged of packs with graded keys


@pytest.mark.parametrize("name", LESS)
def test_damaged_values_and_lengths_are_refused(
    tiny_bundle: Path, pack: Path, tmp_path: Path, name: str
) -> None:
    keys: Any = "graded" if any(part in LESS[name][1] for part in GRADED) else "projected"
    settings = CompressSettings(scan_width=32, keys=keys, values="int4")
    small = compress_pack(pack, tmp_path / "small", settings).pack.path
    change, says = LESS[name]
    damage(small, change)
    with pytest.raises(MemoryPackError, match=says):
        Model.load(tiny_bundle, memory=small, threads=1)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda m: m.update(variant="logits"), "variant"),
        (lambda m: m["gates"][0]["values"].update(dtype="int2"), "dtype"),
        (lambda m: m["gates"][0]["values"].update(of="logits"), "of"),
        (lambda m: m["gates"][0].update(keys="none"), "keys"),
        (lambda m: m["gates"][0].pop("scan"), "keys"),
        (lambda m: m["gates"][0].update(keys="graded"), "key_widths"),
        (lambda m: m["gates"][0].update(keys="graded", key_widths=[32, 48]), "key_widths"),
        (lambda m: m["gates"][0].update(keys="graded", key_widths=[32, "32"]), "key_widths"),
        (lambda m: m["gates"][0].update(keys="graded", key_widths=[64, 32]), "key_widths"),
    ],
)
def test_a_manifest_that_states_impossible_values_is_refused(
    pack: Path, tmp_path: Path, change: Any, says: str
) -> None:
    settings = CompressSettings(scan_width=32, keys="projected", values="int4")
    small = compress_pack(pack, tmp_path / "small", settings).pack.path
    manifest = json.loads((small / "memory.json").read_text())
    change(manifest)
    (small / "memory.json").write_text(json.dumps(manifest))
    with pytest.raises(MemoryPackError, match=says):
        MemoryPack.open(small)


def test_a_pack_is_not_compressed_into_itself(tiny_pack: Path) -> None:
    before = {file.name: file.read_bytes() for file in tiny_pack.iterdir()}
    with pytest.raises(OutputError, match="is what is to be copied"):
        compress_pack(tiny_pack, tiny_pack.parent / "." / tiny_pack.name, overwrite=True)
    with pytest.raises(OutputError, match="is what is to be copied"):
        compress_to_budget(tiny_pack, tiny_pack, Budget.parse("50%"), overwrite=True)
    assert {file.name: file.read_bytes() for file in tiny_pack.iterdir()} == before


def test_what_is_in_the_way_is_found_before_a_budget_is_searched(
    tiny_pack: Path, tmp_path: Path
) -> None:
    (tmp_path / "notes").write_text("mine")
    with pytest.raises(OutputError, match="exists and is not empty"):
        compress_to_budget(tiny_pack, tmp_path, Budget.parse("50%"))
    with pytest.raises(OutputError, match="parent directory does not exist"):
        compress_to_budget(tiny_pack, tmp_path / "missing" / "pack", Budget.parse("50%"))
