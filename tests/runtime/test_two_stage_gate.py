"""The gate that scans int8 keys and scores the candidates again: its reference, in a model."""

from __future__ import annotations

import gc
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from soak_counts import used_bytes

from knnmoe.runtime.blend import knn_blend, search
from knnmoe.runtime.bundle import Bundle
from knnmoe.runtime.calibration import Calibration
from knnmoe.runtime.engines.onnx_bytes import Node, NodeList, Tensor, graph_bytes
from knnmoe.runtime.engines.onnxruntime import OrtEngine
from knnmoe.runtime.errors import BackendError, SettingError
from knnmoe.runtime.gates import retrieval, two_stage
from knnmoe.runtime.gates import scan as scan_graphs
from knnmoe.runtime.gates.base import GateBuffers, GateTrace
from knnmoe.runtime.gates.onnx import graph_name
from knnmoe.runtime.gates.retrieval import Retrieval
from knnmoe.runtime.gates.select import choose, make_gate
from knnmoe.runtime.gates.two_stage import TwoStageGate
from knnmoe.runtime.model import Model
from knnmoe.runtime.profiling.roofline import gate_cost
from knnmoe.runtime.routing import select_assignments
from knnmoe.runtime.two_stage import (
    knn_blend_in_two_stages,
    quantize_keys,
    scan_scores,
)
from memories import random_calibration, random_compressed, random_memory

TOKENS = 5
IDS = np.random.default_rng(0).integers(0, 256, 40)


class Bench:
    """Gates over the graphs of the tiny model's bundle."""

    def __init__(self, bundle: Path) -> None:
        self.bundle = Bundle.open(bundle)
        manifest = self.bundle.manifest
        self.rule, self.room = manifest.routing, manifest.experts_per_token
        self.sizes: dict[str, int] = {
            "hidden_size": manifest.architecture.hidden_size,
            "num_experts": manifest.architecture.num_experts,
        }

    def memory(self, seed: int, **settings: Any) -> Any:
        return random_memory(seed, **self.sizes, **settings)

    def engine(self, name: str) -> OrtEngine:
        return OrtEngine(self.bundle.file(self.bundle.manifest.gates[name].file), threads=1)

    def gate(self, memory: Any, *, candidates: int = 64, many: bool = True) -> TwoStageGate:
        engine = self.engine(graph_name(memory))
        made = TwoStageGate.over(
            engine, memory, self.rule, self.room, candidates=candidates,
            frozen=self.engine("frozen"),
        )  # fmt: skip
        return replace(made, many=many)

    def run(self, gate: Any, x: Any, rows: Any, state: Any) -> tuple[GateBuffers, GateTrace]:
        """One call for one sequence of T tokens, traced."""
        tokens = len(x)
        buffers = GateBuffers(
            router_input=x.astype(np.float32),
            router_logits=rows.astype(np.float32),
            state=state.astype(np.float32),
            lengths=np.array([tokens]),
            expert_ids=np.zeros((tokens, self.room), np.int32),
            expert_weights=np.zeros((tokens, self.room), np.float32),
            state_out=np.zeros((1, 2), np.float32),
        )
        trace = GateTrace.empty(tokens, gate.neighbors)
        gate.bind(buffers, trace)()
        return buffers, trace


@pytest.fixture(scope="module")
def bench(tiny_bundle: Path) -> Bench:
    return Bench(tiny_bundle)


def queries(memory: Any, tokens: int = TOKENS) -> Any:
    """Router inputs as near to entries as those of a domain are."""
    rng = np.random.default_rng(tokens)
    valid = np.arange(max(1, memory.n_valid))
    near = memory.keys[rng.choice(valid, tokens)] + memory.center
    return (near + 0.1 * rng.normal(size=near.shape)).astype(np.float32)


def candidates_engine(memory: Any, candidates: int, **options: Any) -> OrtEngine:
    """The scan alone: centred router inputs to candidates."""
    g = NodeList()
    scores, weights = scan_graphs.int8_scores(g, memory, "queries")
    entries = scan_graphs.best_entries(g, scores, candidates, len(memory.keys))
    g.op("Identity", entries, out="candidates")
    graph = graph_bytes(
        g.nodes,
        [Tensor("queries", np.float32, ("tokens", memory.keys.shape[1]))],
        [Tensor("candidates", np.int64, ("tokens", candidates))],
        g.constants, weights,
    )  # fmt: skip
    return OrtEngine(graph, threads=1, weights=weights, **options)


