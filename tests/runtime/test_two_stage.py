"""The NumPy reference of the search in two stages: int8 candidates, scored again."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from knnmoe.runtime.blend import knn_blend, search
from knnmoe.runtime.errors import SettingError
from knnmoe.runtime.two_stage import (
    ScanKeys,
    knn_blend_in_two_stages,
    quantize_keys,
    scan_scores,
    search_in_two_stages,
)
from memories import random_memory


def queries(memory: Any, count: int = 6) -> Any:
    """Router inputs as near to entries as those of a domain are."""
    rng = np.random.default_rng(count)
    near = memory.keys[rng.integers(0, len(memory.keys), count)] + memory.center
    return near + 0.2 * rng.normal(size=near.shape)


def test_an_int8_key_is_as_long_as_the_key_and_half_a_step_off_at_most() -> None:
    keys = random_memory(0, entries=40, hidden_size=64).keys * 3
    scan = quantize_keys(keys)
    assert scan.keys.dtype == np.int8
    assert (np.abs(scan.keys).max(axis=1) == 127).all()
    steps = np.abs(keys).max(axis=1, keepdims=True) / 127
    assert (np.abs(scan.keys * steps - keys) <= steps * 0.5001).all()
    lengths = np.linalg.norm(scan.keys * scan.scales[:, :1], axis=1)
    np.testing.assert_allclose(lengths, np.linalg.norm(keys, axis=1), rtol=1e-6)
    np.testing.assert_allclose(scan.scales[:, 1], lengths**2, rtol=1e-6)


@pytest.mark.parametrize("size", [0.0, 1e-40, 1e-19, 1e18])
def test_keys_of_any_size_can_be_quantized(size: float) -> None:
    scan = quantize_keys((random_memory(1).keys * size).astype(np.float32))
    assert np.isfinite(scan.scales).all()
    assert (np.abs(scan.keys).max(axis=1) == (127 if size else 0)).all()


@pytest.mark.parametrize("similarity", ["cosine", "rbf"])
def test_with_all_entries_as_candidates_it_is_the_exact_search(similarity: Any) -> None:
    memory = random_memory(2, entries=50, k=5, similarity=similarity, n_valid=40)
    x = queries(memory)
    exact = search(x, memory, np.float64)
    for got, expected in zip(
        search_in_two_stages(x, memory, quantize_keys(memory.keys), 40, np.float64), exact,
        strict=True,
    ):  # fmt: skip
        np.testing.assert_array_equal(got, expected)


@pytest.mark.parametrize("similarity", ["cosine", "rbf"])
def test_neighbours_are_the_best_of_the_candidates_whoever_else_is_near(similarity: Any) -> None:
    memory = random_memory(3, entries=50, k=3, similarity=similarity, n_valid=45)
    x = queries(memory)
    rng = np.random.default_rng(0)
    # Keys that have nothing to do with the memory's: the candidates are anyone.
    scan = quantize_keys(rng.normal(size=memory.keys.shape))
    ids, similarities, found = search_in_two_stages(x, memory, scan, 8, np.float64)
    assert found.all()
    every = replace(memory, k=50)
    all_ids, all_similarities, _ = search(x, every, np.float64)
    scores = scan_scores(x, memory, scan, np.float64)
    for t in range(len(x)):
        candidates = set(np.argsort(-scores[t], kind="stable")[:8].tolist())
        expected = [i for i in all_ids[t] if i in candidates][:3]
        assert ids[t].tolist() == expected
        np.testing.assert_array_equal(
            similarities[t], all_similarities[t][[list(all_ids[t]).index(i) for i in expected]]
        )


def test_of_equal_int8_keys_the_lower_index_is_the_candidate() -> None:
    memory = random_memory(4, entries=12, k=2)
    scan = ScanKeys(np.ones((12, 16), np.int8), np.ones((12, 2), np.float32))
    ids, _, _ = search_in_two_stages(queries(memory), memory, scan, 4, np.float64)
    assert ids.max() < 4


@pytest.mark.parametrize("n_valid", [0, 1, 3])
def test_fewer_entries_than_neighbours_end_as_in_the_exact_search(n_valid: int) -> None:
    memory = random_memory(5, entries=12, k=6, n_valid=n_valid)
    scan = quantize_keys(memory.keys)
    scan.scales[n_valid:] = np.nan
    x = queries(memory)
    rest = (np.zeros((1, 2)), np.array([len(x)]))
    got = knn_blend_in_two_stages(
        x, np.ones((6, 6)), memory, scan, 8, *rest, dtype=np.float64
    )  # fmt: skip
    exact = knn_blend(x, np.ones((6, 6)), memory, *rest, dtype=np.float64)
    for name in ("rows", "confidence", "neighbors", "similarities", "state"):
        np.testing.assert_array_equal(getattr(got, name), getattr(exact, name))


@pytest.mark.parametrize("candidates", [0, 3, 65])
def test_fewer_candidates_than_neighbours_or_more_than_a_list_holds_are_refused(
    candidates: int,
) -> None:
    memory = random_memory(6, k=4)
    with pytest.raises(SettingError, match=r"^candidates: out of range; expected 4 .* to 64"):
        search_in_two_stages(
            queries(memory), memory, quantize_keys(memory.keys), candidates, np.float64
        )
