"""Entries of one gate that say the same, made one.

Two entries are near-identical when they were read at the same token, both in reference text or both
in background text, and the cosine of their centred keys is large enough. On the demo model no entry
has a nearer neighbour of that kind at another token, so nothing is missed by looking at one token
at a time. In the order of the text each entry joins the first kept entry that it is near to, or is
kept; entries of one token beyond `BLOCK` are compared block by block, so the work is at most
N · BLOCK cosines. Keys, logits and residuals of what is merged are averaged.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from knnmoe.runtime.blend import unit_rows

from .partial import ROW_TENSORS
from .tensor_file import TensorFile

BLOCK = 2048


@dataclass(frozen=True)
class Merging:
    """Which entries become one.

    Attributes:
        leaders: [N] int32, for each entry the row of the one that is kept for it.
    """

    leaders: NDArray[np.int32]

    @property
    def kept(self) -> NDArray[np.int32]:
        """[N'] rows that are kept, in order."""
        return np.flatnonzero(self.leaders == np.arange(len(self.leaders))).astype(np.int32)

    @property
    def counts(self) -> NDArray[np.int32]:
        """[N'] entries that each of them stands for, itself included."""
        return np.bincount(self.leaders, minlength=len(self.leaders))[self.kept].astype(np.int32)


def find_merging(
    file: TensorFile,
    center: NDArray[np.float32],
    token_ids: NDArray[np.int32],
    reference_rows: int,
    cosine: float,
) -> Merging:
    """Find the near-identical entries of a gate.

    Args:
        file: Of the gate.
        center: [D], mean of its keys.
        token_ids: [N], where each entry was read.
        reference_rows: How many of them are of reference text; the others are background.
        cosine: The least at which two entries become one.
    """
    leaders = np.arange(len(token_ids), dtype=np.int32)
    for rows in _blocks(token_ids, reference_rows):
        if len(rows) == 1:
            continue
        keys = unit_rows(_gather(file, "keys", rows).astype(np.float32) - center)
        near = np.tril(keys @ keys.T >= cosine, -1)
        for index in np.flatnonzero(near.any(axis=1)):
            before = near[index] & (leaders[rows] == rows)
            if before.any():
                leaders[rows[index]] = rows[before.argmax()]
    return Merging(leaders)


def write_merged(
    file: TensorFile,
    merging: Merging,
    token_ids: NDArray[np.int32],
    reference_rows: int,
    target: Path,
) -> TensorFile:
    """Write a gate's entries with near-identical ones averaged; the centre is copied.

    Args:
        file: Of the gate, with its centre.
        merging: What becomes one.
        token_ids: As for `find_merging`.
        reference_rows: As for `find_merging`.
        target: File to make.
    """
    kept = merging.kept
    ranks = np.zeros(len(merging.leaders), np.int64)
    ranks[kept] = np.arange(len(kept))
    shapes = {
        name: (place.dtype, (len(kept), *place.shape[1:]))
        for name, place in file.places.items()
        if name in ROW_TENSORS
    }
    center = file.places["center"]
    merged = TensorFile.create(target, {**shapes, "center": (center.dtype, center.shape)})
    merged.write("center", 0, file.read("center", 0, center.shape[0]))
    for rows in _blocks(token_ids, reference_rows):
        own, members = np.unique(merging.leaders[rows], return_inverse=True)
        counts = np.bincount(members)
        for name in ROW_TENSORS:
            found = _gather(file, name, rows)
            sums = np.zeros((len(own), found.shape[1]))
            np.add.at(sums, members, found.astype(np.float64))
            for leader, row in zip(own, sums / counts[:, None], strict=True):
                merged.write(name, int(ranks[leader]), row[None])
    return merged


def _blocks(token_ids: NDArray[np.int32], reference_rows: int) -> Iterator[NDArray[np.int64]]:
    """Rows of one token and kind, in order, at most `BLOCK` at a time."""
    background = np.arange(len(token_ids)) >= reference_rows
    order = np.lexsort((np.arange(len(token_ids)), token_ids, background))
    changes = (np.diff(token_ids[order]) != 0) | (np.diff(background[order]) != 0)
    for rows in np.split(order, np.flatnonzero(changes) + 1):
        yield from (rows[first : first + BLOCK] for first in range(0, len(rows), BLOCK))


def _gather(file: TensorFile, name: str, rows: NDArray[np.int64]) -> NDArray[np.generic]:
    return np.concatenate([file.read(name, int(row), 1) for row in rows])
