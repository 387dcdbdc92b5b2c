from __future__ import annotations

import numpy as np

from knnmoe.calibration.overlap import WINDOW, seen_sequences
from knnmoe.runtime.pack_parts import EntryOrigins
from knnmoe.runtime.texts import cut

RNG = np.random.default_rng(0)
DOCUMENTS = [RNG.integers(0, 300, size) for size in (200, 90, 40)]


def built_from(*documents: np.ndarray, length: int = 64) -> EntryOrigins:
    """As a build leaves them: the last token of each piece has no entry."""
    pieces = [
        piece
        for number, tokens in enumerate(documents)
        for piece in cut(tokens, np.ones(len(tokens), np.bool_), number, length)
    ]
    return EntryOrigins(
        np.concatenate([p.tokens[:-1] for p in pieces]).astype(np.int32),
        np.concatenate([np.full(p.targets, p.document) for p in pieces]).astype(np.int32),
        np.concatenate([p.position + np.arange(p.targets) for p in pieces]).astype(np.int32),
    )


def test_text_of_the_memory_is_recognised_wherever_it_is_cut() -> None:
    origins = built_from(*DOCUMENTS, length=200)
    assert seen_sequences(origins, DOCUMENTS) == 3
    assert seen_sequences(origins, [DOCUMENTS[0][33:150], DOCUMENTS[1][5:80]]) == 2


def test_other_text_is_not_even_if_it_shares_sentences() -> None:
    origins = built_from(*DOCUMENTS)
    other = RNG.integers(0, 300, 200)
    quoting = np.concatenate([other[:100], DOCUMENTS[0][:50], other[100:]])
    assert seen_sequences(origins, [other, quoting]) == 0


def test_the_same_tokens_in_another_order_are_other_text() -> None:
    origins = built_from(*DOCUMENTS)
    assert seen_sequences(origins, [DOCUMENTS[0][::-1], np.sort(DOCUMENTS[1])]) == 0


def test_the_end_of_one_document_and_the_start_of_the_next_are_no_text() -> None:
    short = [RNG.integers(0, 300, WINDOW - 2) for _ in range(4)]
    joined = np.concatenate([piece[:-1] for piece in short])
    assert seen_sequences(built_from(*short), [joined]) == 0


def test_less_than_a_window_is_never_recognised() -> None:
    origins = built_from(*DOCUMENTS)
    assert seen_sequences(origins, [DOCUMENTS[0][: WINDOW - 1]]) == 0
    assert seen_sequences(built_from(DOCUMENTS[0][:5]), [DOCUMENTS[0]]) == 0