@pytest.mark.parametrize("rule_first", [False, True], ids=["logits", "assignment"])
@pytest.mark.parametrize("similarity", ["cosine", "rbf"])
@pytest.mark.parametrize("tokens", [1, TOKENS])
@pytest.mark.parametrize("seed", range(3))
def test_it_is_the_reference_with_int8_keys_and_int8_queries(
    bench: Bench, seed: int, tokens: int, similarity: Any, rule_first: bool
) -> None:
    fixed = {"interpolate": 1.0} if rule_first else {}
    memory = bench.memory(
        seed, entries=200, k=4, similarity=similarity, n_valid=180, rule_first=rule_first,
        calibration=random_calibration(seed, **fixed),
    )  # fmt: skip
    x = queries(memory, tokens)
    rng = np.random.default_rng(seed)
    logits = rng.normal(size=(tokens, bench.sizes["num_experts"])).astype(np.float32)
    state = np.array([[1.5, 3.0]])
    buffers, trace = bench.run(bench.gate(memory, candidates=12), x, logits, state)
    rows = bench.rule.assignments(logits) if rule_first else logits
    expected = knn_blend_in_two_stages(
        x, rows, memory, quantize_keys(memory.keys), 12, state, np.array([tokens]),
        dtype=np.float64, int8_queries=True,
    )  # fmt: skip
    select: Any = select_assignments if rule_first else lambda r, _: bench.rule.apply(r)
    ids, weights = select(expected.rows, bench.room)
    np.testing.assert_array_equal(trace.neighbors, expected.neighbors)
    np.testing.assert_allclose(trace.similarities, expected.similarities, atol=2e-5)
    np.testing.assert_allclose(trace.confidence, expected.confidence, atol=2e-5)
    np.testing.assert_allclose(buffers.state_out, expected.state, atol=1e-4)
    np.testing.assert_array_equal(buffers.expert_ids, ids)
    np.testing.assert_allclose(buffers.expert_weights, weights, atol=2e-5)


