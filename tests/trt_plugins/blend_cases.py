"""Random calls of the blend, and what a right answer is."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from emulated import SCHEDULES, Stored, blend, store

from knnmoe.runtime.blend import Blended, blend_found, search
from knnmoe.runtime.two_stage import quantize_keys, scan_scores
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
    seed: int,
    *,
    key_type: KeyType | None = None,
    prefill: bool = False,
    two_stage: bool = False,
    **fixed: Any,
) -> Case:
    """Everything that a call may differ in, drawn from a seed."""
    rng = np.random.default_rng(seed)
    key_type = key_type or KEY_TYPES[rng.integers(2 if two_stage else 3)]
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
        weighted=bool(seed % 2),
    )
    memory = replace(memory, **fixed)
    batch = int(rng.integers(1, 5))
    length = int(rng.integers(5, 20)) if prefill else int(rng.integers(1, 16 // batch + 1))
    x = rng.normal(size=(batch * length, hidden))
    if rng.integers(2):  # as near as in a domain, not as far as at random
        x = memory.keys[rng.integers(0, entries, batch * length)] + memory.center + 0.05 * x
    stored = store(memory, key_type, half_values=bool(rng.integers(2)))
    columns = min(64, min(memory.k, entries) + int(rng.choice([0, 0, 3])))
    if two_stage:
        stored = in_two_stages(stored, int(rng.choice([columns, rng.integers(columns, 65), 64])))
    if rng.integers(2):
        spoil_capacity(stored)
    settings = {
        "schedule": SCHEDULES[rng.integers(4)],
        "seed": seed,
        "columns": columns,
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


def in_two_stages(stored: Stored, candidates: int) -> Stored:
    """The same memory, to be scanned as int8."""
    return replace(stored, scan=quantize_keys(stored.memory.keys), candidates=candidates)


def spoil_capacity(stored: Stored) -> None:
    """Put NaN wherever no valid entry is."""
    scan_scales = [stored.scan.scales] if stored.scan else []
    evidence = stored.memory.evidence_weights
    for array in (
        stored.keys, stored.key_scales, stored.values, stored.memory.values, *scan_scales,
        *([] if evidence is None else [evidence]),
    ):  # fmt: skip
        if array.dtype != np.int8:
            array[stored.memory.n_valid :] = np.nan


def check(case: Case, got: Blended) -> None:
    """The answer is float64's, up to fp32 rounding and to which of two equals came last."""
    memory, x = case.stored.memory, case.x.astype(np.float64)
    k, n = min(memory.k, len(memory.keys)), min(memory.k, memory.n_valid)
    ids, similarities = got.neighbors[:, :k], got.similarities[:, :k]
    assert (got.neighbors[:, n:] == memory.n_valid + np.arange(got.neighbors.shape[1] - n)).all()
    assert (got.similarities[:, n:] == 0).all()
    all_ids, found, _ = search(x, replace(memory, k=len(memory.keys)), np.float64)
    exact = np.empty_like(found)
    np.put_along_axis(exact, all_ids, found, axis=1)
    surely, perhaps = candidates_of(case)
    # Of two entries that rounding cannot tell apart either may be the last candidate, or the last
    # neighbour: those that were taken must be as near as the best, and the rows are compared with
    # the blend of them.
    taken = np.take_along_axis(exact, ids, axis=1)
    np.testing.assert_allclose(similarities, taken, atol=TOLERANCE)
    for t in range(len(x)):
        assert len(set(ids[t, :n].tolist())) == n
        assert perhaps[t, ids[t, :n]].all()
        worst, best = (np.sort(exact[t, some])[::-1][:n] for some in (surely[t], perhaps[t]))
        assert (similarities[t, : len(worst)] >= worst - TOLERANCE).all()
        assert (similarities[t, :n] <= best + TOLERANCE).all()
        assert (np.diff(similarities[t]) <= 0).all()
    blended = blend_found(
        case.r.astype(np.float64), memory, ids, taken, ids < memory.n_valid,
        case.state.astype(np.float64), case.lengths, dtype=np.float64,
    )  # fmt: skip
    np.testing.assert_allclose(got.rows, blended.rows, atol=TOLERANCE)
    np.testing.assert_allclose(got.confidence, blended.confidence, atol=TOLERANCE)
    np.testing.assert_allclose(got.state, blended.state, rtol=TOLERANCE, atol=TOLERANCE)


def candidates_of(case: Case) -> tuple[Any, Any]:
    """Which entries [T, N] are candidates whatever rounding does, and which may be."""
    stored, tokens = case.stored, len(case.x)
    valid = np.arange(len(stored.keys)) < stored.memory.n_valid
    if stored.scan is None or stored.candidates >= stored.memory.n_valid:
        everyone = np.tile(valid, (tokens, 1))
        return everyone, everyone
    scores = scan_scores(case.x.astype(np.float64), stored.memory, stored.scan, np.float64)
    last = np.sort(scores, axis=1)[:, [-stored.candidates]]
    size = np.abs(scores[:, valid]).max(axis=1, keepdims=True)
    margin = 1e-6 * (1 + size)
    return scores > last + margin, scores >= last - margin
