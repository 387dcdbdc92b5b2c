from __future__ import annotations

import json
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from knnmoe.calibration.build import build_memory
from knnmoe.calibration.calibrate import calibrate
from knnmoe.calibration.confidence import GATES, GRID, Way
from knnmoe.calibration.settings import BuildSettings
from knnmoe.runtime.calibration import preset
from knnmoe.runtime.errors import (
    InputError,
    MemoryPackError,
    OutputError,
    SettingError,
    VerificationError,
)
from knnmoe.runtime.evaluation import read_for, score_sequences
from knnmoe.runtime.memory import MemoryPack
from knnmoe.runtime.model import Model
from knnmoe.runtime.pack_parts import GateEntries
from knnmoe.runtime.pack_writing import write_pack
from tiny import make_tiny_olmoe

STORY = [
    "the spring ", "was late ", "that year ", "a heron ", "waited ", "by the river ", "till May ",
    "nobody crossed ", "the water ", "stood high ",
]  # fmt: skip
CODE = ["RETURN 1; ", "IF x>0 ", "RAISE ", "CALL f(y) ", "[0,1] ", "{} "]
SMALL = (
    Way("residual", 4, 0.5, "sequence"),
    Way("residual", 4, 1.0, "sequence"),
    Way("logits", 4, 1.0, "sequence"),
    Way("residual", 2, 0.5, "none"),
)
Texts = dict[str, Path]


def write_documents(path: Path, words: list[str], seed: int, count: int = 16) -> Path:
    rng = random.Random(seed)
    texts = ["".join(rng.choices(words, k=9)) for _ in range(count)]
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Texts:
    root = tmp_path_factory.mktemp("texts")
    return {
        "reference": write_documents(root / "reference.jsonl", STORY, 0),
        "domain": write_documents(root / "domain.jsonl", STORY, 1),
        "general": write_documents(root / "general.jsonl", CODE, 2),
        "test": write_documents(root / "test.jsonl", STORY, 3),
    }


@pytest.fixture(scope="module")
def learned(
    tmp_path_factory: pytest.TempPathFactory, tiny_checkpoint: Path, texts: Texts
) -> MemoryPack:
    """Even a random model predicts such a domain better with a memory of it."""
    return build_memory(
        tiny_checkpoint,
        [texts["reference"]],
        tmp_path_factory.mktemp("learned") / "pack",
        settings=BuildSettings(),
    ).pack


def copied(pack: MemoryPack, path: Path, *, shuffled: bool = False, sign: int = 1) -> Path:
    rng = np.random.default_rng(0)
    gates = {}
    for gate in pack.gates:
        found = pack.read(gate)
        order = rng.permutation(gate.entries) if shuffled else np.arange(gate.entries)
        gates[gate.gate] = GateEntries(
            found.keys, found.router_logits, sign * found.residuals[order], found.center
        )
    write_pack(
        path,
        model=pack.model,
        gates=gates,
        variant=pack.variant,
        neighbors=pack.neighbors,
        similarity=pack.similarity,
        calibration={gate.gate: gate.calibration for gate in pack.gates},
        origins=None,
        provenance=pack.provenance,
    )
    return path


def content(pack: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in pack.iterdir()}


def run(bundle: Path, pack: Path, texts: Texts, **options: Any) -> Any:
    options = {"ways": SMALL, "threads": 1, "max_general_loss": 0.005} | options
    return calibrate(bundle, pack, [texts["domain"]], [texts["general"]], **options)


