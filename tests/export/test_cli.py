"""`knnmoe-export`: exit codes, one JSON object, and a help that answers at once."""

from __future__ import annotations

import json
import resource
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from knnmoe.export import cli
from knnmoe.export.verification import reference, verify
from knnmoe.export.verification.differences import VerifyReport
from knnmoe.runtime.bundle import Bundle
from knnmoe.runtime.errors import VerificationError
from tiny import make_tiny_olmoe


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    return make_tiny_olmoe(tmp_path_factory.mktemp("source"))


def call(*arguments: object) -> Result:
    return CliRunner().invoke(cli.main, [str(argument) for argument in arguments])


def test_json_is_one_object_with_the_promised_keys(checkpoint, tmp_path):
    result = call(checkpoint, tmp_path / "b", "--json")
    assert result.exit_code == 0
    figures = json.loads(result.stdout)
    assert result.stdout.count("\n") == 1
    assert (figures["gates"], figures["segments"]) == (3, 4)
    assert figures["bundle"] == str(tmp_path / "b")
    assert figures["bytes"] == Bundle.open(tmp_path / "b").total_bytes
    assert figures["seconds"] > 0
    assert "max_abs_error" not in figures


def test_a_person_gets_a_table(checkpoint, tmp_path):
    result = call(checkpoint, tmp_path / "b", "--no-fused")
    assert result.exit_code == 0
    assert "3 gates, 4 segments, layouts: split;" in result.stdout


@pytest.mark.skipif(find_spec("torch") is None, reason="the reference needs torch")
@pytest.mark.usefixtures("one_torch_thread")
def test_verify_reports_the_worst_error(checkpoint, tmp_path):
    result = call(checkpoint, tmp_path / "b", "--verify", "--json")
    assert result.exit_code == 0, result.stderr
    figures = json.loads(result.stdout)
    assert 0 < figures["max_abs_error"] <= 1e-4
    assert len(figures["gate_errors"]) == 3
    assert figures["max_abs_error"] == max(*figures["gate_errors"], figures["logits_error"])


def test_a_bundle_that_disagrees_is_not_kept(checkpoint, tmp_path, monkeypatch):
    def disagree(*_: object, **__: object) -> VerifyReport:
        raise VerificationError("logits", "disagree", expected="1e-4", found="0.1")

    monkeypatch.setattr(verify, "verify", disagree)
    monkeypatch.setattr(reference, "require_reference", lambda: None)
    result = call(checkpoint, tmp_path / "b", "--verify", "--json")
    assert result.exit_code == 1
    assert json.loads(result.stdout)["error"] == "VerificationError"
    assert not list(tmp_path.iterdir())


def test_a_stated_failure_is_exit_code_1_and_says_what_to_do(tmp_path):
    result = call(tmp_path, tmp_path / "b")
    assert result.exit_code == 1
    assert result.stdout == ""
    assert "not a checkpoint directory" in result.stderr
    assert "Hugging Face" in result.stderr
    result = call(tmp_path, tmp_path / "b", "--json")
    assert result.exit_code == 1
    error = json.loads(result.stdout)
    assert error["error"] == "CheckpointError"
    assert error["where"] == str(tmp_path)


@pytest.mark.parametrize(
    "arguments",
    [
        "", "one", "a b --precision int3", "a b --experts-per-token 0", "a b --no-such-option",
        "a b --context 5", "a b --entries 5",
    ],
)  # fmt: skip
def test_wrong_usage_is_exit_code_2(arguments):
    assert call(*arguments.split()).exit_code == 2


def test_families_are_listed_without_a_checkpoint():
    result = call("--list-families")
    assert result.exit_code == 0
    described, traced = result.stdout.split("By tracing")
    assert "\n  olmoe\n" in described
    assert "\n  granitemoe\n" in traced
    listed = json.loads(call("--list-families", "--json").stdout)["families"]
    assert "olmoe" in listed["description"]
    assert "granitemoe" in listed["torch"]


def test_help_needs_nothing_heavy():
    code = (
        "import sys; from knnmoe.export.cli import main; main(['--help'], standalone_mode=False); "
        "heavy = {'torch', 'transformers', 'onnx', 'onnx_ir', 'onnxruntime', 'rich'}; "
        "sys.exit(str(heavy & set(sys.modules)) if heavy & set(sys.modules) else 0)"
    )
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    assert "CHECKPOINT" in run.stdout
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 0.5
