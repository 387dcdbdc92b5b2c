"""The small kernels of a decode step, on the emulated device, against the NumPy rules."""

from __future__ import annotations

import ctypes
import re
import threading
from typing import Any

import fake_cupy as fake
import numpy as np
import pytest
import step_emulated
from emulated import SCHEDULES, check_sanitized
from fake_cupy import fake_cupy
from nvrtc import compiled

from knnmoe.runtime.errors import BackendError, SettingError
from knnmoe.runtime.gates.base import pad_experts
from knnmoe.runtime.routing import RoutingRule, select_assignments
from knnmoe.trt_plugins.compiler import ARCHITECTURES, compile_kernels
from knnmoe.trt_plugins.step_kernels import (
    APPEND_PARAMS,
    CACHE_PAIR,
    ROUTE_PARAMS,
    SIZES,
    SOURCE,
    StepKernels,
)
from knnmoe.trt_plugins.toolchain import find_nvcc

KERNELS = [
    *(f"knnmoe_step_{kind}_{size}" for kind in ("route", "assign", "heaviest") for size in SIZES),
    "knnmoe_step_append",
]


class Bench:
    """Step kernels on a fresh emulated device, and arrays with guards around them."""

    def __init__(self) -> None:
        self.cupy = fake_cupy()
        self.kernels = StepKernels(cupy=self.cupy)
        self.guarded: list[tuple[Any, Any]] = []

    def empty(self, shape: tuple[int, ...], dtype: Any) -> Any:
        """An array of poison in the middle of more poison."""
        count = int(np.prod(shape))
        whole = self.cupy.empty(count + 64, dtype)
        self.guarded.append((whole, count))
        return whole[32 : 32 + count].reshape(shape)

    def array(self, host: Any) -> Any:
        array = self.empty(host.shape, host.dtype)
        array.set(np.ascontiguousarray(host))
        return array

    def check_guards(self) -> None:
        for whole, count in self.guarded:
            raw = whole.get().view(np.uint8).reshape(count + 64, -1)
            assert (raw[:32] == 0xFF).all()
            assert (raw[32 + count :] == 0xFF).all()

    def rule(self, rule: RoutingRule, bias: Any) -> dict[str, Any]:
        return rule.numbers() | {"selection_bias": None if bias is None else self.array(bias)}

    def route(
        self, logits: Any, rule: RoutingRule, columns: int, bias: Any = None
    ) -> tuple[Any, Any]:
        ids = self.empty((len(logits), columns), np.int32)
        weights = self.empty((len(logits), columns), np.float32)
        self.kernels.route(self.array(logits), ids, weights, **self.rule(rule, bias))()
        self.check_guards()
        return ids.get(), weights.get()

    def assign(self, logits: Any, rule: RoutingRule, bias: Any = None) -> Any:
        result = self.empty(logits.shape, np.float32)
        self.kernels.assign(self.array(logits), result, **self.rule(rule, bias))()
        self.check_guards()
        return result.get()

    def heaviest(self, assignments: Any, columns: int) -> tuple[Any, Any]:
        ids = self.empty((len(assignments), columns), np.int32)
        weights = self.empty((len(assignments), columns), np.float32)
        self.kernels.heaviest(self.array(assignments), ids, weights)()
        self.check_guards()
        return ids.get(), weights.get()


@pytest.fixture
def bench() -> Bench:
    return Bench()


def few_values(seed: int, tokens: int, experts: int) -> Any:
    """Logits with many ties, far enough apart that any exponential orders them the same."""
    return np.random.default_rng(seed).integers(-4, 5, (tokens, experts)).astype(np.float32)


CASES = [
    # E, k, top_k, renormalise, scale
    (1, 1, 1, True, 1.0),
    (6, 3, 2, False, 1.0),
    (33, 33, 7, True, 2.5),
    (64, 8, 8, False, 1.0),
    (65, 9, 8, True, 1.0),
    (128, 8, 8, True, 1.0),
    (200, 40, 33, False, 0.5),
    (256, 64, 64, True, 2.5),
    (384, 12, 6, True, 1.0),
    (1024, 64, 10, False, 1.0),
]


