"""A tiny random OLMoE checkpoint in the Hugging Face layout, made without torch."""

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


def make_tiny_olmoe(
    path: str | Path, *, seed: int = 0, dtype: str = "float32", shards: int = 1, **config: Any
) -> Path:
    """Write a random OLMoE checkpoint directory that transformers can load.

    Weights are scaled so that activations and router logits are of order one: errors show.

    Args:
        path: Directory to create (it may exist).
        seed: Of the weights.
        dtype: `float32`, `float16` or `bfloat16`.
        shards: Number of safetensors files; above 1 with `model.safetensors.index.json`.
        **config: Entries of `config.json` that replace those of `TINY_CONFIG`.

    Returns:
        The directory.
    """
    root = Path(path)
    root.mkdir(parents=True, exist_ok=True)
    settings = TINY_CONFIG | config
    settings["torch_dtype"] = dtype
    _write_json(root / "config.json", settings)
    _write_json(
        root / "generation_config.json",
        {"eos_token_id": settings["eos_token_id"], "pad_token_id": settings["pad_token_id"]},
    )
    write_tiny_tokenizer(root)
    _write_shards(root, _tensors(settings, np.random.default_rng(seed), dtype), shards)
    return root


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
    hidden, ffn, experts = c["hidden_size"], c["intermediate_size"], c["num_experts"]
    heads = c["num_attention_heads"]
    kv_width = hidden // heads * (c["num_key_value_heads"] or heads)
    tensors: dict[str, NDArray[np.generic]] = {}

    def linear(name: str, out: int, inside: int, gain: float = 1.0) -> None:
        tensors[f"{name}.weight"] = rng.normal(0, gain / np.sqrt(inside), (out, inside))

    def norm(name: str, width: int) -> None:
        tensors[f"{name}.weight"] = rng.uniform(0.5, 1.5, width)

    tensors["model.embed_tokens.weight"] = rng.normal(0, 1, (c["vocab_size"], hidden))
    for layer in range(c["num_hidden_layers"]):
        p = f"model.layers.{layer}"
        norm(f"{p}.input_layernorm", hidden)
        norm(f"{p}.post_attention_layernorm", hidden)
        norm(f"{p}.self_attn.q_norm", hidden)
        norm(f"{p}.self_attn.k_norm", kv_width)
        linear(f"{p}.self_attn.q_proj", hidden, hidden)
        linear(f"{p}.self_attn.k_proj", kv_width, hidden)
        linear(f"{p}.self_attn.v_proj", kv_width, hidden)
        linear(f"{p}.self_attn.o_proj", hidden, hidden)
        linear(f"{p}.mlp.gate", experts, hidden)
        for e in range(experts):
            linear(f"{p}.mlp.experts.{e}.gate_proj", ffn, hidden)
            linear(f"{p}.mlp.experts.{e}.up_proj", ffn, hidden)
            linear(f"{p}.mlp.experts.{e}.down_proj", hidden, ffn, gain=2.0)
    norm("model.norm", hidden)
    if not c["tie_word_embeddings"]:
        linear("lm_head", c["vocab_size"], hidden)
    return {name: tensor.astype(_numpy_dtype(dtype)) for name, tensor in tensors.items()}


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
