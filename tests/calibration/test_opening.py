"""The gate opens on evidence of the domain, and closes again."""

from __future__ import annotations

import numpy as np
import pytest

from knnmoe.calibration.opening import fit_opening
from knnmoe.runtime.blend import sequence_gate
from knnmoe.runtime.calibration import Calibration


def rows(mean: float, seed: int, noise: float = 0.1) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    return [np.clip(rng.normal(mean, noise, 60), 0, 1) for _ in range(20)]


def gate_over(evidence: np.ndarray, found: object, decay: float) -> np.ndarray:
    numbers = Calibration(
        midpoint=found.midpoint, sharpness=found.sharpness, cap=12, sequence=1, decay=decay
    )  # fmt: skip
    gate, _ = sequence_gate(evidence, np.zeros((1, 2)), np.array([len(evidence)]), numbers)
    return gate


@pytest.mark.parametrize("decay", [1.0, 0.9])
def test_the_gate_is_fitted_between_the_two_texts(decay: float) -> None:
    near, far = rows(0.85, 0), rows(0.65, 1)
    found = fit_opening(near, far, decay=decay, cap=12, sequence=True)
    assert 0.65 < found.midpoint < 0.85
    opened = np.mean([gate_over(row, found, decay)[20:].mean() for row in rows(0.85, 2)])
    closed = np.mean([gate_over(row, found, decay)[20:].mean() for row in rows(0.65, 3)])
    assert opened > 0.9
    assert closed < 0.05


def test_a_decaying_gate_lets_go_of_text_that_changes_its_subject() -> None:
    near, far = rows(0.85, 0), rows(0.65, 1)
    late = {}
    for decay in (1.0, 0.9):
        found = fit_opening(near, far, decay=decay, cap=12, sequence=True)
        joined = [np.concatenate(both) for both in zip(rows(0.85, 2), rows(0.65, 3), strict=True)]
        late[decay] = np.mean([gate_over(row, found, decay)[60:].mean() for row in joined])
    assert late[0.9] < 0.5 * late[1.0]


def test_caution_keeps_the_gate_closed_for_longer() -> None:
    near, far = rows(0.8, 0), rows(0.7, 1)
    bold, careful = (
        fit_opening(near, far, decay=0.9, cap=12, sequence=True, caution=caution)
        for caution in (1.0, 10.0)
    )
    assert careful.midpoint > bold.midpoint


def test_evidence_the_wrong_way_round_gives_no_gate() -> None:
    for sequence in (True, False):
        found = fit_opening(rows(0.6, 0), rows(0.8, 1), decay=0.9, cap=12, sequence=sequence)
        assert found.sharpness == 0


def test_texts_told_apart_without_a_mistake_give_a_finite_gate() -> None:
    found = fit_opening(rows(1, 0, 0), rows(0, 1, 0), decay=1.0, cap=12, sequence=True)
    assert 0 < found.midpoint < 1
    assert 0 < found.sharpness < 1e5
