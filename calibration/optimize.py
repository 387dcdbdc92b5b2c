"""The offline step of docs/method.md: free vectors on router logits, moved down the gradient."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

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
        nll_after: The same with the learned logits; NaN where it was not asked for.
    """

    gates: Mapping[int, GateRows]
    nll_before: float
    nll_after: float


def learn(
    teacher: Teacher,
    sequences: Sequence[NDArray[Any]],
    rates: Mapping[int, float],
    *,
    steps: int,
    credited: Sequence[NDArray[np.bool_]] | None = None,
    measure: bool = True,
) -> Learned:
    """Learn the residuals of one batch of token sequences, all gates jointly.

    The loss is summed over tokens, so a token's vector does not depend on how many others share its
    batch. Vectors are fp32 whatever the model computes in.

    Args:
        teacher: The frozen model.
        sequences: Token ids, each [n] with n ≥ 2.
        rates: Learning rate of each gate that gets vectors; the others stay frozen.
        steps: Steps of plain gradient descent; 0 records the frozen router and leaves residuals 0.
        credited: For each sequence [n - 1], whether the token that follows counts in the loss and
            the one before it gets a row; None for all of them.
        measure: Whether to run the model once more for the likelihood after the last step.

    Raises:
        CheckpointError: If the frozen model's likelihood is not finite.
        SettingError: If it stops being finite while learning.
    """
    token_ids, labels = (part.to(teacher.device) for part in _pad(sequences, credited))
    counted = (labels != _NO_TARGET).flatten()
    rows = counted.nonzero()[:, 0]
    frozen: dict[int, tuple[Tensor, Tensor]] = {}
    deltas: dict[int, Tensor] = {}

    def record(gate: int, x: Tensor, logits: Tensor) -> Tensor:
        if gate not in rates:
            return logits
        frozen[gate] = (x.detach(), logits.detach())
        # A leaf of the graph, so that autograd gives its gradient.
        wide = torch.promote_types(logits.dtype, torch.float32)
        deltas[gate] = torch.zeros_like(logits, dtype=wide).requires_grad_(steps > 0)
        return correct(gate, x, logits)

    def correct(gate: int, x: Tensor, logits: Tensor) -> Tensor:
        return (logits + deltas[gate]).to(logits.dtype) if gate in deltas else logits

    with torch.set_grad_enabled(steps > 0):
        before = loss = _summed_nll(teacher.logits(token_ids, record), labels)
    if not torch.isfinite(before):
        raise CheckpointError("the model", "gives NaN or infinite logits on the reference text")
    for step in range(steps):
        if step:
            loss = _summed_nll(teacher.logits(token_ids, correct), labels)
        gradients = torch.autograd.grad(loss, list(deltas.values()))
        # Where no entry will be, nothing is learned: the text is read there as it always was.
        deltas = {
            gate: (delta.detach() - rates[gate] * gradient * counted[:, None]).requires_grad_()
            for (gate, delta), gradient in zip(deltas.items(), gradients, strict=True)
        }
    after = before
    if steps and measure:
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

    def kept(tensor: Tensor) -> NDArray[np.float32]:
        found: NDArray[np.float32] = tensor.detach()[rows].float().cpu().numpy()
        return found

    learned = {
        gate: GateRows(kept(x), kept(logits), kept(deltas[gate]))
        for gate, (x, logits) in frozen.items()
    }
    unknown = steps > 0 and not measure
    return Learned(learned, before.item(), float("nan") if unknown else after.item())


def _pad(
    sequences: Sequence[NDArray[Any]], credited: Sequence[NDArray[np.bool_]] | None
) -> tuple[Tensor, Tensor]:
    """Token ids [B, S] padded at the right, and what each position predicts [B, S]."""
    shape = (len(sequences), max(len(s) for s in sequences))
    # Any valid id serves as padding: nothing that counts can attend to it.
    token_ids = np.zeros(shape, np.int64)
    labels = np.full(shape, _NO_TARGET, np.int64)
    for row, sequence in enumerate(sequences):
        count = len(sequence)
        token_ids[row, :count] = sequence
        following = sequence[1:]
        if credited is not None:
            following = np.where(credited[row], following, _NO_TARGET)
        labels[row, : count - 1] = following
    return torch.from_numpy(token_ids), torch.from_numpy(labels)


def _summed_nll(logits: Tensor, labels: Tensor) -> Tensor:
    wide = torch.promote_types(logits.dtype, torch.float32)
    return F.cross_entropy(
        logits.flatten(0, 1).to(wide),
        labels.flatten(),
        reduction="sum",
        ignore_index=_NO_TARGET,
    )
