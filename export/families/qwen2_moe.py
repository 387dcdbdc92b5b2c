"""Qwen2-MoE (and Qwen1.5-MoE): biases in attention, and a shared expert with a gate of its own."""

from dataclasses import replace

from knnmoe.export.family import ConfigNames, Family

from .names import ATTENTION, COMMON, LAYER

_SHARED = f"{LAYER}.mlp.shared_expert"

QWEN2_MOE = Family(
    name="qwen2_moe",
    model_type="qwen2_moe",
    tensors=replace(
        COMMON,
        query_bias=f"{ATTENTION}.q_proj.bias",
        key_bias=f"{ATTENTION}.k_proj.bias",
        value_bias=f"{ATTENTION}.v_proj.bias",
        dense_gate=f"{LAYER}.mlp.gate_proj.weight",
        dense_up=f"{LAYER}.mlp.up_proj.weight",
        dense_down=f"{LAYER}.mlp.down_proj.weight",
        shared_gate=f"{_SHARED}.gate_proj.weight",
        shared_up=f"{_SHARED}.up_proj.weight",
        shared_down=f"{_SHARED}.down_proj.weight",
        shared_router=f"{_SHARED}_gate.weight",
    ),
    free_head_size=True,
    config=ConfigNames(
        expert_width="moe_intermediate_size",
        dense_width="intermediate_size",
        shared_width="shared_expert_intermediate_size",
        dense_layers="mlp_only_layers",
        sparse_step="decoder_sparse_step",
        attention_bias="qkv_bias",
        window="sliding_window",
        window_switch="use_sliding_window",
        window_end="max_window_layers",
        layer_kinds="layer_types",
    ),
    # What transformers' Qwen2MoeConfig assumes where the file says nothing.
    defaults=(
        ("num_key_value_heads", 16),
        ("hidden_act", "silu"),
        ("rms_norm_eps", 1e-6),
        ("qkv_bias", True),
        ("norm_topk_prob", False),
        ("tie_word_embeddings", False),
        ("decoder_sparse_step", 1),
        ("use_sliding_window", False),
        ("sliding_window", 4096),
        ("max_window_layers", 28),
    ),
)
