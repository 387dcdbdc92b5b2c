"""Text that changes its subject: what a memory costs general text that follows its domain."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from .texts import TokenText

LEAST_TOKENS = 4  # of either half


@dataclass(frozen=True)
class Passage:
    """A sequence of which the tokens from `first` on are scored; `document` is theirs.

    `tokens` are ids [n]; `first` is from 1 to n - 1.
    """

    tokens: NDArray[np.int64]
    first: int
    document: int

    @property
    def read(self) -> int:
        """Tokens that are read, but for the last."""
        return len(self.tokens) - 1


def whole(text: TokenText) -> tuple[Passage, ...]:
    """A text's sequences, scored from their second token on."""
    return tuple(Passage(s.tokens, 1, s.document) for s in text.sequences)


def joined(
    domain: TokenText, general: TokenText, max_tokens: int | None, *, least: int = 0
) -> tuple[Passage, ...]:
    """The first half of a domain sequence, then that of a general one, whose half is scored.

    Args:
        domain: Read in turn; sequences too short for two halves are passed over.
        general: The same.
        max_tokens: Of all passages at most, whole ones; None for all.
        least: So many passages are taken whatever their tokens, if there are as many.
    """
    before, after = (
        [s for s in text.sequences if len(s.tokens) // 2 >= LEAST_TOKENS]
        for text in (domain, general)
    )
    passages: list[Passage] = []
    total = 0
    for left, right in zip(before, after, strict=False):
        halves = [s.tokens[: len(s.tokens) // 2] for s in (left, right)]
        passage = Passage(np.concatenate(halves), len(halves[0]), right.document)
        total += passage.read
        if max_tokens is not None and total > max_tokens and len(passages) >= least:
            break
        passages.append(passage)
    return tuple(passages)


def ids_of(passages: Sequence[Passage]) -> list[list[int]]:
    """Token ids of each."""
    return [passage.tokens.tolist() for passage in passages]
