"""How likely a model finds a text, with its memory and without."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from .errors import InputError, SettingError
from .statistics import Unit, drawn_units, paired_bootstrap

DEFAULT_CONTEXT = 256
ROWS_AT_ONCE = 64  # rows of logits turned into probabilities together; bounds the scratch memory

Progress = Callable[[int], None]


class Encoder(Protocol):
    """What evaluation asks of a tokenizer."""

    def encode(self, text: str | bytes, *, where: object = ...) -> list[int]:
        """Token ids of a text."""


class Scorer(Protocol):
    """What evaluation asks of a model."""

    def logits(self, token_ids: Sequence[int]) -> NDArray[np.float32]:
        """Logits [T, V] after each of the T tokens."""


@dataclass(frozen=True)
class Scores:
    """What a model makes of n sequences, one entry each.

    Attributes:
        nll: [n] float64, summed negative log-likelihood in nats.
        correct: [n] int64, tokens that were the most likely one.
        tokens: [n] int64, tokens predicted: all but the first.
    """

    nll: NDArray[np.float64]
    correct: NDArray[np.int64]
    tokens: NDArray[np.int64]

    @property
    def mean_nll(self) -> float:
        """Nats a token."""
        return float(self.nll.sum() / self.tokens.sum())

    @property
    def accuracy(self) -> float:
        """Share of the tokens that were the most likely one."""
        return float(self.correct.sum() / self.tokens.sum())


@dataclass(frozen=True)
class Evaluation:
    """Scores of the frozen model, and of the model with its memory if it has one."""

    frozen: Scores
    memory: Scores | None = None
    documents: Sequence[int] | None = None  # of each sequence, where known

    def delta(self, *, samples: int = 2000, seed: int = 0) -> tuple[float, float, float]:
        """NLL with the memory minus without, nats a token: (mean, low, high).

        Below zero the memory helps. The bounds are the 95 % interval of a paired bootstrap over
        documents, or sequences (`drawn`), weighted by their tokens; infinite if there is one
        sequence only.
        """
        assert self.memory is not None
        change = (self.memory.nll - self.frozen.nll) / self.frozen.tokens
        units, _ = self._units()
        return paired_bootstrap(change, self.frozen.tokens, units=units, samples=samples, seed=seed)

    @property
    def drawn(self) -> Unit:
        """What the interval's bootstrap draws."""
        return self._units()[1]

    def _units(self) -> tuple[NDArray[np.int64], Unit]:
        if self.documents is None:
            return np.arange(len(self.frozen.tokens)), "sequences"
        return drawn_units(self.documents)

    def to_json(self) -> dict[str, Any]:
        """The figures by name; without a memory only the frozen ones, null for infinite bounds."""
        figures: dict[str, Any] = {
            "sequences": len(self.frozen.tokens),
            "tokens": int(self.frozen.tokens.sum()),
            **_figures(self.frozen, "frozen"),
        }
        if self.memory is not None:
            mean, low, high = self.delta()
            figures |= _figures(self.memory, "memory")
            figures |= {
                "delta": mean,
                "delta_low": low if math.isfinite(low) else None,
                "delta_high": high if math.isfinite(high) else None,
                "drawn": self.drawn,
            }
        return figures


def _figures(scores: Scores, name: str) -> dict[str, float]:
    nll = scores.mean_nll
    return {
        f"nll_{name}": nll,
        # Beyond 700 nats exp overflows; nobody reads such a perplexity.
        f"perplexity_{name}": math.exp(min(nll, 700.0)),
        f"accuracy_{name}": scores.accuracy,
    }


def cut_sequences(tokenizer: Encoder, documents: Iterable[str], **settings: Any) -> list[list[int]]:
    """The sequences of `cut_documents` alone."""
    return cut_documents(tokenizer, documents, **settings)[0]


