"""Qwen3-MoE: norms over each query and key head, dense layers among those with experts."""

from dataclasses import replace

from knnmoe.export.family import ConfigNames, Family

from .names import ATTENTION, COMMON, LAYER

QWEN3_MOE = Family(
    name="qwen3_moe",
    model_type="qwen3_moe",
    tensors=replace(
        COMMON,
        query_bias=f"{ATTENTION}.q_proj.bias",
        key_bias=f"{ATTENTION}.k_proj.bias",
        value_bias=f"{ATTENTION}.v_proj.bias",
        output_bias=f"{ATTENTION}.o_proj.bias",
        query_norm=f"{ATTENTION}.q_norm.weight",
        key_norm=f"{ATTENTION}.k_norm.weight",
        dense_gate=f"{LAYER}.mlp.gate_proj.weight",
        dense_up=f"{LAYER}.mlp.up_proj.weight",
        dense_down=f"{LAYER}.mlp.down_proj.weight",
    ),
    head_norms=True,
    free_head_size=True,
    config=ConfigNames(
        expert_width="moe_intermediate_size",
        dense_width="intermediate_size",
        dense_layers="mlp_only_layers",
        sparse_step="decoder_sparse_step",
        window="sliding_window",
        window_switch="use_sliding_window",
    ),
    aliases=(("num_local_experts", "num_experts"),),  # as transformers 5 writes it
    # What transformers' Qwen3MoeConfig assumes where the file says nothing.
    defaults=(
        ("num_key_value_heads", 4),
        ("hidden_act", "silu"),
        ("rms_norm_eps", 1e-6),
        ("attention_bias", False),
        ("norm_topk_prob", False),
        ("tie_word_embeddings", False),
        ("decoder_sparse_step", 1),
        ("use_sliding_window", False),
        ("sliding_window", 4096),
    ),
)
