"""The kernels, run on an emulated device, against the NumPy reference of the blend."""

from __future__ import annotations

from dataclasses import replace
from itertools import product
from typing import Any

import numpy as np
import pytest
from blend_cases import TOLERANCE, Case, check, in_two_stages, random_case
from emulated import SCHEDULES, SMALL_DEVICE, blend, library, store
from hypothesis import given, settings
from hypothesis import strategies as st

from knnmoe.runtime.blend import knn_blend
from knnmoe.runtime.calibration import Calibration
from knnmoe.runtime.two_stage import ScanKeys, knn_blend_in_two_stages
from knnmoe.trt_plugins.plan import KEY_TYPES, Device, KeyType
from memories import random_calibration, random_memory
from thinned import thinned

EXPERTS = 6


# Every number of tokens under every schedule; fast is one schedule each, in turn.
TOKENS_AND_SCHEDULES = thinned(
    product(range(1, 17), SCHEDULES),
    lambda tokens, schedule: schedule == SCHEDULES[tokens % len(SCHEDULES)],
)
SHUFFLED = {
    (1, "f32", True), (1, "f16", False), (2, "f32", False), (2, "f16", True), (2, "i8", False),
    (16, "f16", False), (16, "f32", True), (16, "i8", False), (17, "f32", False),
    (17, "f16", True), (17, "i8", False),
}  # fmt: skip
FULL_TYPES: tuple[KeyType, ...] = ("f32", "f16")  # of keys that int8 ones are scanned in place of


@pytest.mark.parametrize("key_type", KEY_TYPES)
@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 1_000_000))
def test_decode_agrees_with_float64(key_type: KeyType, seed: int) -> None:
    case = random_case(seed, key_type=key_type)
    check(case, case.run())


@pytest.mark.parametrize("key_type", KEY_TYPES)
@settings(max_examples=12, deadline=None)
@given(seed=st.integers(0, 1_000_000))
def test_prefill_agrees_with_float64(key_type: KeyType, seed: int) -> None:
    case = random_case(seed, key_type=key_type, prefill=True)
    check(case, case.run())


@pytest.mark.parametrize("key_type", FULL_TYPES)
@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 1_000_000))
def test_decode_in_two_stages_agrees_with_float64(key_type: KeyType, seed: int) -> None:
    case = random_case(seed, key_type=key_type, two_stage=True)
    check(case, case.run())


@pytest.mark.parametrize("key_type", FULL_TYPES)
@settings(max_examples=8, deadline=None)
@given(seed=st.integers(0, 1_000_000))
def test_prefill_in_two_stages_agrees_with_float64(key_type: KeyType, seed: int) -> None:
    case = random_case(seed, key_type=key_type, prefill=True, two_stage=True)
    check(case, case.run())


@pytest.mark.parametrize(("tokens", "schedule"), TOKENS_AND_SCHEDULES)
@pytest.mark.parametrize("key_type", KEY_TYPES)
def test_every_number_of_tokens_is_served(key_type: KeyType, tokens: int, schedule: str) -> None:
    case = _plain_case(key_type, tokens)
    check(case, case.run(schedule=schedule))


@pytest.mark.parametrize(("tokens", "schedule"), TOKENS_AND_SCHEDULES)
@pytest.mark.parametrize("key_type", FULL_TYPES)
def test_every_number_of_tokens_is_served_in_two_stages(
    key_type: KeyType, tokens: int, schedule: str
) -> None:
    case = _plain_case(key_type, tokens)
    case = replace(case, stored=in_two_stages(case.stored, 33))
    check(case, case.run(schedule=schedule))


@pytest.mark.parametrize("key_type", KEY_TYPES)
@pytest.mark.parametrize("hidden", [2048, 2880])
@pytest.mark.parametrize("tokens", [1, 16, 17])
def test_hidden_sizes_of_real_models(key_type: KeyType, hidden: int, tokens: int) -> None:
    memory = random_memory(tokens, entries=40, hidden_size=hidden, k=8)
    rng = np.random.default_rng(hidden)
    near = memory.keys[rng.integers(0, 40, tokens)] + memory.center
    x = (near + 0.02 * rng.normal(size=(tokens, hidden))).astype(np.float32)
    r, state = np.ones((tokens, EXPERTS), np.float32), np.zeros((1, 2), np.float32)
    case = Case(store(memory, key_type, True), x, r, state, np.array([tokens]), {})
    for device in (SMALL_DEVICE, Device(2, 227 * 1024)):
        check(case, case.run(device=device))
    if key_type != "i8":
        case = replace(case, stored=in_two_stages(case.stored, 16))
        check(case, case.run())


