from __future__ import annotations

import json
import random
import subprocess
import sys
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from knnmoe.calibration import calibrate as calibrate_module
from knnmoe.calibration.cli import memory
from knnmoe.calibration.settings import (
    DTYPES,
    GRADIENTS,
    OBJECTIVES,
    PRECISIONS,
    RATES,
    BuildSettings,
    UseSettings,
)
from knnmoe.runtime.calibration import SIMILARITIES, VARIANTS
from knnmoe.runtime.memory import MemoryPack

Call = Any


@pytest.fixture
def call() -> Call:
    def run(*arguments: object) -> Result:
        return CliRunner().invoke(memory, [str(argument) for argument in arguments])

    return run


SMALL = ("--max-length", 32)


def test_build_prints_one_json_object(
    call: Call, tiny_checkpoint: Path, reference: Path, background: Path, tmp_path: Path
) -> None:
    result = call(
        "build", tiny_checkpoint, reference, reference, tmp_path / "pack", *SMALL,
        "--background", background, "--background-ratio", "0.5", "--json",
    )  # fmt: skip
    assert result.exit_code == 0
    found = json.loads(result.stdout)
    pack = MemoryPack.open(tmp_path / "pack")
    assert found["entries"] == pack.entries == found["tokens"] + found["background_tokens"]
    assert (found["gates"], found["pack"]) == (3, str(tmp_path / "pack"))
    assert found["seconds"] > 0
    assert found["nll_after"] < found["nll_before"]
    assert pack.provenance["reference"]["files"] == ["reference.jsonl"] * 2


