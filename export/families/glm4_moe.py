"""GLM-4-MoE (GLM-4.5): sigmoid routing with a bias, shared experts, half of each head turned."""

from dataclasses import replace

from knnmoe.export.family import Family

from .names import ATTENTION, DEEPSEEK, DEEPSEEK_ALIASES, DEEPSEEK_CONFIG, SELECTION_BIAS

GLM4_MOE = Family(
    name="glm4_moe",
    model_type="glm4_moe",
    tensors=replace(
        DEEPSEEK,
        query_bias=f"{ATTENTION}.q_proj.bias",
        key_bias=f"{ATTENTION}.k_proj.bias",
        value_bias=f"{ATTENTION}.v_proj.bias",
        query_norm=f"{ATTENTION}.q_norm.weight",
        key_norm=f"{ATTENTION}.k_norm.weight",
        selection_bias=SELECTION_BIAS,
    ),
    score="sigmoid",
    group_score="top2",
    methods=(("noaux_tc", True),),
    head_norms=True,
    free_head_size=True,
    config=replace(
        DEEPSEEK_CONFIG,
        head_norms="use_qk_norm",
        rotated_share="partial_rotary_factor",
    ),
    aliases=DEEPSEEK_ALIASES,
    # What transformers' Glm4MoeConfig assumes where the file says nothing.
    defaults=(
        ("num_key_value_heads", 8),
        ("hidden_act", "silu"),
        ("rms_norm_eps", 1e-5),
        ("attention_bias", False),
        ("norm_topk_prob", True),
        ("tie_word_embeddings", False),
        ("n_shared_experts", 1),
        ("first_k_dense_replace", 1),
        ("routed_scaling_factor", 1.0),
        ("topk_method", "noaux_tc"),
        ("use_qk_norm", False),
        ("partial_rotary_factor", 0.5),
    ),
    fixed=(("scoring_func", "sigmoid"), ("moe_layer_freq", 1)),
)