@pytest.mark.parametrize("similarity", ["cosine", "rbf"])
def test_candidates_are_those_with_the_best_scores_of_the_scan(
    bench: Bench, similarity: Any
) -> None:
    memory = bench.memory(7, entries=150, similarity=similarity, n_valid=140)
    # Sizes that no one scale of all rows would do justice to.
    x = queries(memory, 6) * np.array([[1e-3], [1], [1], [30], [1], [0]], np.float32)
    found = np.zeros((6, 20), np.int64)
    candidates_engine(memory, 20).bind({"queries": x - memory.center}, {"candidates": found})()
    scores = scan_scores(x, memory, quantize_keys(memory.keys), np.float64, int8_queries=True)
    for row, entries in enumerate(found):
        assert (np.diff(entries) > 0).all()
        best = np.sort(scores[row])[::-1][:20]
        np.testing.assert_allclose(np.sort(scores[row, entries])[::-1], best, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("similarity", ["cosine", "rbf"])
@pytest.mark.parametrize("tokens", [1, TOKENS])
def test_it_finds_nearly_all_of_the_exact_neighbours(
    bench: Bench, tokens: int, similarity: Any
) -> None:
    memory = bench.memory(11, entries=4000, k=8, similarity=similarity)
    gate = bench.gate(memory)
    rng = np.random.default_rng(1)
    shares = []
    for _ in range(80 // tokens):
        x = (rng.normal(size=(tokens, memory.keys.shape[1]))).astype(np.float32)
        rows = np.zeros((tokens, bench.sizes["num_experts"]))
        _, trace = bench.run(gate, x, rows, np.zeros((1, 2)))
        exact = search(x, memory, np.float64)[0]
        shares.append((exact[:, :, None] == trace.neighbors[:, None, :]).any(axis=2).mean())
    assert np.mean(shares) >= 0.99


@pytest.mark.parametrize("similarity", ["cosine", "rbf"])
@pytest.mark.parametrize("tokens", [1, TOKENS])
@pytest.mark.parametrize("n_valid", [0, 1, 3, 60])
def test_entries_beyond_n_valid_count_for_nothing_whatever_they_hold(
    bench: Bench, n_valid: int, tokens: int, similarity: Any
) -> None:
    memory = bench.memory(5, entries=60, k=6, n_valid=n_valid, similarity=similarity)
    memory.keys[n_valid:] = 9.0  # nearer than any valid entry
    memory.values[n_valid:] = np.nan
    x = queries(memory, tokens)
    rows = np.random.default_rng(2).normal(size=(tokens, bench.sizes["num_experts"]))
    buffers, trace = bench.run(bench.gate(memory, candidates=8), x, rows, np.zeros((1, 2)))
    expected = knn_blend(x, rows, memory, np.zeros((1, 2)), np.array([tokens]), dtype=np.float64)
    np.testing.assert_array_equal(trace.neighbors, expected.neighbors)
    np.testing.assert_allclose(trace.similarities, expected.similarities, atol=2e-5)
    ids, weights = bench.rule.apply(expected.rows)
    np.testing.assert_array_equal(buffers.expert_ids, ids)
    np.testing.assert_allclose(buffers.expert_weights, weights, atol=2e-5)


def test_fewer_entries_than_candidates_are_all_scored(bench: Bench) -> None:
    memory = bench.memory(6, entries=9, k=20)
    gate = bench.gate(memory)
    assert (gate.candidates, gate.neighbors) == (9, 9)
    x = queries(memory)
    _, trace = bench.run(gate, x, np.zeros((TOKENS, 8)), np.zeros((1, 2)))
    np.testing.assert_array_equal(trace.neighbors, search(x, memory, np.float64)[0])


def test_more_neighbours_than_candidates_are_refused_and_auto_stays_exact(bench: Bench) -> None:
    memory = bench.memory(8, entries=70, k=65)
    with pytest.raises(SettingError, match=r"^neighbors: .*; expected at most 64; found 65"):
        make_gate("two-stage", memory, bench.rule, bench.room, bench.engine)
    large = replace(memory, keys=np.zeros((1 << 14, 64), np.float32), n_valid=1 << 14)
    assert choose(large) == "onnx"
    assert choose(replace(large, k=64)) == "two-stage"


def test_auto_never_widens_a_compressed_memory_whole() -> None:
    """However few its entries are: a budget of bytes counts on it."""
    for entries in (2, 9, 200):
        memory = random_compressed(3, entries=entries, graded=(32, 32), dtype=None)
        assert choose(memory) == "two-stage"
    assert choose(replace(random_compressed(3, entries=200), k=33)) == "onnx"  # of 32 candidates


def test_auto_scans_small_memories_exactly(bench: Bench) -> None:
    assert choose(None) == "onnx"
    assert choose(bench.memory(9, entries=300)) == "onnx"


def test_where_it_gains_nothing_several_tokens_are_searched_exactly(bench: Bench) -> None:
    memory = bench.memory(10, entries=200, k=4)
    made = bench.gate(memory, candidates=4)
    # Candidates that are none: who reads them finds nobody near.
    blind = replace(made, many=False, retrieval=Retrieval.over(replace(memory, n_valid=0), 4))
    x = queries(memory)
    _, trace = bench.run(blind, x, np.zeros((TOKENS, 8)), np.zeros((1, 2)))
    np.testing.assert_array_equal(trace.neighbors, search(x, memory, np.float64)[0])
    assert not TwoStageGate.over(bench.engine("cosine"), memory, bench.rule, bench.room).many


def test_a_token_each_of_several_sequences_is_searched_in_two_stages(bench: Bench) -> None:
    gate = bench.gate(bench.memory(10, entries=200, k=4), many=False)
    assert gate.searches_exactly(tokens=6, sequences=3)
    assert not gate.searches_exactly(tokens=3, sequences=3)
    large = bench.memory(10, entries=two_stage.MANY_ENTRIES)
    assert TwoStageGate.over(bench.engine("cosine"), large, bench.rule, bench.room).many


def test_its_bound_is_a_scan_once_and_candidates_and_neighbours_of_each_token(bench: Bench) -> None:
    size, experts = bench.sizes["hidden_size"], bench.sizes["num_experts"]
    gate = bench.gate(bench.memory(10, entries=200, k=4), candidates=16)
    found = gate_cost(gate, 3, 3)
    assert found.bytes == 200 * size + 3 * 4 * (16 * size + 4 * experts)
    assert found.flops == 3 * 2 * (200 * size + 16 * size)
    exact = gate_cost(replace(gate, many=False), 3, 1)
    assert exact.bytes == 4 * (200 * size + 3 * 4 * experts)


def test_without_a_memory_it_is_the_frozen_router(bench: Bench) -> None:
    gate = make_gate("two-stage", None, bench.rule, bench.room, bench.engine)
    assert (gate.backend, gate.neighbors) == ("onnx", 0)


def test_confidence_of_zero_leaves_the_routing_as_it_was(bench: Bench) -> None:
    memory = bench.memory(3, entries=100, calibration=Calibration(scale=0.0))
    rows = np.random.default_rng(4).normal(size=(1, 8)).astype(np.float32)
    buffers, _ = bench.run(bench.gate(memory), queries(memory, 1), rows, np.zeros((1, 2)))
    frozen = make_gate("onnx", None, bench.rule, bench.room, bench.engine)
    expected, _ = bench.run(frozen, queries(memory, 1), rows, np.zeros((1, 2)))
    assert buffers.expert_weights.tobytes() == expected.expert_weights.tobytes()


def test_products_that_a_processor_would_cut_off_are_computed_otherwise(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    memory = bench.memory(12, entries=200)
    x = queries(memory)
    found = [np.zeros((TOKENS, 16), np.int64) for _ in range(2)]
    for cut_off, entries in zip((False, True), found, strict=True):
        monkeypatch.setattr(scan_graphs, "int8_is_cut_off", lambda cut_off=cut_off: cut_off)
        engine = candidates_engine(memory, 16, precise_int8=scan_graphs.int8_is_cut_off())
        engine.bind({"queries": x - memory.center}, {"candidates": entries})()
    np.testing.assert_array_equal(*found)


# --- in a model --------------------------------------------------------------------------------


def test_a_model_routes_as_with_the_exact_gate_and_its_memory_can_be_swapped(
    tiny_bundle: Path, tiny_pack: Path
) -> None:
    exact = Model.load(tiny_bundle, memory=tiny_pack, gate="onnx", threads=1)
    model = Model.load(tiny_bundle, memory=tiny_pack, gate="two-stage", threads=1)
    np.testing.assert_allclose(steps(model), steps(exact), atol=1e-4)
    model.disable_memory()
    exact.disable_memory()
    assert steps(model).tobytes() == steps(exact).tobytes()
    model.swap_memory(tiny_pack)
    exact.swap_memory(tiny_pack)
    np.testing.assert_allclose(steps(model), steps(exact), atol=1e-4)
    for here, there in zip(traces(model), traces(exact), strict=True):
        np.testing.assert_array_equal(here.expert_ids, there.expert_ids)
        np.testing.assert_array_equal(here.trace.neighbors, there.trace.neighbors)


def test_a_memory_whose_scan_cannot_be_built_leaves_the_old_one_serving(
    tiny_bundle: Path, tiny_pack: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = Model.load(tiny_bundle, memory=tiny_pack, gate="two-stage", threads=1)
    before = steps(model)

    def fail(*_: Any, **__: Any) -> Any:
        raise BackendError("a graph made in memory", "no")

    monkeypatch.setattr(retrieval, "retrieval_engine", fail)
    with pytest.raises(BackendError):
        model.swap_memory(tiny_pack)
    assert steps(model).tobytes() == before.tobytes()


def steps(model: Model) -> Any:
    """Logits of a prompt and of steps of one token."""
    cache = model.pipeline.new_cache(capacity=len(IDS))
    pieces = [model.pipeline.step(cache, IDS[None, :30], rows="all").copy()]
    pieces += [model.pipeline.step(cache, IDS[None, i : i + 1]).copy() for i in range(30, 40)]
    return np.concatenate(pieces)


def traces(model: Model) -> Any:
    cache = model.pipeline.new_cache(capacity=len(IDS))
    model.pipeline.step(cache, IDS[None, :30])
    return model.pipeline.traced_step(cache, IDS[None, 30:31])[1]


# --- graphs as bytes ---------------------------------------------------------------------------


def test_a_graph_written_by_hand_is_one_that_onnx_accepts() -> None:
    onnx = pytest.importorskip("onnx")
    weight = np.arange(600, dtype=np.float32).reshape(200, 3)
    graph = graph_bytes(
        [Node("Gemm", ["x", "w"], ["y"], [("transB", 1)])],
        [Tensor("x", np.float32, ("tokens", 3))],
        [Tensor("y", np.float32, ("tokens", 200))],
        {"w": weight},
        {},
    )
    onnx.checker.check_model(onnx.load_from_string(graph), full_check=True)
    y = np.zeros((2, 200), np.float32)
    x = np.ones((2, 3), np.float32)
    OrtEngine(graph, threads=1).bind({"x": x}, {"y": y})()
    np.testing.assert_array_equal(y, x @ weight.T)


def test_a_graph_that_cannot_be_loaded_is_a_backend_error() -> None:
    with pytest.raises(BackendError, match="made in memory"):
        OrtEngine(graph_bytes([Node("Nonesuch", ["x"], ["y"])], [], [], {}, {}))


def test_what_an_engine_took_for_a_step_is_given_back_after_it() -> None:
    if used_bytes() is None:
        pytest.skip("not glibc")
    g, columns = NodeList(), 1 << 16
    g.constant("w", np.ones((8, columns), np.float32))
    g.op("ReduceMax", g.op("MatMul", "x", "w"), g.ints(1), out="y")
    read, left = Tensor("x", np.float32, ("t", 8)), Tensor("y", np.float32, ("t", 1))
    engine = OrtEngine(graph_bytes(g.nodes, [read], [left], g.constants, {}), threads=1)
    sizes = (1, 256)  # of which the second takes 64 MB in between
    bound = [(np.ones((t, 8), np.float32), np.zeros((t, 1), np.float32)) for t in sizes]
    runs = [engine.bind({"x": x}, {"y": y}) for x, y in bound]
    runs[0]()
    gc.collect()
    before = used_bytes() or 0
    runs[1]()
    assert (used_bytes() or 0) - before < 4 * sizes[1] * columns / 4
    np.testing.assert_array_equal(bound[1][1], 8)
