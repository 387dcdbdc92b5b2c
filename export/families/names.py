"""What most families call their tensors; a family replaces what it calls otherwise."""

from dataclasses import replace

from knnmoe.export.family import ConfigNames, TensorNames

LAYER = "model.layers.{layer}"
ATTENTION = f"{LAYER}.self_attn"
_EXPERT = f"{LAYER}.mlp.experts.{{expert}}"

COMMON = TensorNames(
    embedding="model.embed_tokens.weight",
    input_norm=f"{LAYER}.input_layernorm.weight",
    query=f"{ATTENTION}.q_proj.weight",
    key=f"{ATTENTION}.k_proj.weight",
    value=f"{ATTENTION}.v_proj.weight",
    output=f"{ATTENTION}.o_proj.weight",
    router_norm=f"{LAYER}.post_attention_layernorm.weight",
    router=f"{LAYER}.mlp.gate.weight",
    expert_gate=f"{_EXPERT}.gate_proj.weight",
    expert_up=f"{_EXPERT}.up_proj.weight",
    expert_down=f"{_EXPERT}.down_proj.weight",
    final_norm="model.norm.weight",
    head="lm_head.weight",
    ignored=("rotary_emb.inv_freq",),
)

_SHARED = f"{LAYER}.mlp.shared_experts"
# DeepSeek's, and of those that follow it: dense layers, and experts that every token goes through,
# stored as one.
DEEPSEEK = replace(
    COMMON,
    dense_gate=f"{LAYER}.mlp.gate_proj.weight",
    dense_up=f"{LAYER}.mlp.up_proj.weight",
    dense_down=f"{LAYER}.mlp.down_proj.weight",
    shared_gate=f"{_SHARED}.gate_proj.weight",
    shared_up=f"{_SHARED}.up_proj.weight",
    shared_down=f"{_SHARED}.down_proj.weight",
    further=f"{LAYER}.eh_proj.weight",
)
DEEPSEEK_LATENT = replace(
    DEEPSEEK,
    key=None,
    value=None,
    query_down=f"{ATTENTION}.q_a_proj.weight",
    query_norm=f"{ATTENTION}.q_a_layernorm.weight",
    query_up=f"{ATTENTION}.q_b_proj.weight",
    latent_down=f"{ATTENTION}.kv_a_proj_with_mqa.weight",
    latent_norm=f"{ATTENTION}.kv_a_layernorm.weight",
    latent_up=f"{ATTENTION}.kv_b_proj.weight",
)
SELECTION_BIAS = f"{LAYER}.mlp.gate.e_score_correction_bias"

# What DeepSeek-V3 calls the entries of its config, and those that follow it.
DEEPSEEK_CONFIG = ConfigNames(
    num_experts="n_routed_experts",
    expert_width="moe_intermediate_size",
    dense_width="intermediate_size",
    shared_count="n_shared_experts",
    first_dense="first_k_dense_replace",
    routing_scale="routed_scaling_factor",
    groups="n_group",
    top_groups="topk_group",
    method="topk_method",
    further_layers="num_nextn_predict_layers",
)
DEEPSEEK_ALIASES = (
    ("num_experts", "n_routed_experts"),
    ("num_local_experts", "n_routed_experts"),
    ("num_mtp_layers", "num_nextn_predict_layers"),
)