@pytest.mark.parametrize(
    ("tokens", "two_stage"),
    thinned(
        product((1, 3, 17), (False, True)), lambda tokens, two_stage: two_stage == (tokens == 3)
    ),
)
def test_lists_of_hundreds_of_blocks_are_merged(tokens: int, two_stage: bool) -> None:
    """As on a large GPU: each warp of a team merges several times 32 blocks' lists."""
    memory = random_memory(13, entries=9600, hidden_size=8, k=40, calibration=random_calibration(1))
    stored = store(memory, "f16", True)
    rng = np.random.default_rng(tokens)
    case = Case(
        in_two_stages(stored, 64) if two_stage else stored,
        rng.normal(size=(tokens, 8)).astype(np.float32),
        rng.normal(size=(tokens, EXPERTS)).astype(np.float32),
        np.zeros((1, 2), np.float32), np.array([tokens]), {"device": Device(132, 99 * 1024)},
    )  # fmt: skip
    check(case, case.run())


@pytest.mark.parametrize(
    ("tokens", "key_type", "two_stage"),
    thinned(
        (
            *product((1, 2, 16, 17, 33), KEY_TYPES, (False,)),
            *product((1, 2, 16, 17, 33), FULL_TYPES, (True,)),
        ),
        lambda *case: case in SHUFFLED,
    ),
)
def test_the_order_in_which_threads_run_changes_no_bit(
    tokens: int, key_type: KeyType, two_stage: bool
) -> None:
    case = _plain_case(key_type, tokens)
    if two_stage:
        case = replace(case, stored=in_two_stages(case.stored, 40))
    results = [
        case.run(schedule=schedule, seed=seed, device=Device(3, 99 * 1024))
        for schedule in SCHEDULES
        for seed in range(3 if schedule == "random" else 1)
    ]
    for result in results[1:]:
        for name in ("rows", "confidence", "neighbors", "similarities", "state"):
            assert getattr(result, name).tobytes() == getattr(results[0], name).tobytes()


@pytest.mark.parametrize("key_type", KEY_TYPES)
@pytest.mark.parametrize("tokens", [1, 3, 8, 20])
def test_ties_go_to_the_lower_index(key_type: KeyType, tokens: int) -> None:
    memory = random_memory(0, entries=7, hidden_size=16, k=40)
    many = replace(
        memory, keys=np.tile(memory.keys, (9, 1)), key_scales=np.tile(memory.key_scales, (9, 1)),
        values=np.tile(memory.values, (9, 1)), n_valid=60,
    )  # fmt: skip
    x = np.random.default_rng(1).normal(size=(tokens, 16))
    got = blend(
        store(many, key_type, False), x, np.zeros((tokens, EXPERTS)), np.zeros((1, 2)),
        np.array([tokens]), device=Device(2, 99 * 1024),
    )  # fmt: skip
    for ids, similarities in zip(got.neighbors, got.similarities, strict=True):
        assert ids.max() < 60
        order = np.lexsort((ids, -similarities))
        positive = similarities[order] > 0  # those below are ranked by what was clipped
        np.testing.assert_array_equal(ids[order][positive], ids[positive])
        # The copies of the best entry come first, in order.
        copies = np.arange(ids[0], 60, 7)
        np.testing.assert_array_equal(ids[: len(copies)], copies)


