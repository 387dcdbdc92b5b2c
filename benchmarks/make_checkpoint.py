"""Checkpoints with the shapes of well-known models and random weights, for measuring speed.

    .venv/bin/python benchmarks/make_checkpoint.py olmoe-1b-7b --layers 4 build/olmoe-4

Speed does not depend on what the weights are, only on how many; the text such a model writes is
noise. The files are those of a release on a model hub: `config.json`, bf16 shards with an index
(the experts of GPT-OSS in MXFP4), and a tokenizer of bytes. Weights are pieces of one block of
random numbers, so that a checkpoint takes about as long as its bytes take to write.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import ml_dtypes
import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

_COMMON: dict[str, Any] = {
    "hidden_act": "silu",
    "tie_word_embeddings": False,
    "bos_token_id": None,
    "eos_token_id": 256,
    "pad_token_id": 257,
    "torch_dtype": "bfloat16",
}
CONFIGS: dict[str, dict[str, Any]] = {
    "olmoe-1b-7b": {
        "architectures": ["OlmoeForCausalLM"], "model_type": "olmoe",
        "vocab_size": 50304, "hidden_size": 2048, "intermediate_size": 1024,
        "num_hidden_layers": 16, "num_attention_heads": 16, "num_key_value_heads": 16,
        "num_experts": 64, "num_experts_per_tok": 8, "norm_topk_prob": False,
        "max_position_embeddings": 4096, "rms_norm_eps": 1e-5, "rope_theta": 10000.0,
        "attention_bias": False, "clip_qkv": None,
    },
    "demo-512": {  # the demo's model, four times as wide
        "architectures": ["OlmoeForCausalLM"], "model_type": "olmoe",
        "vocab_size": 3072, "hidden_size": 512, "intermediate_size": 384,
        "num_hidden_layers": 4, "num_attention_heads": 8, "num_key_value_heads": 4,
        "num_experts": 16, "num_experts_per_tok": 4, "norm_topk_prob": False,
        "max_position_embeddings": 512, "rms_norm_eps": 1e-5, "rope_theta": 10000.0,
        "attention_bias": False, "clip_qkv": None,
    },
    "qwen3-30b-a3b": {
        "architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe",
        "vocab_size": 151936, "hidden_size": 2048, "intermediate_size": 6144,
        "moe_intermediate_size": 768, "num_hidden_layers": 48, "num_attention_heads": 32,
        "num_key_value_heads": 4, "head_dim": 128, "num_experts": 128, "num_experts_per_tok": 8,
        "norm_topk_prob": True, "decoder_sparse_step": 1, "mlp_only_layers": [],
        "max_position_embeddings": 40960, "rms_norm_eps": 1e-6, "rope_theta": 1000000.0,
        "attention_bias": False, "use_sliding_window": False, "sliding_window": None,
    },
    "qwen1.5-moe-a2.7b": {
        "architectures": ["Qwen2MoeForCausalLM"], "model_type": "qwen2_moe",
        "vocab_size": 151936, "hidden_size": 2048, "intermediate_size": 5632,
        "moe_intermediate_size": 1408, "shared_expert_intermediate_size": 5632,
        "num_hidden_layers": 24, "num_attention_heads": 16, "num_key_value_heads": 16,
        "num_experts": 60, "num_experts_per_tok": 4, "norm_topk_prob": False,
        "decoder_sparse_step": 1, "mlp_only_layers": [], "max_position_embeddings": 8192,
        "rms_norm_eps": 1e-6, "rope_theta": 1000000.0, "use_sliding_window": False,
        "sliding_window": 32768, "max_window_layers": 21,
    },
    "mixtral-8x7b": {
        "architectures": ["MixtralForCausalLM"], "model_type": "mixtral",
        "vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 14336,
        "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8,
        "num_local_experts": 8, "num_experts_per_tok": 2, "max_position_embeddings": 32768,
        "rms_norm_eps": 1e-5, "rope_theta": 1000000.0, "sliding_window": None,
    },
    "gpt-oss-20b": {
        "architectures": ["GptOssForCausalLM"], "model_type": "gpt_oss",
        "vocab_size": 201088, "hidden_size": 2880, "intermediate_size": 2880,
        "num_hidden_layers": 24, "num_attention_heads": 64, "num_key_value_heads": 8,
        "head_dim": 64, "num_local_experts": 32, "num_experts_per_tok": 4,
        "max_position_embeddings": 131072, "rms_norm_eps": 1e-5, "attention_bias": True,
        "sliding_window": 128, "layer_types": ["sliding_attention", "full_attention"] * 12,
        "swiglu_limit": 7.0, "rope_theta": 150000.0,
        "rope_scaling": {
            "rope_type": "yarn", "factor": 32.0, "beta_fast": 32.0, "beta_slow": 1.0,
            "truncate": False, "original_max_position_embeddings": 4096,
        },
        "quantization_config": {
            "quant_method": "mxfp4",
            "modules_to_not_convert": ["model.layers.*.self_attn", "model.layers.*.mlp.router",
                                       "model.embed_tokens", "lm_head"],
        },
    },
    "deepseek-v2-lite": {
        "architectures": ["DeepseekV2ForCausalLM"], "model_type": "deepseek_v2",
        "vocab_size": 102400, "hidden_size": 2048, "intermediate_size": 10944,
        "moe_intermediate_size": 1408, "num_hidden_layers": 27, "num_attention_heads": 16,
        "num_key_value_heads": 16, "n_routed_experts": 64, "n_shared_experts": 2,
        "num_experts_per_tok": 6, "first_k_dense_replace": 1, "moe_layer_freq": 1,
        "topk_method": "greedy", "scoring_func": "softmax", "n_group": 1, "topk_group": 1,
        "norm_topk_prob": False, "routed_scaling_factor": 1.0, "q_lora_rank": None,
        "kv_lora_rank": 512, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128,
        "max_position_embeddings": 163840, "rms_norm_eps": 1e-6, "rope_theta": 10000.0,
        "rope_scaling": {
            "type": "yarn", "factor": 40, "original_max_position_embeddings": 4096,
            "mscale": 0.707, "mscale_all_dim": 0.707, "beta_fast": 32, "beta_slow": 1,
        },
        "attention_bias": False,
    },
}  # fmt: skip
SHARD_BYTES = 2 << 30
_BLOCK = 1 << 22  # random numbers
_GATED = ("gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True)
class Weight:
    """A tensor: its name, its shape, and the mean and spread of its elements.

    They are bf16, or bytes (`U8`); bytes without a spread are any.
    """

    name: str
    shape: tuple[int, ...]
    mean: float
    spread: float
    dtype: str = "BF16"

    @property
    def width(self) -> int:
        return 2 if self.dtype == "BF16" else 1

    @property
    def nbytes(self) -> int:
        return self.width * int(np.prod(self.shape))

    def elements(self, normal: NDArray[np.float32]) -> NDArray[Any]:
        """Made of as many normal numbers."""
        if self.dtype == "BF16":
            return (self.mean + self.spread * normal).astype(ml_dtypes.bfloat16).view(np.uint16)
        if self.spread == 0:
            return normal.view(np.uint32).astype(np.uint8)  # the lowest bits, which are even
        wide: NDArray[np.float32] = np.rint(self.mean + self.spread * normal)
        return wide.clip(0, 254).astype(np.uint8)


@click.command()
@click.argument("name", type=click.Choice(sorted(CONFIGS)))
@click.argument("out", type=click.Path(path_type=Path))
@click.option("--layers", type=click.IntRange(1), help="Instead of the model's own number.")
@click.option("--seed", default=0, show_default=True)
def main(name: str, out: Path, layers: int | None, seed: int) -> None:
    """Write a checkpoint of the shapes of NAME to the new directory OUT."""
    make_checkpoint(name, out, layers=layers, seed=seed)
    files = list(out.glob("*.safetensors"))
    size = sum(file.stat().st_size for file in files)
    click.echo(f"{out}: {size / 1e9:.2f} GB in {len(files)} files")


def make_checkpoint(name: str, out: Path, *, layers: int | None = None, seed: int = 0) -> Path:
    """Write a checkpoint; the directory must not exist."""
    config = CONFIGS[name] | _COMMON | ({} if layers is None else {"num_hidden_layers": layers})
    if layers is not None and "layer_types" in config:
        config["layer_types"] = config["layer_types"][:layers]
    out.mkdir(parents=True)
    _write_json(out / "config.json", config)
    special = {key: config[key] for key in ("eos_token_id", "pad_token_id")}
    _write_json(out / "generation_config.json", special)
    write_tokenizer(out, config["max_position_embeddings"])
    shards = list(in_shards(weights(config)))
    random = np.random.default_rng(seed)
    block = random.standard_normal(_BLOCK, dtype=np.float32)
    places: dict[str, str] = {}
    for index, shard in enumerate(shards):
        file = f"model-{index + 1:05d}-of-{len(shards):05d}.safetensors"
        write_shard(out / file, shard, block, random)
        places |= {weight.name: file for weight in shard}
    total = sum(weight.nbytes for shard in shards for weight in shard)
    content = {"metadata": {"total_size": total}, "weight_map": places}
    _write_json(out / "model.safetensors.index.json", content)
    return out


def weights(config: dict[str, Any]) -> Iterator[Weight]:
    """All tensors of a configuration, spread so that activations are of order one."""
    family, hidden = config["model_type"], config["hidden_size"]
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    head = config.get("head_dim") or hidden // heads
    width, kv_width = heads * head, kv_heads * head
    counts = ("num_experts", "num_local_experts", "n_routed_experts")
    experts = next(config[name] for name in counts if name in config)
    expert_width = config.get("moe_intermediate_size") or config["intermediate_size"]
    mixtral = family == "mixtral"
    yield _matrix("model.embed_tokens", config["vocab_size"], hidden)
    for layer in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{layer}"
        attention = f"{prefix}.self_attn"
        yield _norm(f"{prefix}.input_layernorm", hidden)
        yield _norm(f"{prefix}.post_attention_layernorm", hidden)
        if family in ("olmoe", "qwen3_moe"):
            whole = family == "olmoe"
            yield _norm(f"{attention}.q_norm", width if whole else head)
            yield _norm(f"{attention}.k_norm", kv_width if whole else head)
        if family == "deepseek_v2":
            yield from _latent_attention(attention, config)
        else:
            for name, out in (("q_proj", width), ("k_proj", kv_width), ("v_proj", kv_width)):
                yield _matrix(f"{attention}.{name}", out, hidden)
                if family in ("qwen2_moe", "gpt_oss"):
                    yield Weight(f"{attention}.{name}.bias", (out,), 0.0, 0.1)
            yield _matrix(f"{attention}.o_proj", hidden, width)
        if layer < config.get("first_k_dense_replace", 0):
            yield from _mlp(f"{prefix}.mlp", hidden, config["intermediate_size"], _GATED)
            continue
        if family == "gpt_oss":
            yield Weight(f"{attention}.o_proj.bias", (hidden,), 0.0, 0.1)
            yield Weight(f"{attention}.sinks", (heads,), 0.0, 1.0)
            yield _matrix(f"{prefix}.mlp.router", experts, hidden)
            yield Weight(f"{prefix}.mlp.router.bias", (experts,), 0.0, 0.1)
            stacks = f"{prefix}.mlp.experts"
            yield from _packed(f"{stacks}.gate_up_proj", experts, 2 * expert_width, hidden)
            yield from _packed(f"{stacks}.down_proj", experts, hidden, expert_width)
            continue
        block = f"{prefix}.block_sparse_moe" if mixtral else f"{prefix}.mlp"
        yield _matrix(f"{block}.gate", experts, hidden)
        names = ("w1", "w3", "w2") if mixtral else _GATED
        for expert in range(experts):
            yield from _mlp(f"{block}.experts.{expert}", hidden, expert_width, names)
        if family == "qwen2_moe":
            shared = config["shared_expert_intermediate_size"]
            yield from _mlp(f"{block}.shared_expert", hidden, shared, _GATED)
            yield _matrix(f"{block}.shared_expert_gate", 1, hidden)
        if shared := config.get("n_shared_experts", 0):
            yield from _mlp(f"{block}.shared_experts", hidden, shared * expert_width, _GATED)
    yield _norm("model.norm", hidden)
    yield _matrix("lm_head", config["vocab_size"], hidden)


def _latent_attention(prefix: str, config: dict[str, Any]) -> Iterator[Weight]:
    hidden, heads = config["hidden_size"], config["num_attention_heads"]
    rank, rotary = config["kv_lora_rank"], config["qk_rope_head_dim"]
    plain, value = config["qk_nope_head_dim"], config["v_head_dim"]
    yield _matrix(f"{prefix}.q_proj", heads * (plain + rotary), hidden)
    yield _matrix(f"{prefix}.kv_a_proj_with_mqa", rank + rotary, hidden)
    yield _norm(f"{prefix}.kv_a_layernorm", rank)
    yield _matrix(f"{prefix}.kv_b_proj", heads * (plain + value), rank)
    yield _matrix(f"{prefix}.o_proj", hidden, heads * value)


def _mlp(prefix: str, hidden: int, width: int, names: tuple[str, str, str]) -> Iterator[Weight]:
    gate, up, down = names
    yield _matrix(f"{prefix}.{gate}", width, hidden)
    yield _matrix(f"{prefix}.{up}", width, hidden)
    yield _matrix(f"{prefix}.{down}", hidden, width)


def _packed(name: str, experts: int, out: int, inside: int) -> Iterator[Weight]:
    """A stack of matrices in MXFP4 (4-bit floats whose mean square is 8.6), and its biases."""
    rows = (experts, out, inside // 32)
    scale = 127 - float(np.log2(inside * 8.6)) / 2
    yield Weight(f"{name}_blocks", (*rows, 16), 0.0, 0.0, "U8")
    yield Weight(f"{name}_scales", rows, scale, 0.5, "U8")
    yield Weight(f"{name}_bias", (experts, out), 0.0, 0.1)


def _matrix(name: str, out: int, inside: int) -> Weight:
    return Weight(f"{name}.weight", (out, inside), 0.0, float(inside**-0.5))


def _norm(name: str, width: int) -> Weight:
    return Weight(f"{name}.weight", (width,), 1.0, 0.1)


def in_shards(every: Iterator[Weight]) -> Iterator[list[Weight]]:
    """The tensors in their order, as many to a file as `SHARD_BYTES` hold."""
    shard: list[Weight] = []
    for weight in every:
        if shard and sum(kept.nbytes for kept in shard) + weight.nbytes > SHARD_BYTES:
            yield shard
            shard = []
        shard.append(weight)
    yield shard


def write_shard(
    path: Path, shard: list[Weight], block: NDArray[np.float32], random: np.random.Generator
) -> None:
    """Write a .safetensors file, tensor after tensor: nothing is held but a block."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    start = 0
    for weight in shard:
        end = start + weight.nbytes
        header[weight.name] = {
            "dtype": weight.dtype,
            "shape": list(weight.shape),
            "data_offsets": [start, end],
        }
        start = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for weight in shard:
            left = weight.nbytes // weight.width
            while left:
                begin = int(random.integers(len(block)))
                piece = block[begin : begin + left]
                file.write(weight.elements(piece).data)
                left -= len(piece)


def write_tokenizer(root: Path, max_length: int) -> None:
    """A tokenizer whose tokens are the 256 bytes; ids beyond them have no text."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<|endoftext|>", "<|padding|>"])
    tokenizer.save(str(root / "tokenizer.json"))
    _write_json(
        root / "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "eos_token": "<|endoftext|>",
            "pad_token": "<|padding|>",
            "model_max_length": max_length,
        },
    )


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
