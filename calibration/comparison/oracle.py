"""The bound: routing learned on the very tokens that are measured."""

from __future__ import annotations

import math

import numpy as np

from knnmoe.runtime.texts import TokenText

from ..optimize import learn
from ..teacher import Teacher
from .bench import Bench
from .measured import Measured

STEPS = 5
RATE = 0.1  # of a first step, relative to each gate's logits
_PILOT_TOKENS = 2048


def oracle(bench: Bench) -> Measured:
    """Gradient steps on each test sequence's own router logits (docs/method.md, the offline step).

    They see what they predict, so nothing that routes can reach this; how far a memory is from it
    says how much of what routing could do is retrieved.
    """
    teacher = Teacher.load(bench.checkpoint)
    rates = _rates(teacher, bench.validation.limited(_PILOT_TOKENS))
    nll = {}
    for name, text in bench.tests.items():
        bench.say(f"oracle: {name} text")
        nll[name] = np.array(
            [
                learn(teacher, [s.tokens], rates, steps=STEPS, credited=[s.credited]).nll_after
                for s in text.sequences
            ]
        )
    return Measured(nll, "torch", None, chosen={"steps": STEPS, "learning_rate": RATE})


def _rates(teacher: Teacher, text: TokenText) -> dict[int, float]:
    """Rates by which a first step moves each gate's logits by a share of their rms."""
    logits, gradients = np.zeros(teacher.num_gates), np.zeros(teacher.num_gates)
    still = dict.fromkeys(range(teacher.num_gates), 1.0)
    for sequence in text.sequences:
        # One step at rate one leaves the negative gradient.
        one = learn(teacher, [sequence.tokens], still, steps=1, credited=[sequence.credited])
        for gate, rows in one.gates.items():
            logits[gate] += float(np.square(rows.router_logits, dtype=np.float64).sum())
            gradients[gate] += float(np.square(rows.residuals, dtype=np.float64).sum())
    return {
        gate: RATE * math.sqrt(logits[gate] / gradients[gate]) if gradients[gate] else 0.0
        for gate in still
    }
