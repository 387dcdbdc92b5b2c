"""Whether text meant to be held out is in the memory already: what is measured on it is void."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from knnmoe.runtime.pack_parts import EntryOrigins

WINDOW = 32  # tokens; few stretches of this length are written twice
MOSTLY = 0.8
_FACTOR = np.uint64(0x9E3779B97F4A7C15)  # odd, so that powers of it stay apart modulo 2^64


def seen_sequences(origins: EntryOrigins, sequences: Sequence[NDArray[np.int64]]) -> int:
    """How many of some token sequences are mostly in the text that a memory was built from.

    A sequence is when four fifths of its windows of 32 tokens are. Sequences shorter than a window
    are never.

    Args:
        origins: Where the memory's entries come from; background counts as well.
        sequences: Token ids, each [n].
    """
    known = np.unique(_reference_windows(origins))
    seen = 0
    for sequence in sequences:
        windows = _windows(sequence)
        seen += len(windows) > 0 and bool(np.isin(windows, known).mean() >= MOSTLY)
    return seen


def _reference_windows(origins: EntryOrigins) -> NDArray[np.uint64]:
    """Hashes of the windows of tokens that follow each other in one document."""
    windows = _windows(origins.token_ids)
    last = np.arange(len(windows)) + WINDOW - 1
    first = np.arange(len(windows))
    together = (origins.documents[last] == origins.documents[first]) & (
        origins.positions[last] - origins.positions[first] == WINDOW - 1
    )
    found: NDArray[np.uint64] = windows[together]
    return found


def _windows(tokens: NDArray[np.integer]) -> NDArray[np.uint64]:
    """A hash of every window of a sequence [n]: [n - 31], empty where n is less."""
    if len(tokens) < WINDOW:
        return np.zeros(0, np.uint64)
    powers = np.cumprod(np.full(WINDOW, _FACTOR))
    windows = np.lib.stride_tricks.sliding_window_view(
        tokens.astype(np.uint64) + np.uint64(1), WINDOW
    )
    return np.asarray((windows * powers).sum(axis=1, dtype=np.uint64))
