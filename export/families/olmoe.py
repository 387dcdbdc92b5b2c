"""OLMoE: query and key norms over the full width, optional clipping, softmax routing."""

from knnmoe.export.architecture import ConfigNames, Family, TensorNames

_LAYER = "model.layers.{layer}"
_ATTENTION = f"{_LAYER}.self_attn"
_EXPERT = f"{_LAYER}.mlp.experts.{{expert}}"

OLMOE = Family(
    name="olmoe",
    model_type="olmoe",
    tensors=TensorNames(
        embedding="model.embed_tokens.weight",
        input_norm=f"{_LAYER}.input_layernorm.weight",
        query=f"{_ATTENTION}.q_proj.weight",
        key=f"{_ATTENTION}.k_proj.weight",
        value=f"{_ATTENTION}.v_proj.weight",
        output=f"{_ATTENTION}.o_proj.weight",
        query_norm=f"{_ATTENTION}.q_norm.weight",
        key_norm=f"{_ATTENTION}.k_norm.weight",
        router_norm=f"{_LAYER}.post_attention_layernorm.weight",
        router=f"{_LAYER}.mlp.gate.weight",
        expert_gate=f"{_EXPERT}.gate_proj.weight",
        expert_up=f"{_EXPERT}.up_proj.weight",
        expert_down=f"{_EXPERT}.down_proj.weight",
        final_norm="model.norm.weight",
        head="lm_head.weight",
        ignored=("rotary_emb.inv_freq",),
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
