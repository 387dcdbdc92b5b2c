"""`knnmoe::KnnBlend` as an ONNX function, against the equations written out in plain Python."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest

from knnmoe.export.blend_function import LENGTHS, blend_function, blend_node, memory_specs
from knnmoe.export.graph import GraphBuilder
from knnmoe.runtime.bundle import TensorSpec

D, E = 12, 5
NAMES = (
    "interpolate", "weight_power", "inverse_temperature", "mean", "scale", "power", "midpoint",
    "sharpness", "cap", "sequence", "gamma", "decay",
)  # fmt: skip
PAPER = dict(zip(NAMES, (1, 1, 0, 1, 1, 1, 0, 0, 12, 0, 1, 1), strict=True))
RECIPE = PAPER | {
    "interpolate": 0, "weight_power": 0, "inverse_temperature": 20, "scale": 0.7, "power": 2,
    "midpoint": 0.4, "sharpness": 4, "cap": 3, "sequence": 1,
}  # fmt: skip


def proto(similarity: str) -> onnx.ModelProto:
    g = GraphBuilder("blend")
    x = g.input("x", "float32", ("tokens", D))
    r = g.input("r", "float32", ("tokens", E))
    memory = [g.declare(spec) for spec in (*memory_specs(D, E), LENGTHS)]
    blended, results = blend_node(g, x, r, memory, similarity)
    outputs = (("r_out", "float32", ("tokens", E)), ("state_out", "float32", ("batch", 2)),
               ("confidence", "float32", ("tokens",)), ("neighbors", "int64", ("tokens", "k")),
               ("similarities", "float32", ("tokens", "k")))  # fmt: skip
    for value, spec in zip((blended, *results), outputs, strict=True):
        g.output(value, TensorSpec(*spec))
    return ir.to_proto(g.model([blend_function(similarity)]))


@pytest.fixture(scope="module")
def sessions() -> dict[str, onnxruntime.InferenceSession]:
    return {
        similarity: onnxruntime.InferenceSession(proto(similarity).SerializeToString())
        for similarity in ("cosine", "rbf")
    }


def run(session: onnxruntime.InferenceSession, case: dict[str, Any]) -> dict[str, np.ndarray]:
    feeds = {name: value for name, value in case.items() if name not in ("numbers", "similarity")}
    feeds["calibration"] = np.array([case["numbers"][name] for name in NAMES], np.float32)
    names = [output.name for output in session.get_outputs()]
    return dict(zip(names, session.run(names, feeds), strict=True))


def written_out(case: dict[str, Any]) -> dict[str, Any]:
    """docs/method.md, a token and a neighbour at a time, in Python's own floats."""
    c = case["numbers"]
    keys, values = case["keys"].astype(float), case["values"].astype(float)
    n_valid, batch = int(case["n_valid"][0]), len(case["state"])
    count = min(int(case["k"][0]), len(keys))
    width = len(case["x"]) // batch
    state = case["state"].astype(float).copy()
    rows, confidences, neighbors, similarities = [], [], [], []
    for t, (x, r) in enumerate(zip(case["x"].astype(float), case["r"].astype(float), strict=True)):
        q = x - case["center"].astype(float)
        norm = math.sqrt(float(q @ q))
        scores = []
        for i in range(len(keys)):
            product = float(q @ keys[i]) * float(case["key_scales"][i, 0])
            if case["similarity"] == "cosine":
                score = product / norm if norm else 0.0
            else:
                distance = float(q @ q) - 2 * product + float(case["key_scales"][i, 1])
                score = math.exp(-c["gamma"] * max(0.0, distance))
            scores.append(score if i < n_valid else -math.inf)
        order = sorted(range(len(keys)), key=lambda i: (-scores[i], i))[:count]
        found = [i for i in order if i < n_valid]
        s = [min(max(scores[i], 0.0), 1.0) for i in found]
        raw = [v ** c["weight_power"] * math.exp(c["inverse_temperature"] * (v - max(s)))
               for v in s]  # fmt: skip
        mean = np.zeros(E)
        if sum(raw) > 0:
            mean = sum(w / sum(raw) * values[i] for w, i in zip(raw, found, strict=True))
        evidence = 0.0
        if found:
            counted = [case["evidence_weights"][i] * v for i, v in zip(found, s, strict=True)]
            evidence = sum(counted) / len(found) if c["mean"] else min(1.0, sum(counted))
        b, position = divmod(t, width)
        if position < case["lengths"][b]:
            state[b] = c["decay"] * state[b] + (evidence, 1)
        gate = 1.0
        if c["sharpness"]:
            seen, measured = (max(state[b][1], 1), state[b][0]) if c["sequence"] else (1, evidence)
            growth = min(math.sqrt(seen), c["cap"])
            z = growth * c["sharpness"] * (measured / seen - c["midpoint"])
            gate = 1 / (1 + math.exp(-z))
        confidence = min(max(c["scale"] * evidence ** c["power"] * gate, 0.0), 1.0)
        rows.append(r + confidence * (mean - c["interpolate"] * r))
        confidences.append(confidence)
        neighbors.append(order)
        similarities.append(s + [0.0] * (count - len(s)))
    return {"r_out": rows, "state_out": state, "confidence": confidences, "neighbors": neighbors,
            "similarities": similarities}  # fmt: skip