@pytest.mark.parametrize("tokens", [1, 3, 8, 20])
def test_of_equal_scores_the_lower_index_is_candidate_and_neighbour(tokens: int) -> None:
    """Five int8 keys nine times over: the candidates are copies of the best, lower index first.

    The keys themselves say that among them the higher index is nearer, but for equal pairs.
    """
    scan_one = np.random.default_rng(0).integers(-127, 128, (5, 16)).astype(np.int8)
    scan = ScanKeys(np.tile(scan_one, (9, 1)), np.ones((45, 2), np.float32))
    direction = np.ones(16, np.float32) / 4
    keys = np.repeat(np.linspace(0.1, 0.9, 23), 2)[:45, None] * direction
    memory = replace(
        random_memory(0, entries=45, k=8), keys=keys.astype(np.float32),
        key_scales=np.ones((45, 2), np.float32), center=np.zeros(16, np.float32),
    )  # fmt: skip
    stored = replace(store(memory, "f32", False), scan=scan, candidates=12)
    x = np.tile(np.ones(16, np.float32), (tokens, 1))
    x += 1e-3 * np.random.default_rng(1).normal(size=x.shape).astype(np.float32)
    x[:, 0] += np.arange(tokens) / 100
    r, state, lengths = np.zeros((tokens, EXPERTS)), np.zeros((1, 2)), np.array([tokens])
    exact = knn_blend_in_two_stages(
        x, r, memory, scan, 12, state, lengths, dtype=np.float64
    )  # fmt: skip
    got = blend(stored, x, r, state, lengths, device=Device(2, 99 * 1024))
    np.testing.assert_array_equal(got.neighbors, exact.neighbors)
    order = np.argsort(-(x @ scan_one.T.astype(np.float32)), axis=1)
    for ids, classes in zip(got.neighbors, order, strict=True):
        expected = np.r_[np.arange(classes[0], 45, 5), np.arange(classes[1], 45, 5)[:3]]
        assert set(ids.tolist()) <= set(expected.tolist())
        pairs = ids // 2
        assert (np.diff(pairs) <= 0).all()  # the nearest first …
        assert (np.diff(ids)[np.diff(pairs) == 0] == 1).all()  # … and of a pair the lower index


@pytest.mark.parametrize("key_type", FULL_TYPES)
@pytest.mark.parametrize("tokens", [1, 5, 16, 20])
@pytest.mark.parametrize("n_valid", [0, 1, 9, 69, 70])
def test_candidates_may_be_more_or_fewer_than_entries_and_as_many_as_neighbours(
    key_type: KeyType, tokens: int, n_valid: int
) -> None:
    case = _plain_case(key_type, tokens)
    memory = replace(case.stored.memory, n_valid=n_valid)
    for candidates in (8, 64):
        stored = in_two_stages(store(memory, key_type, False), candidates)
        at_hand = replace(case, stored=stored)
        got = at_hand.run()
        check(at_hand, got)
        if n_valid == 0:
            assert got.rows.tobytes() == case.r.astype(np.float32).tobytes()
        if candidates >= n_valid and key_type == "f32":  # all are scored again, by the same sums
            exact = replace(case, stored=store(memory, key_type, False)).run()
            np.testing.assert_allclose(got.similarities, exact.similarities, atol=1e-6)


@pytest.mark.parametrize("tokens", [1, 6, 20])
def test_scoring_again_finds_what_int8_alone_ranks_wrongly(tokens: int) -> None:
    """Entries nearer to each other than steps of int8 are: only the keys tell them apart."""
    rng = np.random.default_rng(4)
    memory = random_memory(12, entries=40, hidden_size=64, k=4)
    keys = memory.keys[:1] + 2e-3 * rng.normal(size=(40, 64))
    keys = (keys / np.linalg.norm(keys, axis=1, keepdims=True)).astype(np.float32)
    memory = replace(memory, keys=keys, key_scales=np.ones_like(memory.key_scales))
    x = keys[rng.integers(0, 40, tokens)] + memory.center
    rest = (np.zeros((tokens, EXPERTS)), np.zeros((1, 2)), np.array([tokens]))
    exact = knn_blend(x, rest[0], memory, *rest[1:], dtype=np.float64).neighbors
    alone = blend(store(memory, "i8", False), x, *rest).neighbors
    assert (alone != exact).any(axis=1).mean() > 0.5
    again = blend(in_two_stages(store(memory, "f32", False), 40), x, *rest).neighbors
    np.testing.assert_array_equal(again, exact)


@pytest.mark.parametrize("key_type", KEY_TYPES)
@pytest.mark.parametrize("similarity", ["cosine", "rbf"])
@pytest.mark.parametrize("tokens", [1, 7, 19])
@pytest.mark.parametrize("reason", ["scale", "empty", "zeros", "gate"])
def test_without_confidence_the_row_stays_bit_for_bit(
    key_type: KeyType, similarity: Any, tokens: int, reason: str
) -> None:
    numbers = Calibration(
        scale=0.0 if reason == "scale" else 1.0,
        midpoint=1e5 if reason == "gate" else 0.0,
        sharpness=10.0 if reason == "gate" else 0.0,
        gamma=1e6 if reason == "zeros" else 1.0,
    )
    memory = random_memory(3, similarity=similarity, calibration=numbers)
    if reason == "empty":
        memory = replace(memory, n_valid=0)
    if reason == "zeros":
        memory = replace(
            memory, keys=np.zeros_like(memory.keys), values=np.zeros_like(memory.values),
            key_scales=np.zeros_like(memory.key_scales),
        )  # fmt: skip
    rng = np.random.default_rng(0)
    x, r = rng.normal(size=(tokens, 16)), rng.normal(size=(tokens, EXPERTS)).astype(np.float32)
    if reason != "gate":
        r[0] = -0.0
    got = blend(store(memory, key_type, False), x, r, np.zeros((1, 2)), np.array([tokens]))
    assert (got.confidence == 0).all() if reason != "gate" else (got.confidence < 1e-30).all()
    assert got.rows.tobytes() == r.tobytes()


