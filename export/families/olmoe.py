"""OLMoE: query and key norms over the full width, optional clipping, softmax routing."""

from dataclasses import replace

from knnmoe.export.family import ConfigNames, Family

from .names import ATTENTION, COMMON

OLMOE = Family(
    name="olmoe",
    model_type="olmoe",
    tensors=replace(
        COMMON,
        query_norm=f"{ATTENTION}.q_norm.weight",
        key_norm=f"{ATTENTION}.k_norm.weight",
    ),
    config=ConfigNames(clip_qkv="clip_qkv"),
    # What transformers' OlmoeConfig assumes where the file says nothing.
    defaults=(
        ("hidden_act", "silu"),
        ("rms_norm_eps", 1e-5),
        ("attention_bias", False),
        ("norm_topk_prob", False),
        ("tie_word_embeddings", False),
    ),
)
