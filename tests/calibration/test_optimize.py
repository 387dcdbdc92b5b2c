from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from knnmoe.calibration.optimize import learn
from knnmoe.calibration.teacher import Teacher
from knnmoe.runtime.errors import CheckpointError, SettingError
from tiny import make_tiny_olmoe

RNG = np.random.default_rng(0)
ONE = dict.fromkeys(range(3), 1.0)  # the learning rate of every gate
RATES = dict.fromkeys(range(3), 1.0)
SEQUENCES = [RNG.integers(0, 256, size) for size in (9, 5, 2)]


@pytest.fixture(scope="module")
def teacher(tiny_checkpoint: Path) -> Teacher:
    return Teacher.load(tiny_checkpoint)


def nll(teacher: Teacher, tokens: np.ndarray, deltas: dict[int, Tensor] | None = None) -> float:
    """Summed negative log-likelihood of one sequence, computed in another way, in float64."""

    def correct(gate: int, x: Tensor, logits: Tensor) -> Tensor:
        return logits + deltas[gate] if deltas and gate in deltas else logits

    ids = torch.from_numpy(tokens)[None]
    with torch.no_grad():
        log = teacher.logits(ids, correct)[0].double().log_softmax(-1)
    return -float(log[torch.arange(len(tokens) - 1), ids[0, 1:]].sum())


def test_every_predicted_token_gets_one_row_in_order(teacher: Teacher) -> None:
    learned = learn(teacher, SEQUENCES, ONE, steps=0)
    assert {gate: len(rows.residuals) for gate, rows in learned.gates.items()} == dict.fromkeys(
        range(3), 8 + 4 + 1
    )
    alone = [learn(teacher, [s], ONE, steps=0) for s in SEQUENCES]
    for gate in range(3):
        for name in ("router_inputs", "router_logits"):
            apart = np.concatenate([getattr(part.gates[gate], name) for part in alone])
            np.testing.assert_allclose(getattr(learned.gates[gate], name), apart, atol=1e-5)


def test_no_steps_record_the_frozen_router(teacher: Teacher) -> None:
    learned = learn(teacher, SEQUENCES, ONE, steps=0)
    assert all(not rows.residuals.any() for rows in learned.gates.values())
    assert learned.nll_after == learned.nll_before
    assert learned.nll_before == pytest.approx(sum(nll(teacher, s) for s in SEQUENCES), rel=1e-5)


def test_one_step_follows_the_gradient_of_finite_differences(tmp_path: Path) -> None:
    # Every expert is chosen: where the choice changes, the likelihood has no slope.
    teacher = Teacher.load(make_tiny_olmoe(tmp_path / "soft", num_experts_per_tok=8))
    teacher.model.double()
    # The family's own code takes its softmax in float32: smaller steps would drown.
    tokens, step = SEQUENCES[0], 3e-3
    learned = learn(teacher, [tokens], ONE, steps=1)
    slopes = []
    for gate, row, expert in [(0, 2, 1), (0, 7, 5), (1, 4, 0), (2, 0, 3), (2, 6, 7)]:
        sides = []
        for sign in (1, -1):
            delta = torch.zeros(len(tokens), 8, dtype=torch.float64)
            delta[row, expert] = sign * step
            sides.append(nll(teacher, tokens, {gate: delta}))
        slopes.append((sides[0] - sides[1]) / (2 * step))
        found = learned.gates[gate].residuals[row, expert]
        assert found == pytest.approx(-slopes[-1], rel=5e-3, abs=1e-4)
    assert min(map(abs, slopes)) > 1e-3


def test_steps_lower_the_loss_and_the_figures_say_so(teacher: Teacher) -> None:
    one = learn(teacher, SEQUENCES, ONE, steps=1)
    three = learn(teacher, SEQUENCES, ONE, steps=3)
    assert three.nll_after < one.nll_after < one.nll_before - 0.01
    tokens = SEQUENCES[0]
    alone = learn(teacher, [tokens], ONE, steps=3)
    last = torch.zeros(1, 8)  # the last token has no entry
    deltas = {
        gate: torch.cat([torch.from_numpy(rows.residuals), last])
        for gate, rows in alone.gates.items()
    }
    assert nll(teacher, tokens, deltas) == pytest.approx(alone.nll_after, rel=1e-5)


def test_a_tokens_residual_does_not_depend_on_its_batch(teacher: Teacher) -> None:
    together = learn(teacher, SEQUENCES, ONE, steps=2)
    alone = learn(teacher, SEQUENCES[1:2], ONE, steps=2)
    for gate in range(3):
        np.testing.assert_allclose(
            together.gates[gate].residuals[8:12], alone.gates[gate].residuals, atol=2e-5
        )


def test_only_the_gates_asked_for_are_learned(teacher: Teacher) -> None:
    learned = learn(teacher, SEQUENCES, {2: 1.0}, steps=2)
    assert list(learned.gates) == [2]
    assert learned.nll_after < learned.nll_before


def test_divergence_is_an_error_and_not_a_memory(teacher: Teacher) -> None:
    with pytest.raises(SettingError, match=r"learning rate: .*NaN.*1e\+39.*smaller"):
        learn(teacher, SEQUENCES, dict.fromkeys(range(3), 1e39), steps=3)


def test_a_model_that_gives_nan_is_refused(tiny_checkpoint: Path) -> None:
    teacher = Teacher.load(tiny_checkpoint)
    with torch.no_grad():
        teacher.model.lm_head.weight[0, 0] = float("nan")
    with pytest.raises(CheckpointError, match="NaN"):
        learn(teacher, SEQUENCES, ONE, steps=1)