def test_a_memory_that_pays_is_calibrated_and_pays_on_other_text(
    tiny_bundle: Path, learned: MemoryPack, texts: Texts, tmp_path: Path
) -> None:
    path = copied(learned, tmp_path / "pack")
    tensors = {name: data for name, data in content(path).items() if name != "memory.json"}
    report = run(tiny_bundle, path, texts)
    assert report.domain.high < -0.05
    assert report.chosen.general.high <= 0.005
    assert [one.candidate.name for one in report.tried] == [way.name for way in SMALL]

    pack = MemoryPack.open(path)
    assert {name: data for name, data in content(path).items() if name != "memory.json"} == tensors
    assert (pack.variant, pack.neighbors) == (
        report.chosen.candidate.variant,
        report.chosen.candidate.neighbors,
    )
    assert {g.gate: g.calibration for g in pack.gates} == report.chosen.candidate.calibration
    assert pack.calibrated
    assert report.controls.retrieval.high < 0
    assert report.controls.constant.mean + report.controls.retrieval.mean == pytest.approx(
        report.chosen.domain.mean
    )
    assert report.switch is not None
    assert report.latency is not None
    said = pack.provenance["calibration"]
    assert said["chosen"] == report.chosen.candidate.name
    assert said["domain"]["cross_fitted_high"] == report.domain.high
    assert said["general"]["delta_high"] == report.chosen.general.high
    assert pack.provenance["reference"] == learned.provenance["reference"]

    model = Model.load(tiny_bundle, memory=path, threads=1)
    sequences = read_for(model, [texts["test"]]).sequences
    with_memory = score_sequences(model, sequences).mean_nll
    model.disable_memory()
    assert with_memory < score_sequences(model, sequences).mean_nll - 0.05


def test_the_report_is_what_the_numbers_are(
    tiny_bundle: Path, learned: MemoryPack, texts: Texts, tmp_path: Path
) -> None:
    """The measured change of the settings written is that of loading the pack and scoring."""
    path = copied(learned, tmp_path / "pack")
    reports: list[tuple[int, int]] = []
    report = run(
        tiny_bundle, path, texts, progress=lambda done, total: reports.append((done, total))
    )
    model = Model.load(tiny_bundle, memory=path, threads=1)
    sequences = read_for(model, [texts["domain"]]).sequences
    with_memory = score_sequences(model, sequences).mean_nll
    model.disable_memory()
    frozen = score_sequences(model, sequences).mean_nll
    assert report.chosen.domain.mean == pytest.approx(with_memory - frozen, abs=1e-5)
    done, total = reports[-1]
    assert done == total


def test_the_usual_ways_are_followed_by_other_gates_for_the_best_of_them(
    tiny_bundle: Path, learned: MemoryPack, texts: Texts, tmp_path: Path
) -> None:
    path = copied(learned, tmp_path / "pack")
    report = run(tiny_bundle, path, texts, ways=None, max_latency=None)
    assert len(report.tried) == len(GRID) + len(GATES)
    leader = min(report.tried[: len(GRID)], key=lambda one: one.domain.mean).candidate
    for one in report.tried[len(GRID) :]:
        assert (one.candidate.variant, one.candidate.neighbors) == (leader.variant, 8)
        for gate, numbers in one.candidate.calibration.items():
            assert numbers.power == leader.calibration[gate].power
    stated = MemoryPack.open(path).provenance["calibration"]
    assert stated["caution"] == report.chosen.candidate.caution


def test_a_shuffled_memory_is_refused_and_unchanged(
    tiny_bundle: Path, learned: MemoryPack, texts: Texts, tmp_path: Path
) -> None:
    path = copied(learned, tmp_path / "pack", shuffled=True)
    before = content(path)
    with pytest.raises(VerificationError, match="unchanged"):
        run(tiny_bundle, path, texts, max_general_loss=10.0)
    assert content(path) == before


def test_a_constant_correction_is_no_memory(
    tiny_bundle: Path, learned: MemoryPack, texts: Texts, tmp_path: Path
) -> None:
    path = tmp_path / "pack"
    gates = {}
    for gate in learned.gates:
        found = learned.read(gate)
        mean = found.residuals.astype(np.float32).mean(axis=0, keepdims=True)
        same = np.repeat(mean, gate.entries, axis=0).astype(found.residuals.dtype)
        gates[gate.gate] = replace(found, residuals=same)
    write_pack(
        path, model=learned.model, gates=gates, variant="residual", neighbors=4,
        similarity="cosine", calibration=preset("residual", weighting="softmax"), origins=None,
        provenance={},
    )  # fmt: skip
    before = content(path)
    with pytest.raises(VerificationError, match=r"adds nothing|not make the domain's text"):
        run(tiny_bundle, path, texts, ways=SMALL[:2], max_general_loss=10.0)
    assert content(path) == before


