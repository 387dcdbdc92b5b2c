"""The offline step of docs/method.md: free vectors on router logits, moved down the gradient."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F  # noqa: N812 - the name everybody knows it by

from knnmoe.runtime.errors import CheckpointError, SettingError

from .teacher import Teacher

_NO_TARGET = -100


@dataclass(frozen=True)
class GateRows:
    """What one gate saw and learned, one row a predicted token: [N, D], [N, E], [N, E] fp32."""

    router_inputs: NDArray[np.float32]
    router_logits: NDArray[np.float32]
    residuals: NDArray[np.float32]


@dataclass(frozen=True)
class Learned:
    """Result for one batch.

    Attributes:
        gates: By gate; rows in the order of the sequences and their tokens, last tokens left out.
        nll_before: Summed negative log-likelihood of the predicted tokens, frozen router.
        nll_after: The same with the learned logits.
    """

    gates: Mapping[int, GateRows]
    nll_before: float
    nll_after: float


def learn(
    teacher: Teacher,
    sequences: Sequence[NDArray[np.int64]],
    rates: Mapping[int, float],
    *,
    steps: int,
) -> Learned:
    """Learn the residuals of one batch of token sequences, all gates jointly.

    The loss is summed over tokens, so a token's vector does not depend on how many others share its
    batch.

    Args:
        teacher: The frozen model.
        sequences: Token ids, each [n] with n ≥ 2.
        rates: Learning rate of each gate that gets vectors; the others stay frozen.
        steps: Steps of plain gradient descent; 0 records the frozen router and leaves residuals 0.

    Raises:
        CheckpointError: If the frozen model's likelihood is not finite.
        SettingError: If it stops being finite while learning.
    """
    token_ids, labels = _pad(sequences)
    rows = (labels != _NO_TARGET).flatten().nonzero()[:, 0]
    frozen: dict[int, tuple[Tensor, Tensor]] = {}
    deltas: dict[int, Tensor] = {}

    def record(gate: int, x: Tensor, logits: Tensor) -> Tensor:
        if gate not in rates:
            return logits
        frozen[gate] = (x.detach(), logits.detach())
        # A leaf of the graph, so that autograd gives its gradient.
        deltas[gate] = torch.zeros_like(logits).requires_grad_(steps > 0)
        return logits + deltas[gate]

    def correct(gate: int, x: Tensor, logits: Tensor) -> Tensor:
        return logits + deltas[gate] if gate in deltas else logits

    before = loss = _summed_nll(teacher.logits(token_ids, record), labels)
    if not torch.isfinite(before):
        raise CheckpointError("the model", "gives NaN or infinite logits on the reference text")
    for step in range(steps):
        if step:
            loss = _summed_nll(teacher.logits(token_ids, correct), labels)
        gradients = torch.autograd.grad(loss, list(deltas.values()))
        deltas = {
            gate: (delta.detach() - rates[gate] * gradient).requires_grad_()
            for (gate, delta), gradient in zip(deltas.items(), gradients, strict=True)
        }
    after = before
    if steps:
        with torch.no_grad():
            after = _summed_nll(teacher.logits(token_ids, correct), labels)
    finite = all(bool(torch.isfinite(delta).all()) for delta in deltas.values())
    if not (torch.isfinite(after) and finite):
        raise SettingError(
            "learning rate",
            "the learned logits became NaN or infinite",
            found=", ".join(f"{rate:g}" for rate in rates.values()),
            fix="Build with a smaller --learning-rate.",
        )
    learned = {
        gate: GateRows(x[rows].numpy(), logits[rows].numpy(), deltas[gate].detach()[rows].numpy())
        for gate, (x, logits) in frozen.items()
    }
    return Learned(learned, before.item(), after.item())


def _pad(sequences: Sequence[NDArray[np.int64]]) -> tuple[Tensor, Tensor]:
    """Token ids [B, S] padded at the right, and what each position predicts [B, S]."""
    shape = (len(sequences), max(len(s) for s in sequences))
    # Any valid id serves as padding: nothing that counts can attend to it.
    token_ids = torch.zeros(shape, dtype=torch.long)
    labels = torch.full(shape, _NO_TARGET)
    for row, sequence in enumerate(sequences):
        ids = torch.from_numpy(np.ascontiguousarray(sequence))
        token_ids[row, : len(ids)] = ids
        labels[row, : len(ids) - 1] = ids[1:]
    return token_ids, labels


def _summed_nll(logits: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(
        logits.flatten(0, 1), labels.flatten(), reduction="sum", ignore_index=_NO_TARGET
    )
