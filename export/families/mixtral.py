"""Mixtral: plain attention, perhaps in a sliding window; the experts' weights add up to one."""

from dataclasses import replace

from knnmoe.export.family import ConfigNames, Family

from .names import COMMON, LAYER

_EXPERT = f"{LAYER}.block_sparse_moe.experts.{{expert}}"

MIXTRAL = Family(
    name="mixtral",
    model_type="mixtral",
    tensors=replace(
        COMMON,
        router=f"{LAYER}.block_sparse_moe.gate.weight",
        expert_gate=f"{_EXPERT}.w1.weight",
        expert_up=f"{_EXPERT}.w3.weight",
        expert_down=f"{_EXPERT}.w2.weight",
    ),
    renormalize=True,
    free_head_size=True,
    config=ConfigNames(
        num_experts="num_local_experts",
        renormalize=None,
        attention_bias=None,
        window="sliding_window",
    ),
    aliases=(("num_experts", "num_local_experts"),),
    # What transformers' MixtralConfig assumes where the file says nothing.
    defaults=(
        ("num_key_value_heads", 8),
        ("hidden_act", "silu"),
        ("rms_norm_eps", 1e-5),
        ("tie_word_embeddings", False),
    ),
    rope_theta=1e6,
)
