"""Random calls of the blend on a device, and what a right answer to each is.

The reference is runtime/blend.py in float64, run on the keys and values as the device holds them.
What an answer is held to:

* neighbours: none twice, nearest first, copies of one key by lower index first, columns beyond the
  valid entries as in the reference;
* similarities: each within `TOLERANCE` of the reference's for that entry, and all of them within it
  of the best ones; where keys are rounded to fp16 or int8, also within the bound of that rounding
  of what the unrounded keys would have given. After a scan of int8 keys the best ones are those of
  the candidates, and which entries those are is known up to rounding;
* rows, confidence, state: within `TOLERANCE` (absolute and relative) of the float64 blend of the
  neighbours and similarities that were returned. Taking those as given keeps the comparison
  sharp: a steep gate would multiply what rounding did to a similarity that was checked already.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import product
from typing import Any, Literal, get_args

import numpy as np
from gpu_tally import Errors
from numpy.typing import NDArray

from knnmoe.runtime.blend import Blended, GateMemory, blend_found, search, unit_rows
from knnmoe.runtime.calibration import Calibration, Similarity
from knnmoe.runtime.stored_values import dense
from knnmoe.runtime.two_stage import ScanKeys, quantize_keys, scan_scores

TOLERANCE = 1e-5

KeyType = Literal["f32", "f16", "i8"]
KEY_TYPES: tuple[KeyType, ...] = get_args(KeyType)
SIMILARITIES: tuple[Similarity, ...] = ("cosine", "rbf")


@dataclass(frozen=True)
class Limits:
    """How large cases may be."""

    entries: int
    hidden: tuple[int, ...]
    experts: int
    tokens: tuple[int, ...]


WIDE = Limits(
    4000, (1, 7, 33, 64, 100, 257, 1000, 2048, 2880), 160, (1, 2, 3, 5, 8, 16, 17, 64, 129)
)
# Also for what is slow: compute-sanitizer, an emulated device.
SMALL = Limits(70, (1, 7, 24, 40), 12, (1, 2, 3, 5, 8, 16, 17, 33))


@dataclass(frozen=True)
class Case:
    """A memory as a device holds it, and what is routed over it."""

    name: str
    seed: int
    key_type: KeyType
    memory: GateMemory  # what is held, in fp32 exactly
    exact: GateMemory  # before the keys were rounded
    copies: NDArray[np.int64]  # [N] entries with the same number have the same key
    keys: Any
    key_scales: Any
    values: Any
    x: Any
    r: Any
    state: Any
    lengths: Any
    max_neighbors: int  # at least K: columns that a later K may need
    scan: ScanKeys | None = None  # what is scanned in the place of the keys
    candidates: int = 0  # of that scan


def every_case(seed: int, limits: Limits = WIDE, *, rounds: int = 1) -> Iterator[Case]:
    """In each round a case for every number of tokens, key type and similarity; the rest is drawn.

    In random order: time may run out.
    """
    for first in range(rounds):
        kinds = list(enumerate(product(limits.tokens, KEY_TYPES, SIMILARITIES)))
        random.Random(seed + first).shuffle(kinds)
        for number, (tokens, key_type, similarity) in kinds:
            case_seed = seed + 1000 * first + number
            yield draw_case(case_seed, limits, tokens, key_type, similarity)


def draw_case(
    seed: int, limits: Limits, tokens: int, key_type: KeyType, similarity: Similarity
) -> Case:
    """A case whose remaining properties are drawn from a seed."""
    rng = np.random.default_rng(seed)
    most = limits.entries
    some, many = int(rng.integers(3, 40)), int(rng.integers(40, most))
    entries = int(rng.choice([1, 2, some, many, most, most - 1]))
    hidden, experts = int(rng.choice(limits.hidden)), int(rng.integers(1, limits.experts + 1))
    k = int(rng.choice([1, 8, int(rng.integers(1, 65)), int(rng.integers(1, 65)), 63, 64]))
    n_valid = int(rng.choice([0, 1, max(entries - 1, 0), entries, entries, entries // 2]))
    memory, copies = _memory(rng, entries, hidden, experts, k, n_valid, similarity)
    keys, scales = round_keys(memory, key_type)
    values = dense(memory.values).astype(np.float16 if rng.integers(2) else np.float32)
    if rng.integers(2):  # nobody may read what is beyond the valid entries
        for array in (keys, scales, values, memory.evidence_weights):
            if array is not None and array.dtype != np.int8:
                array[n_valid:] = np.nan
    held = replace(
        memory,
        keys=keys.astype(np.float32),
        key_scales=scales,
        values=values.astype(np.float32),
    )
    batch = int(rng.choice([b for b in range(1, tokens + 1) if tokens % b == 0]))
    length = tokens // batch
    name = (
        f"T={tokens} (B={batch}) D={hidden} E={experts} N={entries} n_valid={n_valid} K={k} "
        f"{key_type} values={values.dtype} {similarity}"
    )
    return Case(
        name,
        seed,
        key_type,
        held,
        memory,
        copies,
        keys,
        scales,
        values,
        _inputs(rng, memory, tokens),
        rng.normal(size=(tokens, experts)).astype(np.float32),
        (np.abs(rng.normal(size=(batch, 2))) * [1, 3]).astype(np.float32),
        rng.integers(0, length + 1, batch),  # sequences without a real token too
        int(min(64, k + rng.choice([0, 0, 3]))),
    )


def _memory(
    rng: np.random.Generator,
    entries: int,
    hidden: int,
    experts: int,
    k: int,
    n_valid: int,
    similarity: Similarity,
) -> tuple[GateMemory, NDArray[np.int64]]:
    copies = np.arange(entries)
    if rng.integers(2):  # every key about three times
        copies = rng.integers(0, max(1, entries // 3), entries)
    raw = rng.normal(size=(entries, hidden)).astype(np.float32)[copies]
    center = raw.mean(axis=0).astype(np.float32)
    keys = raw - center
    if similarity == "cosine":
        keys = unit_rows(keys).astype(np.float32)
    squares = np.einsum("nd,nd->n", keys, keys, dtype=np.float64)
    memory = GateMemory(
        keys=np.ascontiguousarray(keys, dtype=np.float32),
        key_scales=np.stack([np.ones(entries), squares], axis=1).astype(np.float32),
        values=rng.normal(size=(entries, experts)).astype(np.float32),
        n_valid=n_valid,
        k=k,
        center=center,
        calibration=_calibration(rng, hidden),
        similarity=similarity,
        rule_first=False,
        evidence_weights=(
            rng.choice([0, 0.5, 1], entries).astype(np.float32) if rng.integers(2) else None
        ),
    )
    return memory, copies


def _calibration(rng: np.random.Generator, hidden: int) -> Calibration:
    """Every kind of confidence and weighting of docs/method.md, and between."""
    return Calibration(
        interpolate=float(rng.integers(0, 2)),
        weight_power=float(rng.choice([0.0, 1.0, 2.0])),
        inverse_temperature=float(rng.choice([0.0, 5.0, 20.0])),
        mean=float(rng.integers(0, 2)),
        scale=float(rng.uniform(0.2, 1.0)),
        power=float(rng.choice([1.0, 2.0, 3.0])),
        midpoint=float(rng.uniform(0.0, 1.0)),
        sharpness=float(rng.choice([0.0, 3.0, 10.0])),
        cap=float(rng.choice([1.0, 12.0])),
        sequence=float(rng.integers(0, 2)),
        gamma=float(rng.uniform(0.2, 4.0)) / hidden,
        decay=float(rng.choice([1.0, 0.97, 0.7])),
    )


def _inputs(rng: np.random.Generator, memory: GateMemory, tokens: int) -> NDArray[np.float32]:
    entries, hidden = memory.keys.shape
    noise = rng.normal(size=(tokens, hidden))
    kind = rng.integers(3)
    if kind == 0:
        x = noise
    else:  # as near as in a domain, not as far as at random
        spread = rng.uniform(0.05, 0.5) / (hidden**0.5 if memory.similarity == "cosine" else 1)
        x = memory.keys[rng.integers(0, entries, tokens)] + memory.center + spread * noise
    if kind == 2 and memory.similarity == "cosine":  # one element far larger, as models have
        x[:, rng.integers(hidden)] *= 100
    inputs: NDArray[np.float32] = x.astype(np.float32)
    return inputs


def round_keys(memory: GateMemory, key_type: KeyType) -> tuple[Any, NDArray[np.float32]]:
    """Keys in their type, and the key scales that go with them."""
    scales = memory.key_scales.copy()
    if key_type != "i8":
        return memory.keys.astype(np.float16 if key_type == "f16" else np.float32), scales
    largest = np.abs(memory.keys).max(axis=1)
    step = np.where(largest > 0, largest / 127, 1).astype(np.float32)
    scales[:, 0] = step
    return np.rint(memory.keys / step[:, None]).astype(np.int8), scales


def in_two_stages(case: Case) -> Case:
    """The same case with its keys scanned as int8 first, for a drawn number of candidates."""
    rng = np.random.default_rng(case.seed)
    scan = quantize_keys(np.nan_to_num(case.memory.keys))
    scan.scales[case.memory.n_valid :] = np.nan
    least = min(case.max_neighbors, len(case.copies))
    candidates = int(rng.choice([least, int(rng.integers(least, 65)), 64]))
    name = f"{case.name}, {candidates} candidates"
    return replace(case, name=name, scan=scan, candidates=candidates)


def check(case: Case, got: Blended) -> Errors:
    """How far an answer is from the reference.

    Raises:
        AssertionError: If it is farther than it may be.
    """
    memory, count = case.memory, len(case.memory.keys)
    k, n = min(memory.k, count), min(memory.k, memory.n_valid)
    ids, similarities = np.asarray(got.neighbors)[:, :k], np.asarray(got.similarities)[:, :k]
    all_ids, found, _ = search(case.x.astype(np.float64), replace(memory, k=count), np.float64)
    exact = np.empty_like(found)  # [T, N] by entry
    np.put_along_axis(exact, all_ids, found, axis=1)
    assert np.isfinite(similarities).all(), "a similarity was not written, or is not a number"
    assert (got.neighbors[:, n:] >= memory.n_valid).all(), "an entry beyond the valid ones"
    assert (got.similarities[:, n:] == 0).all(), "a similarity of an entry that does not exist"
    np.testing.assert_array_equal(ids[:, n:], all_ids[:, n:k])
    deviation = _check_neighbors(case, ids[:, :n], similarities[:, :n], exact)
    rounding = 0.0 if case.scan else _check_rounding(case, similarities)
    given = blend_found(
        case.r.astype(np.float64),
        memory,
        ids,
        similarities.astype(np.float64),
        ids < memory.n_valid,
        case.state.astype(np.float64),
        case.lengths,
        dtype=np.float64,
    )
    for name in ("rows", "confidence", "state"):
        np.testing.assert_allclose(
            getattr(got, name), getattr(given, name), atol=TOLERANCE, rtol=TOLERANCE, err_msg=name
        )
    silent = given.confidence == 0
    untouched = np.asarray(got.rows)[silent].tobytes() == case.r[silent].tobytes()
    assert untouched, "a row without confidence was changed"
    return {
        "similarities": deviation,
        "rounding_of_keys": rounding,
        "rows": _largest(got.rows, given.rows),
        "confidence": _largest(got.confidence, given.confidence),
        "state": _largest(got.state, given.state),
    }


def _check_neighbors(case: Case, ids: Any, similarities: Any, exact: Any) -> float:
    """That each token's neighbours are right; returns the largest deviation of a similarity."""
    valid = np.arange(len(case.copies)) < case.memory.n_valid
    surely, perhaps = _candidates(case, valid)
    assert ((ids >= 0) & (ids < case.memory.n_valid)).all(), "a neighbour that does not exist"
    for token, (taken, near) in enumerate(zip(ids, similarities, strict=True)):
        where = f"token {token}: "
        assert len(set(taken.tolist())) == len(taken), where + "a neighbour twice"
        assert perhaps[token, taken].all(), where + "a neighbour that was no candidate"
        assert (np.diff(near) <= 0).all(), where + "neighbours that are not nearest first"
        least, most = (
            np.sort(exact[token, among])[::-1][: len(taken)]
            for among in (surely[token], perhaps[token])
        )
        missed = where + "a neighbour that is not among the nearest"
        assert (near[: len(least)] >= least - TOLERANCE).all(), missed
        assert (near <= most + TOLERANCE).all(), where + "nearer than the nearest"
        _check_copies(case, taken, valid, where)
    own = np.take_along_axis(exact, ids, axis=1)
    np.testing.assert_allclose(similarities, own, atol=TOLERANCE, rtol=0)
    return _largest(similarities, own)


