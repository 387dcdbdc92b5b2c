"""Tiny random checkpoints of every family in the Hugging Face layout, made without torch."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

TINY_CONFIG: dict[str, Any] = {
    "architectures": ["OlmoeForCausalLM"],
    "model_type": "olmoe",
    "vocab_size": 272,
    "hidden_size": 64,
    "intermediate_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "hidden_act": "silu",
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "attention_bias": False,
    "clip_qkv": 2.0,
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "norm_topk_prob": False,
    "tie_word_embeddings": False,
    "bos_token_id": None,
    "eos_token_id": 256,
    "pad_token_id": 257,
}


_QWEN: dict[str, Any] = {
    **{
        name: TINY_CONFIG[name]
        for name in TINY_CONFIG
        if name not in ("attention_bias", "clip_qkv")
    },
    "intermediate_size": 48,
    "moe_intermediate_size": 32,
    "num_hidden_layers": 4,
    "rms_norm_eps": 1e-6,
    "norm_topk_prob": True,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [1],
    "use_sliding_window": False,
    "sliding_window": 64,
}

_DEEPSEEK: dict[str, Any] = {
    **{
        name: TINY_CONFIG[name]
        for name in TINY_CONFIG
        if name not in ("attention_bias", "clip_qkv", "num_experts")
    },
    "intermediate_size": 48,
    "moe_intermediate_size": 32,
    "n_routed_experts": 8,
    "n_shared_experts": 1,
    "first_k_dense_replace": 1,
    "num_key_value_heads": 4,
}

_LATENT: dict[str, Any] = {
    "kv_lora_rank": 64,
    "qk_nope_head_dim": 24,
    "qk_rope_head_dim": 16,
    "v_head_dim": 40,
    "attention_bias": False,
}

# Of each family what the others are made of: entries of `config.json`, where `...` removes one.
FAMILIES: dict[str, dict[str, Any]] = {
    "olmoe": TINY_CONFIG,
    "qwen3_moe": _QWEN | {
        "architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe",
        "head_dim": 32, "attention_bias": False,
    },
    "mixtral": {
        **{name: TINY_CONFIG[name] for name in TINY_CONFIG
           if name not in ("attention_bias", "clip_qkv", "num_experts", "norm_topk_prob")},
        "architectures": ["MixtralForCausalLM"], "model_type": "mixtral",
        "num_local_experts": 8, "sliding_window": None,
    },
    "qwen2_moe": _QWEN | {
        "architectures": ["Qwen2MoeForCausalLM"], "model_type": "qwen2_moe",
        "shared_expert_intermediate_size": 40, "norm_topk_prob": False, "max_window_layers": 4,
    },
    "glm4_moe": _DEEPSEEK | {
        "architectures": ["Glm4MoeForCausalLM"], "model_type": "glm4_moe",
        "num_key_value_heads": 2, "head_dim": 32, "attention_bias": True, "use_qk_norm": True,
        "partial_rotary_factor": 0.5, "routed_scaling_factor": 1.5, "norm_topk_prob": True,
        "n_group": 1, "topk_group": 1,
    },
    "gpt_oss": {
        **{name: TINY_CONFIG[name] for name in TINY_CONFIG
           if name not in ("clip_qkv", "num_experts", "norm_topk_prob", "rope_theta")},
        "architectures": ["GptOssForCausalLM"], "model_type": "gpt_oss",
        "num_hidden_layers": 4, "num_local_experts": 8, "num_experts_per_tok": 3, "head_dim": 32,
        "attention_bias": True, "sliding_window": 5, "swiglu_limit": 2.0, "swiglu_alpha": 1.702,
        "layer_types": ["sliding_attention", "full_attention"] * 2, "rope_theta": 1500.0,
        "rope_scaling": {
            "rope_type": "yarn", "factor": 8.0, "beta_fast": 8.0, "beta_slow": 1.0,
            "truncate": False, "original_max_position_embeddings": 16,
        },
    },
    "deepseek_v2": _DEEPSEEK | _LATENT | {
        "architectures": ["DeepseekV2ForCausalLM"], "model_type": "deepseek_v2",
        "q_lora_rank": None, "n_shared_experts": 2, "topk_method": "greedy", "n_group": 1,
        "topk_group": 1, "norm_topk_prob": False, "scoring_func": "softmax", "moe_layer_freq": 1,
        "rope_scaling": {
            "type": "yarn", "factor": 4, "original_max_position_embeddings": 32, "mscale": 0.7,
            "mscale_all_dim": 0.7, "beta_fast": 32, "beta_slow": 1,
        },
    },
    "deepseek_v3": _DEEPSEEK | _LATENT | {
        "architectures": ["DeepseekV3ForCausalLM"], "model_type": "deepseek_v3",
        "q_lora_rank": 64, "topk_method": "noaux_tc", "scoring_func": "sigmoid",
        "n_group": 4, "topk_group": 2, "norm_topk_prob": True, "routed_scaling_factor": 2.5,
        "num_nextn_predict_layers": 1, "moe_layer_freq": 1,
        "rope_scaling": {
            "type": "yarn", "factor": 4, "original_max_position_embeddings": 32, "mscale": 1.0,
            "mscale_all_dim": 0.6,
        },
    },
}  # fmt: skip

# What sets a kind of a family apart from `plain`: entries of its config, `dtype`, `shards`, and
# `mxfp4`, whether its experts are in that format.
KINDS: dict[str, dict[str, dict[str, Any]]] = {
    "olmoe": {"plain": {}},
    "qwen3_moe": {
        "plain": {},  # a dense layer behind the first gate, heads wider than the hidden size
        "first and last layers dense, two in a row": {
            "num_hidden_layers": 6, "mlp_only_layers": [0, 1, 3, 5], "dtype": "bfloat16",
            "shards": 3,
        },
        "every other layer dense, biases, tied, as transformers 5 writes it": {
            "decoder_sparse_step": 2, "mlp_only_layers": None, "attention_bias": True,
            "tie_word_embeddings": True, "norm_topk_prob": False, "num_experts": ...,
            "num_local_experts": 8, "rope_theta": ...,
            "rope_parameters": {"rope_theta": 500.0, "rope_type": "default"},
        },
        "a context stretched by YaRN": {
            "rope_scaling": {
                "rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32,
            },
        },
        "a window of 5, one narrow key head": {
            "use_sliding_window": True, "sliding_window": 5, "num_key_value_heads": 1,
            "head_dim": 16, "num_attention_heads": 6,
        },
    },
    "mixtral": {
        "plain": {},
        "a window of 5, wide heads, many experts": {
            "sliding_window": 5, "head_dim": 48, "num_local_experts": 12, "dtype": "float16",
        },
        "a window of 1, a key head for every query head": {
            "sliding_window": 1, "num_key_value_heads": 4, "tie_word_embeddings": True,
        },
    },
    "qwen2_moe": {
        "plain": {},
        "windows of 6 in every other layer, last layer dense": {
            "num_hidden_layers": 5, "mlp_only_layers": [4], "use_sliding_window": True,
            "sliding_window": 6, "shards": 2, "dtype": "bfloat16",
        },
        "a context stretched by YaRN along a ramp of broken pairs": {
            "rope_theta": ...,
            "rope_parameters": {
                "rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 16,
                "rope_theta": 700.0, "beta_fast": 4.0, "beta_slow": 0.5, "truncate": False,
                "mscale": 0.7, "mscale_all_dim": 0.3,
            },
        },
        "windows of 4 by list, no biases, renormalised": {
            "mlp_only_layers": [], "qkv_bias": False, "norm_topk_prob": True,
            "use_sliding_window": True, "sliding_window": 4, "num_experts_per_tok": 3,
            "layer_types": ["full_attention", "sliding_attention", "sliding_attention",
                            "full_attention"],
        },
    },
    "glm4_moe": {
        "plain": {},
        "no norms, no biases, groups, two shared experts, a layer that predicts more": {
            "use_qk_norm": False, "attention_bias": False, "n_group": 4, "topk_group": 2,
            "n_shared_experts": 2, "num_nextn_predict_layers": 1, "norm_topk_prob": False,
            "first_k_dense_replace": 2, "num_hidden_layers": 4, "dtype": "bfloat16", "shards": 2,
        },
        "all experts, whole heads, as transformers 5 writes it": {
            "first_k_dense_replace": 0, "num_experts_per_tok": 3, "rope_theta": ...,
            "partial_rotary_factor": ..., "tie_word_embeddings": True,
            "rope_parameters": {
                "rope_theta": 500.0, "rope_type": "default", "partial_rotary_factor": 1.0,
            },
        },
    },
    "gpt_oss": {
        "plain": {},  # windows of 5 in every other layer, a clamp at 2
        "experts in MXFP4": {"mxfp4": True, "dtype": "bfloat16", "shards": 2, "swiglu_limit": 1.0},
        "as transformers assumes it, a key head for every query head": {
            "sliding_window": 3, "layer_types": ..., "rope_theta": ..., "rope_scaling": ...,
            "swiglu_limit": ..., "swiglu_alpha": ..., "num_key_value_heads": 4, "head_dim": 64,
            "attention_bias": ..., "num_hidden_layers": 3, "intermediate_size": 48,
        },
        "no biases in attention, tied, one window by list": {
            "attention_bias": False, "tie_word_embeddings": True, "num_experts_per_tok": 1,
            "layer_types": ["full_attention", "full_attention", "sliding_attention",
                            "full_attention"], "swiglu_alpha": 1.0, "num_local_experts": 5,
        },
    },
    "deepseek_v2": {
        "plain": {},
        "groups, latent queries, no dense layer": {
            "q_lora_rank": 32, "topk_method": "group_limited_greedy", "n_group": 4,
            "topk_group": 2, "routed_scaling_factor": 16.0, "first_k_dense_replace": 0,
            "rope_scaling": None, "dtype": "bfloat16", "shards": 2,
        },
        "tied, wide values, no key head count, as transformers 5 writes it": {
            "tie_word_embeddings": True, "v_head_dim": 72, "num_key_value_heads": ...,
            "rope_theta": ..., "rope_scaling": ...,
            "rope_parameters": {"rope_theta": 500.0, "rope_type": "default"},
        },
    },
    "deepseek_v3": {
        "plain": {},
        "queries of the stream, pairs half a head apart, not renormalised": {
            "q_lora_rank": None, "rope_interleave": False, "norm_topk_prob": False,
            "n_group": 1, "topk_group": 1, "num_nextn_predict_layers": 0, "rope_scaling": None,
            "first_k_dense_replace": 2, "num_hidden_layers": 4, "n_shared_experts": 2,
        },
        "narrow latents, two dense layers, float16": {
            "kv_lora_rank": 32, "q_lora_rank": 32, "qk_rope_head_dim": 8, "v_head_dim": 24,
            "first_k_dense_replace": 2, "num_hidden_layers": 4, "dtype": "float16",
        },
    },
}  # fmt: skip


def make_tiny(
    path: str | Path,
    family: str = "olmoe",
    kind: str = "plain",
    *,
    seed: int = 0,
    dtype: str | None = None,
    shards: int | None = None,
    **config: Any,
) -> Path:
    """Write a random checkpoint directory that transformers can load.

    Weights are scaled so that activations and router logits are of order one: errors show.

    Args:
        path: Directory to create (it may exist).
        family: A key of `FAMILIES`.
        kind: A key of `KINDS[family]`.
        seed: Of the weights.
        dtype: `float32`, `float16` or `bfloat16`; by default the kind's, or float32.
        shards: Number of safetensors files, by default the kind's, or one; above 1 with
            `model.safetensors.index.json`.
        **config: Entries of `config.json` that replace those of the kind; `...` removes one.

    Returns:
        The directory.
    """
    root = Path(path)
    root.mkdir(parents=True, exist_ok=True)
    settings = FAMILIES[family] | KINDS[family][kind] | config
    dtype, shards = (
        given or settings.get(name, usual)
        for name, given, usual in (("dtype", dtype, "float32"), ("shards", shards, 1))
    )
    packed = settings.get("mxfp4", False)
    settings = {
        name: value
        for name, value in settings.items()
        if value is not ... and name not in ("dtype", "shards", "mxfp4")
    }
    settings["torch_dtype"] = dtype
    if packed:
        settings["quantization_config"] = {
            "quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.self_attn"],
        }  # fmt: skip
    _write_json(root / "config.json", settings)
    _write_json(
        root / "generation_config.json",
        {"eos_token_id": settings["eos_token_id"], "pad_token_id": settings["pad_token_id"]},
    )
    write_tiny_tokenizer(root)
    _write_shards(root, _tensors(settings, np.random.default_rng(seed), dtype), shards)
    return root


def make_tiny_olmoe(path: str | Path, **options: Any) -> Path:
    """`make_tiny` of the family the others are compared with."""
    return make_tiny(path, "olmoe", **options)


def write_tiny_tokenizer(root: Path) -> None:
    """Write `tokenizer.json` and `tokenizer_config.json`: bytes 0..255, then two special tokens."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(
        [AddedToken(token, special=True) for token in ("<|endoftext|>", "<|padding|>")]
    )
    tokenizer.save(str(root / "tokenizer.json"))
    _write_json(
        root / "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "eos_token": "<|endoftext|>",
            "pad_token": "<|padding|>",
            "model_max_length": 128,
        },
    )


