"""Retrieval in one graph: equal to the NumPy reference, whatever the memory's calibration."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from knnmoe.runtime.blend import blend_found, knn_blend, prepare_queries
from knnmoe.runtime.calibration import Calibration
from knnmoe.runtime.compressed import CompressedMemory
from knnmoe.runtime.engines.onnxruntime import OrtEngine
from knnmoe.runtime.gates import scan
from knnmoe.runtime.gates.base import GateBuffers, GateTrace
from knnmoe.runtime.gates.two_stage import TwoStageGate
from knnmoe.runtime.memory import MemoryPack
from knnmoe.runtime.model import Model
from knnmoe.runtime.profiling.account import gate_bytes
from knnmoe.runtime.profiling.roofline import gate_cost
from knnmoe.runtime.routing import RoutingRule
from knnmoe.runtime.two_stage import rank_products, search_compressed
from memories import random_calibration, random_compressed, random_memory

gate_graphs = pytest.importorskip("knnmoe.export.gate_graphs", reason="its graphs need onnx-ir")

SIZE, EXPERTS, ROOM = 64, 8, 2
RULE = RoutingRule(ROOM)


class Gates:
    """The gate graphs of a rule, as a bundle has them."""

    def __init__(self, folder: Path, rule: RoutingRule = RULE) -> None:
        import onnx_ir

        self.folder, self.rule = folder, rule
        shape = gate_graphs.GateShape(SIZE, EXPERTS, ROOM, rule)
        for name in ("frozen", "cosine", "rbf", "cosine-assignment"):
            graph = gate_graphs.gate_graph(name, shape).model(gate_graphs.gate_functions(name))
            onnx_ir.save(graph, folder / f"{name}.onnx")

    def over(self, memory: Any, candidates: int, **options: Any) -> TwoStageGate:
        name = memory.similarity + ("-assignment" if memory.rule_first else "")
        return TwoStageGate.over(
            self.engine(name), memory, self.rule, ROOM, candidates=candidates,
            frozen=self.engine("frozen"), **options,
        )  # fmt: skip

    def engine(self, name: str) -> OrtEngine:
        return OrtEngine(self.folder / f"{name}.onnx", threads=1)


@pytest.fixture(scope="module")
def gates(tmp_path_factory: pytest.TempPathFactory) -> Gates:
    return Gates(tmp_path_factory.mktemp("gates"))


def step(
    gate: TwoStageGate, x: Any, rows: Any, state: Any, *, real: Any = None
) -> tuple[GateBuffers, GateTrace]:
    """One step of one token of each of some sequences, traced; `real` marks those that go on."""
    count = len(x)
    buffers = GateBuffers(
        router_input=x.astype(np.float32),
        router_logits=rows.astype(np.float32),
        state=np.array(state, np.float32).reshape(count, 2),
        lengths=np.ones(count, np.int64) if real is None else np.array(real),
        expert_ids=np.zeros((count, ROOM), np.int32),
        expert_weights=np.zeros((count, ROOM), np.float32),
        state_out=np.zeros((count, 2), np.float32),
    )
    trace = GateTrace.empty(count, gate.neighbors)
    gate.bind(buffers, trace)()
    return buffers, trace


def query(memory: Any, seed: int, tokens: int = 1) -> Any:
    """Router inputs near entries, [T, D]."""
    rng = np.random.default_rng(seed)
    whole = memory.widened() if isinstance(memory, CompressedMemory) else memory
    near = whole.keys[rng.integers(0, memory.n_valid, tokens)] * 2 + memory.center
    return (near + 0.2 * rng.normal(size=(tokens, SIZE))).astype(np.float32)


def memories() -> dict[str, Any]:
    """What a gate may be made over, by kind: a function of seed and further settings."""
    sizes: dict[str, Any] = {"hidden_size": SIZE, "num_experts": EXPERTS, "entries": 60}
    kinds: dict[str, Any] = {"int8 scan": lambda seed, **s: random_memory(seed, **sizes, **s)}
    compressed = (
        (np.float16, None), (np.float32, "int4"), (np.int8, "int8"), (None, "fp16"),
    )  # fmt: skip
    for dtype, values in compressed:
        name = np.dtype(dtype).name if dtype else "no"
        kinds[f"{name} keys, {values or 'fp32'} values"] = (
            lambda seed, dtype=dtype, values=values, **s: random_compressed(
                seed, **sizes, dtype=dtype, stored_values=values, **s
            )
        )
    kinds["graded keys, int8 values"] = lambda seed, **s: random_compressed(
        seed, **sizes, dtype=None, graded=(32, SIZE - 32), stored_values="int8", **s
    )
    return kinds


@pytest.mark.parametrize("similarity", ["cosine", "rbf"])
@pytest.mark.parametrize("kind", memories())
@pytest.mark.parametrize("seed", range(4))
def test_it_is_the_reference_where_every_entry_is_a_candidate(
    gates: Gates, seed: int, kind: str, similarity: Any
) -> None:
    memory = memories()[kind](
        seed, similarity=similarity, duplicates=seed % 2 == 1, weighted=seed % 3 == 1,
        calibration=random_calibration(seed + 10 * len(kind)),
    )  # fmt: skip
    gate = gates.over(memory, 60)
    # One sequence, and several side by side, of which one has ended in the last case.
    for tokens, real in ((1, [1]), (3, [1, 1, 1]), (3, [1, 0, 1])):
        check_against_reference(replace(gate, many=True), memory, seed, tokens, np.array(real))


def check_against_reference(
    gate: TwoStageGate, memory: Any, seed: int, tokens: int, real: Any
) -> None:
    rng = np.random.default_rng(seed)
    x, rows = query(memory, seed, tokens), rng.normal(size=(tokens, EXPERTS))
    seen = rng.integers(1, 9, (tokens, 1))
    state = np.concatenate([seen * rng.random((tokens, 1)), seen], axis=1)
    whole = memory.widened() if isinstance(memory, CompressedMemory) else memory
    buffers, trace = step(gate, x, rows, state, real=real)
    expected = knn_blend(x, rows, whole, state, real, dtype=np.float64)
    counted = real > 0
    np.testing.assert_array_equal(trace.neighbors[counted], expected.neighbors[counted])
    np.testing.assert_allclose(trace.similarities, expected.similarities, atol=1e-5)
    np.testing.assert_allclose(trace.confidence[counted], expected.confidence[counted], atol=2e-5)
    np.testing.assert_allclose(buffers.state_out, expected.state, rtol=1e-5)
    ids, weights = RULE.apply(expected.rows)
    np.testing.assert_array_equal(buffers.expert_ids[counted], ids[counted])
    np.testing.assert_allclose(buffers.expert_weights[counted], weights[counted], atol=2e-5)


@pytest.mark.parametrize("similarity", ["cosine", "rbf"])
@pytest.mark.parametrize("entries", [320, 333])
def test_its_candidates_are_the_same_with_and_without_blocks(
    gates: Gates, similarity: Any, entries: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    memory = random_compressed(
        3, entries=entries, similarity=similarity, k=9, bits=4, n_valid=entries - 3,
        duplicates=True, calibration=Calibration(gamma=0.1),
    )  # fmt: skip
    x, rows, state = query(memory, 0, 5), np.zeros((5, EXPERTS)), np.zeros((5, 2))
    for candidates in (16, 32):
        _, expected = step(gates.over(memory, candidates), x, rows, state)
        with monkeypatch.context() as patch:
            patch.setattr(scan, "BLOCKED_ENTRIES", 1)
            _, trace = step(gates.over(memory, candidates), x, rows, state)
        np.testing.assert_array_equal(trace.neighbors, expected.neighbors)
        np.testing.assert_allclose(trace.similarities, expected.similarities, atol=1e-6)


def test_a_long_call_is_searched_piece_by_piece(gates: Gates) -> None:
    memory = random_compressed(4, entries=200, k=5)
    retrieval = gates.over(memory, 16).retrieval
    x = query(memory, 1, 21)
    whole, in_pieces = retrieval.search(x), replace(retrieval, at_once=8).search(x)
    np.testing.assert_array_equal(whole[0], in_pieces[0])
    np.testing.assert_allclose(whole[1], in_pieces[1], atol=1e-6)


def test_its_candidates_are_those_of_the_numpy_reference(gates: Gates) -> None:
    memory = random_compressed(5, entries=400, k=8, calibration=Calibration(scale=0.5))
    gate = gates.over(memory, 16)
    same = []
    for seed in range(20):
        x, rows = query(memory, seed), np.random.default_rng(seed).normal(size=(1, EXPERTS))
        buffers, trace = step(gate, x, rows, (0, 0))
        found = search_compressed(x, memory, 16, np.float32, int8_queries=True)
        blended = blend_found(
            rows, memory.without_keys(), *found, np.zeros((1, 2)), np.array([1]), dtype=np.float64
        )
        # Of two roundings of a query to the nearest that are as near, either may be taken, and with
        # it another last candidate.
        same.append(np.array_equal(trace.neighbors, found[0]))
        if same[-1]:
            np.testing.assert_array_equal(buffers.expert_ids, RULE.apply(blended.rows)[0])
    assert np.mean(same) >= 0.9


@pytest.mark.parametrize("factor", [1e30, 1e-30, 0.0])
def test_router_inputs_of_any_length_have_the_same_neighbours(gates: Gates, factor: float) -> None:
    memory = replace(random_compressed(7, entries=60), center=np.zeros(SIZE, np.float32))
    x = (query(memory, 1) * np.float32(factor)).astype(np.float32)
    _, trace = step(gates.over(memory, 60), x, np.zeros((1, EXPERTS)), (0, 0))
    whole = memory.widened()
    products = prepare_queries(x.astype(np.float64), whole) @ whole.keys.T
    every = np.arange(60)[None]
    found = rank_products(every, products, whole.key_scales[:, 1][None], x, whole)
    np.testing.assert_array_equal(trace.neighbors, found[0])
    np.testing.assert_allclose(trace.similarities, found[1], atol=1e-5)


def test_a_router_input_that_overflows_where_the_centre_is_taken_off_is_cut_off(
    gates: Gates,
) -> None:
    memory = random_compressed(8, entries=60)
    x = np.full((1, SIZE), np.finfo(np.float32).max, np.float32)
    buffers, trace = step(gates.over(memory, 60), x, np.ones((1, EXPERTS)), (0, 0))
    assert np.isfinite(buffers.expert_weights).all()
    assert np.isfinite(trace.similarities).all()


def test_groups_and_selection_biases_are_those_of_the_rule(tmp_path: Path) -> None:
    rule = RoutingRule(
        ROOM, score="sigmoid", renormalize=True, scale=1.5, groups=4, top_groups=2,
        group_score="top2", selection_bias=True,
    )  # fmt: skip
    bias = np.linspace(-0.3, 0.3, EXPERTS).astype(np.float32)
    memory = random_compressed(9, entries=60)
    gate = Gates(tmp_path, rule).over(memory, 60, selection_bias=bias)
    x, rows = query(memory, 2), np.random.default_rng(2).normal(size=(1, EXPERTS))
    buffers, _ = step(gate, x, rows, (0, 0))
    expected = knn_blend(
        x, rows, memory.widened(), np.zeros((1, 2)), np.array([1]), dtype=np.float64
    )
    ids, weights = rule.apply(expected.rows, bias)
    np.testing.assert_array_equal(buffers.expert_ids, ids)
    np.testing.assert_allclose(buffers.expert_weights, weights, atol=2e-5)


def test_a_step_without_a_real_token_leaves_the_evidence_as_it_is(gates: Gates) -> None:
    calibration = Calibration(sequence=1, sharpness=5, decay=0.9)
    memory = random_compressed(10, calibration=calibration)
    gate = gates.over(memory, 16)
    x, rows = query(memory, 3), np.zeros((1, EXPERTS))
    padded, _ = step(gate, x, rows, (1.5, 3.0), real=[0])
    np.testing.assert_array_equal(padded.state_out, [[1.5, 3.0]])
    real, _ = step(gate, x, rows, (1.5, 3.0))
    assert real.state_out[0, 1] == pytest.approx(0.9 * 3 + 1)


def test_what_its_graph_does_not_blend_is_blended_by_numpy(gates: Gates) -> None:
    assert gates.over(random_compressed(0), 16).retrieval.experts == EXPERTS
    assert gates.over(random_compressed(0, rule_first=True), 16).retrieval.experts == 0
    # Candidates that do not exist would have to be masked.
    assert gates.over(random_compressed(0, n_valid=15), 16).retrieval.experts == 0


KEY_BYTES = {
    "int8 scan": 4 * SIZE,
    "float16 keys, fp32 values": 2 * SIZE,
    "int8 keys, int8 values": SIZE,
    "no keys, fp16 values": 32,
    "graded keys, int8 values": 32 + (SIZE - 32) // 2,
}


@pytest.mark.parametrize("kind", KEY_BYTES)
def test_what_a_token_reads_is_a_scan_and_the_keys_and_values_found(
    gates: Gates, kind: str
) -> None:
    memory = memories()[kind](0, k=4)
    gate = gates.over(memory, 16)
    scanned = 60 * (SIZE if kind == "int8 scan" else 32)
    found = gate_cost(gate, 2, 2)
    value_bytes = memory.values.nbytes // 60
    assert found.bytes == scanned + 2 * (16 * KEY_BYTES[kind] + 4 * value_bytes)
    assert found.flops >= 2 * 2 * scanned
    held = gate_bytes(gate)
    assert held >= scanned + 60 * (KEY_BYTES[kind] + value_bytes)
    once = sum({id(array): array.nbytes for array in gate.retrieval.inputs.values()}.values())
    assert held == scanned + once + gate.memory.key_scales.nbytes
    assert held <= 2 * scanned + 60 * (KEY_BYTES[kind] + value_bytes + 16) + 8 * SIZE * SIZE


def test_a_model_counts_evidence_alike_with_and_without_it_and_after_a_new_calibration(
    tiny_bundle: Path, tiny_pack: Path
) -> None:
    pack = MemoryPack.open(tiny_pack)
    sequence = replace(
        pack.gates[0].calibration, sequence=1.0, sharpness=8.0, midpoint=0.3, decay=0.95
    )
    ids = np.random.default_rng(0).integers(0, 256, 20)
    model = Model.load(tiny_bundle, memory=pack, gate="two-stage", threads=1)
    exact = Model.load(tiny_bundle, memory=pack, gate="numpy", threads=1)
    before = decoded(model, ids)
    np.testing.assert_allclose(before, decoded(exact, ids), atol=1e-4)
    for each in (model, exact):
        each.swap_memory(pack.with_settings(calibration=sequence))
    after = decoded(model, ids)
    np.testing.assert_allclose(after, decoded(exact, ids), atol=1e-4)
    assert np.abs(after - before).max() > 1e-3


def decoded(model: Model, ids: Any) -> Any:
    """Logits of steps of one token."""
    cache = model.pipeline.new_cache(capacity=len(ids))
    return np.concatenate([model.pipeline.step(cache, i[None, None]).copy() for i in ids])