@pytest.mark.parametrize("key_type", KEY_TYPES)
@pytest.mark.parametrize("similarity", ["cosine", "rbf"])
@pytest.mark.parametrize("size", [0.0, 1e-44, 1e-38, 1e-20, 1e18, 3e38])
@pytest.mark.parametrize("tokens", [4, 8])
def test_no_finite_input_gives_anything_but_finite_output(
    key_type: KeyType, similarity: Any, size: float, tokens: int
) -> None:
    memory = random_memory(5, similarity=similarity, calibration=random_calibration(5))
    stored = store(memory, key_type, False)
    sign = np.sign(np.random.default_rng(1).normal(size=(tokens, 16)))
    r, state, lengths = np.ones((tokens, EXPERTS)), np.zeros((2, 2)), np.full(2, tokens // 2)
    got = blend(stored, (sign * size).astype(np.float32), r, state, lengths)
    assert np.isfinite(got.rows).all()
    assert np.isfinite(got.state).all()
    if similarity == "cosine" and size >= 1e18:  # the direction is all that counts
        far = blend(stored, (sign * 1e10).astype(np.float32), r, state, lengths)
        np.testing.assert_allclose(got.rows, far.rows, atol=1e-4)
    if key_type != "i8":
        again = in_two_stages(stored, 40)
        got = blend(again, (sign * size).astype(np.float32), r, state, lengths)
        assert np.isfinite(got.rows).all()
        assert ((got.neighbors >= 0) & (got.neighbors < 50)).all()


@pytest.mark.parametrize("key_type", ["f16", "i8"])
def test_tensor_core_products_are_as_exact_as_fp32_queries(key_type: KeyType) -> None:
    """One element a hundred times the others, as router inputs have: fp16 queries would lose them.

    Against the same call one token at a time, which multiplies in fp32.
    """
    memory = random_memory(6, entries=64, hidden_size=256, k=8)
    rng = np.random.default_rng(2)
    x = rng.normal(size=(8, 256)).astype(np.float32)
    x[:, 17] *= 100
    stored = store(memory, key_type, False)
    exact = knn_blend(
        x, np.zeros((8, EXPERTS)), stored.memory, np.zeros((8, 2)), np.ones(8, np.int64),
        dtype=np.float64,
    )  # fmt: skip
    got = blend(stored, x, np.zeros((8, EXPERTS)), np.zeros((8, 2)), np.ones(8))
    assert np.abs(got.similarities - exact.similarities).max() < 5e-7
    rounded = np.abs(x.astype(np.float16).astype(np.float64) - x).max(axis=1)
    assert rounded.min() > 1e-4


@pytest.mark.parametrize("key_type", KEY_TYPES)
def test_one_long_call_and_many_short_ones_gather_the_same_evidence(key_type: KeyType) -> None:
    numbers = Calibration(midpoint=0.4, sharpness=4.0, sequence=1.0)
    memory = random_memory(8, calibration=numbers)
    stored = store(memory, key_type, False)
    rng = np.random.default_rng(2)
    x, r = rng.normal(size=(2, 40, 16)), rng.normal(size=(2, 40, EXPERTS))
    whole = blend(
        stored, x.reshape(80, -1), r.reshape(80, -1), np.zeros((2, 2)), np.array([40, 40])
    )
    state = np.zeros((2, 2), np.float32)
    for t in range(0, 40, 8):
        step = blend(
            stored, x[:, t : t + 8].reshape(16, -1), r[:, t : t + 8].reshape(16, -1), state,
            np.array([8, 8]), in_place=True,
        )  # fmt: skip
        state = step.state
        expected = whole.rows.reshape(2, 40, -1)[:, t : t + 8]
        np.testing.assert_allclose(step.rows.reshape(2, 8, -1), expected, atol=TOLERANCE)
    np.testing.assert_allclose(state, whole.state, rtol=TOLERANCE)
    assert state[:, 1].tolist() == [40, 40]


@pytest.mark.parametrize("tokens", [5, 40])
def test_padding_leaves_no_trace_in_the_state(tokens: int) -> None:
    memory = random_memory(9, calibration=Calibration(sharpness=4.0, sequence=1.0))
    stored = store(memory, "f16", False)
    rng = np.random.default_rng(3)
    x, r = rng.normal(size=(tokens, 16)), rng.normal(size=(tokens, EXPERTS))
    short = blend(stored, x[:3], r[:3], np.zeros((1, 2)), np.array([3]))
    padded = blend(stored, x, r, np.zeros((1, 2)), np.array([3]))
    np.testing.assert_allclose(padded.rows[:3], short.rows, atol=TOLERANCE)
    np.testing.assert_allclose(padded.state, short.state, atol=TOLERANCE)


def test_a_ticket_serves_call_after_call_without_being_cleared() -> None:
    """What a captured CUDA graph does: the same memory, replayed, nothing reset in between."""
    ticket = np.zeros(1, np.uint32)
    for seed in range(18):
        case = random_case(seed, prefill=seed % 3 == 2, two_stage=seed % 2 == 1)
        check(case, case.run(ticket=ticket))
        assert ticket[0] == 0


@pytest.mark.parametrize("key_type", KEY_TYPES)
def test_decode_reads_every_key_once(key_type: KeyType) -> None:
    memory = random_memory(10, entries=256, hidden_size=64, n_valid=192)
    for tokens in (1, 2, 4, 8, 16):
        stored = store(memory, key_type, False)
        case = Case(
            stored, np.ones((tokens, 64)), np.ones((tokens, EXPERTS)), np.zeros((1, 2)),
            np.array([tokens]), {"device": Device(3, 200 * 1024)},
        )  # fmt: skip
        library().knnmoe_streamed_bytes()
        case.run()
        reads = -(-tokens // 4) if key_type == "f32" else 1  # no tensor cores for fp32 keys
        assert library().knnmoe_streamed_bytes() == reads * 192 * 64 * stored.keys.itemsize


@pytest.mark.parametrize("key_type", FULL_TYPES)
def test_two_stages_read_every_int8_key_once_and_the_candidates(key_type: KeyType) -> None:
    memory = random_memory(10, entries=256, hidden_size=64, n_valid=192)
    stored = in_two_stages(store(memory, key_type, False), 20)
    for tokens in (1, 2, 8, 16):
        x, r = np.ones((tokens, 64)), np.ones((tokens, EXPERTS))
        library().knnmoe_streamed_bytes()
        blend(stored, x, r, np.zeros((1, 2)), np.array([tokens]), device=Device(3, 200 * 1024))
        rows = 192 * 64 + tokens * 20 * 64 * stored.keys.itemsize
        assert library().knnmoe_streamed_bytes() == rows


def test_numbers_on_the_device_that_are_out_of_range_are_clamped() -> None:
    memory = random_memory(11, entries=20, k=4)
    x, r = np.ones((2, 16)), np.ones((2, EXPERTS))
    rest = (np.zeros((2, 2)), np.array([1, 1]))
    all_valid = blend(store(memory, "f32", False), x, r, *rest)
    for wrong in (21, 1 << 40):
        got = blend(store(replace(memory, n_valid=wrong), "f32", False), x, r, *rest)
        assert got.rows.tobytes() == all_valid.rows.tobytes()
    widest = blend(store(memory, "f32", False), x, r, *rest, columns=4)
    got = blend(store(replace(memory, k=1 << 40), "f32", False), x, r, *rest, columns=4)
    assert got.rows.tobytes() == widest.rows.tobytes()
    for k, n_valid in ((0, 20), (-3, 20), (4, -1)):
        none = store(replace(memory, k=k, n_valid=n_valid), "f32", False)
        got = blend(none, x, r, *rest, columns=4)
        assert got.rows.tobytes() == r.astype(np.float32).tobytes()


def _plain_case(key_type: KeyType, tokens: int) -> Case:
    memory = random_memory(
        tokens, entries=70, hidden_size=32, k=8, calibration=random_calibration(tokens)
    )
    rng = np.random.default_rng(tokens)
    return Case(
        store(memory, key_type, False),
        rng.normal(size=(tokens, 32)).astype(np.float32),
        rng.normal(size=(tokens, EXPERTS)).astype(np.float32),
        np.zeros((1, 2), np.float32),
        np.array([tokens]),
        {"device": SMALL_DEVICE},
    )