def test_build_takes_its_settings_from_options(
    call: Call, tiny_checkpoint: Path, reference: Path, tmp_path: Path
) -> None:
    result = call(
        "build", tiny_checkpoint, reference, tmp_path / "pack", *SMALL, "--variant", "logits",
        "--similarity", "rbf", "--neighbors", 5, "--confidence", "sum", "--weighting", "similarity",
        "--scale", 0.9, "--power", 1, "--gates", "0,2", "--precision", "fp32", "--steps", 1,
        "--max-tokens", 40,
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    assert "NLL of the reference text" in result.stdout
    pack = MemoryPack.open(tmp_path / "pack")
    assert (pack.variant, pack.similarity, pack.neighbors) == ("logits", "rbf", 5)
    assert [gate.gate for gate in pack.gates] == [0, 2]
    numbers = pack.gates[0].calibration
    assert (numbers.mean, numbers.weight_power, numbers.scale, numbers.power) == (0, 1, 0.9, 1)
    assert pack.entries <= 40
    assert pack.provenance["steps"] == 1


def test_a_stated_failure_is_exit_code_1_and_json(call: Call, tmp_path: Path) -> None:
    result = call("build", tmp_path / "nowhere", "text.txt", tmp_path / "pack", "--json")
    assert result.exit_code == 1
    assert json.loads(result.stdout)["error"] == "CheckpointError"
    assert not list(tmp_path.iterdir())
    plain = call("build", tmp_path / "nowhere", "text.txt", tmp_path / "pack")
    assert plain.exit_code == 1
    assert (plain.stdout, "not a checkpoint" in plain.stderr) == ("", True)


def test_wrong_usage_is_exit_code_2(call: Call) -> None:
    assert call("build", "checkpoint", "pack").exit_code == 2
    assert call("build", "c", "r.txt", "p", "--variant", "other").exit_code == 2
    assert call("calibrate", "bundle", "pack", "--domain", "d.txt").exit_code == 2


def test_an_interrupt_says_how_to_go_on(
    call: Call,
    tiny_checkpoint: Path,
    reference: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from knnmoe.calibration import learners

    learn, learned = learners.learn, []

    def interrupt(*arguments: Any, **options: Any) -> Any:
        if len(learned) == batches:
            raise KeyboardInterrupt
        learned.append(learn(*arguments, **options))
        return learned[-1]

    monkeypatch.setattr(learners, "learn", interrupt)
    for batches in (0, 2):
        learned.clear()
        result = call(
            "build", tiny_checkpoint, reference, tmp_path / "pack", "--batch-tokens", "64",
            "--max-length", "32", "--rate", "absolute",
        )  # fmt: skip
        assert result.exit_code == 130
        assert ("same command again" in result.stderr) == bool(batches)
        assert not (tmp_path / "pack").exists()


def test_inspect_shows_a_pack(call: Call, tiny_pack: Path) -> None:
    result = call("inspect", tiny_pack)
    assert result.exit_code == 0
    assert "residual" in result.stdout
    assert "300" in result.stdout
    found = json.loads(call("inspect", tiny_pack, "--json").stdout)
    assert found["entries"] == 300
    assert [gate["gate"] for gate in found["gates"]] == [0, 1, 2]
    assert found["gates"][0]["calibration"]["sharpness"] == 3


def test_inspect_does_not_obey_what_a_pack_says(
    call: Call, tiny_pack: Path, tmp_path: Path
) -> None:
    import shutil

    path = tmp_path / "pack"
    shutil.copytree(tiny_pack, path)
    manifest = json.loads((path / "memory.json").read_text())
    manifest["provenance"] = {"made": "[/nonsense] \x1b[31mred", "\x1b]0;name": {"[b]": "[x]"}}
    (path / "memory.json").write_text(json.dumps(manifest))
    result = call("inspect", path)
    assert result.exit_code == 0
    assert "[/nonsense]" in result.stdout
    assert "\x1b" not in result.stdout


def test_inspect_refuses_a_changed_pack(call: Call, tiny_pack: Path, tmp_path: Path) -> None:
    import shutil

    path = tmp_path / "pack"
    shutil.copytree(tiny_pack, path)
    data = bytearray((path / "gate-01.safetensors").read_bytes())
    data[-1] ^= 1
    (path / "gate-01.safetensors").write_bytes(data)
    result = call("inspect", path, "--json")
    assert result.exit_code == 1
    assert json.loads(result.stdout)["error"] == "MemoryPackError"


def test_calibrate_prints_one_json_object(
    call: Call,
    tiny_checkpoint: Path,
    tiny_bundle: Path,
    tmp_path: Path,
) -> None:
    rng = random.Random(0)
    story = ["the", "spring", "was", "late", "that", "year", "a", "heron", "waited", "till", "May"]
    for name, words in (("reference", story), ("domain", story), ("general", ["x=1;", "{}", "if"])):
        lines = [" ".join(rng.choices(words, k=15)) for _ in range(12)]
        content = "".join(json.dumps({"text": line}) + "\n" for line in lines)
        (tmp_path / f"{name}.jsonl").write_text(content)
    built = call("build", tiny_checkpoint, tmp_path / "reference.jsonl", tmp_path / "p", *SMALL)
    assert built.exit_code == 0
    result = call(
        "calibrate", tiny_bundle, tmp_path / "p", "--domain", tmp_path / "domain.jsonl",
        "--general", tmp_path / "general.jsonl", "--max-general-loss", 0.5, "--json",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert found["pack"] == str(tmp_path / "p")
    assert found["domain"]["delta_high"] < 0
    assert found["chosen"] in {one["name"] for one in found["tried"]}
    assert MemoryPack.open(tmp_path / "p").provenance["calibration"]["chosen"] == found["chosen"]


def test_options_and_settings_agree() -> None:
    build, calibrate = memory.commands["build"], memory.commands["calibrate"]
    defaults = build.make_context("build", ["checkpoint", "reference", "pack"]).params
    for kind in (BuildSettings, UseSettings):
        for field in fields(kind):
            assert defaults[field.name] == field.default, field.name
    options = {option.name: option for option in build.params}
    assert set(options["variant"].type.choices) == set(VARIANTS)  # type: ignore[attr-defined]
    assert set(options["similarity"].type.choices) == set(SIMILARITIES)  # type: ignore[attr-defined]
    assert set(options["rate"].type.choices) == set(RATES)  # type: ignore[attr-defined]
    assert set(options["precision"].type.choices) == set(PRECISIONS)  # type: ignore[attr-defined]
    for name, choices in (("objective", OBJECTIVES), ("gradient", GRADIENTS), ("dtype", DTYPES)):
        assert options[name].type.choices == choices  # type: ignore[attr-defined]
    arguments = ["bundle", "pack", "--domain", "d", "--general", "g"]
    assert (
        calibrate.make_context("calibrate", arguments).params["max_tokens"]
        == calibrate_module.DEFAULT_MAX_TOKENS
    )


def test_help_needs_nothing_heavy() -> None:
    code = (
        "import sys; import knnmoe.calibration.cli;"
        "print([m for m in ('numpy', 'rich', 'torch', 'transformers', 'onnxruntime')"
        " if m in sys.modules])"
    )
    output = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    ).stdout
    assert output.strip() == "[]"


@pytest.mark.parametrize("module", ["calibrate", "references", "summary", "tables"])
def test_only_building_needs_torch(module: str) -> None:
    code = (
        f"import sys; sys.modules['torch'] = sys.modules['transformers'] = None;"
        f"import knnmoe.calibration.{module}"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
