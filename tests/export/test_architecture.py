"""Checkpoints that cannot be exported are refused, with the entry or tensor concerned."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from knnmoe.export.architecture import Swiglu
from knnmoe.export.describe import describe
from knnmoe.export.exporter import export, plan_export
from knnmoe.export.families import family_of
from knnmoe.export.rope import Rope, Yarn
from knnmoe.export.tensors import further_tensors
from knnmoe.runtime.checkpoint import Checkpoint
from knnmoe.runtime.errors import CheckpointError
from knnmoe.runtime.routing import RoutingRule
from tiny import FAMILIES, make_tiny, make_tiny_olmoe


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
    assert (architecture.clip_qkv, architecture.rope.theta) == (2.0, 10000.0)


def test_what_the_config_leaves_out_is_what_transformers_assumes(source, tmp_path):
    absent = dict.fromkeys(
        ("rope_theta", "clip_qkv", "norm_topk_prob", "tie_word_embeddings", "attention_bias",
         "hidden_act", "rms_norm_eps"), ...,
    )  # fmt: skip
    architecture = opened(with_config(source, tmp_path, **absent))
    assert architecture.clip_qkv is None
    assert architecture.rope.theta == 10000.0
    assert not architecture.routing.renormalize


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "gpt2"}, "architecture; expected .*mixtral or olmoe or .*; found gpt2"),
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
        ({"rope_parameters": {"rope_type": "longrope"}}, "scaling that is not supported"),
        ({"rope_parameters": {"rope_type": "yarn"}}, "rope_parameters: factor: malformed"),
        ({"rope_parameters": {"partial_rotary_factor": 0.5}}, "only a part of each head"),
        ({"rope_parameters": {"full_attention": {}}}, "not the same for all layers"),
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


@pytest.fixture(scope="module")
def sources(tmp_path_factory) -> dict[str, Path]:
    """The plain checkpoint of each family."""
    return {family: make_tiny(tmp_path_factory.mktemp(family), family) for family in FAMILIES}


def test_layers_are_described_one_by_one(tmp_path):
    def layers(family: str, kind: str) -> list[tuple[int | None, int | None]]:
        checkpoint = Checkpoint.open(make_tiny(tmp_path / family / kind, family, kind))
        return [(layer.gate, layer.window) for layer in opened(checkpoint).layers]

    first_and_last = layers("qwen3_moe", "first and last layers dense, two in a row")
    assert [gate for gate, _ in first_and_last] == [None, None, 0, None, 1, None]
    assert {window for _, window in first_and_last} == {None}
    every_other = layers("qwen2_moe", "windows of 6 in every other layer, last layer dense")
    assert every_other == [(0, 6), (1, None), (2, 6), (3, None), (None, None)]
    by_list = layers("qwen2_moe", "windows of 4 by list, no biases, renormalised")
    assert by_list == [(0, None), (1, 4), (2, 4), (3, None)]
    assert layers("mixtral", "plain") == [(0, None), (1, None), (2, None)]
    assert layers("gpt_oss", "plain") == [(0, 5), (1, None), (2, 5), (3, None)]
    unsaid = "as transformers assumes it, a key head for every query head"
    assert layers("gpt_oss", unsaid) == [(0, 3), (1, None), (2, 3)]


def test_what_gpt_oss_leaves_out_is_what_transformers_assumes(tmp_path):
    kind = "as transformers assumes it, a key head for every query head"
    architecture = opened(Checkpoint.open(make_tiny(tmp_path, "gpt_oss", kind)))
    assert architecture.swiglu == Swiglu(alpha=1.702, shift=1.0, limit=7.0)
    assert architecture.rope == Rope(150000.0, Yarn(32.0, 4096, 0.1 * np.log(32) + 1, whole=False))
    assert architecture.routing == RoutingRule(3, "softmax-topk")
    assert architecture.expert_biases
    assert architecture.output_bias


def test_a_config_of_the_old_form_may_do_without_yarn(tmp_path):
    checkpoint = make_tiny(tmp_path, "gpt_oss", rope_scaling={"rope_type": "default"})
    assert opened(Checkpoint.open(checkpoint)).rope == Rope(1500.0)


def test_segments_hold_the_layers_between_their_gates(tmp_path):
    kind = "first and last layers dense, two in a row"
    architecture = opened(Checkpoint.open(make_tiny(tmp_path, "qwen3_moe", kind)))
    assert architecture.gate_layers == (2, 4)
    assert [list(architecture.segment_layers(i)) for i in range(3)] == [[0, 1, 2], [3, 4], [5]]


def test_mixtral_renormalises_whatever_its_config_says(sources, tmp_path):
    checkpoint = with_config(sources["mixtral"], tmp_path, norm_topk_prob=False)
    assert opened(checkpoint).routing.renormalize


STACKS = "model.layers.2.mlp.experts"
WINDOWED = {"use_sliding_window": True, "sliding_window": 9}


@pytest.mark.parametrize(
    ("family", "changes", "message"),
    [
        ("qwen3_moe", {"head_dim": 24}, "head_dim: gives heads of size 24; .* multiple of 16"),
        ("qwen3_moe", {"head_dim": 48}, "q_proj.weight: has another shape"),
        ("qwen3_moe", {"head_dim": ...}, "q_proj.weight: has another shape"),
        ("qwen3_moe", {"head_dim": ..., "num_attention_heads": 6}, "does not divide the hidden"),
        ("qwen3_moe", {"mlp_only_layers": [0]}, "layers.0.mlp.gate_proj.weight is missing"),
        ("qwen3_moe", {"mlp_only_layers": []}, "layers.1.mlp.gate.weight is missing"),
        ("qwen3_moe", {"mlp_only_layers": [0, 1, 2, 3]}, "mlp_only_layers: leaves no layer with"),
        ("qwen3_moe", {"mlp_only_layers": "1"}, "mlp_only_layers: malformed"),
        ("qwen3_moe", {"mlp_only_layers": [-1]}, "mlp_only_layers: malformed"),
        ("qwen3_moe", {"decoder_sparse_step": 0}, "decoder_sparse_step: malformed"),
        ("qwen3_moe", {"decoder_sparse_step": 9, "mlp_only_layers": None}, "step: leaves no layer"),
        ("qwen3_moe", {"num_local_experts": 9}, "num_local_experts: is not what num_experts says"),
        ("qwen3_moe", {"num_experts": 9}, "mlp.gate.weight: has another shape"),
        ("qwen3_moe", {"num_experts_per_tok": 9}, "more than there are experts"),
        ("qwen3_moe", {"moe_intermediate_size": 48}, "gate_proj.weight: has another shape"),
        ("qwen3_moe", {"intermediate_size": 32}, "layers.1.mlp.gate_proj.weight: has another"),
        ("qwen3_moe", {"attention_bias": True}, "q_proj.bias is missing"),
        ("qwen3_moe", {"use_sliding_window": 1}, "use_sliding_window: malformed"),
        ("qwen3_moe", WINDOWED | {"sliding_window": 0}, "sliding_window: malformed"),
        ("qwen3_moe", {"num_hidden_layers": 5000}, "num_hidden_layers: is too large"),
        (
            "qwen3_moe",
            {"rope_scaling": {"type": "yarn", "factor": -4}},
            "rope_scaling: factor: malf",
        ),
        ("mixtral", {"sliding_window": -1}, "sliding_window: malformed"),
        ("mixtral", {"num_local_experts": ...}, "num_local_experts: malformed"),
        ("mixtral", {"head_dim": 32}, "q_proj.weight: has another shape"),
        ("mixtral", {"num_local_experts": 7}, "block_sparse_moe.gate.weight: has another shape"),
        ("qwen2_moe", {"qkv_bias": False}, "proj.bias: is not a tensor of the family qwen2_moe"),
        ("qwen2_moe", {"shared_expert_intermediate_size": 32}, "shared_expert.gate_proj.weight: "),
        ("qwen2_moe", {"shared_expert_intermediate_size": ...}, "shared_.*: malformed"),
        ("qwen2_moe", WINDOWED | {"layer_types": ["full_attention"]}, "layer_types: malformed"),
        ("qwen2_moe", {"layer_types": ["sliding_attention"] * 4}, "4 times full_attention; found"),
        ("qwen2_moe", WINDOWED | {"max_window_layers": None}, "max_window_layers: malformed"),
        ("glm4_moe", {"n_routed_experts": 7}, "mlp.gate.weight: has another shape"),
        ("glm4_moe", {"n_routed_experts": ...}, "n_routed_experts: malformed"),
        ("glm4_moe", {"num_experts_per_tok": 9}, "num_experts_per_tok: is more than there are"),
        ("glm4_moe", {"n_group": 3}, "groups .*found 3"),
        ("glm4_moe", {"n_group": 2, "topk_group": 3}, "top_groups .*found 3"),
        (
            "glm4_moe",
            {"n_group": 4, "topk_group": 1, "num_experts_per_tok": 3},
            "routing rule that cannot be: .*top_k",
        ),
        ("glm4_moe", {"n_group": "4"}, "n_group: malformed"),
        ("glm4_moe", {"head_dim": 48}, "partial_rotary_factor: turns 24 of the 48 numbers"),
        ("glm4_moe", {"head_dim": 64}, "q_proj.weight: has another shape"),
        ("glm4_moe", {"partial_rotary_factor": 0.4}, "turns 12 of the 32 numbers of a head"),
        ("glm4_moe", {"partial_rotary_factor": 1.5}, "partial_rotary_factor: out of range"),
        ("glm4_moe", {"rope_parameters": {"partial_rotary_factor": 0}}, "partial_.*: malformed"),
        ("glm4_moe", {"topk_method": "greedy"}, "topk_method: is not supported; expected noaux_tc"),
        ("glm4_moe", {"scoring_func": "softmax"}, "scoring_func: is not supported; expected sigm"),
        ("glm4_moe", {"moe_layer_freq": 2}, "moe_layer_freq: is not supported; expected 1"),
        ("glm4_moe", {"routed_scaling_factor": 0}, "routed_scaling_factor: malformed"),
        ("glm4_moe", {"n_shared_experts": 2}, "shared_experts.gate_proj.weight: has another"),
        ("glm4_moe", {"n_shared_experts": None}, "n_shared_experts: malformed"),
        ("glm4_moe", {"first_k_dense_replace": 2}, "layers.1.mlp.gate_proj.weight is missing"),
        ("glm4_moe", {"first_k_dense_replace": 3}, "first_k_dense_replace: leaves no layer with"),
        ("glm4_moe", {"first_k_dense_replace": -1}, "first_k_dense_replace: malformed"),
        ("glm4_moe", {"use_qk_norm": False}, "norm.weight: is not a tensor of the family"),
        ("glm4_moe", {"use_qk_norm": 1}, "use_qk_norm: malformed"),
        ("glm4_moe", {"attention_bias": False}, "proj.bias: is not a tensor of the family"),
        (
            "glm4_moe",
            {"num_hidden_layers": 2, "num_nextn_predict_layers": 1},
            "model.layers.2.*: is not a tensor of the family",
        ),
        ("glm4_moe", {"num_nextn_predict_layers": -1}, "num_nextn_predict_layers: malformed"),
        ("glm4_moe", {"num_mtp_layers": 1, "num_nextn_predict_layers": 2}, "is not what num_nextn"),
        ("gpt_oss", {"swiglu_limit": None}, "swiglu_limit: malformed"),
        ("gpt_oss", {"swiglu_limit": -7}, "swiglu_limit: malformed"),
        ("gpt_oss", {"swiglu_alpha": "1.702"}, "swiglu_alpha: malformed"),
        ("gpt_oss", {"hidden_act": "gelu"}, "hidden_act: is not supported; expected silu"),
        ("gpt_oss", {"num_experts": 9}, "num_experts: is not what num_local_experts says"),
        ("gpt_oss", {"num_local_experts": 9}, "mlp.router.weight: has another shape"),
        ("gpt_oss", {"intermediate_size": 48}, r"gate_up_proj: .*\[8, 64, 96\]; .*\[8, 64, 64\]"),
        ("gpt_oss", {"layer_types": ["sliding_attention"]}, "layer_types: malformed"),
        ("gpt_oss", {"sliding_window": None}, "layer_types: malformed"),
        ("gpt_oss", {"attention_bias": False}, "proj.bias: is not a tensor of the family gpt_oss"),
        ("gpt_oss", {"tie_word_embeddings": "no"}, "tie_word_embeddings: malformed"),
        ("deepseek_v2", {"n_routed_experts": 7}, "mlp.gate.weight: has another shape"),
        ("deepseek_v2", {"num_experts_per_tok": 9}, "num_experts_per_tok: is more than there are"),
        ("deepseek_v2", {"topk_method": "noaux_tc"}, "topk_method: is not supported; expected gre"),
        ("deepseek_v2", {"topk_method": None}, "topk_method: is not supported"),
        ("deepseek_v2", {"scoring_func": "sigmoid"}, "scoring_func: is not supported; expected so"),
        ("deepseek_v2", {"norm_topk_prob": True}, "norm_topk_prob: is not supported; expected Fal"),
        ("deepseek_v2", {"mlp_bias": True}, "mlp_bias: is not supported"),
        ("deepseek_v2", {"attention_bias": True}, "attention_bias: is not supported"),
        (
            "deepseek_v2",
            {"topk_method": "group_limited_greedy", "n_group": 3},
            "routing rule that cannot be: .*groups .*found 3",
        ),
        ("deepseek_v2", {"q_lora_rank": 32}, "q_a_proj.weight is missing"),
        ("deepseek_v2", {"q_lora_rank": ...}, "q_a_proj.weight is missing"),
        ("deepseek_v2", {"kv_lora_rank": 32}, "kv_a_proj_with_mqa.weight: has another shape"),
        ("deepseek_v2", {"kv_lora_rank": None}, "kv_lora_rank: malformed"),
        ("deepseek_v2", {"kv_lora_rank": 60}, "makes 76 with qk_rope_head_dim; .*multiple of 8"),
        ("deepseek_v2", {"qk_rope_head_dim": 24}, "q_proj.weight: has another shape|with_mqa"),
        ("deepseek_v2", {"qk_rope_head_dim": 15}, "cannot be turned in pairs"),
        ("deepseek_v2", {"qk_nope_head_dim": 32}, "q_proj.weight: has another|kv_b_proj"),
        ("deepseek_v2", {"v_head_dim": 32}, "kv_b_proj.weight: has another shape"),
        ("deepseek_v2", {"v_head_dim": ...}, "v_head_dim: malformed"),
        ("deepseek_v2", {"num_key_value_heads": 2}, "is not the number of heads; expected 4"),
        ("deepseek_v2", {"rope_scaling": {"type": "linear"}}, "scaling that is not supported"),
        ("deepseek_v2", {"num_hidden_layers": 2}, "layers.2.*: is not a tensor of the family"),
        ("deepseek_v3", {"topk_method": "greedy"}, "topk_method: is not supported; expected noaux"),
        ("deepseek_v3", {"scoring_func": "softmax"}, "scoring_func: is not supported; expected si"),
        ("deepseek_v3", {"n_group": 3}, "routing rule that cannot be: .*groups .*found 3"),
        ("deepseek_v3", {"n_group": 8, "topk_group": 2}, "routing rule that cannot be"),
        ("deepseek_v3", {"q_lora_rank": 32}, "q_a_proj.weight: has another shape"),
        ("deepseek_v3", {"q_lora_rank": None}, "q_proj.weight is missing"),
        ("deepseek_v3", {"rope_interleave": "yes"}, "rope_interleave: malformed"),
        (
            "deepseek_v3",
            {"num_nextn_predict_layers": 0},
            "layers.3.*: is not a tensor of the family",
        ),
        ("deepseek_v3", {"first_k_dense_replace": 0}, "layers.0.mlp.gate.weight is missing"),
        ("deepseek_v3", {"first_k_dense_replace": ...}, "first_k_dense_replace: leaves no layer"),
        (
            "deepseek_v3",
            {"rope_scaling": {"type": "yarn", "factor": 4, "mscale_all_dim": -1}},
            "mscale_all_dim: malformed",
        ),
    ],
)
def test_a_familys_config_that_cannot_be_right_is_refused(
    sources, tmp_path, family, changes, message
):
    with pytest.raises(CheckpointError, match=message):
        opened(with_config(sources[family], tmp_path, **changes))


@pytest.mark.parametrize(
    ("family", "change", "message"),
    [
        ("qwen3_moe", lambda t: t.pop("model.layers.1.mlp.up_proj.weight"), "1.mlp.up_proj.weight"),
        ("qwen3_moe", lambda t: t.update(two_norms(t)), "q_norm.weight: has another shape"),
        ("qwen3_moe", lambda t: t.update({"model.layers.1.mlp.gate.weight": np.zeros((8, 64))}),
         "layers.1.mlp.gate.weight: is not a tensor of the family qwen3_moe"),
        ("mixtral", lambda t: t.pop("model.layers.2.block_sparse_moe.experts.3.w3.weight"),
         "experts.3.w3.weight is missing"),
        ("qwen2_moe", lambda t: t.pop("model.layers.0.mlp.shared_expert_gate.weight"),
         "shared_expert_gate.weight is missing"),
        ("qwen2_moe", lambda t: t.pop("model.layers.3.self_attn.k_proj.bias"), "3.*k_proj.bias is"),
        ("glm4_moe", lambda t: t.pop("model.layers.1.mlp.gate.e_score_correction_bias"),
         "e_score_correction_bias is missing"),
        ("glm4_moe", lambda t: t.update({"model.layers.3.eh_proj.weight": np.zeros(1, "f4")}),
         "layers.3.eh_proj.weight: is not a tensor of the family glm4_moe"),
        ("gpt_oss", lambda t: t.pop("model.layers.3.mlp.router.bias"), "3.mlp.router.bias is miss"),
        ("gpt_oss", lambda t: t.pop("model.layers.0.self_attn.sinks"), "self_attn.sinks is miss"),
        ("gpt_oss", lambda t: t.pop(f"{STACKS}.gate_up_proj_bias"), "gate_up_proj_bias is missing"),
        ("gpt_oss", lambda t: t.pop(f"{STACKS}.down_proj"), "down_proj is missing"),
        ("gpt_oss", lambda t: t.update({f"{STACKS}.down_proj": np.zeros((8, 64, 32), "f4")}),
         r"down_proj: has another shape.*expected \[8, 32, 64\]; found \[8, 64, 32\]"),
        ("gpt_oss", lambda t: t.update({f"{STACKS}.down_proj_bias": np.zeros((8, 32), "f4")}),
         "down_proj_bias: has another shape"),
        ("gpt_oss", lambda t: t.update({f"{STACKS}.0.up_proj.weight": np.zeros((32, 64), "f4")}),
         "is not a tensor of the family gpt_oss"),
        ("gpt_oss", lambda t: t.update({f"{STACKS}.down_proj_blocks": np.zeros((8, 64), "u1")}),
         "down_proj_blocks: is not a tensor of the family gpt_oss"),
    ],
)  # fmt: skip
def test_a_familys_tensors_that_do_not_fit_are_refused(sources, tmp_path, family, change, message):
    with pytest.raises(CheckpointError, match=message):
        opened(with_tensors(sources[family], tmp_path, change))


def test_layers_that_predict_more_tokens_are_left_out(tmp_path):
    kind = "no norms, no biases, groups, two shared experts, a layer that predicts more"
    checkpoint = Checkpoint.open(make_tiny(tmp_path / "checkpoint", "glm4_moe", kind))
    extra = {name for name in checkpoint.tensors if name.startswith("model.layers.4.")}
    assert "model.layers.4.eh_proj.weight" in extra
    assert set(further_tensors(checkpoint, opened(checkpoint))) == extra
    report = export(checkpoint, tmp_path / "bundle")
    assert set(report.left_out) == extra
    stored = sum(f.size for n, f in report.files.items() if n.endswith(".safetensors"))
    assert stored == plan_export(checkpoint).weight_bytes


def test_of_latent_attention_one_small_key_is_cached(sources):
    architecture = opened(Checkpoint.open(sources["deepseek_v3"]))
    shape = architecture.shape
    assert (shape.num_heads, shape.num_kv_heads, shape.head_size) == (4, 1, 64 + 16)
    assert (shape.latent_size, shape.cache_width) == (64, 80)
    # YaRN by 4: the products grow by the square of 1 + 0.06 ln 4.
    growth = (1 + 0.06 * np.log(4)) ** 2
    assert architecture.softmax_scale == pytest.approx(growth / np.sqrt(24 + 16))


def two_norms(tensors):
    """A norm over all heads where one over each is meant."""
    name = "model.layers.0.self_attn.q_norm.weight"
    return {name: np.tile(tensors[name], 4)}
