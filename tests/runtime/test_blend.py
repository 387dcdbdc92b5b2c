"""The blend: its NumPy reference against the equations, and every backend against the reference."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from knnmoe.runtime.blend import Blended, GateMemory, blend_found, knn_blend, search
from knnmoe.runtime.calibration import Calibration
from knnmoe.runtime.engines.onnxruntime import OrtEngine
from knnmoe.runtime.gates.base import Gate, GateBuffers, GateTrace
from knnmoe.runtime.gates.faiss import FaissGate, build_index
from knnmoe.runtime.gates.numpy import NumpyGate
from knnmoe.runtime.gates.onnx import OnnxGate, graph_name, memory_inputs
from knnmoe.runtime.routing import RoutingRule
from memories import random_calibration, random_memory

HIDDEN, EXPERTS, TOP_K = 16, 6, 2
RULE = RoutingRule(TOP_K)
TOLERANCE = 1e-5


def by_hand(x: Any, r: Any, memory: GateMemory, sums: float, seen: float) -> tuple[Any, float]:
    """docs/method.md for one token, in plain Python floats."""
    c = memory.calibration
    q = [float(a) - float(b) for a, b in zip(x, memory.center, strict=True)]
    similarities = []
    for key, (scale, norm) in zip(
        memory.keys[: memory.n_valid], memory.key_scales[: memory.n_valid], strict=True
    ):
        product = math.fsum(a * float(b) for a, b in zip(q, key, strict=True)) * float(scale)
        length = math.sqrt(math.fsum(a * a for a in q))
        if memory.similarity == "cosine":
            similarities.append(product / length if length else 0.0)
        else:
            distance = max(0.0, length**2 - 2 * product + float(norm))
            similarities.append(math.exp(-c.gamma * distance))
    order = sorted(range(len(similarities)), key=lambda i: (-similarities[i], i))[: memory.k]
    s = [min(1.0, max(0.0, similarities[i])) for i in order]
    raw = [si**c.weight_power * math.exp(c.inverse_temperature * (si - max(s))) for si in s]
    total = math.fsum(raw)
    weights = [w / total if total else 0.0 for w in raw]
    value = sum(
        (w * memory.values[i].astype(float) for w, i in zip(weights, order, strict=True)), 0 * r
    )
    counted = [si * float(memory.entry_evidence()[i]) for si, i in zip(s, order, strict=True)]
    mean = (sum(counted) / len(s) if c.mean else min(1.0, sum(counted))) if s else 0.0
    tokens = c.decay * seen + 1 if c.sequence else 1
    evidence = (c.decay * sums + mean) / tokens if c.sequence else mean
    gate = 1.0
    if c.sharpness:
        z = min(math.sqrt(tokens), c.cap) * c.sharpness * (evidence - c.midpoint)
        gate = 1 / (1 + math.exp(-z))
    strength = min(1.0, max(0.0, c.scale * mean**c.power * gate))
    return r + strength * (value - c.interpolate * r), mean


@pytest.mark.parametrize("similarity", ["cosine", "rbf"])
@pytest.mark.parametrize("seed", range(6))
def test_the_reference_is_the_equations(similarity: Any, seed: int) -> None:
    memory = random_memory(
        seed, n_valid=40, similarity=similarity, weighted=True,
        calibration=random_calibration(seed),
    )  # fmt: skip
    rng = np.random.default_rng(seed)
    x, r = rng.normal(size=(6, HIDDEN)), rng.normal(size=(6, EXPERTS))
    state = np.array([[2.5, 4.0], [0.0, 0.0]])
    got = knn_blend(x, r, memory, state, np.array([3, 2]), dtype=np.float64)
    for sequence in range(2):
        sums, seen = state[sequence]
        for position in range(3):
            t = 3 * sequence + position
            real = position < [3, 2][sequence]
            expected, mean = by_hand(x[t], r[t], memory, sums, seen)
            if real:
                np.testing.assert_allclose(got.rows[t], expected, rtol=1e-9, atol=1e-9)
                decay = memory.calibration.decay
                sums, seen = decay * sums + mean, decay * seen + 1
        np.testing.assert_allclose(got.state[sequence], [sums, seen], rtol=1e-9)


def test_neighbours_are_the_most_similar_and_ties_go_to_the_lower_index() -> None:
    memory = random_memory(0, entries=9, k=4)
    twice = replace(memory, keys=memory.keys[[0, 1, 1, 2, 1, 3, 4, 5, 6]])
    x = (memory.keys[1] + memory.center)[None]
    got = knn_blend(x, np.zeros((1, EXPERTS)), twice, np.zeros((1, 2)), np.array([1]))
    assert got.neighbors[0, :3].tolist() == [1, 2, 4]
    np.testing.assert_allclose(got.similarities[0, :3], 1, atol=1e-6)


# --- every backend against the reference -------------------------------------------------------


@pytest.fixture(scope="module")
def engines(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], OrtEngine]:
    """Gate graphs by name, and the bare blend node as `blend-cosine` and `blend-rbf`."""
    loaded: dict[str, OrtEngine] = {}
    directory: Path = tmp_path_factory.mktemp("gates")

    def engine_of(name: str) -> OrtEngine:
        onnx_ir = pytest.importorskip("onnx_ir")
        if name not in loaded:
            path = directory / f"{name}.onnx"
            onnx_ir.save(graph_model(name), path)
            loaded[name] = OrtEngine(path, threads=1)
        return loaded[name]

    return engine_of


def graph_model(name: str) -> Any:
    """The gate graph of that name, or for `blend-…` the blend node alone."""
    from knnmoe.export.blend_function import (
        LENGTHS,
        RESULTS,
        TensorSpec,
        blend_function,
        blend_node,
        memory_specs,
    )
    from knnmoe.export.gate_graphs import GateShape, gate_functions, gate_graph
    from knnmoe.export.graph import GraphBuilder

    if not name.startswith("blend-"):
        shape = GateShape(HIDDEN, EXPERTS, TOP_K, RULE)
        return gate_graph(name, shape).model(gate_functions(name))
    similarity: Any = name.removeprefix("blend-")
    g = GraphBuilder("blend")
    x = g.input("x", "float32", ("tokens", HIDDEN))
    r = g.input("r", "float32", ("tokens", EXPERTS))
    memory = [g.declare(spec) for spec in (*memory_specs(HIDDEN, EXPERTS), LENGTHS)]
    rows, results = blend_node(g, x, r, memory, similarity)
    g.output(rows, TensorSpec("rows", "float32", ("tokens", EXPERTS)))
    for value, spec in zip(results, RESULTS, strict=True):
        g.output(value, spec)
    return g.model([blend_function(similarity)])


def blend(
    backend: str, memory: GateMemory, x: Any, r: Any, state: Any, lengths: Any, engines: Any
) -> Blended:
    """The blend of one backend, all of its outputs."""
    x, r, state = (array.astype(np.float32) for array in (x, r, state))
    if backend == "numpy":
        return knn_blend(x, r, memory, state, lengths)
    if backend == "faiss":
        pytest.importorskip("faiss")
        gate = FaissGate(RULE, TOP_K, memory, index=build_index(memory))
        ids, similarities, found = gate.find(memory, x)
        return blend_found(r, memory, ids, similarities, found, state, lengths)
    width = min(memory.k, len(memory.keys))
    trace = GateTrace.empty(len(x), width)
    out = {
        "rows": np.full_like(r, np.nan),
        "state_out": np.full_like(state, np.nan),
        "confidence": trace.confidence,
        "neighbors": trace.neighbors,
        "similarities": trace.similarities,
    }
    inputs = {"x": x, "r": r, "state": state, "lengths": lengths, **memory_inputs(memory)}
    engines(f"blend-{memory.similarity}").bind(inputs, out)()
    return Blended(
        out["rows"], trace.confidence, trace.neighbors, trace.similarities, out["state_out"]
    )


@dataclass(frozen=True)
class Case:
    """A random memory with what is routed over it."""

    memory: GateMemory
    x: Any
    r: Any
    state: Any
    lengths: Any


@st.composite
def cases(draw: st.DrawFn) -> Case:
    seed = draw(st.integers(0, 100_000))
    rng = np.random.default_rng(seed)
    entries, rule_first = draw(st.integers(1, 80)), draw(st.booleans())
    numbers = random_calibration(seed, **({"interpolate": 1.0} if rule_first else {}))
    memory = random_memory(
        seed,
        hidden_size=HIDDEN,
        num_experts=EXPERTS,
        entries=entries,
        k=draw(st.integers(1, 64)),
        n_valid=draw(st.sampled_from([0, 1, entries // 2, entries])),
        similarity=draw(st.sampled_from(["cosine", "rbf"])),
        duplicates=draw(st.booleans()),
        rule_first=rule_first,
        calibration=numbers,
    )
    if draw(st.booleans()):
        memory.keys[memory.n_valid :] = 9.0  # nearer than any valid entry
        memory.values[memory.n_valid :] = np.nan
    batch, length = draw(st.integers(1, 3)), draw(st.integers(1, 5))
    x = rng.normal(size=(batch * length, HIDDEN))
    near = rng.integers(0, entries, batch * length)
    if draw(st.booleans()):  # as near as in a domain, not as far as at random
        x = np.nan_to_num(memory.keys[near]) + memory.center + 0.05 * x
    r = rng.normal(size=(batch * length, EXPERTS))
    if rule_first:
        r = RULE.assignments(r)
    state = np.abs(rng.normal(size=(batch, 2))) * [1, 3]
    return Case(memory, x, r, state, rng.integers(1, length + 1, batch))


@pytest.mark.parametrize("backend", ["numpy", "onnx", "faiss"])
@settings(max_examples=150, deadline=None)
@given(case=cases())
def test_backends_agree_with_float64(backend: str, case: Case, engines: Any) -> None:
    memory, state, lengths = case.memory, case.state, case.lengths
    x, r = case.x.astype(np.float32), case.r.astype(np.float32)
    got = blend(backend, memory, x, r, state, lengths, engines)
    exact = knn_blend(x, r, memory, state, lengths, dtype=np.float64)
    np.testing.assert_allclose(got.similarities, exact.similarities, atol=TOLERANCE)
    # Of two entries that rounding cannot tell apart either may be the last neighbour, so the rows
    # are compared with the blend of the neighbours that were taken; they are as near as the best.
    taken = blend_found(
        case.r, memory, got.neighbors, exact.similarities, got.neighbors < memory.n_valid,
        case.state, lengths, dtype=np.float64,
    )  # fmt: skip
    np.testing.assert_allclose(got.rows, taken.rows, atol=TOLERANCE)
    np.testing.assert_allclose(got.confidence, exact.confidence, atol=TOLERANCE)
    np.testing.assert_allclose(got.state, exact.state, atol=TOLERANCE)
    clear = (np.abs(got.neighbors - exact.neighbors) == 0).all(axis=1)
    np.testing.assert_allclose(got.rows[clear], exact.rows[clear], atol=TOLERANCE)
    _assert_same_entries(memory, x, got.neighbors, exact)


def _assert_same_entries(memory: GateMemory, x: Any, neighbors: Any, exact: Blended) -> None:
    """Each neighbour taken is valid, taken once, and as similar as the exact one of its rank."""
    every = replace(memory, k=len(memory.keys))
    all_ids, all_similarities, _ = search(x.astype(np.float64), every, np.float64)
    for t in range(len(x)):
        by_id = dict(zip(all_ids[t].tolist(), all_similarities[t].tolist(), strict=True))
        valid = [int(i) for i in neighbors[t] if i < memory.n_valid]
        count = min(memory.k, memory.n_valid)
        if memory.n_valid:
            valid = valid[:count]
        assert len(set(valid)) == count
        for rank, entry in enumerate(valid):
            assert abs(by_id[entry] - exact.similarities[t, rank]) <= TOLERANCE


@pytest.mark.parametrize("backend", ["numpy", "onnx", "faiss"])
@pytest.mark.parametrize("similarity", ["cosine", "rbf"])
@pytest.mark.parametrize("reason", ["scale", "empty", "zeros", "gate"])
def test_without_confidence_the_row_stays_bit_for_bit(
    backend: str, similarity: Any, reason: str, engines: Any
) -> None:
    numbers = Calibration()
    if reason == "scale":
        numbers = replace(numbers, scale=0.0)
    if reason == "gate":  # so far from the memory that the gate is shut in fp32
        numbers = replace(numbers, midpoint=1e5, sharpness=10.0)
    memory = random_memory(3, similarity=similarity, calibration=numbers)
    if reason == "empty":
        memory = replace(memory, n_valid=0)
    if reason == "zeros":
        memory = replace(
            memory,
            keys=np.zeros_like(memory.keys),
            key_scales=np.zeros_like(memory.key_scales),
            values=np.zeros_like(memory.values),
            calibration=replace(numbers, gamma=1e6),
        )
    rng = np.random.default_rng(0)
    x, r = rng.normal(size=(7, HIDDEN)), rng.normal(size=(7, EXPERTS)).astype(np.float32)
    if reason != "gate":
        r[0] = -0.0
    got = blend(backend, memory, x, r, np.zeros((1, 2)), np.array([7]), engines)
    if reason == "gate":
        assert (got.confidence < 1e-30).all()
        np.testing.assert_array_equal(got.rows, r)
    else:
        assert (got.confidence == 0).all()
        assert got.rows.tobytes() == r.tobytes()


@pytest.mark.parametrize("backend", ["numpy", "onnx", "faiss"])
@pytest.mark.parametrize("similarity", ["cosine", "rbf"])
@pytest.mark.parametrize("size", [0.0, 1e-38, 1e-20, 1e18, 3e38])
def test_no_finite_input_gives_anything_but_finite_output(
    backend: str, similarity: Any, size: float, engines: Any
) -> None:
    memory = random_memory(5, similarity=similarity, calibration=random_calibration(5))
    x = (np.sign(np.random.default_rng(1).normal(size=(4, HIDDEN))) * size).astype(np.float32)
    r = np.ones((4, EXPERTS), np.float32)
    got = blend(backend, memory, x, r, np.zeros((2, 2)), np.array([2, 2]), engines)
    assert np.isfinite(got.rows).all()
    assert np.isfinite(got.state).all()
    if similarity == "cosine" and size >= 1e18:  # the direction is all that counts
        far = blend(
            backend, memory, x / size * 1e10, r, np.zeros((2, 2)), np.array([2, 2]), engines
        )
        np.testing.assert_allclose(got.rows, far.rows, atol=1e-4)


def test_without_decay_the_state_is_to_the_bit_the_running_sum(engines: Any) -> None:
    memory = random_memory(8, calibration=Calibration(sequence=1.0, sharpness=4.0))
    rng = np.random.default_rng(2)
    x, r = rng.normal(size=(9, HIDDEN)), rng.normal(size=(9, EXPERTS))
    state = np.array([[1.37, 3.0]], np.float32)
    for backend in ("numpy", "onnx", "faiss"):
        got = blend(backend, memory, x, r, state, np.array([7]), engines)
        evidence = np.float32(got.similarities).sum(axis=1) / np.float32(memory.k)
        running = state[0, 0] + np.cumsum(evidence[:7], dtype=np.float32)[-1]
        assert got.state.tolist() == [[running, 10.0]]


def test_a_decaying_state_forgets_the_subject_it_left(engines: Any) -> None:
    numbers = Calibration(sequence=1.0, sharpness=8.0, midpoint=0.8)
    memory = random_memory(8, k=1, calibration=numbers)
    near = np.tile(memory.keys[0] + memory.center, (30, 1))
    x = np.concatenate([near, -memory.keys[0] + memory.center + np.zeros((10, HIDDEN))])
    r, lengths, confidence = np.zeros((40, EXPERTS)), np.array([40]), {}
    for decay in (1.0, 0.8):
        changed = replace(memory, calibration=replace(memory.calibration, decay=decay))
        for backend in ("numpy", "onnx", "faiss"):
            got = blend(backend, changed, x, r, np.zeros((1, 2)), lengths, engines)
            confidence[decay, backend] = got.confidence[-1]
            assert got.confidence[29] > 0.9
    for backend in ("numpy", "onnx", "faiss"):
        assert confidence[0.8, backend] < 0.2 * confidence[1.0, backend]


def test_entries_without_evidence_are_blended_but_raise_no_confidence(engines: Any) -> None:
    memory = random_memory(8, k=2, entries=2, calibration=Calibration(power=1.0))
    half = replace(memory, evidence_weights=np.array([1, 0], np.float32))
    x, r = memory.keys + memory.center, np.zeros((2, EXPERTS))
    for backend in ("numpy", "onnx", "faiss"):
        all_, some = (
            blend(backend, one, x, r, np.zeros((2, 2)), np.array([1, 1]), engines)
            for one in (memory, half)
        )
        np.testing.assert_array_equal(some.similarities, all_.similarities)
        first = some.neighbors == 0
        np.testing.assert_allclose(
            some.confidence, (some.similarities * first).sum(axis=1) / 2, atol=TOLERANCE
        )
        # The direction is that of all neighbours, its length the confidence.
        for t in range(2):
            np.testing.assert_allclose(
                some.rows[t] * all_.confidence[t], all_.rows[t] * some.confidence[t],
                atol=TOLERANCE,
            )  # fmt: skip


@pytest.mark.parametrize("decay", [1.0, 0.8])
def test_one_long_call_and_many_short_ones_gather_the_same_evidence(
    engines: Any, decay: float
) -> None:
    numbers = Calibration(midpoint=0.4, sharpness=4.0, sequence=1.0, decay=decay)
    memory = random_memory(8, calibration=numbers, weighted=True)
    rng = np.random.default_rng(2)
    x, r = rng.normal(size=(2, 9, HIDDEN)), rng.normal(size=(2, 9, EXPERTS))
    for backend in ("numpy", "onnx", "faiss"):
        whole = blend(
            backend, memory, x.reshape(18, -1), r.reshape(18, -1), np.zeros((2, 2)),
            np.array([9, 9]), engines,
        )  # fmt: skip
        state = np.zeros((2, 2))
        for t in range(9):
            step = blend(backend, memory, x[:, t], r[:, t], state, np.array([1, 1]), engines)
            state = step.state
            np.testing.assert_allclose(
                step.rows, whole.rows.reshape(2, 9, -1)[:, t], atol=TOLERANCE
            )
        np.testing.assert_allclose(state, whole.state, atol=TOLERANCE)
        np.testing.assert_allclose(state[:, 1], sum(decay**t for t in range(9)), rtol=1e-6)
        pieces = np.zeros((2, 2))
        for start, end in ((0, 4), (4, 9)):  # padded to six, as chunks of a prompt are
            rows = np.zeros((2, 6, HIDDEN)), np.zeros((2, 6, EXPERTS))
            for padded, source in zip(rows, (x, r), strict=True):
                padded[:, : end - start] = source[:, start:end]
            lengths = np.array([end - start] * 2)
            got = blend(backend, memory, rows[0].reshape(12, -1), rows[1].reshape(12, -1),
                        pieces, lengths, engines)  # fmt: skip
            pieces = got.state
            np.testing.assert_allclose(
                got.rows.reshape(2, 6, -1)[:, : end - start],
                whole.rows.reshape(2, 9, -1)[:, start:end], atol=TOLERANCE,
            )  # fmt: skip
        np.testing.assert_allclose(pieces, whole.state, atol=TOLERANCE)


def test_padding_leaves_no_trace_in_the_state(engines: Any) -> None:
    numbers = Calibration(sharpness=4.0, sequence=1.0, decay=0.8)
    memory = random_memory(9, calibration=numbers)
    rng = np.random.default_rng(3)
    x, r = rng.normal(size=(5, HIDDEN)), rng.normal(size=(5, EXPERTS))
    for backend in ("numpy", "onnx", "faiss"):
        short = blend(backend, memory, x[:3], r[:3], np.zeros((1, 2)), np.array([3]), engines)
        padded = blend(backend, memory, x, r, np.zeros((1, 2)), np.array([3]), engines)
        np.testing.assert_allclose(padded.rows[:3], short.rows, atol=TOLERANCE)
        np.testing.assert_allclose(padded.state, short.state, atol=TOLERANCE)
        nothing = blend(backend, memory, x, r, short.state, np.array([0]), engines)
        np.testing.assert_allclose(nothing.state, short.state, atol=TOLERANCE)


# --- whole gates -------------------------------------------------------------------------------


def route(
    gate: Gate, x: Any, r: Any, state: Any, lengths: Any, experts: int = TOP_K
) -> tuple[GateBuffers, GateTrace]:
    rows = len(x)
    buffers = GateBuffers(
        x.astype(np.float32), r.astype(np.float32), state.astype(np.float32), lengths,
        np.full((rows, experts), -7, np.int32), np.full((rows, experts), np.nan, np.float32),
        np.full((len(lengths), 2), np.nan, np.float32),
    )  # fmt: skip
    trace = GateTrace.empty(rows, gate.neighbors)
    gate.bind(buffers, trace)()
    return buffers, trace


@pytest.mark.parametrize("rule_first", [False, True])
@pytest.mark.parametrize("similarity", ["cosine", "rbf"])
def test_gates_route_alike(similarity: Any, rule_first: bool, engines: Any) -> None:
    pytest.importorskip("faiss")
    memory = random_memory(
        11, similarity=similarity, rule_first=rule_first, entries=200,
        calibration=Calibration(scale=0.9, gamma=0.05),
    )  # fmt: skip
    rng = np.random.default_rng(4)
    x, r = rng.normal(size=(2, 40, HIDDEN)), 3 * rng.normal(size=(80, EXPERTS))
    x, state, lengths = x.reshape(80, -1), np.zeros((2, 2)), np.array([40, 33])
    gates: list[Gate] = [
        NumpyGate(RULE, TOP_K, memory, np.float64),
        NumpyGate(RULE, TOP_K, memory),
        OnnxGate.over(engines(graph_name(memory)), memory),
        FaissGate(RULE, TOP_K, memory, index=build_index(memory)),
    ]
    oracle, exact = route(gates[0], x, r, state, lengths)
    frozen, _ = route(NumpyGate(RULE, TOP_K), x, r, state, lengths)
    assert (frozen.expert_ids != oracle.expert_ids).any()
    for gate in gates[1:]:
        got, trace = route(gate, x, r, state, lengths)
        np.testing.assert_array_equal(got.expert_ids, oracle.expert_ids)
        np.testing.assert_allclose(got.expert_weights, oracle.expert_weights, atol=TOLERANCE)
        np.testing.assert_allclose(got.state_out, oracle.state_out, rtol=1e-5)
        np.testing.assert_array_equal(trace.neighbors, exact.neighbors)
        np.testing.assert_allclose(trace.confidence, exact.confidence, atol=TOLERANCE)


def test_an_empty_memory_routes_bit_for_bit_like_the_frozen_router(engines: Any) -> None:
    rng = np.random.default_rng(5)
    x, r = rng.normal(size=(6, HIDDEN)), rng.normal(size=(6, EXPERTS))
    state, lengths = np.zeros((1, 2)), np.array([6])
    empty = GateMemory.empty(HIDDEN, EXPERTS)
    for frozen, with_empty in (
        (NumpyGate(RULE, TOP_K), NumpyGate(RULE, TOP_K, empty)),
        (
            OnnxGate.over(engines("frozen"), None),
            OnnxGate.over(engines("cosine"), empty),
        ),
    ):
        expected, _ = route(frozen, x, r, state, lengths)
        got, _ = route(with_empty, x, r, state, lengths)
        assert got.expert_ids.tobytes() == expected.expert_ids.tobytes()
        assert got.expert_weights.tobytes() == expected.expert_weights.tobytes()


def test_room_for_more_experts_than_the_rule_selects_is_filled_with_weight_zero() -> None:
    rng = np.random.default_rng(6)
    r = rng.normal(size=(5, EXPERTS))
    got, _ = route(
        NumpyGate(RULE, 4), np.zeros((5, HIDDEN)), r, np.zeros((1, 2)), np.array([5]), experts=4
    )
    ids, weights = RULE.apply(r)
    np.testing.assert_array_equal(got.expert_ids[:, :TOP_K], ids)
    np.testing.assert_allclose(got.expert_weights[:, :TOP_K], weights, atol=1e-7)
    assert (got.expert_weights[:, TOP_K:] == 0).all()
    assert all(len(set(row)) == 4 for row in got.expert_ids.tolist())


def test_an_inverted_file_finds_nearly_what_the_full_scan_finds() -> None:
    pytest.importorskip("faiss")
    memory = random_memory(12, entries=4000, hidden_size=16, k=8)
    index = build_index(memory, exact_entries=1000)
    gate = FaissGate(RULE, TOP_K, memory, index=index)
    assert not gate.exact
    rng = np.random.default_rng(7)
    near = memory.keys[rng.integers(0, 4000, 50)] + memory.center
    x = (near + 0.02 * rng.normal(size=near.shape)).astype(np.float32)
    ids, similarities, found = gate.find(memory, x)
    exact_ids, exact_similarities, _ = search(x, memory, np.float32)
    assert found.all()
    np.testing.assert_array_equal(ids[:, 0], exact_ids[:, 0])
    assert (similarities <= exact_similarities + 1e-6).all()
    recall = np.mean([len(set(a) & set(b)) / 8 for a, b in zip(ids, exact_ids, strict=True)])
    assert recall > 0.5


@pytest.mark.parametrize("tokens", [1, 3, 40])
def test_faiss_breaks_ties_that_reach_beyond_its_candidates(tokens: int) -> None:
    pytest.importorskip("faiss")
    rng = np.random.default_rng(13)
    units = np.eye(8, dtype=np.float32)
    for _ in range(60):
        entries = int(rng.integers(60, 3000))
        memory = random_memory(13, entries=entries, hidden_size=8, k=int(rng.integers(1, 65)))
        # Few distinct keys: hundreds of entries are equally near.
        keys = units[rng.integers(0, rng.integers(2, 9), entries)]
        memory = replace(memory, keys=keys, center=np.zeros(8, np.float32))
        x = units[rng.integers(0, 8, tokens)] + np.float32(0.5)
        gate = FaissGate(RULE, TOP_K, memory, index=build_index(memory))
        ids, _, _ = gate.find(memory, x)
        exact, _, _ = search(x, memory, np.float32)
        np.testing.assert_array_equal(ids, exact)