def make_case(similarity: str, numbers: dict[str, float], seed: int = 0, **changes: Any) -> dict:
    rng = np.random.default_rng(seed)
    batch, width, entries = 3, 4, 9
    x = rng.normal(size=(batch * width, D)).astype(np.float32)
    center = rng.normal(size=D).astype(np.float32) * 0.1
    keys = x[:entries] - center + rng.normal(size=(entries, D)).astype(np.float32) * 0.4
    if similarity == "cosine":
        keys /= np.linalg.norm(keys, axis=1, keepdims=True)
    scales = np.stack([np.ones(entries), (keys.astype(float) ** 2).sum(1)], axis=1)
    case = {
        "similarity": similarity, "numbers": numbers | {"gamma": 0.1}, "x": x,
        "r": rng.normal(size=(batch * width, E)).astype(np.float32),
        "keys": keys.astype(np.float32), "key_scales": scales.astype(np.float32),
        "values": rng.normal(size=(entries, E)).astype(np.float32), "center": center,
        "n_valid": np.array([entries]), "k": np.array([4]),
        "evidence_weights": rng.choice([0, 0.5, 1], entries).astype(np.float32),
        "state": np.abs(rng.normal(size=(batch, 2))).astype(np.float32).round(),
        "lengths": np.array([width, 2, width]),
    }  # fmt: skip
    return case | changes


@pytest.mark.parametrize("similarity", ["cosine", "rbf"])
@pytest.mark.parametrize("numbers", [PAPER, RECIPE, PAPER | {"mean": 0, "scale": 0.4},
                                     RECIPE | {"sequence": 0, "weight_power": 2}])  # fmt: skip
@pytest.mark.parametrize(
    "changes",
    [{}, {"k": np.array([1])}, {"k": np.array([64])}, {"n_valid": np.array([2])},
     {"n_valid": np.array([2]), "k": np.array([64])}, {"n_valid": np.array([0])},
     {"lengths": np.array([4, 4, 4])}],
    ids=["plain", "k=1", "k>N", "n_valid<k", "n_valid<k<N", "empty", "no padding"],
)  # fmt: skip
def test_the_function_computes_the_equations(sessions, similarity, numbers, changes):
    case = make_case(similarity, numbers, **changes)
    found, expected = run(sessions[similarity], case), written_out(case)
    np.testing.assert_array_equal(found["neighbors"], expected["neighbors"])
    # A padded row of a sequence that is judged as a whole is nobody's output.
    real = (np.arange(4)[None] < case["lengths"][:, None]).reshape(-1)
    for name in ("r_out", "confidence", "similarities"):
        np.testing.assert_allclose(
            found[name][real], np.array(expected[name])[real], atol=1e-5, err_msg=name
        )
    np.testing.assert_allclose(found["state_out"], expected["state_out"], atol=1e-5)


@pytest.mark.parametrize("similarity", ["cosine", "rbf"])
def test_zero_confidence_leaves_the_logits_bit_for_bit(sessions, similarity):
    case = make_case(similarity, PAPER | {"scale": 0.0})
    case["r"][0, 0] = -0.0
    found = run(sessions[similarity], case)
    assert found["r_out"].tobytes() == case["r"].tobytes()
    case = make_case(similarity, PAPER, n_valid=np.array([0]))
    assert run(sessions[similarity], case)["r_out"].tobytes() == case["r"].tobytes()


