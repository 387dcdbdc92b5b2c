"""The small kernels of a decode step against the NumPy rules: routing, assignments, caches.

Logits are drawn with many ties, so that experts must agree exactly; weights must agree within
`TOLERANCE` with float64. Outputs are poisoned, and lie between guards that nobody may touch.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from functools import partial
from importlib import import_module
from itertools import product
from typing import Any

import numpy as np
from gpu_tally import Check, Errors, Records, tally

from knnmoe.runtime.gates.base import pad_experts
from knnmoe.runtime.routing import RoutingRule, select_assignments

TOLERANCE = 1e-5
TOKENS = (1, 2, 3, 5, 8, 17, 64, 129)
EXPERTS = (1, 6, 33, 60, 64, 65, 128, 200, 256, 384, 1024)
GUARD = 64  # elements before and behind an output
POISON = 0xA5
APPENDS = 24


class Steps:
    """Runs the kernels over random arrays."""

    def __init__(self, cupy: Any, kernels: Any) -> None:
        self.cupy, self.kernels = cupy, kernels

    def checks(self, seed: int) -> Iterator[Check]:
        """Everything that is checked."""
        for number, (tokens, experts) in enumerate(product(TOKENS, EXPERTS)):
            rng = np.random.default_rng([seed, number])
            rule = random_rule(rng, experts)
            columns = int(rng.integers(rule.top_k, min(experts, 64) + 1))
            # Far enough apart for any exponential to order them alike; not around 0, where the sums
            # of two sigmoids would be equal but for rounding.
            logits = rng.integers(-4, 5, (tokens, experts)).astype(np.float32) + np.float32(0.3125)
            bias = random_bias(rng, rule, experts) if rule.selection_bias else None
            rows = rng.integers(0, 4, (tokens, experts)).astype(np.float32) / 8
            rows[0, columns - 1 :] = 0  # no more than are kept: nothing is rescaled
            said = f"T={tokens} E={experts} columns={columns} {rule}"
            for kind, run in (
                ("route", partial(self.route, logits, rule, bias, columns)),
                ("assign", partial(self.assign, logits, rule, bias)),
                ("heaviest", partial(self.heaviest, rows, columns)),
            ):
                yield Check(f"{kind} {said}", seed, kind, run)
        for number in range(APPENDS):
            rng = np.random.default_rng([seed, 1000 + number])
            yield Check(f"append {number}", seed, "append", partial(self.append, rng))

    def route(self, logits: Any, rule: RoutingRule, bias: Any, columns: int) -> Errors:
        """Experts exactly, weights within the tolerance."""
        exact = logits.astype(np.float64)
        expected = pad_experts(*rule.apply(exact, bias), rule.ranking(exact, bias), columns)
        ids, weights = self._selection(expected)
        self.kernels.route(
            self.cupy.asarray(logits), ids.array, weights.array, **self._rule(rule, bias)
        )()
        return compared(ids, weights, expected)

    def assign(self, logits: Any, rule: RoutingRule, bias: Any) -> Errors:
        """Dense rows, in place too."""
        expected = rule.assignments(logits.astype(np.float64), bias)
        numbers = self._rule(rule, bias)
        dense = Output(self.cupy, expected.shape, np.float32)
        self.kernels.assign(self.cupy.asarray(logits), dense.array, **numbers)()
        rows = self.cupy.asarray(logits)
        self.kernels.assign(rows, rows, **numbers)()
        result = dense.read()
        np.testing.assert_array_equal(self.cupy.asnumpy(rows), result)
        return near(result, expected)

    def heaviest(self, rows: Any, columns: int) -> Errors:
        """Experts exactly, the mass of the row kept."""
        expected = select_assignments(rows.astype(np.float64), columns)
        ids, weights = self._selection(expected)
        self.kernels.heaviest(self.cupy.asarray(rows), ids.array, weights.array)()
        return compared(ids, weights, expected)

    def append(self, rng: np.random.Generator) -> Errors:
        """Several caches in one launch, bit for bit; a sequence that is full is left alone."""
        batch, fresh = int(rng.integers(1, 4)), int(rng.integers(1, 6))
        lengths = rng.integers(0, 12, batch)
        caches, pairs, expected = [], [], []
        for _ in range(int(rng.choice([1, 2, 33]))):
            heads, width = int(rng.integers(1, 5)), int(rng.choice([1, 3, 8, 64, 128]))
            capacity = int(rng.integers(8, 16))
            dtype = np.float16 if rng.integers(2) else np.float32
            old = rng.normal(size=(batch, heads, capacity, width)).astype(dtype)
            new = rng.normal(size=(batch, heads, fresh, width)).astype(dtype)
            cache = Output(self.cupy, old.shape, dtype)
            cache.array[...] = self.cupy.asarray(old)
            caches.append(cache)
            pairs.append((cache.array, self.cupy.asarray(new)))
            for b, length in enumerate(lengths):
                room = max(0, min(fresh, capacity - length))
                old[b, :, length : length + room] = new[b, :, :room]
            expected.append(old)
        self.kernels.append_many(pairs, self.cupy.asarray(lengths.astype(np.int64)))()
        for cache, right in zip(caches, expected, strict=True):
            np.testing.assert_array_equal(cache.read(), right)
        return {"cache": 0.0}

    def _rule(self, rule: RoutingRule, bias: Any) -> dict[str, Any]:
        there = None if bias is None else self.cupy.asarray(bias)
        return rule.numbers() | {"selection_bias": there}

    def _selection(self, expected: tuple[Any, Any]) -> tuple[Output, Output]:
        ids, weights = expected
        return Output(self.cupy, ids.shape, np.int32), Output(self.cupy, weights.shape, np.float32)


def random_rule(rng: np.random.Generator, experts: int) -> RoutingRule:
    """Any rule over that many experts that the kernels take; every other one is plain softmax."""
    plain = bool(rng.integers(2))
    score = "softmax" if plain else str(rng.choice(["softmax", "softmax-topk", "sigmoid"]))
    divisors = [count for count in range(1, 33) if experts % count == 0]
    groups = 1 if plain else int(rng.choice(divisors))
    top_groups = int(rng.integers(1, groups + 1))
    size = experts // groups
    return RoutingRule(
        int(rng.integers(1, min(size * top_groups, 64) + 1)),
        score,
        renormalize=bool(rng.integers(2)) and score != "softmax-topk",
        scale=float(rng.choice([1.0, 0.5, 2.5])),
        groups=groups,
        top_groups=top_groups,
        group_score="top2" if size > 1 and rng.integers(2) else "max",
        selection_bias=not plain and bool(rng.integers(2)),
    )


def random_bias(rng: np.random.Generator, rule: RoutingRule, experts: int) -> Any:
    """A bias [E] that leaves ranks equal or far apart.

    One for a whole group where groups are ranked by sums: two experts that swapped their biases
    would make sums that are equal but for rounding.
    """
    sums = rule.groups > 1 and rule.group_score == "top2"
    same = experts // rule.groups if sums else 1
    values = rng.choice(np.array([-0.47, -0.1, 0.0, 0.23, 0.5], np.float32), experts // same)
    return np.repeat(values, same)


class Output:
    """An array full of poison between guards."""

    def __init__(self, cupy: Any, shape: tuple[int, ...], dtype: Any) -> None:
        self.cupy, self.shape = cupy, shape
        self.count, self.size = int(np.prod(shape)), np.dtype(dtype).itemsize
        raw = np.full((self.count + 2 * GUARD) * self.size, POISON, np.uint8)
        self.whole = cupy.asarray(raw.view(dtype))
        self.array = self.whole[GUARD : GUARD + self.count].reshape(shape)

    def read(self) -> Any:
        """What is there now, on the host.

        Raises:
            AssertionError: If a guard was overwritten.
        """
        whole = self.cupy.asnumpy(self.whole)
        raw, edge = whole.view(np.uint8), GUARD * self.size
        assert (raw[:edge] == POISON).all(), "something was written before the output"
        assert (raw[len(raw) - edge :] == POISON).all(), "something was written behind the output"
        return whole[GUARD : GUARD + self.count].reshape(self.shape)


def near(got: Any, expected: Any) -> Errors:
    """The largest deviation.

    Raises:
        AssertionError: If it is beyond the tolerance.
    """
    np.testing.assert_allclose(got, expected, rtol=TOLERANCE, atol=TOLERANCE)
    return {"weights": float(np.abs(np.asarray(got, np.float64) - expected).max(initial=0))}


def compared(ids: Output, weights: Output, expected: tuple[Any, Any]) -> Errors:
    """Ids exactly, weights within the tolerance."""
    np.testing.assert_array_equal(ids.read(), expected[0])
    return near(weights.read(), expected[1])


def check_steps(cupy: Any, seed: int, deadline: float, *, most_cases: int | None = None) -> Records:
    """All checks until the deadline; at least one."""
    try:
        module = import_module("knnmoe.trt_plugins.step_kernels")
    except ImportError as error:
        return {"status": "absent", "why": f"this checkout has no step kernels: {error}"}
    checks = list(Steps(cupy, module.StepKernels(cupy=cupy)).checks(seed))
    random.Random(seed).shuffle(checks)  # time may run out
    return {**tally(checks[:most_cases], deadline), "tolerance": TOLERANCE}
