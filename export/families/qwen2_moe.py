"""Qwen2-MoE (and Qwen1.5-MoE): biases in attention, and a shared expert with a gate of its own."""

from knnmoe.export.architecture import ConfigNames, Family, TensorNames

_LAYER = "model.layers.{layer}"
_ATTENTION = f"{_LAYER}.self_attn"
_EXPERT = f"{_LAYER}.mlp.experts.{{expert}}"
_SHARED = f"{_LAYER}.mlp.shared_expert"

QWEN2_MOE = Family(
    name="qwen2_moe",
    model_type="qwen2_moe",
    tensors=TensorNames(
        embedding="model.embed_tokens.weight",
        input_norm=f"{_LAYER}.input_layernorm.weight",
        query=f"{_ATTENTION}.q_proj.weight",
        key=f"{_ATTENTION}.k_proj.weight",
        value=f"{_ATTENTION}.v_proj.weight",
        output=f"{_ATTENTION}.o_proj.weight",
        query_bias=f"{_ATTENTION}.q_proj.bias",
        key_bias=f"{_ATTENTION}.k_proj.bias",
        value_bias=f"{_ATTENTION}.v_proj.bias",
        router_norm=f"{_LAYER}.post_attention_layernorm.weight",
        router=f"{_LAYER}.mlp.gate.weight",
        expert_gate=f"{_EXPERT}.gate_proj.weight",
        expert_up=f"{_EXPERT}.up_proj.weight",
        expert_down=f"{_EXPERT}.down_proj.weight",
        dense_gate=f"{_LAYER}.mlp.gate_proj.weight",
        dense_up=f"{_LAYER}.mlp.up_proj.weight",
        dense_down=f"{_LAYER}.mlp.down_proj.weight",
        shared_gate=f"{_SHARED}.gate_proj.weight",
        shared_up=f"{_SHARED}.up_proj.weight",
        shared_down=f"{_SHARED}.down_proj.weight",
        shared_router=f"{_SHARED}_gate.weight",
        final_norm="model.norm.weight",
        head="lm_head.weight",
        ignored=("rotary_emb.inv_freq",),
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
