"""Text that changes its subject: what a memory costs general text that follows its domain."""

from __future__ import annotations

import numpy as np

from knnmoe.runtime.texts import TokenSequence, TokenText

LEAST_TOKENS = 4  # of either half
# Of either half: enough for a state that forgets to be full, and to let go. What counts is the
# number of changes, and shorter passages are more of them.
MOST_TOKENS = 64


def joined(
    domain: TokenText, general: TokenText, max_tokens: int | None, *, least: int = 0
) -> tuple[TokenSequence, ...]:
    """The start of a domain sequence, then that of a general one, which is scored.

    Each is half of its sequence, `MOST_TOKENS` at most.

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
    passages: list[TokenSequence] = []
    total = 0
    for left, right in zip(before, after, strict=False):
        start, half = (min(len(one.tokens) // 2, MOST_TOKENS) for one in (left, right))
        tokens = np.concatenate([left.tokens[:start], right.tokens[:half]])
        # Of plain text its first token is scored too.
        credited = np.zeros(start + half - 1, np.bool_)
        credited[start - 1 :] = [bool(right.credited.all()), *right.credited[: half - 1]]
        if not credited.any():
            continue
        passage = TokenSequence(tokens, credited, right.document)
        total += passage.read
        if max_tokens is not None and total > max_tokens and len(passages) >= least:
            break
        passages.append(passage)
    return tuple(passages)
