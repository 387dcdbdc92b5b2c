"""How likely a model finds a text, with its memory and without."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import NDArray

from .conversations import Conversations
from .errors import SettingError
from .statistics import Unit, drawn_units, paired_bootstrap
from .texts import DEFAULT_CONTEXT, TokenSequence, TokenText, read_text

if TYPE_CHECKING:
    from .model import Model

ROWS_AT_ONCE = 64  # rows of logits turned into probabilities together; bounds the scratch memory

Progress = Callable[[int], None]


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
        tokens: [n] int64, tokens predicted.
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


def read_for(
    model: Model,
    paths: Sequence[str | Path],
    *,
    context: int | None = None,
    max_tokens: int | None = None,
) -> TokenText:
    """Text files as sequences for a model, conversations written by its chat template.

    Args:
        model: Whose tokenizer and positions to go by.
        paths: `.txt` or `.jsonl` files.
        context: Tokens a sequence, 2 to the positions of the model; None takes 256, or all.
        max_tokens: Predicted tokens at most: whole sequences drawn from all over the text, always
            the same ones; None for all.

    Raises:
        SettingError: If a setting is out of its range.
        InputError: If a file cannot be used, or has nothing to predict.
    """
    positions = model.pipeline.max_positions
    if context is None:
        context = min(DEFAULT_CONTEXT, positions)
    if not 2 <= context <= positions:
        raise SettingError(
            "context",
            "out of range",
            expected=f"2 to {positions} tokens, the positions of this model",
            found=context,
        )
    return read_text(
        paths,
        model.tokenizer,
        vocab_size=model.pipeline.vocab_size,
        max_length=context,
        max_tokens=max_tokens,
        render=Conversations(model.chat_template).documents,
    )


def score_sequences(
    model: Scorer, sequences: Sequence[TokenSequence], progress: Progress | None = None
) -> Scores:
    """Score what is credited of every sequence, each by itself.

    Args:
        model: What scores.
        sequences: What it reads.
        progress: Called with the tokens just read.
    """
    nll = np.zeros(len(sequences))
    correct = np.zeros(len(sequences), np.int64)
    for index, sequence in enumerate(sequences):
        rows = model.logits(sequence.tokens.tolist())[:-1]
        targets = sequence.tokens[1:]
        if not sequence.credited.all():
            rows, targets = rows[sequence.credited], targets[sequence.credited]
        nll[index], correct[index] = _score(rows, targets)
        if progress is not None:
            progress(sequence.read)
    tokens = [sequence.targets for sequence in sequences]
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
