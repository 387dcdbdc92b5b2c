"""The gate graphs: the routing rule alone, and with the blend before or after it."""

from __future__ import annotations

from itertools import product

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest

from knnmoe.export.gate_graphs import GateShape, gate_functions, gate_graph
from knnmoe.export.graph import IR_VERSIONS, OPSET
from knnmoe.runtime.blend import GateMemory
from knnmoe.runtime.bundle import GATE_GRAPHS
from knnmoe.runtime.calibration import preset
from knnmoe.runtime.errors import SettingError
from knnmoe.runtime.gates.base import GateBuffers
from knnmoe.runtime.gates.numpy import NumpyGate
from knnmoe.runtime.gates.onnx import graph_name, memory_inputs
from knnmoe.runtime.routing import RoutingRule
from thinned import thinned

D, E, T = 8, 6, 10


def session(name: str, shape: GateShape, opset: int = OPSET) -> onnxruntime.InferenceSession:
    model = ir.to_proto(gate_graph(name, shape, opset).model(gate_functions(name, opset)))
    onnx.checker.check_model(model, full_check=True)
    return onnxruntime.InferenceSession(model.SerializeToString())


def shape(room: int = 2, **rule: object) -> GateShape:
    return GateShape(D, E, room, RoutingRule(**{"top_k": 2} | rule))


def logits(seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(T, E)).astype(np.float32)


def memory(values: np.ndarray, scale: float) -> dict[str, np.ndarray]:
    """One entry that is everybody's neighbour, with similarity 1 to the inputs of `route`."""
    calibration = np.zeros(12, np.float32)
    calibration[[0, 1, 3, 4, 5]] = (1, 1, 1, scale, 1)
    keys = np.zeros((1, D), np.float32)
    keys[0, 0] = 1
    return {
        "keys": keys, "key_scales": np.ones((1, 2), np.float32),
        "values": values[None].astype(np.float32),
        "evidence_weights": np.ones(1, np.float32), "n_valid": np.array([1]), "k": np.array([3]),
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


RULES = {
    "gpt-oss": RoutingRule(3, "softmax-topk", scale=2.0),
    "deepseek-v2": RoutingRule(3, scale=16.0, groups=8, top_groups=3),
    "deepseek-v3": RoutingRule(
        3, "sigmoid", renormalize=True, scale=2.5, groups=4, top_groups=2, group_score="top2",
        selection_bias=True,
    ),
    "glm-4": RoutingRule(3, "sigmoid", renormalize=True, selection_bias=True),
    "softmax with a bias": RoutingRule(3, renormalize=True, selection_bias=True),
    "groups of logits": RoutingRule(3, "softmax-topk", groups=4, top_groups=2),
}  # fmt: skip
MANY, WIDE = 16, 40  # experts, tokens


def turn(rule: str, name: str) -> tuple[int, int]:
    number = list(RULES).index(rule) + list(GATE_GRAPHS).index(name)
    return list(IR_VERSIONS)[number % len(IR_VERSIONS)], (3, 7)[number % 2]


def random_memory(name: str, rng: np.random.Generator, rule: RoutingRule, bias) -> GateMemory:
    keys = rng.normal(size=(20, D)).astype(np.float32)
    keys /= np.linalg.norm(keys, axis=1, keepdims=True)
    values = rng.normal(size=(20, MANY)).astype(np.float32)
    first = name.endswith("-assignment")
    return GateMemory(
        keys=keys, key_scales=np.ones((20, 2), np.float32),
        values=rule.assignments(values, bias) if first else values,
        n_valid=17, k=4, center=np.zeros(D, np.float32),
        calibration=preset("assignment" if first else "logits"),
        similarity="rbf" if name.startswith("rbf") else "cosine", rule_first=first,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("rule", "name", "opset", "room"),
    thinned(
        product(RULES, GATE_GRAPHS, IR_VERSIONS, (3, 7)),
        # Of a rule and a graph one opset and one room, in turn.
        lambda rule, name, opset, room: (opset, room) == turn(rule, name),
    ),
)
def test_every_graph_of_every_rule_is_the_gate_of_numpy(
    rule: str, name: str, opset: int, room: int
) -> None:
    check_graph(RULES[rule], name, opset, room)


def check_graph(rule: RoutingRule, name: str, opset: int, room: int) -> None:
    rng = np.random.default_rng(room)
    bias = rng.normal(0, 0.2, MANY).astype(np.float32) if rule.selection_bias else None
    memory = None if name == "frozen" else random_memory(name, rng, rule, bias)
    assert graph_name(memory) == name
    x = rng.normal(size=(WIDE, D)).astype(np.float32)
    r = rng.normal(size=(WIDE, MANY)).astype(np.float32)
    ids, weights = np.zeros((WIDE, room), np.int32), np.zeros((WIDE, room), np.float32)
    buffers = GateBuffers(
        x, r, np.zeros((1, 2), np.float32), np.array([WIDE]), ids, weights,
        np.zeros((1, 2), np.float32),
    )  # fmt: skip
    NumpyGate(rule, room, memory, selection_bias=bias).bind(buffers)()
    graph = session(name, GateShape(D, MANY, room, rule), opset)
    feeds: dict[str, np.ndarray] = {"router_input": x, "router_logits": r}
    feeds |= {} if bias is None else {"selection_bias": bias}
    feeds |= {} if memory is None else memory_inputs(memory)
    feeds |= {"state": buffers.state, "lengths": buffers.lengths}
    names = {spec.name for spec in graph.get_inputs()}
    found_ids, found = graph.run(["expert_ids", "expert_weights"], {n: feeds[n] for n in names})
    assert ("selection_bias" in names) == rule.selection_bias
    weighed = weights != 0  # an expert of weight 0 is nobody's business
    np.testing.assert_array_equal(found_ids[weighed], ids[weighed])
    np.testing.assert_allclose(found, weights, rtol=1e-5, atol=1e-6)
    assert all(len(set(row)) == room for row in found_ids)


def test_equal_groups_and_experts_choose_the_lower() -> None:
    rule = RoutingRule(3, "sigmoid", groups=4, top_groups=2, group_score="top2")
    graph = session("frozen", GateShape(D, MANY, 3, rule))
    ids, _ = route(graph, np.zeros((T, MANY), np.float32))
    np.testing.assert_array_equal(ids, np.tile([0, 1, 2], (T, 1)))


def test_a_rule_that_cannot_select_among_the_experts_makes_no_graph() -> None:
    with pytest.raises(SettingError, match=r"^routing.groups: does not divide"):
        gate_graph("frozen", GateShape(D, 10, 2, RoutingRule(2, groups=4)))


def test_sigmoids_that_are_all_zero_weigh_nothing() -> None:
    rule = RoutingRule(2, "sigmoid", renormalize=True)
    graph = session("frozen", GateShape(D, E, 2, rule))
    _, weights = route(graph, np.full((T, E), -1e4, np.float32))
    assert (weights == 0).all()
