"""Which sequences are learned together, and where their entries go.

The plan is a function of the text and the settings alone: whoever learns a batch, and in whichever
order, the same numbers come to the same rows.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from .corpus import Corpus, Piece


@dataclass(frozen=True)
class Batch:
    """Sequences that are learned together.

    Attributes:
        number: Of the batch.
        corpus: Whose sequences.
        sequences: Their numbers in the corpus.
        rows: First row of each sequence's entries in a gate's tensors.
        background: Whether they are recorded with residual zero instead of learned.
    """

    number: int
    corpus: Corpus
    sequences: NDArray[np.int64]
    rows: NDArray[np.int64]
    background: bool

    @property
    def targets(self) -> int:
        """Entries."""
        return int(self.corpus.index.targets[self.sequences].sum())

    def pieces(self) -> list[Piece]:
        """The sequences' tokens."""
        return [self.corpus.piece(int(sequence)) for sequence in self.sequences]

    def slices(self) -> Iterator[tuple[int, slice]]:
        """Each sequence's first row in the gate's tensors, and its rows in the batch."""
        begin = 0
        for sequence, row in zip(self.sequences, self.rows, strict=True):
            end = begin + int(self.corpus.index.targets[sequence])
            yield int(row), slice(begin, end)
            begin = end


@dataclass(frozen=True)
class Plan:
    """All batches; reference text first, in rows as in batches."""

    batches: tuple[Batch, ...]

    @property
    def entries(self) -> int:
        """Entries of each gate."""
        return sum(batch.targets for batch in self.batches)


def plan(reference: Corpus, background: Corpus | None, batch_tokens: int) -> Plan:
    """Batches of sequences of like length, so that little is padding.

    Args:
        reference: Learned.
        background: Recorded; its entries come behind those of the reference.
        batch_tokens: Padded tokens a batch has room for; a longer sequence is a batch by itself.
    """
    batches: list[Batch] = []
    row = 0
    for corpus, behind in ((reference, False), (background, True)):
        if corpus is None:
            continue
        rows = row + np.cumsum(corpus.index.targets) - corpus.index.targets
        for group in _groups(corpus.index.lengths, batch_tokens):
            batches.append(Batch(len(batches), corpus, group, rows[group], behind))
        row += corpus.targets
    return Plan(tuple(batches))


def _groups(lengths: NDArray[np.int64], room: int) -> Iterator[NDArray[np.int64]]:
    order = np.argsort(lengths, kind="stable")
    first = 0
    for index, length in enumerate(lengths[order].tolist()):
        # The newest is the longest: the whole batch is padded to it.
        if index > first and (index - first + 1) * length > room:
            yield order[first:index]
            first = index
    yield order[first:]