def _check_copies(case: Case, taken: Any, valid: Any, where: str) -> None:
    kinds, counts = np.unique(case.copies[taken], return_counts=True)
    for kind, found in zip(kinds, counts, strict=True):
        lowest = np.flatnonzero(valid & (case.copies == kind))[:found]
        np.testing.assert_array_equal(
            taken[case.copies[taken] == kind], lowest,
            err_msg=where + "of equal keys the lower index comes first",
        )  # fmt: skip


def _candidates(case: Case, valid: Any) -> tuple[Any, Any]:
    """Which entries [T, N] are candidates whatever rounding does, and which may be."""
    if case.scan is None or case.candidates >= case.memory.n_valid:
        everyone = np.tile(valid, (len(case.x), 1))
        return everyone, everyone
    scores = scan_scores(case.x.astype(np.float64), case.memory, case.scan, np.float64)
    last = np.sort(scores, axis=1)[:, [-case.candidates]]
    margin = TOLERANCE * (1 + np.abs(scores[:, valid]).max(axis=1, keepdims=True))
    return scores > last + margin, scores >= last - margin


def rounding_bound(case: Case) -> float:
    """How far rounding may have moved a valid key: half a step in every element."""
    keys = case.exact.keys[: case.memory.n_valid].astype(np.float64)
    if case.key_type == "f32" or not keys.size:
        return 0.0
    if case.key_type == "i8":
        steps = np.abs(keys).max(axis=1) / 127 / 2 * (1 + 1e-6)
        return float((steps * keys.shape[1] ** 0.5).max())
    steps = np.maximum(np.abs(keys) * 2.0**-11, 2.0**-25)  # below 2^-14 steps are all alike
    return float(np.sqrt((steps**2).sum(axis=1)).max())


def _check_rounding(case: Case, similarities: Any) -> float:
    """Largest deviation from what unrounded keys give; at most what the rounding explains."""
    memory = case.exact
    x = case.x.astype(np.float64)
    _, exact, _ = search(x, memory, np.float64)
    moved = rounding_bound(case)
    bound = np.full((len(x), 1), moved)  # |q·moved| ≤ ‖moved‖ for a q of length one
    if memory.similarity == "rbf":  # |exp(-a) - exp(-b)| ≤ |a - b| for what is not negative
        lengths = np.sqrt(((x - memory.center) ** 2).sum(axis=1, keepdims=True))
        bound = 2 * memory.calibration.gamma * lengths * moved
    excess = np.abs(similarities - exact) - bound
    assert excess.max(initial=0) <= TOLERANCE, "farther than the rounding of the keys explains"
    return _largest(similarities, exact)


def _largest(a: Any, b: Any) -> float:
    return float(np.abs(np.asarray(a, np.float64) - b).max(initial=0))
