"""DeepSeek-V3 (and R1): latent attention, sigmoid routing by groups with a bias."""

from dataclasses import replace

from knnmoe.export.family import Family
from knnmoe.export.latent import LatentNames

from .names import DEEPSEEK_ALIASES, DEEPSEEK_CONFIG, DEEPSEEK_LATENT, SELECTION_BIAS

DEEPSEEK_V3 = Family(
    name="deepseek_v3",
    model_type="deepseek_v3",
    tensors=replace(DEEPSEEK_LATENT, selection_bias=SELECTION_BIAS),
    score="sigmoid",
    group_score="top2",
    methods=(("noaux_tc", True),),
    config=replace(
        DEEPSEEK_CONFIG,
        latent=LatentNames(interleaved="rope_interleave"),
    ),
    aliases=DEEPSEEK_ALIASES,
    # What transformers' DeepseekV3Config assumes where the file says nothing.
    defaults=(
        ("hidden_act", "silu"),
        ("rms_norm_eps", 1e-6),
        ("attention_bias", False),
        ("norm_topk_prob", True),
        ("tie_word_embeddings", False),
        ("n_shared_experts", 1),
        ("first_k_dense_replace", 3),
        ("routed_scaling_factor", 2.5),
        ("n_group", 8),
        ("topk_group", 4),
        ("topk_method", "noaux_tc"),
        ("q_lora_rank", 1536),
        ("rope_interleave", True),
    ),
    fixed=(("scoring_func", "sigmoid"), ("moe_layer_freq", 1)),
)
