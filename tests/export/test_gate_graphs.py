"""The gate graphs: the routing rule alone, and with the blend before or after it."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest

from knnmoe.export.gate_graphs import GateShape, gate_functions, gate_graph
from knnmoe.runtime.bundle import GATE_GRAPHS
from knnmoe.runtime.routing import RoutingRule

D, E, T = 8, 6, 10


def session(name: str, shape: GateShape) -> onnxruntime.InferenceSession:
    model = ir.to_proto(gate_graph(name, shape).model(gate_functions(name)))
    onnx.checker.check_model(model, full_check=True)
    return onnxruntime.InferenceSession(model.SerializeToString())


def shape(room: int = 2, **rule: object) -> GateShape:
    return GateShape(D, E, room, RoutingRule(**{"top_k": 2} | rule))


def logits(seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(T, E)).astype(np.float32)


def memory(values: np.ndarray, scale: float) -> dict[str, np.ndarray]:
    """One entry that is everybody's neighbour, with similarity 1 to the inputs of `route`."""
    calibration = np.zeros(11, np.float32)
    calibration[[0, 1, 3, 4, 5]] = (1, 1, 1, scale, 1)
    keys = np.zeros((1, D), np.float32)
    keys[0, 0] = 1
    return {
        "keys": keys, "key_scales": np.ones((1, 2), np.float32),
        "values": values[None].astype(np.float32), "n_valid": np.array([1]), "k": np.array([3]),
        "center": np.zeros(D, np.float32), "calibration": calibration,
        "state": np.zeros((1, 2), np.float32), "lengths": np.array([T]),
    }  # fmt: skip


def route(graph: onnxruntime.InferenceSession, r: np.ndarray, **inputs: np.ndarray):
    x = np.zeros((T, D), np.float32)
    x[:, 0] = 1
    feeds = {"router_input": x, "router_logits": r} | inputs
    names = {spec.name for spec in graph.get_inputs()}
    feeds = {name: value for name, value in feeds.items() if name in names}
    return graph.run(["expert_ids", "expert_weights"], feeds)


def dense(ids: np.ndarray, weights: np.ndarray) -> np.ndarray:
    rows = np.zeros((len(ids), E))
    np.put_along_axis(rows, ids.astype(np.int64), weights, axis=1)
    return rows


def softmax(r: np.ndarray) -> np.ndarray:
    e = np.exp(r.astype(float) - r.max(axis=1, keepdims=True))
    return e / e.sum(axis=1, keepdims=True)


@pytest.mark.parametrize("renormalize", [False, True])
@pytest.mark.parametrize("scale", [1.0, 2.5])
def test_the_frozen_gate_is_the_routing_rule(renormalize, scale):
    r = logits()
    ids, weights = route(session("frozen", shape(renormalize=renormalize, scale=scale)), r)
    assert ids.dtype == np.int32
    assert weights.dtype == np.float32
    scores = softmax(r)
    expected_ids = np.argsort(-scores, axis=1, kind="stable")[:, :2]
    expected = np.take_along_axis(scores, expected_ids, axis=1)
    if renormalize:
        expected /= expected.sum(axis=1, keepdims=True)
    np.testing.assert_array_equal(ids, expected_ids)
    np.testing.assert_allclose(weights, expected * scale, rtol=1e-5)


def test_equal_logits_choose_the_lower_expert():
    ids, _ = route(session("frozen", shape()), np.zeros((T, E), np.float32))
    np.testing.assert_array_equal(ids, np.tile([0, 1], (T, 1)))


@pytest.mark.parametrize("renormalize", [False, True])
def test_room_for_more_experts_changes_nothing_for_the_rule(renormalize):
    r = logits()
    ids, weights = route(session("frozen", shape(renormalize=renormalize)), r)
    more_ids, more_weights = route(session("frozen", shape(4, renormalize=renormalize)), r)
    np.testing.assert_array_equal(more_ids[:, :2], ids)
    np.testing.assert_array_equal(more_weights[:, :2], weights)
    assert not more_weights[:, 2:].any()
    assert all(len(set(row)) == 4 for row in more_ids)


def test_a_blend_of_logits_is_routed_after_it():
    r, values = logits(), np.linspace(-2, 2, E)
    ids, weights = route(session("cosine", shape()), r, **memory(values, 0.25))
    expected_ids, expected = route(
        session("frozen", shape()), 0.75 * r + 0.25 * values.astype("f4")
    )
    np.testing.assert_array_equal(ids, expected_ids)
    np.testing.assert_allclose(weights, expected, atol=1e-6)


def test_a_blend_of_assignments_may_mix_further_experts_in():
    r, learned = logits(), np.array([0.5, 0, 0, 0, 0, 0.3])
    graph, frozen = session("cosine-assignment", shape(4)), session("frozen", shape())
    blended = 0.6 * dense(*route(frozen, r)) + 0.4 * learned
    found = dense(*route(graph, r, **memory(learned, 0.4)))
    np.testing.assert_allclose(found, blended, atol=1e-6)


def test_a_cut_of_assignments_keeps_the_mass_of_the_row():
    r, learned = logits(), np.array([0.5, 0, 0, 0, 0, 0.3])
    blended = 0.6 * dense(*route(session("frozen", shape()), r)) + 0.4 * learned
    ids, weights = route(session("cosine-assignment", shape(2)), r, **memory(learned, 0.4))
    np.testing.assert_allclose(weights.sum(axis=1), blended.sum(axis=1), rtol=1e-5)
    np.testing.assert_array_equal(ids, np.argsort(-blended, axis=1, kind="stable")[:, :2])
    kept = np.take_along_axis(blended, ids.astype(int), axis=1)
    ratio = weights / kept
    np.testing.assert_allclose(ratio[:, 0], ratio[:, 1], rtol=1e-5)


@pytest.mark.parametrize("name", [name for name in GATE_GRAPHS if name != "frozen"])
@pytest.mark.parametrize("room", [2, 4])
def test_without_confidence_every_gate_is_the_frozen_one(name, room):
    r = logits()
    expected = dense(*route(session("frozen", shape(room)), r))
    found = dense(*route(session(name, shape(room)), r, **memory(np.ones(E), 0.0)))
    np.testing.assert_array_equal(found, expected)
