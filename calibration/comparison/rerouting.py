"""Adaptation without reference text: routing that follows the sequence being read.

*Rewiring Experts on the Fly* (arXiv 2510.14853): before generation, and at regular intervals of it,
additive vectors on the router logits of some layers are optimised on the text so far, and kept
until the next time. Here the text is given, so each interval is scored with what the tokens before
it taught. Interval, steps and optimiser are ours; learning rate and layers are chosen on validation
text.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from knnmoe.runtime.texts import TokenText

from ..teacher import Teacher
from .bench import Bench
from .measured import Measured
from .torch_model import Batch, batches, sequence_nll, token_nll

INTERVAL = 64  # tokens
STEPS = 3
RATES = (0.003, 0.01, 0.03)
CHOICE_TOKENS = 1500  # of validation text


@dataclass(frozen=True)
class Settings:
    """How the vectors are learned: Adam's learning rate, and which gates have one."""

    rate: float
    gates: tuple[int, ...]


def rerouted(bench: Bench) -> Measured:
    """Score the tests with routing that adapts online; nothing is kept between sequences."""
    teacher = Teacher.load(bench.checkpoint)
    held = bench.validation.limited(CHOICE_TOKENS)
    settings, found, before = _choose(bench, teacher, held)
    nll = {}
    for name, text in bench.tests.items():
        bench.say(f"re-routing online: {name} text")
        nll[name] = adapted_nll(teacher, text, settings)
    return Measured(
        nll,
        "torch",
        0,
        chosen={
            "learning_rate": settings.rate,
            "gates": list(settings.gates),
            "interval": INTERVAL,
            "steps": STEPS,
            "validation_nll": found,
            "validation_nll_before": before,
        },
    )


def adapted_nll(teacher: Teacher, text: TokenText, settings: Settings) -> NDArray[np.float64]:
    """Summed NLL of each sequence, [n], each interval scored by what came before it."""
    nll = np.zeros(len(text.sequences))
    for batch in batches(text):
        nll[batch.numbers] = _score(teacher, batch, settings)
    return nll


def _choose(bench: Bench, teacher: Teacher, held: TokenText) -> tuple[Settings, float, float]:
    """The best settings on validation text, the NLL with them and without."""
    every = tuple(range(teacher.num_gates))
    late = every[len(every) // 2 :]
    best = None
    for gates in dict.fromkeys((every, late)):
        for rate in RATES:
            bench.say(f"re-routing online: {len(gates)} gates, learning rate {rate:g}")
            found = float(adapted_nll(teacher, held, Settings(rate, gates)).sum() / held.targets)
            if best is None or found < best[1]:
                best = (Settings(rate, gates), found)
    assert best is not None
    return (*best, float(sequence_nll(teacher, held).sum() / held.targets))


def _score(teacher: Teacher, batch: Batch, settings: Settings) -> NDArray[np.float64]:
    rows, length = batch.token_ids.shape
    # One vector a sequence and gate; Adam works by element, so sequences do not meet.
    deltas = {
        gate: torch.zeros(rows, 1, teacher.num_experts, requires_grad=True)
        for gate in settings.gates
    }
    optimizer = torch.optim.Adam(list(deltas.values()), lr=settings.rate)
    nll = torch.zeros(rows, dtype=torch.float64)
    for start in range(0, length, INTERVAL):
        end = min(start + INTERVAL, length)
        if start:
            for _ in range(STEPS):
                # Position start - 1 predicts a token of the interval to come: it is left out.
                read = batch.following[:, :start]
                loss = _nll(teacher, batch, read, deltas)[:, : start - 1].sum()
                optimizer.zero_grad()
                loss.backward()  # type: ignore[no-untyped-call]  # torch has no type for it
                optimizer.step()
        first = max(start - 1, 0)
        with torch.no_grad():
            predicted = _nll(teacher, batch, batch.labels[:, :end], deltas)
            nll += predicted[:, first : end - 1].double().sum(dim=1)
    return nll.numpy()


def _nll(teacher: Teacher, batch: Batch, labels: Tensor, deltas: dict[int, Tensor]) -> Tensor:
    """NLL of the first positions, as many as there are labels [B, end]; 0 where there is none."""
    rows, end = labels.shape

    def correct(gate: int, x: Tensor, logits: Tensor) -> Tensor:
        if gate not in deltas:
            return logits
        return (logits.view(rows, end, -1) + deltas[gate]).view_as(logits)

    return token_nll(teacher.logits(batch.token_ids[:, :end], correct), labels)
