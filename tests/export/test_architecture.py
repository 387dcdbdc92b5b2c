"""Checkpoints that cannot be exported are refused, with the entry or tensor concerned."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from knnmoe.export.architecture import describe
from knnmoe.export.families import family_of
from knnmoe.runtime.checkpoint import Checkpoint
from knnmoe.runtime.errors import CheckpointError
from tiny import make_tiny_olmoe


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    return make_tiny_olmoe(tmp_path_factory.mktemp("source"))


def with_config(source: Path, root: Path, **changes: object) -> Checkpoint:
    """The checkpoint with other entries in its config; `...` removes one."""
    config = json.loads((source / "config.json").read_text()) | changes
    config = {name: value for name, value in config.items() if value is not ...}
    (root / "model.safetensors").hardlink_to(source / "model.safetensors")
    (root / "config.json").write_text(json.dumps(config))
    return Checkpoint.open(root)


def with_tensors(source: Path, root: Path, change) -> Checkpoint:
    tensors = load_file(source / "model.safetensors")
    change(tensors)
    save_file(tensors, root / "model.safetensors")
    (root / "config.json").write_bytes((source / "config.json").read_bytes())
    return Checkpoint.open(root)


def opened(checkpoint: Checkpoint):
    return describe(checkpoint, family_of(checkpoint))


def test_a_tiny_olmoe_is_described_as_it_is(source):
    architecture = opened(Checkpoint.open(source))
    assert (architecture.shape.num_gates, architecture.shape.num_experts) == (3, 8)
    assert (architecture.query_width, architecture.kv_width) == (64, 32)
    assert architecture.routing.to_json() == {
        "top_k": 2, "score": "softmax", "renormalize": False, "scale": 1.0,
    }  # fmt: skip
    assert (architecture.clip_qkv, architecture.rope_theta) == (2.0, 10000.0)


def test_what_the_config_leaves_out_is_what_transformers_assumes(source, tmp_path):
    absent = dict.fromkeys(
        ("rope_theta", "clip_qkv", "norm_topk_prob", "tie_word_embeddings", "attention_bias",
         "hidden_act", "rms_norm_eps"), ...,
    )  # fmt: skip
    architecture = opened(with_config(source, tmp_path, **absent))
    assert architecture.clip_qkv is None
    assert architecture.rope_theta == 10000.0
    assert not architecture.routing.renormalize


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "gpt2"}, "architecture; expected mixtral or olmoe or .*; found gpt2"),
        ({"model_type": ...}, "model_type is missing"),
        ({"hidden_size": ...}, "hidden_size: malformed"),
        ({"hidden_size": "64"}, "hidden_size: malformed"),
        ({"hidden_size": 0}, "hidden_size: malformed"),
        ({"hidden_size": 1 << 40}, "hidden_size: malformed"),
        ({"num_experts": None}, "num_experts: malformed"),
        ({"num_attention_heads": 5}, "does not divide the hidden size"),
        ({"num_attention_heads": 16}, "heads of size 4"),
        ({"num_key_value_heads": 3}, "does not divide the heads"),
        ({"head_dim": 32}, "head_dim: is not the hidden size over the heads"),
        ({"num_experts_per_tok": 9}, "more than there are experts; expected at most 8"),
        ({"hidden_act": "gelu"}, "hidden_act: is not supported; expected silu; found gelu"),
        ({"attention_bias": True}, "attention_bias: is not supported"),
        ({"norm_topk_prob": "yes"}, "norm_topk_prob: malformed"),
        ({"clip_qkv": -1}, "clip_qkv: malformed"),
        ({"rope_scaling": {"type": "linear", "factor": 2}}, "scaling that is not supported"),
        ({"rope_parameters": {"rope_type": "yarn"}}, "scaling that is not supported"),
        ({"rope_parameters": {"partial_rotary_factor": 0.5}}, "only a part of each head"),
        ({"rope_theta": 0}, "rope_theta: malformed"),
        ({"intermediate_size": 48}, "another shape than the config states"),
        ({"vocab_size": 100}, "embed_tokens.weight: has another shape"),
        ({"num_hidden_layers": 4}, "tensor model.layers.3"),
        ({"num_hidden_layers": 2}, "model.layers.2.*: is not a tensor of the family"),
        ({"num_experts": 7, "num_experts_per_tok": 2}, "gate.weight: has another shape"),
    ],
)
def test_a_config_that_cannot_be_right_is_refused(source, tmp_path, changes, message):
    with pytest.raises(CheckpointError, match=message):
        opened(with_config(source, tmp_path, **changes))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("model.norm.weight"), "tensor model.norm.weight is missing"),
        (lambda t: t.pop("model.layers.1.mlp.experts.3.up_proj.weight"), "experts.3.up_proj"),
        (lambda t: t.update({"model.layers.0.self_attn.q_proj.bias": np.zeros(64, "f4")}),
         "q_proj.bias: is not a tensor of the family"),
        (lambda t: t.update({"lm_head.weight": np.zeros((272, 64), "i4")}),
         "dtype that cannot be exported; expected F32 or F16 or BF16; found I32"),
        (lambda t: t.update({"lm_head.weight": np.zeros((272, 64), "f8")}), "found F64"),
    ],
)  # fmt: skip
def test_tensors_that_do_not_fit_are_refused(source, tmp_path, change, message):
    with pytest.raises(CheckpointError, match=message):
        opened(with_tensors(source, tmp_path, change))


def test_buffers_of_old_checkpoints_are_ignored(source, tmp_path):
    name = "model.layers.0.self_attn.rotary_emb.inv_freq"
    checkpoint = with_tensors(source, tmp_path, lambda t: t.update({name: np.zeros(8, "f4")}))
    assert opened(checkpoint)
