"""A memory of fewer entries: those that are of use, or clusters of them.

What an entry is of use for is its credit: the weight with which it is retrieved, summed over
tokens of held-out text of the domain, where a token counts more the more the memory makes its
successor likelier; and over entries of the memory itself, each searched for among the others,
because held-out text is short. Entries with none go first.

Merging is k-means on the keys as they are compared, Lloyd's iterations (1982) within blocks that
a tree of principal directions makes, so that its cost is linear in the entries. Keys and values
of a cluster are means weighted by credit.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from knnmoe.runtime.blend import GateMemory, inner_products, neighbor_weights, prepare_queries
from knnmoe.runtime.pack_parts import GateEntries

from .compress import Kept
from .recorded import GateInputs

Reduction = Literal["credit", "merge"]
REDUCTIONS: tuple[Reduction, ...] = get_args(Reduction)
OWN_QUERIES = 4096  # entries of the memory that are searched for among the others, at most
_BLOCK = 1024  # entries clustered together
_ROUNDS = 5
_AT_ONCE = 64  # queries

Floats = NDArray[np.floating[Any]]


@dataclass(frozen=True)
class Credit:
    """What each entry of a gate is of use for, [N] each, of sum 1 (or all 0).

    Attributes:
        text: By held-out text of the domain.
        own: By entries of the memory.
    """

    text: NDArray[np.float64]
    own: NDArray[np.float64]

    @property
    def total(self) -> NDArray[np.float64]:
        """Of both alike."""
        return (self.text + self.own) / 2


def credit_of(
    memory: GateMemory, asked: GateInputs | None, gains: Floats | None, seed: int = 0
) -> Credit:
    """The credit of a gate's entries.

    Args:
        memory: Of the gate.
        asked: Its router inputs [T, D] over text of the domain; None without text.
        gains: [T] nats that the memory gains with each token's successor.
        seed: Of the entries drawn.
    """
    count = len(memory.keys)
    text = np.zeros(count)
    if asked is not None and gains is not None:
        positive = np.maximum(gains, 0)
        shares = 1 + positive / max(float(positive.mean()), 1e-12)
        for piece in _pieces(len(asked.x)):
            found, weights = _retrieved(asked.x[piece], memory)
            np.add.at(text, found, weights * shares[piece, None])
    own = np.zeros(count)
    drawn = np.random.default_rng(seed).permutation(count)[:OWN_QUERIES]
    for piece in _pieces(len(drawn)):
        x = memory.keys[drawn[piece]] + memory.center
        np.add.at(own, *_retrieved(x, memory, drawn[piece]))
    return Credit(_shared(text), _shared(own))


def _retrieved(
    x: Floats, memory: GateMemory, itself: NDArray[np.int64] | None = None
) -> tuple[NDArray[np.int64], Floats]:
    """The K nearest entries of router inputs [T, D] and their weights, [T, K].

    As `blend.search`, but for the order of equals, which costs a sort of all entries.

    Args:
        x: Router inputs.
        memory: What is searched.
        itself: [T] an entry each that is left out.
    """
    products = inner_products(x, memory, np.float32)
    scores = products
    if memory.similarity == "rbf":
        scores = 2 * products - memory.key_scales[:, 1]
    if itself is not None:
        scores[np.arange(len(x)), itself] = -np.inf
    count = min(memory.k, len(memory.keys) - (itself is not None))
    found = np.argpartition(-scores, count - 1, axis=1)[:, :count]
    best = np.take_along_axis(scores, found, axis=1)
    if memory.similarity == "rbf":
        squares = (prepare_queries(x, memory) ** 2).sum(axis=1, keepdims=True)
        best = np.exp(-memory.calibration.gamma * np.maximum(squares - best, 0))
    similar = np.clip(best, 0, 1)
    return found, neighbor_weights(similar, np.ones(similar.shape, np.bool_), memory.calibration)


def keep(entries: GateEntries, credit: Credit, count: int, members: NDArray[np.int64]) -> Kept:
    """The entries with most credit, in their order; of equal ones the earlier.

    Args:
        entries: N of them.
        credit: Theirs.
        count: How many stay.
        members: [N] of how many entries each was made before.
    """
    kept = np.sort(np.argsort(-credit.total, kind="stable")[:count])
    return Kept(_of(entries, kept), kept, members[kept])


def merge(
    entries: GateEntries,
    compared: NDArray[np.float32],
    credit: Credit,
    count: int,
    members: NDArray[np.int64],
    kinds: NDArray[np.bool_] | None = None,
    seed: int = 0,
) -> Kept:
    """About `count` clusters of entries, never more.

    Args:
        entries: N of them.
        compared: Keys [N, D] as they are compared.
        credit: Weights of the means, beside a little for every entry.
        count: Of clusters.
        members: [N] of how many entries each was made before.
        kinds: [N] which entries are of background text; those are not merged with others.
        seed: Of the first centres.
    """
    total = len(compared)
    weights = credit.total + 0.1 / total
    groups = [np.arange(total)]
    if kinds is not None and kinds.any():
        groups = [np.flatnonzero(kinds == kind) for kind in (False, True)]
    blocks = [block for group in groups for block in _blocks(compared, group)]
    room = _rooms([len(block) for block in blocks], count)
    clusters: list[NDArray[np.int64]] = []
    random = np.random.default_rng(seed)
    for block, most in zip(blocks, room, strict=True):
        labels = _k_means(compared[block], weights[block], most, random)
        clusters += [block[labels == label] for label in range(most) if (labels == label).any()]
    clusters.sort(key=lambda each: int(each[0]))
    rows = np.array([each[0] for each in clusters])
    sizes = np.array([members[each].sum() for each in clusters])
    return Kept(_means(entries, clusters, weights), rows, sizes)


def _means(
    entries: GateEntries, members: list[NDArray[np.int64]], weights: NDArray[np.float64]
) -> GateEntries:
    owner = np.empty(len(weights), np.int64)
    for number, each in enumerate(members):
        owner[each] = number
    sums = np.bincount(owner, weights)

    def mean(rows: Floats) -> Floats:
        totals = np.zeros((len(members), rows.shape[1]))
        np.add.at(totals, owner, rows.astype(np.float64) * weights[:, None])
        means: Floats = (totals / sums[:, None]).astype(rows.dtype)
        return means

    return GateEntries(
        mean(entries.keys), mean(entries.router_logits), mean(entries.residuals), entries.center
    )


def _blocks(rows: NDArray[np.float32], members: NDArray[np.int64]) -> list[NDArray[np.int64]]:
    """Members halved along the direction in which they differ most, until they are few."""
    if len(members) <= _BLOCK:
        return [members]
    sample = rows[members[:: max(1, len(members) // 2048)]]
    centred = sample - sample.mean(axis=0)
    direction = _widest(centred)
    order = np.argsort(rows[members] @ direction, kind="stable")
    half = len(members) // 2
    return [
        *_blocks(rows, np.sort(members[order[:half]])),
        *_blocks(rows, np.sort(members[order[half:]])),
    ]


def _widest(rows: NDArray[np.float32]) -> Floats:
    """About the direction in which rows [n, D] about zero differ most: a power iteration."""
    direction: Floats = rows[np.abs(rows).sum(axis=1).argmax()]
    for _ in range(8):
        direction = (rows @ direction) @ rows
        direction = direction / max(float(np.linalg.norm(direction)), 1e-30)
    return direction


def _rooms(sizes: list[int], count: int) -> list[int]:
    """`count` clusters shared out among blocks of these sizes, at least one each."""
    total = sum(sizes)
    ends = np.floor(np.cumsum(sizes) / total * count).astype(int)
    rooms = np.diff(np.concatenate([[0], ends]))
    return [max(1, int(room)) for room in rooms]


def _k_means(
    rows: NDArray[np.float32],
    weights: NDArray[np.float64],
    clusters: int,
    random: np.random.Generator,
) -> NDArray[np.int64]:
    """The cluster of each row [n]."""
    if clusters >= len(rows):
        return np.arange(len(rows))
    drawn = random.choice(len(rows), clusters, replace=False, p=weights / weights.sum())
    centres = rows[drawn].astype(np.float64)
    labels = np.zeros(len(rows), np.int64)
    for _ in range(_ROUNDS):
        distances = (centres**2).sum(axis=1) - 2 * rows.astype(np.float64) @ centres.T
        labels = distances.argmin(axis=1)
        sums = np.zeros_like(centres)
        np.add.at(sums, labels, rows * weights[:, None])
        mass = np.bincount(labels, weights, clusters)
        filled = mass > 0
        centres[filled] = sums[filled] / mass[filled, None]
    return labels


def _of(entries: GateEntries, rows: NDArray[np.int64]) -> GateEntries:
    return GateEntries(
        entries.keys[rows], entries.router_logits[rows], entries.residuals[rows], entries.center
    )


def _shared(credit: NDArray[np.float64]) -> NDArray[np.float64]:
    total = credit.sum()
    return credit / total if total > 0 else credit


def _pieces(count: int) -> list[slice]:
    return [slice(start, start + _AT_ONCE) for start in range(0, count, _AT_ONCE)]
