from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from knnmoe.calibration.confidence import (
    FOLDS,
    GRID,
    Measured,
    Separation,
    Way,
    candidate,
    choose,
    cross_fitted,
    separations,
)
from knnmoe.calibration.evidence import Evidence
from knnmoe.runtime.blend import sequence_gate
from knnmoe.runtime.calibration import Calibration, preset
from knnmoe.runtime.memory import MemoryPack


def measured(*rows: float, sequences: int = 40, noise: float = 0.0, seed: int = 0) -> Measured:
    """Candidates whose changes have these means, the noise of each sequence shared by all."""
    rng = np.random.default_rng(seed)
    deltas = np.array(rows)[:, None] + noise * rng.normal(size=sequences)
    return Measured(deltas, np.full(sequences, 100), np.arange(sequences))


def test_the_gate_is_fitted_between_the_two_texts() -> None:
    found = Separation(domain=0.9, general=0.7)
    assert (found.midpoint, found.sharpness) == (pytest.approx(0.8), pytest.approx(10))
    numbers = Calibration(midpoint=found.midpoint, sharpness=found.sharpness, sequence=1)
    opened = {}
    for name, evidence in (("domain", 0.9), ("general", 0.7)):
        gate, _ = sequence_gate(np.full(9, evidence), np.zeros((1, 2)), np.array([9]), numbers)
        opened[name] = gate[-1]
    # After nine tokens the growth is three: σ(±3).
    assert opened["domain"] == pytest.approx(1 / (1 + np.exp(-3)))
    assert opened["general"] == pytest.approx(1 - opened["domain"])


def test_evidence_the_wrong_way_round_gives_no_gate() -> None:
    assert Separation(domain=0.7, general=0.9).sharpness == 0
    assert Separation(domain=0.8, general=0.8).sharpness == 0


def test_evidence_is_a_mean_over_tokens_then_over_sequences(pack: MemoryPack) -> None:
    near = np.array([[0.9, 0.5], [0.7, 0.1]], np.float32)
    long = np.full((5, 2), 0.3, np.float32)
    domain = Evidence({0: [near, long], 2: [near, near]})
    general = Evidence({0: [long, long], 2: [long, long]})
    np.testing.assert_allclose(domain.sequence_means(0, 1), [0.8, 0.3])
    np.testing.assert_allclose(domain.sequence_means(0, 2), [0.55, 0.3], rtol=1e-6)
    found = separations(pack, domain, general, 1)
    assert list(found) == [0, 2]
    assert (found[0].domain, found[0].general) == (pytest.approx(0.55), pytest.approx(0.3))


SEPARATIONS = {4: {0: Separation(0.9, 0.5), 2: Separation(0.4, 0.6)}}


@pytest.mark.parametrize("variant", ["residual", "logits"])
@pytest.mark.parametrize("gate", ["sequence", "token", "none"])
def test_a_way_keeps_what_it_does_not_vary(pack: MemoryPack, variant: Any, gate: Any) -> None:
    found = candidate(pack, Way(variant, 4, 0.5, gate), SEPARATIONS).applied(pack)
    assert (found.variant, found.neighbors, found.similarity) == (variant, 4, pack.similarity)
    for stated in found.gates:
        numbers = stated.calibration
        assert (numbers.weight_power, numbers.inverse_temperature, numbers.gamma) == (0, 10, 0.25)
        assert (numbers.interpolate, numbers.scale) == (variant == "logits", 0.5)


def test_ways_differ_in_what_their_gate_looks_at(pack: MemoryPack) -> None:
    def numbers(gate: Any) -> dict[int, Calibration]:
        return dict(candidate(pack, Way("residual", 4, 1.0, gate), SEPARATIONS).calibration)

    sequence, token, none = numbers("sequence"), numbers("token"), numbers("none")
    assert (sequence[0].midpoint, sequence[0].sharpness) == (pytest.approx(0.7), pytest.approx(5))
    assert (sequence[0].sequence, token[0].sequence) == (1, 0)
    assert token[0].sharpness > sequence[0].sharpness
    assert (none[0].sharpness, none[0].power, sequence[0].power) == (0, 2, 1)
    # Gate 2 does not tell the texts apart.
    assert sequence[2].sharpness == token[2].sharpness == 0


def test_the_grid_names_its_ways() -> None:
    assert len({way.name for way in GRID}) == len(GRID)
    assert {way.variant for way in GRID} == {"residual", "logits"}


@pytest.fixture
def pack(tiny_pack: object) -> MemoryPack:
    """A pack that covers gates 0 and 2."""
    from dataclasses import replace

    opened = MemoryPack.open(str(tiny_pack))
    opened = replace(opened, gates=(opened.gates[0], opened.gates[2]))
    numbers = preset("residual", weighting="softmax", temperature=0.1, gamma=0.25)
    return opened.with_settings(calibration=numbers)


def test_the_best_gain_within_the_limit_is_chosen() -> None:
    domain, general = measured(-0.01, -0.05, -0.09), measured(0.0, 0.001, 0.004)
    assert choose(domain, general, 0.002) == 1
    assert choose(domain, general, 0.01) == 2
    assert choose(domain, measured(0.01, 0.01, 0.01), 0.002) is None


def test_the_upper_end_counts_and_not_the_mean() -> None:
    domain = measured(-0.01, -0.09)
    general = Measured(
        np.stack([np.full(40, 0.0005), np.tile([-0.02, 0.02], 20)]),
        np.full(40, 100),
        np.arange(40),
    )
    assert general.deltas[1].mean() == 0
    assert choose(domain, general, 0.002) == 0


def test_choosing_among_noise_does_not_flatter_itself() -> None:
    rng = np.random.default_rng(0)
    tokens, documents = np.full(40, 100), np.arange(40)
    domain = Measured(rng.normal(0, 0.05, (60, 40)), tokens, documents)
    general = Measured(np.zeros((60, 40)), tokens, documents)
    best = choose(domain, general, 0.002)
    assert best is not None
    assert domain.interval(best).high < 0  # looks like a sure gain
    assert cross_fitted(domain, general, 0.002)[0].high > 0  # and is none


def test_a_real_gain_is_proven_and_general_text_measured_with_it() -> None:
    domain, general = measured(-0.01, -0.05, noise=0.02), measured(0.0, 0.001, noise=0.001)
    proven, spared = cross_fitted(domain, general, 0.002)
    assert proven.high < 0
    assert proven.mean == pytest.approx(domain.deltas[1].mean())
    assert spared.mean == pytest.approx(general.deltas[1].mean())


def test_where_nothing_is_allowed_nothing_changes() -> None:
    proven, spared = cross_fitted(measured(-0.1), measured(0.1), 0.002)
    assert (proven.mean, spared.mean) == (0, 0)


def test_a_document_is_in_one_fold_only() -> None:
    documents = np.repeat(np.arange(10) * 3, 4)
    text = Measured(np.zeros((1, 40)), np.full(40, 10), documents)
    folds = text.folds()
    assert set(folds) == set(range(FOLDS))
    for document in np.unique(documents):
        assert len(set(folds[documents == document])) == 1


def test_one_long_document_is_dealt_out_in_stretches() -> None:
    text = Measured(np.zeros((1, 9)), np.full(9, 10), np.zeros(9, int))
    assert text.folds().tolist() == [0, 0, 0, 1, 1, 2, 2, 3, 3]
