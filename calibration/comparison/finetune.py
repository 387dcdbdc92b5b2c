"""The alternative that changes weights: fine-tuning on the same reference text."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Literal

import numpy as np
import torch
from torch import Tensor
from torch.nn import Parameter

from knnmoe.runtime.errors import VerificationError
from knnmoe.runtime.texts import TokenText

from ..teacher import Teacher
from .bench import Bench
from .measured import Measured
from .torch_model import batches, mean_nll, sequence_nll, token_nll

What = Literal["router", "all"]

# Learning rates tried, largest last; the router's few weights bear more.
RATES: dict[What, tuple[float, ...]] = {
    "router": (3e-4, 1e-3, 3e-3),
    "all": (1e-4, 3e-4, 1e-3),
}
MAX_EPOCHS = 3
CHECKS = 2  # an epoch: how often validation text is asked whether to stop


def fine_tuned(bench: Bench, what: What) -> Measured:
    """Fine-tune with Adam; learning rate and number of steps are those best on validation text."""
    teacher = Teacher.load(bench.checkpoint)
    parameters = _parameters(teacher, what)
    before = mean_nll(teacher, bench.validation)
    start = [parameter.detach().clone() for parameter in parameters]
    best, chosen = (before, start), {"learning_rate": 0.0, "steps": 0}
    for rate in RATES[what]:
        bench.say(f"fine-tuning {what}, learning rate {rate:g}")
        _set(parameters, start)
        found, state, steps = _train(teacher, parameters, rate, bench.reference, bench.validation)
        if found < best[0]:
            best, chosen = (found, state), {"learning_rate": rate, "steps": steps}
    _set(parameters, best[1])
    return Measured(
        {name: sequence_nll(teacher, text) for name, text in bench.tests.items()},
        "torch",
        sum(parameter.numel() * parameter.element_size() for parameter in parameters),
        chosen={**chosen, "validation_nll": best[0], "validation_nll_before": before},
    )


router, everything = partial(fine_tuned, what="router"), partial(fine_tuned, what="all")


def _parameters(teacher: Teacher, what: What) -> list[Parameter]:
    chosen = (
        teacher.model.parameters()
        if what == "all"
        else [p for module in teacher.routers for p in module.parameters()]
    )
    parameters: list[Parameter] = list(chosen)
    for parameter in parameters:
        parameter.requires_grad_()
    if not parameters:
        raise VerificationError("router fine-tuning", "this model's routers have no weights")
    return parameters


def _set(parameters: Sequence[Parameter], values: Sequence[Tensor]) -> None:
    with torch.no_grad():
        for parameter, value in zip(parameters, values, strict=True):
            parameter.copy_(value)


def _train(
    teacher: Teacher,
    parameters: Sequence[Parameter],
    rate: float,
    reference: TokenText,
    validation: TokenText,
) -> tuple[float, list[Tensor], int]:
    """The best validation NLL on the way, the weights there, and the steps that led there."""
    optimizer = torch.optim.Adam(parameters, lr=rate)
    rng = np.random.default_rng(0)
    best = (float("inf"), [parameter.detach().clone() for parameter in parameters], 0)
    steps = worse = 0
    for _ in range(MAX_EPOCHS):
        epoch = list(batches(reference, shuffle=rng))
        checks = {len(epoch) * (number + 1) // CHECKS for number in range(CHECKS)}
        for number, batch in enumerate(epoch, start=1):
            loss = token_nll(teacher.logits(batch.token_ids), batch.labels).sum() / batch.targets
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]  # torch has no type for it
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            steps += 1
            if number not in checks:
                continue
            found = mean_nll(teacher, validation)
            worse = 0 if found < best[0] else worse + 1
            if found < best[0]:
                best = (found, [parameter.detach().clone() for parameter in parameters], steps)
            if worse == CHECKS:
                return best
    return best
