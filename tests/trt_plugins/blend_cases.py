"""Random calls of the blend, and what a right answer is."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from emulated import SCHEDULES, Stored, blend, store

from knnmoe.runtime.blend import Blended, blend_found, knn_blend, search
from knnmoe.trt_plugins.plan import KEY_TYPES, Device, KeyType
from memories import random_calibration, random_memory

TOLERANCE = 1e-5
HIDDEN_SIZES = (1, 3, 7, 8, 16, 24, 33, 40, 64, 100)


@dataclass(frozen=True)
class Case:
    """A stored memory, what is routed over it, and on which machine."""

    stored: Stored
    x: Any
    r: Any
    state: Any
    lengths: Any
    settings: dict[str, Any]

    def run(self, **changed: Any) -> Blended:
        call = (self.stored, self.x, self.r, self.state, self.lengths)
        return blend(*call, **{**self.settings, **changed})


def random_case(
    seed: int, *, key_type: KeyType | None = None, prefill: bool = False, **fixed: Any
) -> Case:
    """Everything that a call may differ in, drawn from a seed."""
    rng = np.random.default_rng(seed)
    key_type = key_type or KEY_TYPES[rng.integers(3)]
    entries = int(rng.choice([1, 2, rng.integers(3, 40), rng.integers(40, 120)]))
    hidden = int(rng.choice(HIDDEN_SIZES))
    memory = random_memory(
        seed,
        entries=entries,
        hidden_size=hidden,
        num_experts=int(rng.integers(1, 12)),
        k=int(rng.choice([1, 4, 8, rng.integers(1, 65), 64])),
        n_valid=int(rng.choice([entries, entries, entries // 2, 1, 0])),
        similarity="rbf" if rng.integers(2) and hidden <= 40 else "cosine",
        duplicates=bool(rng.integers(2)),
        calibration=random_calibration(seed),
    )
    memory = replace(memory, **fixed)
    batch = int(rng.integers(1, 5))
    length = int(rng.integers(5, 20)) if prefill else int(rng.integers(1, 16 // batch + 1))
    x = rng.normal(size=(batch * length, hidden))
    if rng.integers(2):  # as near as in a domain, not as far as at random
        x = memory.keys[rng.integers(0, entries, batch * length)] + memory.center + 0.05 * x
    stored = store(memory, key_type, half_values=bool(rng.integers(2)))
    if rng.integers(2):
        spoil_capacity(stored)
    columns = min(memory.k, entries)
    settings = {
        "schedule": SCHEDULES[rng.integers(4)],
        "seed": seed,
        "columns": min(64, columns + int(rng.choice([0, 0, 3]))),
        # One to three multiprocessors; mostly with room for the widest tile.
        "device": Device(int(rng.integers(1, 4)), int(rng.choice([99, 99, 24])) * 1024),
        "in_place": bool(rng.integers(2)),
    }
    return Case(
        stored,
        x.astype(np.float32),
        rng.normal(size=(batch * length, memory.values.shape[1])).astype(np.float32),
        (np.abs(rng.normal(size=(batch, 2))) * [1, 3]).astype(np.float32),
        rng.integers(1, length + 1, batch),
        settings,
    )


def spoil_capacity(stored: Stored) -> None:
    """Put NaN wherever no valid entry is."""
    for array in (stored.keys, stored.key_scales, stored.values, stored.memory.values):
        if array.dtype != np.int8:
            array[stored.memory.n_valid :] = np.nan


def check(case: Case, got: Blended) -> None:
    """The answer is float64's, up to fp32 rounding and to which of two equals came last."""
    memory = case.stored.memory
    k, n = min(memory.k, len(memory.keys)), min(memory.k, memory.n_valid)
    exact = knn_blend(case.x, case.r, memory, case.state, case.lengths, dtype=np.float64)
    ids, similarities = got.neighbors[:, :k], got.similarities[:, :k]
    np.testing.assert_allclose(similarities, exact.similarities, atol=TOLERANCE)
    assert (got.neighbors[:, n:] >= memory.n_valid).all()
    assert (got.similarities[:, n:] == 0).all()
    np.testing.assert_array_equal(ids[:, n:], exact.neighbors[:, n:])
    # Of two entries that rounding cannot tell apart either may be the last neighbour: the rows are
    # compared with the blend of those that were taken, and those must be as near as the best.
    every = replace(memory, k=len(memory.keys))
    all_ids, all_similarities, _ = search(case.x.astype(np.float64), every, np.float64)
    for t, taken_ids in enumerate(ids[:, :n]):
        by_id = np.empty(len(memory.keys))
        by_id[all_ids[t]] = all_similarities[t]
        assert len(set(taken_ids.tolist())) == n
        np.testing.assert_allclose(by_id[taken_ids], exact.similarities[t, :n], atol=TOLERANCE)
    taken = blend_found(
        case.r.astype(np.float64), memory, ids, exact.similarities, ids < memory.n_valid,
        case.state.astype(np.float64), case.lengths, dtype=np.float64,
    )  # fmt: skip
    np.testing.assert_allclose(got.rows, taken.rows, atol=TOLERANCE)
    np.testing.assert_allclose(got.confidence, exact.confidence, atol=TOLERANCE)
    np.testing.assert_allclose(got.state, exact.state, rtol=TOLERANCE, atol=TOLERANCE)