@pytest.mark.parametrize(("experts", "columns", "top_k", "renormalize", "scale"), CASES)
@pytest.mark.parametrize("tokens", [1, 7])
def test_route_is_the_rule_with_ties_to_the_lower_index(
    bench: Bench,
    experts: int,
    columns: int,
    top_k: int,
    renormalize: bool,
    scale: float,
    tokens: int,
) -> None:
    rule = RoutingRule(top_k, renormalize=renormalize, scale=scale)
    logits = few_values(experts, tokens, experts)
    expected = pad_experts(*rule.apply(logits), logits, columns)
    ids, weights = bench.route(logits, rule, columns)
    np.testing.assert_array_equal(ids, expected[0])
    np.testing.assert_allclose(weights, expected[1], rtol=1e-5, atol=1e-30)
    assert (weights[:, top_k:] == 0).all()
    dense = bench.assign(logits, rule)
    np.testing.assert_allclose(dense, rule.assignments(logits), rtol=1e-5, atol=1e-30)


RULES = [
    # E, k, rule
    (5, 5, RoutingRule(2, "softmax-topk")),
    (32, 4, RoutingRule(4, "softmax-topk", scale=2.0)),
    (200, 40, RoutingRule(33, "softmax-topk")),
    (1024, 12, RoutingRule(8, "softmax-topk", selection_bias=True)),
    (6, 3, RoutingRule(2, "sigmoid")),
    (128, 8, RoutingRule(8, "sigmoid", renormalize=True, scale=2.5, selection_bias=True)),
    (1024, 64, RoutingRule(40, "sigmoid", renormalize=True, selection_bias=True)),
    (60, 8, RoutingRule(6, selection_bias=True, renormalize=True)),
    (6, 6, RoutingRule(2, groups=3)),
    (64, 6, RoutingRule(6, scale=16.0, groups=8, top_groups=3)),
    (160, 6, RoutingRule(6, groups=8, top_groups=3)),
    (
        256, 8,
        RoutingRule(8, "sigmoid", renormalize=True, scale=2.5, groups=8, top_groups=4,
                    group_score="top2", selection_bias=True),
    ),
    (
        256, 12,
        RoutingRule(8, "sigmoid", groups=32, top_groups=9, group_score="top2"),
    ),
    (
        72, 20,
        RoutingRule(9, groups=8, top_groups=1, group_score="top2", selection_bias=True),
    ),
    (1024, 64, RoutingRule(64, "sigmoid", groups=16, top_groups=1, renormalize=True)),
    (96, 7, RoutingRule(5, "softmax-topk", groups=4, top_groups=2, group_score="top2")),
]  # fmt: skip


def case_of(experts: int, rule: RoutingRule, tokens: int) -> tuple[Any, Any]:
    """Logits and bias with many ties, and no other sums that are near each other."""
    rng = np.random.default_rng(experts)
    logits = few_values(experts, tokens, experts) / 2 + np.float32(0.3)
    bias = rng.integers(-2, 3, experts).astype(np.float32) / 4
    return logits, bias if rule.selection_bias else None


