"""What a memory is compared with is what it says, and reads nothing but the pack."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest

from knnmoe.calibration.controls import GainLaw, first_share, shuffled, without_retrieval
from knnmoe.runtime.calibration import Calibration
from knnmoe.runtime.memory import MemoryPack
from knnmoe.runtime.routing import RoutingRule

RULE = RoutingRule(2)


@pytest.fixture
def pack(tiny_pack: Path) -> MemoryPack:
    return MemoryPack.open(tiny_pack).with_settings(
        variant="residual", calibration=Calibration(interpolate=0.0, scale=0.5)
    )


def background(pack: MemoryPack) -> dict[int, np.ndarray]:
    return {gate.gate: np.arange(gate.entries) % (3 + gate.gate) == 0 for gate in pack.gates}


def test_without_retrieval_every_entry_says_the_same(pack: MemoryPack) -> None:
    gate, marked = pack.gates[1], background(pack)[pack.gates[1].gate]
    own = pack.gate_memory(gate, RULE)
    constant = without_retrieval(pack.with_settings(variant="logits"), background(pack))
    assert constant.variant == "residual"
    assert constant.gates[1].calibration == gate.calibration
    memory = constant.gate_memory(gate, RULE)
    np.testing.assert_allclose(
        memory.values[~marked], np.tile(own.values[~marked].mean(axis=0), ((~marked).sum(), 1)),
        rtol=1e-5,
    )  # fmt: skip
    np.testing.assert_array_equal(memory.values[marked], own.values[marked])
    np.testing.assert_array_equal(memory.keys, own.keys)


def test_shuffled_values_are_all_there_at_other_entries(pack: MemoryPack) -> None:
    gate, marked = pack.gates[1], background(pack)[pack.gates[1].gate]
    own = pack.gate_memory(gate, RULE).values
    moved = shuffled(pack, background(pack)).gate_memory(gate, RULE).values
    assert (moved != own).any()
    np.testing.assert_array_equal(moved[marked], own[marked])
    np.testing.assert_array_equal(np.sort(moved, axis=0), np.sort(own, axis=0))


def test_a_share_of_a_memory_is_its_first_part_of_each_text(pack: MemoryPack) -> None:
    gate, marked = pack.gates[1], background(pack)[pack.gates[1].gate]
    own = pack.gate_memory(gate, RULE)
    quarter = first_share(pack, 1 / 4, background(pack)).gate_memory(gate, RULE)
    kept = [
        *np.flatnonzero(~marked)[: math.ceil((~marked).sum() / 4)],
        *np.flatnonzero(marked)[: math.ceil(marked.sum() / 4)],
    ]
    np.testing.assert_array_equal(quarter.keys, own.keys[kept])
    np.testing.assert_array_equal(quarter.values, own.values[kept])
    assert quarter.n_valid == len(kept)


def test_the_law_says_how_many_tokens_a_gain_takes() -> None:
    tokens = [1000, 2000, 4000, 8000]
    law = GainLaw(tokens, [0.01 - 0.005 * math.log(n) for n in tokens])
    assert law.fit() == (pytest.approx(0.01), pytest.approx(-0.005))
    assert law.needed(0.01 - 0.005 * math.log(50_000)) == pytest.approx(50_000, abs=2)
    assert GainLaw(tokens, [0.0, 0.01, 0.02, 0.03]).needed(-0.01) is None
    assert GainLaw(tokens, [0.0, -1e-9, -2e-9, -3e-9]).needed(-1.0) is None
