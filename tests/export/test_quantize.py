"""The quantiser: how far a weight may be from what it was, whatever the weights are."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from knnmoe.export.quantize import TINY, ErrorMeter, Scheme, pack, quantize, unpack

SCHEMES = [
    Scheme(bits, block, zero_points, search)
    for bits in (4, 8) for block in (32, 128) for zero_points in (False, True)
    for search in (False, True)
]  # fmt: skip
schemes = st.sampled_from(SCHEMES)


def rows_of(scheme: Scheme, seed: int, *, rows: int = 3, scale: float = 1.0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return (rng.normal(size=(rows, 2 * scheme.block)) * scale).astype(np.float32)


def squared_errors(wanted: np.ndarray, scheme: Scheme) -> np.ndarray:
    """Of each block."""
    change = quantize(wanted, scheme).dequantized().astype(np.float64) - wanted
    return np.square(change).reshape(-1, scheme.block).sum(axis=1)


@settings(max_examples=150, deadline=None)
@given(scheme=schemes, data=st.data())
def test_no_weight_moves_further_than_its_block_allows(scheme, data):
    magnitude = data.draw(st.sampled_from([1e-25, 1e-6, 1.0, 1e6, 1e30]))
    elements = st.floats(-1, 1, width=32)
    shape = (2, scheme.block)
    unit = data.draw(hnp.arrays(np.float32, shape, elements=elements, fill=st.nothing()))
    weights = (unit * np.float32(magnitude)).astype(np.float32)
    found = quantize(weights, scheme)
    error = np.abs(found.dequantized().astype(np.float64) - weights)
    largest = np.abs(weights).max(axis=1, keepdims=True).astype(np.float64)
    if scheme.search:
        # A smaller range may clip, by a quarter of the largest weight and half a step.
        assert (error <= 0.3 * largest + np.abs(found.scales) + TINY).all()
        return
    # Half a step; without zero points a whole one at the end that the range leaves out.
    step = np.abs(found.scales).astype(np.float64)
    assert (error <= step * (0.5 if scheme.zero_points else 1.0) * (1 + 1e-4) + TINY).all()


@settings(max_examples=60, deadline=None)
@given(scheme=schemes, seed=st.integers(0, 1 << 30), power=st.integers(-60, 60))
def test_weights_that_are_codes_times_a_scale_come_back_as_they_were(scheme, seed, power):
    rng = np.random.default_rng(seed)
    codes = rng.integers(0, scheme.levels + 1, (4, scheme.block)).astype(np.float32)
    codes[:, 0], codes[:, 1] = 0, scheme.levels
    point = rng.integers(0, scheme.levels + 1, (4, 1)) if scheme.zero_points else scheme.middle
    weights = ((codes - point) * np.float32(2.0**power)).astype(np.float32)
    restored = quantize(weights, scheme).dequantized()
    np.testing.assert_allclose(restored, weights, rtol=1e-6, atol=0)


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_zeros_stay_zeros_and_blocks_do_not_touch_each_other(scheme):
    weights = rows_of(scheme, 1)
    weights[1, : scheme.block] = 0
    found = quantize(weights, scheme)
    assert not found.dequantized()[1, : scheme.block].any()
    alone = quantize(weights[2:], scheme)
    np.testing.assert_array_equal(found.codes[2:], alone.codes)
    np.testing.assert_array_equal(found.scales[2:], alone.scales)


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
@pytest.mark.parametrize("scale", [1e-44, 1e-30, 1e-20, 3e37])
def test_huge_and_tiny_weights_stay_finite(scheme, scale):
    with np.errstate(under="ignore"):
        weights = np.clip(rows_of(scheme, 2, scale=scale), -3e38, 3e38)
        restored = quantize(weights, scheme).dequantized()
    assert np.isfinite(restored).all()
    if scale > 1e-25:
        assert np.abs(restored / scale - weights / scale).max() < 0.8
    else:
        assert np.abs(restored).max() <= np.abs(weights).max() + TINY


@settings(max_examples=60, deadline=None)
@given(scheme=st.sampled_from([s for s in SCHEMES if s.search]), seed=st.integers(0, 1 << 30))
def test_the_search_never_makes_a_block_worse(scheme, seed):
    weights = rows_of(scheme, seed)
    weights[0] **= 3  # heavy tails, where it has something to find
    plain = Scheme(scheme.bits, scheme.block, scheme.zero_points, search=False)
    searched, spanned = squared_errors(weights, scheme), squared_errors(weights, plain)
    assert (searched <= spanned * (1 + 1e-4) + 1e-12).all()
    assert searched.sum() < spanned.sum()


@pytest.mark.parametrize(("bits", "bound"), [(4, 0.105), (8, 0.0068)])
def test_normal_weights_lose_what_so_many_bits_cost(bits, bound):
    weights = rows_of(Scheme(bits, 128), 3, rows=64)
    meter = ErrorMeter()
    for half in np.split(weights, 2):
        meter.add(half, quantize(half, Scheme(bits, 128)).dequantized())
    found = meter.result("w", f"int{bits}")
    change = quantize(weights, Scheme(bits, 128)).dequantized() - weights
    assert found.values == weights.size
    assert found.relative_rms < bound
    assert found.relative_rms == pytest.approx(np.linalg.norm(change) / np.linalg.norm(weights))
    assert found.max_abs == pytest.approx(np.abs(change).max())


def test_zero_points_suit_weights_that_lean_to_one_side():
    weights = np.abs(rows_of(Scheme(4, 32), 4))
    without, with_ = (squared_errors(weights, Scheme(4, 32, z)).sum() for z in (False, True))
    assert with_ < without / 2


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("count", [2, 7, 32])
def test_codes_survive_packing(bits, count):
    codes = np.random.default_rng(5).integers(0, 1 << bits, (3, count)).astype(np.uint8)
    packed = pack(codes, bits)
    assert packed.shape == (3, -(-count * bits // 8))
    np.testing.assert_array_equal(unpack(packed, bits, count), codes)


def test_the_earlier_code_is_in_the_lower_half_of_a_byte():
    assert pack(np.array([[0x1, 0xF, 0x3]], np.uint8), 4).tolist() == [[0xF1, 0x03]]


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_what_is_not_a_number_is_refused(bad):
    weights = np.zeros((2, 32), np.float32)
    weights[1, 5] = bad
    with pytest.raises(ValueError, match="not a number"):
        quantize(weights, Scheme(4, 32))


def test_rows_must_be_whole_blocks():
    with pytest.raises(ValueError, match="no multiple"):
        quantize(np.zeros((2, 48), np.float32), Scheme(4, 32))