@pytest.mark.parametrize(("experts", "columns", "rule"), RULES)
def test_rules_of_the_other_families(
    bench: Bench, experts: int, columns: int, rule: RoutingRule
) -> None:
    logits, bias = case_of(experts, rule, 7)
    expected = pad_experts(*rule.apply(logits, bias), rule.ranking(logits, bias), columns)
    ids, weights = bench.route(logits, rule, columns, bias)
    np.testing.assert_array_equal(ids, expected[0])
    np.testing.assert_allclose(weights, expected[1], rtol=1e-5, atol=1e-30)
    dense = bench.assign(logits, rule, bias)
    np.testing.assert_allclose(dense, rule.assignments(logits, bias), rtol=1e-5, atol=1e-30)
    rows = bench.array(logits)
    bench.kernels.assign(rows, rows, **bench.rule(rule, bias))()
    np.testing.assert_array_equal(rows.get(), dense)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_every_schedule_gives_the_same_groups(
    bench: Bench, schedule: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    experts, columns, rule = RULES[11]
    logits, bias = case_of(experts, rule, 6)
    forward = *bench.route(logits, rule, columns, bias), bench.assign(logits, rule, bias)
    run = step_emulated.library().knnmoe_step_run

    def launch(name: bytes, params: Any, x: int, y: int, threads: int, shared: Any) -> Any:
        return run(name, params, x, y, threads, SCHEDULES.index(schedule), 5)

    monkeypatch.setattr(fake, "emulated_launch", lambda name: launch)
    again = *bench.route(logits, rule, columns, bias), bench.assign(logits, rule, bias)
    for one, other in zip(forward, again, strict=True):
        np.testing.assert_array_equal(one, other)


def test_extreme_logits_of_a_sigmoid(bench: Bench) -> None:
    logits = np.array([[-200, 200, -300, 0], [-200, -300, -400, -500]], np.float32)
    rule = RoutingRule(2, "sigmoid", renormalize=True)
    ids, weights = bench.route(logits, rule, 2)
    assert ids.tolist() == [[1, 3], [0, 1]]
    np.testing.assert_allclose(weights, [[2 / 3, 1 / 3], [0, 0]], rtol=1e-6)


def test_large_logits_of_a_softmax_over_the_selected(bench: Bench) -> None:
    logits = few_values(6, 3, 40) + np.array([[300], [-300], [0]], np.float32)
    rule = RoutingRule(5, "softmax-topk")
    ids, weights = bench.route(logits, rule, 5)
    np.testing.assert_array_equal(ids, rule.apply(logits)[0])
    np.testing.assert_allclose(weights, rule.apply(logits)[1], rtol=1e-5)
    np.testing.assert_allclose(bench.assign(logits, rule), rule.assignments(logits), rtol=1e-5)


@pytest.mark.parametrize("score", ["softmax-topk", "sigmoid"])
def test_a_logit_that_is_nan_comes_after_every_number(bench: Bench, score: str) -> None:
    logits = few_values(3, 2, 40) + np.float32(0.3)
    logits[0, [0, 7]] = np.nan
    logits[1] = np.nan
    rule = RoutingRule(3, score)
    ids, weights = bench.route(logits, rule, 40)
    with np.errstate(invalid="ignore"):
        expected = rule.apply(logits)
    np.testing.assert_array_equal(ids[:, :3], expected[0])
    np.testing.assert_allclose(weights[0, :3], expected[1][0], rtol=1e-5)
    assert ids[0, 38:].tolist() == [0, 7]
    assert ids[1].tolist() == list(range(40))
    assert np.isnan(weights[1, :3]).all()


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_rows_without_scores_stay_in_bounds_with_groups(bench: Bench, bad: float) -> None:
    logits = np.full((2, 64), bad, np.float32)
    logits[1] = few_values(4, 1, 64)
    for score in ("softmax", "softmax-topk", "sigmoid"):
        rule = RoutingRule(6, score, groups=8, top_groups=2, group_score="top2")
        ids, weights = bench.route(logits, rule, 9)
        assert ((ids >= 0) & (ids < 64)).all()
        assert all(len(set(row)) == 9 for row in ids)
        if np.isnan(bad) or score != "sigmoid":
            assert not np.isfinite(weights[0, :6]).any()
        np.testing.assert_array_equal(ids[1, :6], rule.apply(logits[1:])[0][0])


@pytest.mark.parametrize("experts", [8, 64, 100, 1024])
def test_route_of_any_logits_takes_the_best(bench: Bench, experts: int) -> None:
    rng = np.random.default_rng(experts)
    logits = (rng.normal(size=(9, experts)) * 10.0 ** rng.integers(-3, 3, (9, 1))).astype(
        np.float32
    )
    rule, columns = RoutingRule(min(experts, 8), renormalize=True), min(experts, 20)
    ids, weights = bench.route(logits, rule, columns)
    expected = rule.apply(logits.astype(np.float64))[1]
    np.testing.assert_allclose(weights[:, :8], expected, rtol=2e-5, atol=1e-30)
    for row, chosen in zip(logits, ids, strict=True):
        assert len(set(chosen)) == columns
        scores = np.exp(row - row.max())
        np.testing.assert_allclose(scores[chosen], np.sort(scores)[::-1][:columns], rtol=1e-6)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_every_schedule_gives_the_same(
    bench: Bench, schedule: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    rule, logits = RoutingRule(8, renormalize=True), few_values(3, 6, 100)
    forward = *bench.route(logits, rule, 12), bench.assign(logits, rule)
    forward += bench.heaviest(np.abs(logits), 8)
    run = step_emulated.library().knnmoe_step_run

    def launch(name: bytes, params: Any, x: int, y: int, threads: int, shared: Any) -> Any:
        return run(name, params, x, y, threads, SCHEDULES.index(schedule), 5)

    monkeypatch.setattr(fake, "emulated_launch", lambda name: launch)
    again = *bench.route(logits, rule, 12), bench.assign(logits, rule)
    again += bench.heaviest(np.abs(logits), 8)
    for one, other in zip(forward, again, strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("experts", [5, 64, 1024])
@pytest.mark.parametrize("bad", [np.nan, np.inf, "all -inf"])
def test_a_row_without_a_softmax_gives_experts_in_bounds_and_weights_that_show_it(
    bench: Bench, experts: int, bad: Any
) -> None:
    logits = few_values(1, 3, experts)
    if isinstance(bad, str):
        logits[1] = -np.inf
    else:
        logits[1, experts // 2] = bad
    rule = RoutingRule(3, renormalize=True)
    ids, weights = bench.route(logits, rule, 5)
    assert list(ids[1]) == [0, 1, 2, 3, 4]
    assert np.isnan(weights[1, :3]).all()
    assert (weights[1, 3:] == 0).all()
    dense = bench.assign(logits, rule)
    assert np.isnan(dense[1, :3]).all()
    assert (dense[1, 3:] == 0).all()
    others = [0, 2]
    with np.errstate(invalid="ignore"):
        expected = rule.apply(logits)
    np.testing.assert_array_equal(ids[:, :3], expected[0])  # NumPy's rule says the same
    np.testing.assert_allclose(weights[others, :3], expected[1][others], rtol=1e-5)


def test_minus_infinity_masks_an_expert(bench: Bench) -> None:
    logits = few_values(2, 4, 16)
    logits[:, [0, 5]] = -np.inf
    rule = RoutingRule(4)
    ids, weights = bench.route(logits, rule, 16)
    expected = rule.apply(logits)
    np.testing.assert_array_equal(ids[:, :4], expected[0])
    np.testing.assert_allclose(weights[:, :4], expected[1], rtol=1e-5)
    assert (ids[:, 14:] == [0, 5]).all()


@pytest.mark.parametrize(("experts", "columns"), [(6, 2), (64, 8), (64, 64), (300, 33), (1024, 64)])
def test_heaviest_keeps_the_mass_of_the_row(bench: Bench, experts: int, columns: int) -> None:
    rng = np.random.default_rng(experts)
    rows = rng.integers(0, 4, (6, experts)).astype(np.float32) / 8
    rows[0, columns - 1 :] = 0  # no more than are kept: nothing is rescaled
    rows[1] = 0
    rows[2] = np.abs(rng.normal(size=experts))
    rows[3] = -rows[3]  # nothing kept is above 0: no rescaling by a quotient of nothing
    ids, weights = bench.heaviest(rows, columns)
    expected = select_assignments(rows, columns)
    np.testing.assert_array_equal(ids, expected[0])
    np.testing.assert_allclose(weights, expected[1], rtol=1e-5, atol=1e-6)
    rows[4, experts // 2] = np.nan
    ids, weights = bench.heaviest(rows, columns)
    np.testing.assert_array_equal(ids, select_assignments(rows, columns)[0])
    np.testing.assert_allclose(weights[5], expected[1][5], rtol=1e-5)


def test_assignments_may_replace_their_logits(bench: Bench) -> None:
    logits, rule = few_values(5, 5, 70), RoutingRule(6)
    rows = bench.array(logits)
    bench.kernels.assign(rows, rows, top_k=6, renormalize=False, scale=1.0)()
    np.testing.assert_array_equal(rows.get(), bench.assign(logits, rule))
    bench.check_guards()


def appended(cache: Any, new: Any, past: Any) -> Any:
    """What the caches must be, position by position."""
    result = cache.copy()
    for b, length in enumerate(past):
        for s in range(new.shape[2]):
            if 0 <= int(length) + s < cache.shape[2]:
                result[b, :, int(length) + s] = new[b, :, s]
    return result


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
@pytest.mark.parametrize("width", [128, 64, 12, 7, 1])
@pytest.mark.parametrize("fresh", [1, 5])
def test_append_writes_behind_what_a_cache_holds(
    bench: Bench, dtype: Any, width: int, fresh: int
) -> None:
    rng = np.random.default_rng(width)
    past = np.array([0, 3, 8, 9, 10, -1, -2, 2**63 - 1, -(2**63)])
    batch, heads, capacity = len(past), 3, 10
    pairs = []
    for _ in range(2):
        cache = rng.normal(size=(batch, heads, capacity, width)).astype(dtype)
        new = rng.normal(size=(batch, heads, fresh, width)).astype(dtype)
        pairs.append((cache, new))
    arrays = [(bench.array(cache), bench.array(new)) for cache, new in pairs]
    bench.kernels.append_many(arrays, bench.array(past))()
    for (cache, new), (written, _) in zip(pairs, arrays, strict=True):
        np.testing.assert_array_equal(written.get(), appended(cache, new, past))
    assert bench.cupy.machine.launched == ["knnmoe_step_append"]
    bench.check_guards()


def test_caches_of_a_launch_may_differ(bench: Bench) -> None:
    rng = np.random.default_rng(0)
    past = np.array([1, 0])
    shapes = [(4, 6, 16, np.float32), (1, 9, 5, np.float16), (2, 3, 8, np.float16)]
    shapes += [(1, 4, 2, np.float32)] * 40  # more than one launch takes
    hosts, arrays = [], []
    for heads, capacity, width, dtype in shapes:
        cache = rng.normal(size=(2, heads, capacity, width)).astype(dtype)
        new = rng.normal(size=(2, heads, 3, width)).astype(dtype)
        hosts.append((cache, new))
        arrays.append((bench.array(cache), bench.array(new)))
    bench.kernels.append_many(arrays, bench.array(past))()
    for (cache, new), (written, _) in zip(hosts, arrays, strict=True):
        np.testing.assert_array_equal(written.get(), appended(cache, new, past))
    assert len(bench.cupy.machine.launched) == 2
    bench.check_guards()


def test_a_captured_step_reads_its_numbers_at_each_replay(bench: Bench) -> None:
    cupy = bench.cupy
    stream = cupy.cuda.Stream(non_blocking=True)
    with stream:
        cache, new = cupy.zeros((1, 2, 8, 4), np.float32), cupy.zeros((1, 2, 1, 4), np.float32)
        past, rows = cupy.zeros(1, np.int64), cupy.zeros((1, 8), np.float32)
        ids, weights = cupy.empty((1, 2), np.int32), cupy.empty((1, 2), np.float32)
        append = bench.kernels.append(cache, new, past)
        route = bench.kernels.route(rows, ids, weights, top_k=2, renormalize=False, scale=1.0)
        stream.synchronize()
        stream.begin_capture()
        append()
        route()
        graph = stream.end_capture()
        assert not cupy.machine.launched
        for length in (2, 5):
            past.set(np.array([length]))
            new.set(np.full((1, 2, 1, 4), length, np.float32))
            logits = np.zeros((1, 8), np.float32)
            logits[0, length] = 3
            rows.set(logits)
            graph.launch(stream)
            assert ids.get()[0, 0] == length
    held = cache.get(stream=stream)[0, 0, :, 0]
    np.testing.assert_array_equal(held, [0, 0, 2, 0, 0, 5, 0, 0])


def test_no_tokens_launch_nothing(bench: Bench) -> None:
    ids, weights = bench.route(np.zeros((0, 8), np.float32), RoutingRule(2), 2)
    assert ids.shape == weights.shape == (0, 2)
    cache = bench.array(np.zeros((1, 2, 4, 8), np.float32))
    bench.kernels.append(
        cache, bench.array(np.zeros((1, 2, 0, 8), np.float32)), bench.array(np.zeros(1, np.int64))
    )()
    bench.cupy.machine.synchronize()
    assert not bench.cupy.machine.launched


def test_what_does_not_fit_is_refused_by_name(bench: Bench) -> None:
    cupy, kernels = bench.cupy, bench.kernels
    f32, i32 = np.float32, np.int32

    def route(
        rows: Any = ((2, 8), f32), ids: Any = ((2, 3), i32), weights: Any = ((2, 3), f32),
        top_k: int = 3, scale: float = 1.0,
    ) -> None:  # fmt: skip
        arrays = [cupy.zeros(*a) if isinstance(a, tuple) else a for a in (rows, ids, weights)]
        kernels.route(*arrays, top_k=top_k, renormalize=False, scale=scale)

    route()
    for name, wrong in (
        ("rows", {"rows": ((2, 8), np.float16)}),
        ("rows", {"rows": np.zeros((2, 8), f32)}),
        ("rows", {"rows": ((2, 1025), f32)}),
        ("rows", {"rows": ((16,), f32)}),
        ("rows", {"rows": cupy.zeros((2, 16), f32)[:, ::2]}),
        ("expert_ids", {"ids": ((2, 3), np.int64)}),
        ("expert_ids", {"ids": ((3, 3), i32)}),
        ("expert_ids", {"ids": ((2, 9), i32), "weights": ((2, 9), f32)}),
        ("expert_ids", {"rows": ((2, 99), f32), "ids": ((2, 65), i32), "weights": ((2, 65), f32)}),
        ("expert_weights", {"weights": ((2, 4), f32)}),
        ("top_k", {"top_k": 4}),
        ("top_k", {"top_k": 0}),
        ("scale", {"scale": float("nan")}),
    ):
        with pytest.raises(SettingError, match=f"^{name}: "):
            route(**wrong)
    with pytest.raises(SettingError, match=r"^assignments: of another shape"):
        kernels.assign(
            cupy.zeros((2, 8), f32), cupy.zeros((2, 9), f32), top_k=1, renormalize=True, scale=1.0
        )

    for name, rule in (
        ("score", {"score": "relu"}),
        ("group_score", {"group_score": "mean"}),
        ("group_score", {"groups": 8, "group_score": "top2", "top_groups": 8}),
        ("groups", {"groups": 3}),
        ("groups", {"groups": 0}),
        ("top_groups", {"groups": 2, "top_groups": 3}),
        ("top_k", {"groups": 4}),
        ("selection_bias", {"selection_bias": cupy.zeros(7, f32)}),
        ("selection_bias", {"selection_bias": cupy.zeros(8, np.float16)}),
        ("selection_bias", {"selection_bias": np.zeros(8, f32)}),
    ):
        arrays = cupy.zeros((2, 8), f32), cupy.zeros((2, 3), i32), cupy.zeros((2, 3), f32)
        with pytest.raises(SettingError, match=f"^{name}: "):
            kernels.route(*arrays, **({"top_k": 3} | rule))
        with pytest.raises(SettingError, match=f"^{name}: "):
            kernels.assign(arrays[0], arrays[0], **({"top_k": 3} | rule))
    with pytest.raises(SettingError, match=r"^groups: .* at most 32"):
        kernels.assign(cupy.zeros((2, 64), f32), cupy.zeros((2, 64), f32), top_k=1, groups=64)

    def append(
        cache: Any = (1, 2, 8, 4), new: Any = (1, 2, 3, 4), past: Any = 1, types: Any = (f32, f32)
    ) -> None:
        kernels.append(
            cupy.zeros(cache, types[0]), cupy.zeros(new, types[1]), cupy.zeros(past, np.int64)
        )

    append()
    for name, wrong in (
        ("new 0", {"new": (1, 3, 3, 4)}),
        ("new 0", {"new": (1, 2, 3, 5)}),
        ("new 0", {"new": (2, 2, 3, 4)}),
        ("new 0", {"types": (f32, np.float16)}),
        ("cache 0", {"cache": (2, 2, 8, 4)}),
        ("cache 0", {"types": (np.int8, np.int8)}),
        ("past_lengths", {"past": (1, 1)}),
    ):
        with pytest.raises(SettingError, match=f"^{name}: "):
            append(**wrong)
    with pytest.raises(SettingError, match=r"^pairs: empty"):
        kernels.append_many([], cupy.zeros(1, np.int64))


def test_the_arguments_have_the_same_layout_in_both_languages() -> None:
    offsets = (ctypes.c_longlong * 64)()
    count = step_emulated.library().knnmoe_step_layout(offsets)
    expected: list[int] = []
    for dtype in (ROUTE_PARAMS, CACHE_PAIR, APPEND_PARAMS):
        fields = dtype.fields
        assert fields is not None
        expected += [fields[name][1] for name in dtype.names or ()] + [dtype.itemsize]
    assert list(offsets[:count]) == expected


def test_every_kernel_is_tested() -> None:
    named = re.findall(r"X\((knnmoe_\w+),", SOURCE.read_text())
    assert sorted([*named, "knnmoe_step_append"]) == sorted(KERNELS)


@pytest.mark.parametrize(
    "architecture",
    [a if a == "90" else pytest.param(a, marks=pytest.mark.slow) for a in ARCHITECTURES],
)
def test_the_kernels_compile_without_spilling(architecture: str) -> None:
    try:
        find_nvcc()
    except BackendError as error:
        pytest.skip(str(error))
    usages = compile_kernels(architecture, source=SOURCE)
    assert sorted(usage.kernel for usage in usages) == sorted(KERNELS)
    for usage in usages:
        assert usage.spilled_bytes == usage.stack_bytes == usage.static_shared_bytes == 0, usage
        assert usage.registers <= (168 if usage.kernel.endswith("_1024") else 64), usage


@pytest.mark.parametrize(
    "architecture", ["87", *(pytest.param(a, marks=pytest.mark.slow) for a in ("90", "120"))]
)
def test_nvrtc_compiles_the_kernels_as_cupy_asks_it_to(architecture: str) -> None:
    cubin = compiled(SOURCE, architecture)
    for kernel in KERNELS:
        assert kernel.encode() in cubin


def test_random_calls_are_clean_under_the_sanitizers() -> None:
    check_sanitized("sanitized_step.py", 40, source="step.cpp")


def test_bound_calls_may_be_made_by_several_threads() -> None:
    """A run owns its argument; only the emulated machine takes one launch at a time."""
    bench = Bench()
    results: list[Any] = []

    def work(seed: int) -> None:
        logits = few_values(seed, 3, 40)
        ids = bench.cupy.empty((3, 4), np.int32)
        weights = bench.cupy.empty((3, 4), np.float32)
        stream = bench.cupy.cuda.Stream(non_blocking=True)
        with stream:
            rows = bench.cupy.asarray(logits)
            bench.kernels.route(rows, ids, weights, top_k=4, renormalize=False, scale=1.0)()
            results.append((ids.get(), RoutingRule(4).apply(logits)[0]))

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 3
    for got, expected in results:
        np.testing.assert_array_equal(got, expected)
