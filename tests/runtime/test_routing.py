"""Routing rules in NumPy: what they select, how they weigh it, and which rules are refused."""

from __future__ import annotations

import numpy as np
import pytest

from knnmoe.runtime.errors import SettingError
from knnmoe.runtime.routing import RoutingRule


def row(*logits: float) -> np.ndarray:
    return np.array([logits], np.float32)


def sigmoid(logits: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-logits.astype(float)))


def test_softmax_over_the_selected_weighs_them_alone() -> None:
    ids, weights = RoutingRule(2, "softmax-topk", scale=3.0).apply(row(0, 2, -1, 1))
    assert ids.tolist() == [[1, 3]]
    e = np.exp([2.0, 1.0])
    np.testing.assert_allclose(weights[0], 3 * e / e.sum(), rtol=1e-6)


def test_logits_that_a_softmax_cannot_tell_apart_are_told_apart_by_softmax_topk() -> None:
    logits = row(-200, -150, 0, -190)
    assert RoutingRule(3, "softmax").apply(logits)[0].tolist() == [[2, 0, 1]]  # both are 0
    assert RoutingRule(3, "softmax-topk").apply(logits)[0].tolist() == [[2, 1, 3]]


def test_a_bias_moves_the_selection_and_not_the_weights() -> None:
    logits, bias = row(0, 2, -1, 1), np.array([0, -1, 1, 0], np.float32)
    rule = RoutingRule(2, "sigmoid", selection_bias=True, scale=2.5)
    ids, weights = rule.apply(logits, bias)
    assert ids.tolist() == [[2, 3]]
    np.testing.assert_allclose(weights[0], 2.5 * sigmoid(logits)[0, [2, 3]], rtol=1e-6)
    renormalized = RoutingRule(2, "sigmoid", selection_bias=True, renormalize=True)
    np.testing.assert_allclose(
        renormalized.apply(logits, bias)[1][0], weights[0] / weights.sum(), rtol=1e-6
    )


def test_groups_are_ranked_by_their_best_or_by_their_two_best() -> None:
    logits = row(3, -9, 2, 2, 1, -9)  # groups of two
    chosen = {
        score: RoutingRule(2, "sigmoid", groups=3, group_score=score).apply(logits)[0].tolist()
        for score in ("max", "top2")
    }
    assert chosen == {"max": [[0, 1]], "top2": [[2, 3]]}
    two = RoutingRule(2, groups=3, top_groups=2).apply(logits)
    assert two[0].tolist() == [[0, 2]]
    scores = np.exp(logits) / np.exp(logits).sum()
    np.testing.assert_allclose(two[1], scores[:, [0, 2]], rtol=1e-6)


def test_experts_of_a_group_that_is_not_selected_come_after_all_others() -> None:
    rule = RoutingRule(1, groups=2)
    np.testing.assert_array_equal(
        np.isneginf(rule.ranking(row(0, 1, 5, 4))), [[True, True, False, False]]
    )


def test_of_equal_groups_and_experts_the_lower_come_first() -> None:
    for score in ("softmax", "softmax-topk", "sigmoid"):
        for group_score in ("max", "top2"):
            rule = RoutingRule(3, score, groups=4, top_groups=2, group_score=group_score)
            assert rule.apply(np.zeros((2, 8), np.float32))[0].tolist() == [[0, 1, 2]] * 2


def test_extreme_logits_of_a_sigmoid_give_finite_weights() -> None:
    logits = row(-1e4, -2e4, 1e4, -3e4)
    with np.errstate(all="raise", under="ignore"):
        ids, weights = RoutingRule(2, "sigmoid", renormalize=True).apply(logits)
        none, nothing = RoutingRule(2, "sigmoid", renormalize=True).apply(logits[:, :2])
    assert (ids.tolist(), weights.tolist()) == ([[2, 0]], [[1, 0]])
    assert (none.tolist(), nothing.tolist()) == ([[0, 1]], [[0, 0]])


def test_assignments_are_the_selection_as_dense_rows() -> None:
    rng = np.random.default_rng(0)
    logits, bias = rng.normal(size=(5, 12)), rng.normal(size=12)
    rule = RoutingRule(
        3, "sigmoid", groups=4, top_groups=2, group_score="top2", selection_bias=True
    )
    ids, weights = rule.apply(logits, bias)
    dense = rule.assignments(logits, bias)
    np.testing.assert_array_equal(np.take_along_axis(dense, ids.astype(int), axis=1), weights)
    assert np.count_nonzero(dense) == weights.size


@pytest.mark.parametrize(
    ("fields", "where"),
    [
        ({"score": "relu"}, "routing.score"),
        ({"group_score": "mean"}, "routing.group_score"),
        ({"top_k": 0}, "routing.top_k"),
        ({"groups": 0}, "routing.groups"),
        ({"groups": 2, "top_groups": 0}, "routing.top_groups"),
        ({"groups": 2, "top_groups": 3}, "routing.top_groups"),
        ({"scale": float("inf")}, "routing.scale"),
        ({"score": "softmax-topk", "renormalize": True}, "routing.renormalize"),
    ],
)
def test_a_rule_that_makes_no_sense_is_refused(fields: dict[str, object], where: str) -> None:
    with pytest.raises(SettingError, match=rf"^{where}: "):
        RoutingRule(**({"top_k": 2} | fields))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("fields", "where"),
    [
        ({"top_k": 9}, "routing.top_k"),
        ({"groups": 3}, "routing.groups"),
        ({"top_k": 5, "groups": 4, "top_groups": 2}, "routing.top_k"),
        ({"top_k": 1, "groups": 8, "group_score": "top2"}, "routing.group_score"),
    ],
)
def test_a_rule_is_refused_for_experts_it_cannot_select_among(
    fields: dict[str, object], where: str
) -> None:
    rule = RoutingRule(**({"top_k": 2} | fields))  # type: ignore[arg-type]
    with pytest.raises(SettingError, match=rf"^{where}: "):
        rule.apply(np.zeros((1, 8), np.float32))


def test_a_bias_is_given_where_the_rule_has_one_and_nowhere_else() -> None:
    logits = np.zeros((1, 4), np.float32)
    with pytest.raises(SettingError, match=r"^selection_bias: is missing; expected a bias of 4"):
        RoutingRule(1, selection_bias=True).apply(logits)
    with pytest.raises(SettingError, match=r"^selection_bias: is given to a rule that has none"):
        RoutingRule(1).apply(logits, logits[0])
    with pytest.raises(SettingError, match=r"^selection_bias: of another shape"):
        RoutingRule(1, selection_bias=True).apply(logits, logits)


def test_a_rule_states_what_sets_it_apart_from_those_before_it() -> None:
    old = {"top_k": 2, "score": "softmax", "renormalize": True, "scale": 1.0}
    assert RoutingRule(2, renormalize=True).to_json() == old
    rule = RoutingRule(
        2, "sigmoid", groups=4, top_groups=2, group_score="top2", selection_bias=True
    )
    assert RoutingRule(**rule.to_json()) == rule
    assert set(rule.to_json()) == set(rule.__dataclass_fields__)