@pytest.mark.parametrize("similarity", ["cosine", "rbf"])
def test_ties_go_to_the_lower_index(sessions, similarity):
    case = make_case(similarity, PAPER)
    case["keys"][:] = case["keys"][0]
    case["key_scales"][:] = case["key_scales"][0]
    found = run(sessions[similarity], case)
    np.testing.assert_array_equal(found["neighbors"], np.tile(np.arange(4), (12, 1)))


@pytest.mark.parametrize("similarity", ["cosine", "rbf"])
@pytest.mark.parametrize("magnitude", [0.0, 1e-30, 1e30, 3e38])
def test_no_input_however_large_or_small_gives_nan(sessions, similarity, magnitude):
    case = make_case(similarity, PAPER)
    signs = np.sign(case["x"])
    case["x"] = (signs * magnitude).astype(np.float32)
    found = run(sessions[similarity], case)
    for name, value in found.items():
        assert np.isfinite(value).all(), name


def test_a_huge_query_points_where_a_small_one_of_its_direction_does(sessions):
    small = make_case("cosine", PAPER, center=np.zeros(D, np.float32))
    large = small | {"x": (small["x"] * np.float32(1e30))}
    for name, value in run(sessions["cosine"], small).items():
        np.testing.assert_allclose(run(sessions["cosine"], large)[name], value, atol=1e-6)


@pytest.mark.parametrize("similarity", ["cosine", "rbf"])
def test_capacity_beyond_n_valid_does_not_count(sessions, similarity):
    clean = make_case(similarity, PAPER, n_valid=np.array([5]), k=np.array([64]))
    dirty = {name: np.copy(v) if isinstance(v, np.ndarray) else v for name, v in clean.items()}
    dirty["values"][5:] = np.nan
    dirty["keys"][5:] = 9.0
    found, expected = run(sessions[similarity], dirty), run(sessions[similarity], clean)
    for name in ("r_out", "confidence", "state_out", "similarities"):
        np.testing.assert_array_equal(found[name], expected[name])


def test_nan_in_a_row_of_padding_stays_there(sessions):
    clean = make_case("cosine", RECIPE)
    dirty = clean | {"x": clean["x"].copy()}
    dirty["x"][6:8] = np.nan  # the padding of the second sequence
    found, expected = run(sessions["cosine"], dirty), run(sessions["cosine"], clean)
    real = np.r_[0:6, 8:12]
    np.testing.assert_array_equal(found["r_out"][real], expected["r_out"][real])
    np.testing.assert_array_equal(found["state_out"], expected["state_out"])


def test_a_sequence_in_two_calls_is_the_sequence_in_one(sessions):
    whole = make_case("cosine", RECIPE, state=np.zeros((3, 2), np.float32),
                      lengths=np.array([4, 4, 4]))  # fmt: skip
    expected = run(sessions["cosine"], whole)
    state, rows = whole["state"], []
    for half in (slice(0, 2), slice(2, 4)):
        part = {name: whole[name].reshape(3, 4, -1)[:, half].reshape(6, -1) for name in ("x", "r")}
        found = run(sessions["cosine"], whole | part | {"state": state,
                    "lengths": np.array([2, 2, 2])})  # fmt: skip
        state = found["state_out"]
        rows.append(found["r_out"].reshape(3, 2, -1))
    np.testing.assert_allclose(state, expected["state_out"], atol=1e-6)
    joined = np.concatenate(rows, axis=1).reshape(12, -1)
    np.testing.assert_allclose(joined, expected["r_out"], atol=1e-6)


@pytest.mark.parametrize("similarity", ["cosine", "rbf"])
def test_the_node_is_one_that_onnx_and_tensorrt_know(similarity):
    model = proto(similarity)
    onnx.checker.check_model(model, full_check=True)
    (node,) = model.graph.node
    (function,) = model.functions
    assert (node.domain, node.op_type) == (function.domain, function.name) == ("knnmoe", "KnnBlend")
    attributes = {a.name: a.s.decode() for a in node.attribute}
    assert attributes == {"similarity": similarity, "plugin_namespace": "knnmoe"}
    assert {inner.domain for inner in function.node} == {""}


def test_a_sequence_of_nothing_but_padding_is_harmless(sessions):
    case = make_case("cosine", RECIPE, state=np.zeros((3, 2), np.float32),
                     lengths=np.array([4, 0, 4]))  # fmt: skip
    found = run(sessions["cosine"], case)
    assert np.isfinite(found["r_out"]).all()
    np.testing.assert_array_equal(found["state_out"][1], [0, 0])