def cut_documents(
    tokenizer: Encoder,
    documents: Iterable[str],
    *,
    context: int,
    max_positions: int,
    max_tokens: int | None = None,
    where: object = "text",
) -> tuple[list[list[int]], list[int]]:
    """Documents as sequences of at most `context` tokens, and the number of each one's document.

    None spans two documents.

    Args:
        context: Tokens a sequence, 2 to `max_positions`.
        max_tokens: Predicted tokens at most: whole sequences drawn from all over the text, always
            the same ones; None for all.
        where: What the documents are, for error messages.

    Raises:
        SettingError: If a setting is out of its range.
        InputError: If no sequence has the two tokens that a prediction takes.
    """
    if not 2 <= context <= max_positions:
        raise SettingError(
            "context",
            "out of range",
            expected=f"2 to {max_positions} tokens, the positions of this model",
            found=context,
        )
    sequences: list[list[int]] = []
    origins: list[int] = []
    for number, document in enumerate(documents, start=1):
        ids = tokenizer.encode(document, where=f"{where}, document {number}")
        pieces = [ids[start : start + context] for start in range(0, len(ids), context)]
        pieces = [piece for piece in pieces if len(piece) > 1]
        sequences += pieces
        origins += [number] * len(pieces)
    if not sequences:
        raise InputError(where, "too short to score", expected="at least two tokens")
    return (sequences, origins) if max_tokens is None else _draw(sequences, origins, max_tokens)


def _draw(
    sequences: list[list[int]], origins: list[int], max_tokens: int
) -> tuple[list[list[int]], list[int]]:
    if max_tokens < 1:
        raise SettingError("max tokens", "out of range", expected=">= 1", found=max_tokens)
    order = np.random.default_rng(0).permutation(len(sequences))
    reached = np.cumsum([len(sequences[index]) - 1 for index in order])
    kept = np.sort(order[: int((reached <= max_tokens).sum())])
    if len(kept):
        return [sequences[index] for index in kept], [origins[index] for index in kept]
    # Something always remains: a first sequence that is too long is cut.
    return [sequences[order[0]][: max_tokens + 1]], [origins[order[0]]]


def score_sequences(
    model: Scorer,
    sequences: Sequence[Sequence[int]],
    progress: Progress | None = None,
    *,
    first: int | Sequence[int] = 1,
) -> Scores:
    """Score every sequence by itself.

    Args:
        model: What scores.
        sequences: Token ids.
        progress: Called with the tokens just read.
        first: Token of each sequence, or of all, that is the first to be predicted, ≥ 1.
    """
    firsts = [first] * len(sequences) if isinstance(first, int) else list(first)
    nll = np.zeros(len(sequences))
    correct = np.zeros(len(sequences), np.int64)
    for index, (ids, start) in enumerate(zip(sequences, firsts, strict=True)):
        rows = model.logits(ids)[start - 1 : -1]
        nll[index], correct[index] = _score(rows, np.asarray(ids[start:], np.int64))
        if progress is not None:
            progress(len(ids) - 1)
    tokens = [len(ids) - start for ids, start in zip(sequences, firsts, strict=True)]
    return Scores(nll, correct, np.array(tokens, np.int64))


def _score(logits: NDArray[np.float32], targets: NDArray[np.int64]) -> tuple[float, int]:
    """Summed NLL and number of right guesses of logits [T, V] about the tokens that came [T]."""
    nll, correct = 0.0, 0
    for start in range(0, len(targets), ROWS_AT_ONCE):
        rows, wanted = logits[start : start + ROWS_AT_ONCE], targets[start : start + ROWS_AT_ONCE]
        highest = rows.max(axis=1)
        odds = np.exp(rows - highest[:, None]).sum(axis=1, dtype=np.float64)
        chosen = rows[np.arange(len(wanted)), wanted].astype(np.float64)
        nll += float((np.log(odds) + highest - chosen).sum())
        correct += int((rows.argmax(axis=1) == wanted).sum())
    return nll, correct