def _tensors(
    c: dict[str, Any], rng: np.random.Generator, dtype: str
) -> dict[str, NDArray[np.generic]]:
    family, hidden = c["model_type"], c["hidden_size"]
    ffn = c.get("moe_intermediate_size", c["intermediate_size"])
    experts = c.get("num_experts", c.get("num_local_experts", c.get("n_routed_experts")))
    shared = ffn * c.get("n_shared_experts", 0)
    heads = c["num_attention_heads"]
    head = c.get("head_dim") or hidden // heads
    width, kv_width = heads * head, head * (c.get("num_key_value_heads") or heads)
    attention_bias = c.get("attention_bias", family == "gpt_oss")
    qkv_bias = c.get("qkv_bias", family == "qwen2_moe") or attention_bias
    further = c.get("num_nextn_predict_layers", 0)
    tensors: dict[str, NDArray[np.generic]] = {}

    def linear(name: str, out: int, inside: int, gain: float = 1.0, bias: bool = False) -> None:
        tensors[f"{name}.weight"] = rng.normal(0, gain / np.sqrt(inside), (out, inside))
        if bias:
            tensors[f"{name}.bias"] = rng.normal(0, 0.5, out)

    def norm(name: str, width: int) -> None:
        tensors[f"{name}.weight"] = rng.uniform(0.5, 1.5, width)

    def mlp(name: str, width: int, parts: tuple[str, str, str]) -> None:
        gate, up, down = parts
        linear(f"{name}.{gate}", width, hidden)
        linear(f"{name}.{up}", width, hidden)
        linear(f"{name}.{down}", hidden, width, gain=2.0)

    def stacked(name: str, inside: int, out: int) -> None:
        tensors[f"{name}_bias"] = rng.normal(0, 0.5, (experts, out))
        if "quantization_config" not in c:
            tensors[name] = rng.normal(0, 1 / np.sqrt(inside), (experts, inside, out))
            return
        rows = (experts, out, inside // 32)
        tensors[f"{name}_blocks"] = rng.integers(0, 256, (*rows, 16), np.uint8)
        tensors[f"{name}_scales"] = rng.integers(121, 125, rows, np.uint8)

    def latent_attention(name: str) -> None:
        rank, query_rank, rotary = c["kv_lora_rank"], c["q_lora_rank"], c["qk_rope_head_dim"]
        query = heads * (c["qk_nope_head_dim"] + rotary)
        if query_rank is None:
            linear(f"{name}.q_proj", query, hidden)
        else:
            linear(f"{name}.q_a_proj", query_rank, hidden)
            norm(f"{name}.q_a_layernorm", query_rank)
            linear(f"{name}.q_b_proj", query, query_rank)
        linear(f"{name}.kv_a_proj_with_mqa", rank + rotary, hidden)
        norm(f"{name}.kv_a_layernorm", rank)
        linear(f"{name}.kv_b_proj", heads * (c["qk_nope_head_dim"] + c["v_head_dim"]), rank)
        linear(f"{name}.o_proj", hidden, heads * c["v_head_dim"])

    gated = ("gate_proj", "up_proj", "down_proj")
    tensors["model.embed_tokens.weight"] = rng.normal(0, 1, (c["vocab_size"], hidden))
    for layer in range(c["num_hidden_layers"]):
        p = f"model.layers.{layer}"
        norm(f"{p}.input_layernorm", hidden)
        norm(f"{p}.post_attention_layernorm", hidden)
        if family == "olmoe":
            norm(f"{p}.self_attn.q_norm", width)
            norm(f"{p}.self_attn.k_norm", kv_width)
        if family == "qwen3_moe" or c.get("use_qk_norm"):
            norm(f"{p}.self_attn.q_norm", head)
            norm(f"{p}.self_attn.k_norm", head)
        if "kv_lora_rank" in c:
            latent_attention(f"{p}.self_attn")
        else:
            linear(f"{p}.self_attn.q_proj", width, hidden, bias=qkv_bias)
            linear(f"{p}.self_attn.k_proj", kv_width, hidden, bias=qkv_bias)
            linear(f"{p}.self_attn.v_proj", kv_width, hidden, bias=qkv_bias)
            out_bias = attention_bias and family != "glm4_moe"
            linear(f"{p}.self_attn.o_proj", hidden, width, bias=out_bias)
        dense = layer in (c.get("mlp_only_layers") or ())
        dense |= layer < c.get("first_k_dense_replace", 0)
        if dense or (layer + 1) % c.get("decoder_sparse_step", 1):
            mlp(f"{p}.mlp", c["intermediate_size"], gated)
            continue
        if family == "gpt_oss":
            tensors[f"{p}.self_attn.sinks"] = rng.normal(0, 1, heads)
            linear(f"{p}.mlp.router", experts, hidden, bias=True)
            stacked(f"{p}.mlp.experts.gate_up_proj", hidden, 2 * ffn)
            stacked(f"{p}.mlp.experts.down_proj", ffn, hidden)
            continue
        block = f"{p}.block_sparse_moe" if family == "mixtral" else f"{p}.mlp"
        linear(f"{block}.gate", experts, hidden)
        for e in range(experts):
            parts = ("w1", "w3", "w2") if family == "mixtral" else gated
            mlp(f"{block}.experts.{e}", ffn, parts)
        if family == "qwen2_moe":
            mlp(f"{block}.shared_expert", c["shared_expert_intermediate_size"], gated)
            linear(f"{block}.shared_expert_gate", 1, hidden)
        if shared:
            mlp(f"{block}.shared_experts", shared, gated)
        if family in ("deepseek_v3", "glm4_moe"):
            bias = rng.normal(0, 0.2, experts).astype(np.float32)
            tensors[f"{block}.gate.e_score_correction_bias"] = bias
    for layer in range(c["num_hidden_layers"], c["num_hidden_layers"] + further):
        linear(f"model.layers.{layer}.eh_proj", hidden, 2 * hidden)
        norm(f"model.layers.{layer}.enorm", hidden)
    norm("model.norm", hidden)
    if not c["tie_word_embeddings"]:
        linear("lm_head", c["vocab_size"], hidden)
    return {
        name: tensor if tensor.dtype == np.uint8 else tensor.astype(_numpy_dtype(dtype))
        for name, tensor in tensors.items()
    }


def _numpy_dtype(name: str) -> np.dtype[Any]:
    if name == "bfloat16":
        import ml_dtypes

        return np.dtype(ml_dtypes.bfloat16)
    return np.dtype(name)


def _write_shards(root: Path, tensors: dict[str, NDArray[np.generic]], shards: int) -> None:
    from safetensors.numpy import save_file

    if shards == 1:
        save_file(tensors, root / "model.safetensors", metadata={"format": "pt"})
        return
    names = list(tensors)
    weight_map: dict[str, str] = {}
    for shard in range(shards):
        file = f"model-{shard + 1:05d}-of-{shards:05d}.safetensors"
        part = {name: tensors[name] for name in names[shard::shards]}
        save_file(part, root / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
    total = sum(tensor.nbytes for tensor in tensors.values())
    _write_json(
        root / "model.safetensors.index.json",
        {"metadata": {"total_size": total}, "weight_map": weight_map},
    )


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
