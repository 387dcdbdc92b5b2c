"""What most families call their tensors; a family replaces what it calls otherwise."""

from knnmoe.export.architecture import TensorNames

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
