"""Checkpoints of random weights have the tensors that the families' descriptions look for."""

from __future__ import annotations

import json
from pathlib import Path

import make_checkpoint
import numpy as np
import pytest
from click.testing import CliRunner

from knnmoe.export.exporter import export
from knnmoe.runtime.model import Model

SMALL = {
    "vocab_size": 300, "hidden_size": 64, "intermediate_size": 32, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 128,
}  # fmt: skip
NARROW = {
    "moe_intermediate_size": 32, "shared_expert_intermediate_size": 32, "head_dim": 32,
    "kv_lora_rank": 32, "qk_nope_head_dim": 16, "qk_rope_head_dim": 16, "v_head_dim": 16,
}  # fmt: skip


@pytest.mark.parametrize("name", sorted(make_checkpoint.CONFIGS))
def test_a_checkpoint_of_every_name_is_one_that_can_be_exported(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = dict(make_checkpoint.CONFIGS[name]) | SMALL
    config |= {key: value for key, value in NARROW.items() if key in config}
    if "kv_lora_rank" in config:  # each head has a key of its own
        config["num_key_value_heads"] = config["num_attention_heads"]
    monkeypatch.setitem(make_checkpoint.CONFIGS, name, config)
    monkeypatch.setattr(make_checkpoint, "SHARD_BYTES", 1 << 18)
    out = tmp_path / "checkpoint"
    arguments = [name, str(out), "--layers", "2"]
    result = CliRunner().invoke(make_checkpoint.main, arguments)
    assert result.exit_code == 0, result.output
    index = json.loads((out / "model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) == len(list(out.glob("*.safetensors"))) > 1
    export(out, tmp_path / "bundle")
    logits = Model.load(tmp_path / "bundle", threads=1).logits(np.arange(20))
    assert logits.shape == (20, 300)
    assert 0.1 < logits.std() < 10


def test_the_seed_decides_the_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(
        make_checkpoint.CONFIGS, "olmoe-1b-7b", make_checkpoint.CONFIGS["olmoe-1b-7b"] | SMALL
    )
    made = [
        make_checkpoint.make_checkpoint("olmoe-1b-7b", tmp_path / str(i), layers=1, seed=seed)
        for i, seed in enumerate((0, 0, 1))
    ]
    first, same, other = (next(path.glob("*.safetensors")).read_bytes() for path in made)
    assert first == same
    assert first != other
