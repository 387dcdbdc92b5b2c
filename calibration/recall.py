"""How much of what an exact search finds a search by projected keys finds too."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from knnmoe.runtime.calibration import Similarity
from knnmoe.runtime.compressed_files import widths_are_possible
from knnmoe.runtime.projection import (
    WIDTH_STEP,
    ProjectedKeys,
    encode,
    projected_products,
    round_projection,
)

Keys = Literal["as-stored", "fp16", "int8", "projected", "graded"]
KEYS: tuple[Keys, ...] = get_args(Keys)
RESTORED: tuple[Keys, ...] = ("projected", "graded")
Widths = tuple[int, int]  # directions of graded keys in 8 and in 4 bits
_TOGETHER = 64  # queries

Floats = NDArray[np.floating[Any]]


def project_keys(centred: Floats, matrix: Floats, bits: int) -> ProjectedKeys:
    """Centred keys [N, D] projected by P [W, D], which is rounded first, and in some bits."""
    projection, scales = round_projection(matrix)
    rounded = projection * scales[:, None]
    codes, key_scales = encode(centred @ rounded.T, bits)
    return ProjectedKeys(projection, scales, codes, key_scales)


@dataclass(frozen=True)
class Exact:
    """Held-back keys, what they are searched among, and who is nearest.

    Attributes:
        queries, among: Centred keys [T, D] and [N, D].
        norms: [N] squared lengths of those searched.
        lengths: [N], where keys are compared at unit length.
        nearest: [T, K] the K nearest.
    """

    queries: Floats
    among: Floats
    norms: Floats
    lengths: Floats | None
    nearest: NDArray[np.int64]

    @staticmethod
    def of(queries: Floats, among: Floats, neighbors: int, similarity: Similarity) -> Exact:
        """Searched by brute force."""
        norms = np.einsum("nd,nd->n", among, among)
        lengths = np.sqrt(norms) if similarity == "cosine" else None
        exact = Exact(queries, among, norms, lengths, np.zeros((0, neighbors), np.int64))
        nearest = [_best(exact.scores(piece @ among.T), neighbors) for piece in _some(queries)]
        return replace(exact, nearest=np.concatenate(nearest))

    def scores(self, products: Floats) -> Floats:
        """What is ranked by [T, N], of inner products with the keys searched."""
        return 2 * products - self.norms if self.lengths is None else self.products(products)

    def of_some(self, products: Floats, entries: NDArray[np.int64]) -> tuple[Floats, Floats]:
        """Scores and products as keys are compared, of products with some entries [T, R]."""
        if self.lengths is None:
            return 2 * products - self.norms[entries], products
        lengths = self.lengths[entries]
        divided: Floats = products / np.where(lengths > 0, lengths, np.float32(1))
        return divided, divided

    def products(self, products: Floats) -> Floats:
        """Inner products [T, N] with the keys as they are compared."""
        if self.lengths is None:
            return products
        return products / np.where(self.lengths > 0, self.lengths, np.float32(1))

    def nearest_products(self) -> Floats:
        """Inner products [T, K] with the nearest keys as they are compared."""
        products = np.einsum("td,tkd->tk", self.queries, self.among[self.nearest])
        return self.of_some(products, self.nearest)[1]


def measure_recall(exact: Exact, matrix: Floats, bits: int, candidates: int) -> float:
    """Share of the K nearest that are among R candidates found through a projection P [W, D]."""
    keys = project_keys(exact.among, matrix, bits)
    found = []
    for start, piece in zip(
        range(0, len(exact.queries), _TOGETHER), _some(exact.queries), strict=True
    ):
        scores = exact.scores(projected_products(piece, keys, int8_queries=True))
        among = np.zeros(scores.shape, np.bool_)
        np.put_along_axis(among, _best(scores, candidates), True, axis=1)
        nearest = exact.nearest[start : start + _TOGETHER]
        found.append(np.take_along_axis(among, nearest, axis=1))
    return float(np.concatenate(found).mean())


@dataclass(frozen=True)
class Searched:
    """What a search by the keys that are kept returns of held-back keys' neighbours.

    Attributes:
        kept: Share of the K nearest that are among the K returned.
        correction: What products with projected keys are too small by, on average over the
            neighbours returned; 1 where full keys are kept.
    """

    kept: float
    correction: float


def measure_search(
    exact: Exact,
    matrix: Floats,
    bits: int,
    candidates: int,
    keys: Keys,
    graded: Sequence[tuple[Floats, int]] = (),
) -> Searched:
    """Search in both stages: R candidates by a projection P [W, D], scored by the keys kept.

    `graded`: matrices and bits of graded keys.
    """
    scan = project_keys(exact.among, matrix, bits)
    parts = [project_keys(exact.among, *part) for part in graded]
    among = scanned(exact, scan, candidates)
    returned, products = scored(exact, among, keys, parts or [scan])
    kept = (exact.nearest[:, :, None] == returned[:, None, :]).any(axis=2).mean()
    return Searched(float(kept), correction(exact, products) if keys in RESTORED else 1.0)


def correction(exact: Exact, products: Floats) -> float:
    """What products [T, K] with projected keys are too small by, as the true neighbours tell."""
    total = float(products.sum())
    return float(exact.nearest_products().sum()) / total if total > 0 else 1.0


def scanned(exact: Exact, scan: ProjectedKeys, candidates: int) -> NDArray[np.int64]:
    """The first stage: R candidates [T, R]."""
    best = []
    for piece in _some(exact.queries):
        scores = exact.scores(projected_products(piece, scan, int8_queries=True))
        best.append(_best(scores, min(candidates, scores.shape[1])))
    return np.concatenate(best)


def scored(
    exact: Exact, candidates: NDArray[np.int64], keys: Keys, parts: Sequence[ProjectedKeys]
) -> tuple[NDArray[np.int64], Floats]:
    """The second stage: what it returns [T, K], and the inner products by the keys kept.

    Args:
        exact: The queries, and the keys in full.
        candidates: [T, R].
        keys: What these are scored by.
        parts: Of projected or graded keys, what they are the sum of.
    """
    count = exact.nearest.shape[1]
    ids, found = [], []
    for start, piece in zip(
        range(0, len(candidates), _TOGETHER), _some(exact.queries), strict=True
    ):
        best = candidates[start : start + _TOGETHER]
        if keys in RESTORED:
            rows = sum((part.restored(best) for part in parts[1:]), start=parts[0].restored(best))
        else:
            rows = _rounded(exact.among[best]) if keys == "int8" else exact.among[best]
        scores, products = exact.of_some(np.einsum("td,trd->tr", piece, rows), best)
        order = _best(scores, count)
        ids.append(np.take_along_axis(best, order, axis=1))
        found.append(np.take_along_axis(products, order, axis=1))
    return np.concatenate(ids), np.concatenate(found)


def graded_widths(size: int) -> tuple[Widths, ...]:
    """Widths of graded keys that are tried of keys of D elements."""

    def steps(share: float) -> int:
        return max(WIDTH_STEP, round(share * size / WIDTH_STEP) * WIDTH_STEP)

    pairs = {
        (steps(fine), steps(whole) - steps(fine))
        for fine, whole in product((1 / 8, 1 / 4, 1 / 2), (1 / 4, 1 / 2, 3 / 4, 1))
    }
    return tuple(sorted(pair for pair in pairs if widths_are_possible(pair, size)))


def graded_parts(directions: Floats, widths: Widths, seed: int) -> list[tuple[Floats, int]]:
    """Matrices [F, D] and [C, D] of graded keys with their bits: the widest directions in 8."""
    fine, coarse = widths
    return [(turned(directions, fine, seed), 8), (turned(directions[fine:], coarse, seed), 4)]


def principal(keys: Floats) -> Floats:
    """Principal directions of keys [N, D] about zero, all of them, the widest first."""
    moments = keys.T.astype(np.float64) @ keys
    directions: Floats = np.linalg.eigh(moments)[1][:, ::-1].T.astype(np.float32)
    return directions


def turned(directions: Floats, width: int, seed: int) -> Floats:
    """The first W directions, turned at random among themselves: P [W, D]."""
    random = np.random.default_rng([seed, width])
    turn = np.linalg.qr(random.standard_normal((width, width)))[0]
    matrix: Floats = turn.astype(np.float32) @ directions[:width]
    return matrix


def _some(queries: Floats) -> Iterator[Floats]:
    """A few queries at a time: their scores are as wide as the memory is long."""
    for start in range(0, len(queries), _TOGETHER):
        yield queries[start : start + _TOGETHER]


def _best(scores: Floats, count: int) -> NDArray[np.int64]:
    return np.argpartition(-scores, count - 1, axis=1)[:, :count]


def _rounded(keys: Floats) -> Floats:
    """Keys [..., D] in steps of a 127th of the largest element of each."""
    largest = np.abs(keys).max(axis=-1, keepdims=True)
    steps = np.where(largest > 0, largest, 1) / 127
    rounded: Floats = (np.rint(keys / steps) * steps).astype(np.float32)
    return rounded
