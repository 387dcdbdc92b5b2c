"""What compressed memories are said to cost."""

from __future__ import annotations

from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from knnmoe.calibration import costs
from knnmoe.calibration.costs import (
    FEATURES,
    Costs,
    GateShape,
    Use,
    fit,
    held_bytes,
    made_up,
    plain_bytes,
)
from knnmoe.runtime.errors import SettingError
from knnmoe.runtime.gates import retrieval
from knnmoe.runtime.gates.onnx import memory_inputs
from memories import random_memory

SHAPES = [
    GateShape(300, 96, 8, width, bits, 16, keys, values)
    for (width, bits), (keys, values) in product(
        [(32, 4), (96, 8)],
        [("projected", "int4"), ("int8", "int8"), ("fp16", "fp16"), ("fp16", "as-stored")],
    )
]
SHAPES.append(GateShape(300, 96, 8, 32, 4, 16, "graded", "int8", key_widths=(32, 64)))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_bytes_are_those_of_the_arrays_that_a_search_and_a_blend_read(
    shape: GateShape, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights: list[Any] = []

    class Engine:
        threads = 1

        def __init__(self, graph: Any, **options: Any) -> None:
            weights.extend(options["weights"].values())

    monkeypatch.setattr(retrieval, "OrtEngine", Engine)
    memory = made_up(shape, Use(8, weighted=True))
    found = retrieval.Retrieval.over(memory, 16, threads=1)
    # Views of an array are that array.
    arrays = {a.__array_interface__["data"][0]: a for a in found.inputs.values()}
    assert held_bytes(shape) == sum(a.nbytes for a in (*weights, *arrays.values()))


def test_bytes_of_a_large_memory_as_it_is_count_what_is_scanned() -> None:
    small, large = plain_bytes(4095, 256, 8), plain_bytes(4096, 256, 8)
    one = 4 * 256 + 8 + 4 * 8 + 4
    assert small == 4095 * one + 4 * 256
    assert large == 4096 * (one + 256 + 8) + 4 * 256


def test_bytes_of_a_memory_as_it_is_are_those_of_its_arrays() -> None:
    inputs = memory_inputs(random_memory(0, entries=50, hidden_size=16, num_experts=6))
    small = ("n_valid", "k", "calibration")
    arrays = sum(array.nbytes for name, array in inputs.items() if name not in small)
    assert plain_bytes(50, 16, 6) == arrays


def test_the_fit_finds_what_times_are_made_of() -> None:
    shapes = costs._designs(20_000, 256, 16, 32)
    true = np.array([0.2, 0.03, 0.06, 2.0, 8.0, 0.0, 0.5, 0.1, 0.02])
    features = [shape.features for shape in shapes]
    times = [float(row @ true) for row in features]
    found = fit(features, times)
    assert (found >= 0).all()
    np.testing.assert_allclose(np.array(features) @ found, times, rtol=1e-3)
    # With noise of a tenth the whole is still right to a tenth.
    noisy = np.array(times) * np.random.default_rng(0).uniform(0.9, 1.1, len(times))
    near = np.array(features) @ fit(features, noisy.tolist())
    assert (np.abs(near / times - 1) < 0.12).all()


def record() -> Costs:
    return Costs("a board", 1, 64, 8, 8, 1.5, tuple(0.1 * n for n in range(len(FEATURES))))


def test_a_record_comes_back_as_it_was_written(tmp_path: Path) -> None:
    record().write(tmp_path / "costs.json")
    assert Costs.read(tmp_path / "costs.json") == record()
    shape = SHAPES[0]
    assert record().token_ms([shape] * 3) == pytest.approx(1.5 + 3 * record().gate_ms(shape))


@pytest.mark.parametrize(
    ("old", "new"),
    [("costs/3", "costs/9"), ("1.5", "NaN"), ("1.5", "-2"), ('"entries"', '"others"'), ("{", "[")],
)
def test_a_record_of_something_else_is_refused(tmp_path: Path, old: str, new: str) -> None:
    path = tmp_path / "costs.json"
    record().write(path)
    path.write_text(path.read_text().replace(old, new))
    with pytest.raises(SettingError, match="is no record of costs"):
        Costs.read(path)
