"""Scoring with torch: what fine-tuning, kNN-LM and the oracle share."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F  # noqa: N812 - the name everybody knows it by

from knnmoe.runtime.texts import TokenSequence, TokenText

from ..teacher import Correction, Teacher

BATCH_TOKENS = 1024
_NO_TARGET = -100


@dataclass(frozen=True)
class Batch:
    """Some sequences of a text, padded at the right.

    Attributes:
        numbers: Which sequences, [B].
        token_ids: [B, S].
        labels: [B, S], what each position predicts; -100 where nothing that is credited.
        following: [B, S], the same for all that is read.
    """

    numbers: NDArray[np.int64]
    token_ids: Tensor
    labels: Tensor
    following: Tensor

    @property
    def targets(self) -> int:
        """Predicted tokens."""
        return int((self.labels != _NO_TARGET).sum())


def batches(
    text: TokenText,
    *,
    batch_tokens: int = BATCH_TOKENS,
    shuffle: np.random.Generator | None = None,
) -> Iterator[Batch]:
    """The sequences in batches of like length; with `shuffle`, the batches in a random order."""
    lengths = np.array([len(sequence.tokens) for sequence in text.sequences])
    groups: list[list[int]] = [[]]
    for number in np.argsort(lengths, kind="stable").tolist():
        # The newest is the longest: the whole batch is padded to it.
        if groups[-1] and (len(groups[-1]) + 1) * lengths[number] > batch_tokens:
            groups.append([])
        groups[-1].append(number)
    order = np.arange(len(groups)) if shuffle is None else shuffle.permutation(len(groups))
    for index in order:
        yield pad(np.array(groups[index]), [text.sequences[n] for n in groups[index]])


def pad(numbers: NDArray[np.int64], sequences: Sequence[TokenSequence]) -> Batch:
    """Token sequences as one batch."""
    shape = (len(sequences), max(len(sequence.tokens) for sequence in sequences))
    token_ids = torch.zeros(shape, dtype=torch.long)
    labels = torch.full(shape, _NO_TARGET)
    following = labels.clone()
    for row, sequence in enumerate(sequences):
        ids = torch.from_numpy(np.ascontiguousarray(sequence.tokens))
        token_ids[row, : len(ids)] = ids
        following[row, : len(ids) - 1] = ids[1:]
        credited = torch.from_numpy(sequence.credited)
        labels[row, : len(ids) - 1] = ids[1:].where(credited, torch.tensor(_NO_TARGET))
    return Batch(numbers, token_ids, labels, following)


def token_nll(logits: Tensor, labels: Tensor) -> Tensor:
    """NLL of each position [B, S] in nats, 0 where nothing is predicted."""
    return F.cross_entropy(
        logits.flatten(0, 1), labels.flatten(), reduction="none", ignore_index=_NO_TARGET
    ).view(labels.shape)


def sequence_nll(
    teacher: Teacher, text: TokenText, correct: Correction | None = None
) -> NDArray[np.float64]:
    """Summed NLL of each sequence, [n]."""
    nll = np.zeros(len(text.sequences))
    with torch.no_grad():
        for batch in batches(text):
            found = token_nll(teacher.logits(batch.token_ids, correct), batch.labels)
            nll[batch.numbers] = found.double().sum(dim=1).numpy()
    return nll


def mean_nll(teacher: Teacher, text: TokenText) -> float:
    """Nats a token."""
    return float(sequence_nll(teacher, text).sum() / text.targets)
