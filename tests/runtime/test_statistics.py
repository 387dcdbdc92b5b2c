from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from knnmoe.runtime.errors import SettingError
from knnmoe.runtime.statistics import drawn_units, paired_bootstrap, paired_share


def test_the_mean_is_weighted_by_tokens() -> None:
    mean, low, high = paired_bootstrap([-1.0, 0.5], [300, 100])
    assert mean == pytest.approx((-1.0 * 300 + 0.5 * 100) / 400)
    # Two sequences: both drawn alike often enough that the interval is their range.
    assert (low, high) == (-1.0, 0.5)


def test_the_interval_is_that_of_a_direct_computation() -> None:
    rng = np.random.default_rng(5)
    deltas, tokens = rng.normal(-0.1, 1, 40), rng.integers(10, 200, 40)
    _, low, high = paired_bootstrap(deltas, tokens, samples=4000)
    means = []
    for _ in range(4000):
        drawn = rng.choice(40, size=40, replace=True)
        means.append(sum(deltas[i] * tokens[i] for i in drawn) / sum(tokens[i] for i in drawn))
    expected = np.percentile(means, [2.5, 97.5])
    np.testing.assert_allclose([low, high], expected, atol=0.03)


def test_the_interval_covers_the_truth_about_as_often_as_it_says() -> None:
    rng = np.random.default_rng(1)
    covered = 0
    for _ in range(200):
        _, low, high = paired_bootstrap(rng.normal(0.3, 1, 50), np.full(50, 7), samples=300)
        covered += low <= 0.3 <= high
    assert 176 <= covered <= 198


def test_the_same_seed_gives_the_same_interval_whatever_the_block_size(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    deltas, tokens = np.arange(20.0), np.full(20, 3)
    first = paired_bootstrap(deltas, tokens, seed=3)
    assert first == paired_bootstrap(deltas, tokens, seed=3)
    assert first != paired_bootstrap(deltas, tokens, seed=4)
    monkeypatch.setattr("knnmoe.runtime.statistics._BLOCK", 100)
    assert first == paired_bootstrap(deltas, tokens, seed=3)


def test_one_sequence_says_nothing_about_others() -> None:
    assert paired_bootstrap([-0.5], [100]) == (-0.5, -np.inf, np.inf)


@pytest.mark.parametrize(
    ("deltas", "tokens", "samples"),
    [
        ([], [], 10),
        ([1.0], [1, 2], 10),
        ([[1.0]], [[1]], 10),
        ([1.0, float("nan")], [1, 1], 10),
        ([1.0, 2.0], [1, 0], 10),
        ([1.0, 2.0], [1, 1], 0),
    ],
)
def test_what_cannot_be_resampled_is_refused(deltas: Any, tokens: Any, samples: int) -> None:
    with pytest.raises(SettingError):
        paired_bootstrap(deltas, tokens, samples=samples)


def test_documents_are_drawn_whole_where_there_are_enough() -> None:
    units, kind = drawn_units([5, 5, 1, 1, 1, 2, 3, 4, 6, 7, 8])
    assert kind == "documents"
    assert len(set(units.tolist())) == 8
    assert units[0] == units[1] != units[2]
    units, kind = drawn_units([5, 5, 1, 1, 1])
    assert (units.tolist(), kind) == ([0, 1, 2, 3, 4], "sequences")


def test_drawing_units_is_drawing_their_sums() -> None:
    rng = np.random.default_rng(0)
    deltas, tokens = rng.normal(size=12), rng.integers(1, 9, 12)
    units = np.repeat(np.arange(4), 3)
    sums = (deltas * tokens).reshape(4, 3).sum(axis=1)
    together = tokens.reshape(4, 3).sum(axis=1)
    got = paired_bootstrap(deltas, tokens, units=units)
    np.testing.assert_allclose(got, paired_bootstrap(sums / together, together), rtol=1e-12)
    with pytest.raises(SettingError, match="units do not match"):
        paired_bootstrap(deltas, tokens, units=[0, 1])


def test_a_share_is_of_sums_that_are_drawn_together() -> None:
    rng = np.random.default_rng(2)
    whole = rng.normal(-10, 5, 60)
    part = 0.9 * whole + rng.normal(0, 0.5, 60)
    share, low, high = paired_share(part, whole)
    assert share == pytest.approx(part.sum() / whole.sum())
    drawn = rng.integers(60, size=(4000, 60))
    expected = np.percentile(part[drawn].sum(1) / whole[drawn].sum(1), [2.5, 97.5])
    np.testing.assert_allclose([low, high], expected, atol=2e-3)
    # Drawn apart, the two sums would leave it open between 0.7 and 1.1.
    assert high - low < 0.05
    assert paired_share(0.9 * whole, whole) == pytest.approx((0.9, 0.9, 0.9))


def test_a_share_of_what_may_be_nothing_is_unbounded() -> None:
    assert paired_share([1.0, 2.0, 1.0], [1.0, -1.5, 1.0])[1:] == (-np.inf, np.inf)
    assert paired_share([1.0], [2.0]) == (0.5, -np.inf, np.inf)
    with pytest.raises(SettingError, match="a share of nothing"):
        paired_share([1.0, 2.0], [1.0, -1.0])
    with pytest.raises(SettingError, match="sequences do not match"):
        paired_share([1.0, 2.0], [1.0])
