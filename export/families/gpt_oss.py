"""GPT-OSS: sinks, windows in every other layer, biases everywhere, stacked experts with a clamp."""

from dataclasses import replace

from knnmoe.export.family import ConfigNames, Family

from .names import ATTENTION, COMMON, LAYER

_MLP = f"{LAYER}.mlp"

GPT_OSS = Family(
    name="gpt_oss",
    model_type="gpt_oss",
    tensors=replace(
        COMMON,
        query_bias=f"{ATTENTION}.q_proj.bias",
        key_bias=f"{ATTENTION}.k_proj.bias",
        value_bias=f"{ATTENTION}.v_proj.bias",
        output_bias=f"{ATTENTION}.o_proj.bias",
        sinks=f"{ATTENTION}.sinks",
        router=f"{_MLP}.router.weight",
        router_bias=f"{_MLP}.router.bias",
        expert_gate=None,
        expert_up=None,
        expert_down=None,
        stacked_gate_up=f"{_MLP}.experts.gate_up_proj",
        stacked_gate_up_bias=f"{_MLP}.experts.gate_up_proj_bias",
        stacked_down=f"{_MLP}.experts.down_proj",
        stacked_down_bias=f"{_MLP}.experts.down_proj_bias",
    ),
    score="softmax-topk",
    swiglu_shift=1.0,
    alternating_windows=True,
    free_head_size=True,
    config=ConfigNames(
        num_experts="num_local_experts",
        renormalize=None,
        window="sliding_window",
        layer_kinds="layer_types",
        swiglu_alpha="swiglu_alpha",
        swiglu_limit="swiglu_limit",
    ),
    aliases=(("num_experts", "num_local_experts"),),
    # What transformers' GptOssConfig assumes where the file says nothing.
    defaults=(
        ("num_key_value_heads", 8),
        ("head_dim", 64),
        ("hidden_act", "silu"),
        ("rms_norm_eps", 1e-5),
        ("attention_bias", True),
        ("tie_word_embeddings", False),
        ("num_experts_per_tok", 4),
        ("sliding_window", 128),
        ("max_position_embeddings", 131072),
        ("swiglu_alpha", 1.702),
        ("swiglu_limit", 7.0),
        (
            "rope_parameters",
            {
                "rope_type": "yarn",
                "factor": 32.0,
                "beta_fast": 32.0,
                "beta_slow": 1.0,
                "truncate": False,
                "original_max_position_embeddings": 4096,
            },
        ),
    ),
    rope_theta=150000.0,
)
