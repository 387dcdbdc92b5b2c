from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from knnmoe.calibration.summary import summarize
from knnmoe.calibration.tables import formula
from knnmoe.runtime.blend import unit_rows
from knnmoe.runtime.calibration import Calibration, preset
from knnmoe.runtime.memory import MemoryPack
from knnmoe.runtime.pack_parts import EntryOrigins, GateEntries, ModelIdentity
from knnmoe.runtime.pack_writing import write_pack

HIDDEN, EXPERTS = 6, 3


def write(path: Path, keys: np.ndarray, documents: list[int], **options: object) -> MemoryPack:
    count = len(documents)
    logits = np.full((count, EXPERTS), 2.0, np.float32)
    residuals = np.where(np.array(documents)[:, None] < 0, 0, 0.5).astype(np.float32)
    center = np.zeros(HIDDEN, np.float32)
    entries = GateEntries(keys, logits, np.tile(residuals, (1, EXPERTS)), center)
    numbers = np.arange(count, dtype=np.int32)
    settings = {
        "variant": "residual",
        "neighbors": 2,
        "similarity": "cosine",
        "calibration": preset("residual"),
        "origins": EntryOrigins(numbers, np.array(documents, np.int32), numbers),
        "provenance": {},
    } | options
    return write_pack(
        path,
        model=ModelIdentity("sha256:" + "0" * 64, "olmoe", 2, HIDDEN, EXPERTS),
        gates={1: entries},
        **settings,  # type: ignore[arg-type] # named above
    )


@pytest.fixture
def keys() -> np.ndarray:
    return np.random.default_rng(0).normal(size=(5, HIDDEN)).astype(np.float32)


def test_magnitudes_leave_background_out(tmp_path: Path, keys: np.ndarray) -> None:
    gate = summarize(write(tmp_path / "p", keys, [0, 0, 1, -1, -2])).gates[0]
    assert (gate.gate, gate.entries, gate.background) == (1, 5, 2)
    assert (gate.logit_rms, gate.residual_rms) == (pytest.approx(2), pytest.approx(0.5))
    assert gate.bytes > 5 * (HIDDEN + 2 * EXPERTS) * 4


def test_evidence_is_what_other_documents_offer(tmp_path: Path, keys: np.ndarray) -> None:
    documents = np.array([0, 0, 1, 2, -1])
    gate = summarize(write(tmp_path / "p", keys, documents.tolist())).gates[0]
    unit = unit_rows(keys)
    expected = []
    for entry in range(4):  # the last one is background: nobody asks what it finds
        cosines = unit[documents != documents[entry]] @ unit[entry]
        expected.append(np.clip(np.sort(cosines)[-2:], 0, 1).mean())
    assert gate.similarity == pytest.approx(np.mean(expected), abs=1e-6)


def test_one_document_has_no_others(tmp_path: Path, keys: np.ndarray) -> None:
    summary = summarize(write(tmp_path / "p", keys, [0] * 5))
    assert np.isnan(summary.gates[0].similarity)
    assert summary.to_json()["gates"][0]["similarity"] is None


def test_a_pack_that_does_not_say_where_entries_come_from(tmp_path: Path, keys: np.ndarray) -> None:
    gate = summarize(write(tmp_path / "p", keys, [0] * 5, origins=None)).gates[0]
    assert 0 < gate.similarity < 1


def test_rbf_evidence_is_measured_with_the_packs_gamma(tmp_path: Path, keys: np.ndarray) -> None:
    numbers = replace(preset("residual"), gamma=0.05)
    pack = write(tmp_path / "p", keys, [0, 1, 2, 3, 4], similarity="rbf", calibration=numbers)
    squares = ((keys[:, None] - keys[None]) ** 2).sum(-1)
    nearest = np.sort(np.exp(-0.05 * squares), axis=1)[:, -3:-1]
    assert summarize(pack).gates[0].similarity == pytest.approx(nearest.mean(), abs=1e-5)


def test_json_names_everything_a_script_needs(tmp_path: Path, keys: np.ndarray) -> None:
    found = summarize(write(tmp_path / "p", keys, [0, 0, 1, 1, 1])).to_json()
    assert found["entries"] == 5
    assert found["model"]["num_gates"] == 2
    assert (found["variant"], found["neighbors"], found["similarity"]) == ("residual", 2, "cosine")
    assert found["gates"][0]["calibration"]["mean"] == 1.0


@pytest.mark.parametrize(
    ("numbers", "text"),
    [
        (Calibration(), "λ = 1·s̄, w ∝ s"),
        (preset("logits", confidence="sum"), "λ = 1·min(1, Σs), w ∝ s"),
        (preset("residual", weighting="softmax", scale=0.7, power=2.0),
         "λ = 0.7·s̄^2, w ∝ exp(s/0.05)"),
        (Calibration(sharpness=3, sequence=1, weight_power=0),
         "λ = 1·s̄·σ(min(√t, 12)·sharpness·(mean s̄ - midpoint)), w ∝ 1"),
        (Calibration(sharpness=3), "λ = 1·s̄·σ(sharpness·(s̄ - midpoint)), w ∝ s"),
    ],
)  # fmt: skip
def test_a_calibration_is_shown_as_a_formula(numbers: Calibration, text: str) -> None:
    assert formula(numbers) == text
