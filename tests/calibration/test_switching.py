"""Text that changes its subject is made of halves, and only the second is scored."""

from __future__ import annotations

import numpy as np

from knnmoe.calibration.switching import joined, whole
from knnmoe.calibration.texts import TokenSequence, TokenText


def text(*lengths: int, start: int = 0) -> TokenText:
    sequences = tuple(
        TokenSequence(np.arange(start, start + n), number, 0) for number, n in enumerate(lengths)
    )
    return TokenText(sequences, ("text",), len(lengths), "0" * 64)


def test_a_domain_half_is_followed_by_a_general_half() -> None:
    domain, general = text(10, 3, 20), text(30, 12, 12, start=100)
    first, second = joined(domain, general, None)
    assert first.tokens.tolist() == [*range(5), *range(100, 115)]
    assert (first.first, first.document, first.read) == (5, 0, 19)
    assert second.tokens.tolist() == [*range(10), *range(100, 106)]  # three tokens are too few
    assert second.document == 1


def test_whole_passages_are_kept_within_the_room() -> None:
    domain, general = text(10, 10, 10), text(10, 10, 10, start=100)
    assert len(joined(domain, general, None)) == 3
    assert len(joined(domain, general, 20)) == 2
    assert joined(domain, general, 5) == ()
    assert len(joined(domain, general, 5, least=2)) == 2


def test_other_text_is_scored_from_its_second_token_on() -> None:
    assert [(p.first, p.document) for p in whole(text(4, 5))] == [(1, 0), (1, 1)]
