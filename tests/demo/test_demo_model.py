"""The shipped model and real text: parity with torch, and the gain that the demo claims.

Needs the texts that `make texts` extracts.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from knnmoe.runtime import Model
from knnmoe.runtime.evaluation import Evaluation, read_for, score_sequences

ROOT = Path(__file__).resolve().parents[2]
CHECKPOINT = ROOT / "examples" / "demo" / "model"
TEXTS = ROOT / "build" / "demo" / "texts"


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from knnmoe.export.exporter import export

    return export(CHECKPOINT, tmp_path_factory.mktemp("demo") / "bundle").bundle


@pytest.fixture(scope="module")
def torch_model() -> Any:
    import torch
    import transformers

    loaded, report = transformers.AutoModelForCausalLM.from_pretrained(
        CHECKPOINT, dtype=torch.float32, output_loading_info=True
    )
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    return loaded.eval()


def documents(name: str, split: str) -> list[str]:
    path = TEXTS / name / f"{split}.jsonl"
    assert path.is_file(), f"{path} is missing: run `make texts` first"
    return [json.loads(line)["text"] for line in path.read_text(encoding="utf-8").splitlines()]


def test_logits_on_real_text_are_those_of_transformers(bundle: Path, torch_model: Any) -> None:
    import torch

    model = Model.load(bundle)
    for name in ("general", "scripture", "finnish"):
        ids = model.tokenizer.encode(documents(name, "test")[0])[:300]
        with torch.no_grad():
            expected = torch_model(torch.tensor([ids])).logits[0].numpy()
        np.testing.assert_allclose(model.logits(ids), expected, atol=1e-4)


def test_greedy_text_is_that_of_transformers(bundle: Path, torch_model: Any) -> None:
    import torch

    model = Model.load(bundle)
    for document in documents("general", "test")[:10]:
        prompt = model.tokenizer.encode(document)[:16]
        with torch.no_grad():
            written = torch_model.generate(
                torch.tensor([prompt]), do_sample=False, max_new_tokens=64, min_new_tokens=64,
                eos_token_id=None, pad_token_id=0,
            )[0, 16:]  # fmt: skip
        ours = model.generate(prompt, do_sample=False, max_new_tokens=64, eos_token_ids=())
        assert list(ours.token_ids) == written.tolist()


@pytest.mark.slow
def test_a_calibrated_memory_gains_in_its_domain_and_spares_general_text(
    bundle: Path, tmp_path: Path
) -> None:
    from knnmoe.calibration.build import build_memory
    from knnmoe.calibration.calibrate import calibrate
    from knnmoe.calibration.settings import BuildSettings

    scripture, general = TEXTS / "scripture", TEXTS / "general"
    build_memory(
        CHECKPOINT,
        [scripture / "reference.jsonl"],
        tmp_path / "pack",
        settings=BuildSettings(max_tokens=12_000),
    )
    calibrate(
        bundle,
        tmp_path / "pack",
        [scripture / "validation.jsonl"],
        [general / "validation.jsonl"],
        max_tokens=5000,
    )
    model = Model.load(bundle)
    change = {}
    for name in ("scripture", "general"):
        sequences = read_for(
            model, [TEXTS / name / "test.jsonl"], context=256, max_tokens=15_000
        ).sequences
        model.disable_memory()
        frozen = score_sequences(model, sequences)
        model.swap_memory(tmp_path / "pack")
        change[name] = Evaluation(frozen, score_sequences(model, sequences)).delta()
    mean, _, high = change["scripture"]
    assert high < 0
    assert mean < -0.02
    assert change["general"][2] < 0.005
