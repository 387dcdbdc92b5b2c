"""DeepSeek-V2 (and V2-Lite): latent attention, softmax routing, by groups where the config says."""

from knnmoe.export.family import ConfigNames, Family
from knnmoe.export.latent import LatentNames

from .names import DEEPSEEK_LATENT

DEEPSEEK_V2 = Family(
    name="deepseek_v2",
    model_type="deepseek_v2",
    tensors=DEEPSEEK_LATENT,
    methods=(("greedy", False), ("group_limited_greedy", True)),
    config=ConfigNames(
        num_experts="n_routed_experts",
        expert_width="moe_intermediate_size",
        dense_width="intermediate_size",
        shared_count="n_shared_experts",
        first_dense="first_k_dense_replace",
        renormalize=None,
        routing_scale="routed_scaling_factor",
        groups="n_group",
        top_groups="topk_group",
        method="topk_method",
        latent=LatentNames(),
    ),
    aliases=(("num_experts", "n_routed_experts"),),
    # What transformers' DeepseekV2Config assumes where the file says nothing.
    defaults=(
        ("hidden_act", "silu"),
        ("rms_norm_eps", 1e-6),
        ("attention_bias", False),
        ("tie_word_embeddings", False),
        ("n_shared_experts", 2),
        ("first_k_dense_replace", 0),
        ("routed_scaling_factor", 1.0),
        ("topk_method", "greedy"),
        ("q_lora_rank", 1536),
    ),
    # transformers never renormalises; DeepSeek's own code would, and then leave the scale out.
    fixed=(
        ("scoring_func", "softmax"),
        ("norm_topk_prob", False),
        ("moe_layer_freq", 1),
        ("mlp_bias", False),
    ),
)