def test_a_refusal_says_how_much_reference_text_might_do(
    tiny_bundle: Path, learned: MemoryPack, texts: Texts, tmp_path: Path
) -> None:
    path = copied(learned, tmp_path / "pack", shuffled=True)
    with pytest.raises(VerificationError, match=r"reference tokens would do|gains nothing with"):
        run(tiny_bundle, path, texts, ways=SMALL[2:3], max_general_loss=10.0)


@pytest.mark.slow
def test_a_thorough_calibration_also_tries_each_gate_frozen_and_less_text(
    tiny_bundle: Path, learned: MemoryPack, texts: Texts, tmp_path: Path
) -> None:
    path = copied(learned, tmp_path / "pack")
    reports: list[tuple[int, int]] = []
    report = run(
        tiny_bundle, path, texts, thorough=True, max_latency=None,
        progress=lambda done, total: reports.append((done, total)),
    )  # fmt: skip
    assert len(report.tried) == len(SMALL) + len(learned.gates)
    assert report.law is not None
    assert report.law.tokens[-1] == learned.entries
    assert report.law.changes[-1] < report.law.changes[0]
    assert report.controls.shuffled is not None
    assert report.controls.shuffled.mean > report.chosen.domain.mean
    assert report.latency is None
    assert reports[-1][0] == reports[-1][1]


def test_a_memory_that_general_text_pays_for_is_refused_and_unchanged(
    tiny_bundle: Path, learned: MemoryPack, texts: Texts, tmp_path: Path
) -> None:
    path = copied(learned, tmp_path / "pack", sign=-1)
    before = content(path)
    alike = texts | {"general": texts["test"]}  # so near that no gate tells it from the domain
    with pytest.raises(VerificationError, match=r"general text too much.*unchanged"):
        run(tiny_bundle, path, alike, max_general_loss=0.0)
    assert content(path) == before


def test_too_little_text_is_refused(tiny_bundle: Path, learned: MemoryPack, texts: Texts) -> None:
    with pytest.raises(InputError, match="too little domain text"):
        run(tiny_bundle, learned.path, texts, max_tokens=300)


def test_a_pack_that_cannot_be_written_into_is_refused_before_anything_is_measured(
    tiny_bundle: Path, learned: MemoryPack, texts: Texts, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("os.access", lambda path, mode: Path(path) != learned.path)
    with pytest.raises(OutputError, match="cannot be written into"):
        run(tiny_bundle, learned.path, texts, progress=pytest.fail)


def test_a_memory_of_another_model_is_refused(
    learned: MemoryPack, texts: Texts, tmp_path: Path
) -> None:
    from knnmoe.export.exporter import export

    export(make_tiny_olmoe(tmp_path / "other", seed=1), tmp_path / "bundle")
    with pytest.raises(MemoryPackError, match="another model"):
        run(tmp_path / "bundle", learned.path, texts)


def test_text_that_the_memory_was_built_from_is_refused(
    tiny_bundle: Path, learned: MemoryPack, texts: Texts
) -> None:
    before = content(learned.path)
    with pytest.raises(InputError, match=r"reference\.jsonl.*16 of 16 sequences"):
        run(tiny_bundle, learned.path, texts | {"domain": texts["reference"]})
    assert content(learned.path) == before


def test_domain_and_general_text_must_differ(
    tiny_bundle: Path, learned: MemoryPack, texts: Texts
) -> None:
    with pytest.raises(InputError, match="as domain and as general"):
        run(tiny_bundle, learned.path, texts | {"general": texts["domain"]})


def test_bad_input_is_refused(tiny_bundle: Path, learned: MemoryPack, texts: Texts) -> None:
    with pytest.raises(InputError, match=r"nowhere\.txt"):
        calibrate(tiny_bundle, learned.path, [Path("nowhere.txt")], [texts["general"]])
    for limit in (-1.0, float("nan"), float("inf")):
        for name in ("max_general_loss", "max_switch_loss", "max_latency"):
            with pytest.raises(SettingError, match=name.replace("_", " ")):
                run(tiny_bundle, learned.path, texts, **{name: limit})
