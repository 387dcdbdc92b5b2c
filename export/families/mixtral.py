"""Mixtral: plain attention, perhaps in a sliding window; the experts' weights add up to one."""

from knnmoe.export.architecture import ConfigNames, Family, TensorNames

_LAYER = "model.layers.{layer}"
_ATTENTION = f"{_LAYER}.self_attn"
_EXPERT = f"{_LAYER}.block_sparse_moe.experts.{{expert}}"

MIXTRAL = Family(
    name="mixtral",
    model_type="mixtral",
    tensors=TensorNames(
        embedding="model.embed_tokens.weight",
        input_norm=f"{_LAYER}.input_layernorm.weight",
        query=f"{_ATTENTION}.q_proj.weight",
        key=f"{_ATTENTION}.k_proj.weight",
        value=f"{_ATTENTION}.v_proj.weight",
        output=f"{_ATTENTION}.o_proj.weight",
        router_norm=f"{_LAYER}.post_attention_layernorm.weight",
        router=f"{_LAYER}.block_sparse_moe.gate.weight",
        expert_gate=f"{_EXPERT}.w1.weight",
        expert_up=f"{_EXPERT}.w3.weight",
        expert_down=f"{_EXPERT}.w2.weight",
        final_norm="model.norm.weight",
        head="lm_head.weight",
        ignored=("rotary_emb.inv_freq",),
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
