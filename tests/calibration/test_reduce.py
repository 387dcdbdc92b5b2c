"""Fewer entries: which go first, and what clusters become."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from knnmoe.calibration.recorded import GateInputs
from knnmoe.calibration.reduce import Credit, credit_of, keep, merge
from knnmoe.runtime.blend import search
from knnmoe.runtime.pack_parts import GateEntries
from memories import random_memory

ONE = np.ones(60, np.int64)


def entries_at(centres: Any, each: int, spread: float, experts: int = 4) -> GateEntries:
    """Entries about some centres [C, D]; the values say which centre."""
    rng = np.random.default_rng(0)
    owner = np.repeat(np.arange(len(centres)), each)
    keys = centres[owner] + spread * rng.normal(size=(len(owner), centres.shape[1]))
    residuals = np.eye(len(centres), experts)[owner]
    logits = rng.normal(size=(len(owner), experts))
    parts = (keys.astype(np.float32), logits.astype(np.float32), residuals.astype(np.float32))
    return GateEntries(*parts, np.zeros(centres.shape[1], np.float32))


def test_credit_is_where_text_retrieves_and_more_where_the_memory_gains() -> None:
    memory = random_memory(0, entries=60, k=3)
    rng = np.random.default_rng(1)
    x = (memory.keys[:20] + memory.center + 0.01 * rng.normal(size=(20, 16))).astype(np.float32)
    rows = np.zeros((20, 6), np.float32)
    even = credit_of(memory, GateInputs(x, rows), np.zeros(20)).text
    found = search(x, memory, np.float64)[0]
    assert even.sum() == pytest.approx(1)
    assert set(np.flatnonzero(even)) <= set(found.ravel())
    gains = np.zeros(20)
    gains[7] = 3.0
    skewed = credit_of(memory, GateInputs(x, rows), gains).text
    assert skewed[7] > 3 * even[7]


def test_without_text_credit_is_what_entries_of_the_memory_retrieve() -> None:
    memory = random_memory(0, entries=60, k=3, duplicates=True)
    credit = credit_of(memory, None, None)
    assert credit.text.sum() == 0
    assert credit.own.sum() == pytest.approx(1)
    lonely = np.zeros((1, 16), np.float32)
    lonely[0, 0] = 1
    alone = np.concatenate([memory.keys, lonely])
    wider = replace(
        memory, keys=alone, key_scales=np.ones((61, 2), np.float32),
        values=np.zeros((61, 6), np.float32), n_valid=61, center=-lonely[0] * 0,
    )  # fmt: skip
    own = credit_of(wider, None, None).own
    assert own[60] <= np.median(own)


def test_the_entries_kept_are_those_of_most_credit_in_their_order() -> None:
    entries = entries_at(np.eye(4, 8) * 5, 15, 0.1)
    credit = np.zeros(60)
    credit[[50, 3, 17]] = (0.5, 0.3, 0.2)
    kept = keep(entries, Credit(credit, np.zeros(60)), 4, ONE * 2)
    assert kept.rows.tolist() == [0, 3, 17, 50]  # of those without any, the first
    np.testing.assert_array_equal(kept.entries.keys, entries.keys[kept.rows])
    assert kept.counts.tolist() == [2, 2, 2, 2]


def test_clusters_become_their_means_and_no_entry_is_lost() -> None:
    entries = entries_at(np.eye(4, 8) * 5, 15, 0.01)
    credit = Credit(np.full(60, 1 / 60), np.full(60, 1 / 60))
    merged = merge(entries, entries.keys, credit, 30, ONE)
    assert len(merged.rows) <= 30
    assert merged.counts.sum() == 60
    # A cluster holds one centre's entries: its value still says which.
    assert np.isclose(merged.entries.residuals.max(axis=1), 1).all()
    whole = np.average(merged.entries.keys, axis=0, weights=merged.counts)
    np.testing.assert_allclose(whole, entries.keys.mean(axis=0), atol=1e-5)


def test_means_are_weighted_by_credit() -> None:
    entries = entries_at(np.zeros((1, 8)), 20, 0.1)
    heavy = np.zeros(20)
    heavy[4] = 1.0
    merged = merge(entries, entries.keys, Credit(heavy, heavy), 1, ONE[:20])
    assert len(merged.rows) == 1
    off = np.abs(merged.entries.keys[0] - entries.keys[4]).max()
    assert off < 0.2 * np.abs(entries.keys.mean(axis=0) - entries.keys[4]).max()


def test_background_is_not_merged_with_reference_text() -> None:
    entries = entries_at(np.zeros((1, 8)), 60, 0.1)
    kinds = np.arange(60) % 2 == 1
    credit = Credit(np.full(60, 1 / 60), np.full(60, 1 / 60))
    marked = replace(entries, residuals=np.where(kinds[:, None], 0.0, entries.residuals))
    merged = merge(marked, entries.keys, credit, 6, ONE, kinds)
    values = merged.entries.residuals.max(axis=1)
    assert set(values.round(6)) == {0.0, 1.0}
    np.testing.assert_array_equal(values == 0, kinds[merged.rows])


def test_large_memories_are_clustered_in_blocks() -> None:
    rng = np.random.default_rng(0)
    keys = rng.normal(size=(3000, 8)).astype(np.float32)
    values = keys[:, :4].copy()
    entries = GateEntries(keys, values, values, np.zeros(8, np.float32))
    credit = Credit(np.full(3000, 1 / 3000), np.zeros(3000))
    merged = merge(entries, keys, credit, 300, np.ones(3000, np.int64))
    assert 200 < len(merged.rows) <= 300
    assert merged.counts.sum() == 3000
