"""The comparison of decode speeds runs, and says who is missing."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import cpu_decode
import make_checkpoint
import pytest

from knnmoe.export.exporter import export

SMALL = {
    "vocab_size": 300, "hidden_size": 64, "intermediate_size": 32, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 256,
}  # fmt: skip


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A checkpoint and its bundle."""
    root = tmp_path_factory.mktemp("model")
    with pytest.MonkeyPatch.context() as patch:
        config = make_checkpoint.CONFIGS["olmoe-1b-7b"] | SMALL
        patch.setitem(make_checkpoint.CONFIGS, "olmoe-1b-7b", config)
        checkpoint = make_checkpoint.make_checkpoint("olmoe-1b-7b", root / "source", layers=2)
    export(checkpoint, root / "bundle", fused=False)
    return checkpoint, root / "bundle"


def test_contenders_take_turns_and_those_that_cannot_are_named(
    model: tuple[Path, Path], tmp_path: Path
) -> None:
    target = tmp_path / "result.json"
    command = [
        sys.executable, cpu_decode.__file__, *map(str, model), "--entries", "300",
        "--gates", "two-stage", "--turns", "1", "--tokens", "2",
        "--only", "frozen;300 entries, two-stage", "--llama-python", sys.executable,
        "--json", str(target),
    ]  # fmt: skip
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, env=dict(os.environ)
    )
    assert done.returncode == 0, done.stderr
    report = json.loads(target.read_text())
    (run,) = report["runs"]
    assert run["threads"] == 1
    assert list(run["contenders"]) == ["frozen", "300 entries, two-stage"]
    for row in run["contenders"].values():
        assert row["decode_ms"] > 0
        assert row["peak_mb"] > 10
    assert "onnxruntime-genai" in run["absent"]
    assert "absent: onnxruntime-genai" in done.stdout


def test_bytes_of_a_token_are_those_of_its_experts_and_not_of_the_embedding(
    model: tuple[Path, Path],
) -> None:
    checkpoint, bundle = model
    body, head = cpu_decode.checkpoint_elements(checkpoint)
    hidden, width, vocab = 64, 32, 300
    experts = 8 * 3 * hidden * width
    attention = 2 * hidden * hidden + 2 * hidden * 32
    norms = 2 * hidden + hidden + 32
    assert head == hidden * vocab
    assert body == 2 * (experts + 64 * hidden + attention + norms) + hidden
    assert cpu_decode.bundle_bytes(bundle) == pytest.approx(4 * (body + head), rel=0.01)


def test_a_contender_that_cannot_start_says_why() -> None:
    peer = cpu_decode.Peer("none", "knnmoe", ("/nowhere", 1, 0, "auto", {}, None), 0.0)
    with pytest.raises(RuntimeError, match=r"ended with 1: .*nowhere"), cpu_decode.started(peer):
        pass
