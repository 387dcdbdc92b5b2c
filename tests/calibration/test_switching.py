"""Text that changes its subject is made of halves, and only the second is scored."""

from __future__ import annotations

import numpy as np

from knnmoe.calibration.switching import MOST_TOKENS, joined
from knnmoe.runtime.texts import TokenSequence, TokenText


def text(*lengths: int, start: int = 0) -> TokenText:
    sequences = tuple(
        TokenSequence.of(np.arange(start, start + n), document=number)
        for number, n in enumerate(lengths)
    )
    return TokenText(sequences, ("text",), len(lengths), "0" * 64)


def test_a_domain_half_is_followed_by_a_general_half() -> None:
    domain, general = text(10, 3, 20), text(30, 12, 12, start=100)
    first, second = joined(domain, general, None)
    assert first.tokens.tolist() == [*range(5), *range(100, 115)]
    assert first.credited.tolist() == [False] * 4 + [True] * 15
    assert (first.document, first.read) == (0, 19)
    assert second.tokens.tolist() == [*range(10), *range(100, 106)]  # three tokens are too few
    assert second.document == 1


def test_long_sequences_make_no_longer_passages() -> None:
    (passage,) = joined(text(400), text(300, start=1000), None)
    assert passage.tokens.tolist() == [*range(MOST_TOKENS), *range(1000, 1000 + MOST_TOKENS)]
    assert passage.targets == MOST_TOKENS


def test_whole_passages_are_kept_within_the_room() -> None:
    domain, general = text(10, 10, 10), text(10, 10, 10, start=100)
    assert len(joined(domain, general, None)) == 3
    assert len(joined(domain, general, 20)) == 2
    assert joined(domain, general, 5) == ()
    assert len(joined(domain, general, 5, least=2)) == 2


def test_of_a_conversation_only_what_is_credited_is_scored() -> None:
    def told(*credited: bool) -> TokenText:
        sequence = TokenSequence(np.arange(len(credited) + 1), np.array(credited))
        return TokenText((sequence,), ("text",), 1, "0" * 64)

    general = told(False, True, True, False, True, True, True)  # four of its eight tokens are read
    (passage,) = joined(text(8), general, None)
    assert passage.credited.tolist() == [False] * 4 + [False, True, True]
    assert joined(text(8), told(*[False] * 6, True), None) == ()
