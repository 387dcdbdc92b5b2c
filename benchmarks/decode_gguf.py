"""An OLMoE checkpoint as a GGUF file for llama.cpp.

python benchmarks/decode_gguf.py CHECKPOINT TARGET
"""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path
from typing import Any


def convert_to_gguf(checkpoint: str, target: str) -> None:
    """OLMoE as F16, then quantised to Q4_0 (its head to Q6_K, as llama.cpp does)."""
    import ctypes

    import numpy as np

    gguf: Any = importlib.import_module("gguf")
    llama_cpp: Any = importlib.import_module("llama_cpp")

    root = Path(checkpoint)
    config = json.loads((root / "config.json").read_text(encoding="utf-8"))
    places = json.loads((root / "model.safetensors.index.json").read_text(encoding="utf-8"))
    headers = {file: tensor_header(root / file) for file in set(places["weight_map"].values())}

    def read(name: str) -> Any:
        file = places["weight_map"][name]
        start, header = headers[file]
        begin, end = header[name]["data_offsets"]
        raw = np.fromfile(root / file, np.uint16, (end - begin) // 2, offset=start + begin)
        wide = (raw.astype(np.uint32) << 16).view(np.float32)
        return wide.reshape(header[name]["shape"])

    layers, experts = config["num_hidden_layers"], config["num_experts"]
    half = target + ".f16"
    writer = gguf.GGUFWriter(half, "olmoe", use_temp_file=True)
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(layers)
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_rope_freq_base(config["rope_theta"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_expert_count(experts)
    writer.add_expert_used_count(config["num_experts_per_tok"])
    writer.add_vocab_size(config["vocab_size"])
    writer.add_tokenizer_model("none")

    def add(name: str, array: Any) -> None:
        matrix = array.ndim > 1 and "gate_inp" not in name
        writer.add_tensor(f"{name}.weight", array.astype(np.float16 if matrix else np.float32))

    names = {
        "attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm",
        "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj",
        "attn_output": "self_attn.o_proj", "attn_q_norm": "self_attn.q_norm",
        "attn_k_norm": "self_attn.k_norm", "ffn_gate_inp": "mlp.gate",
    }  # fmt: skip
    add("token_embd", read("model.embed_tokens.weight"))
    for layer in range(layers):
        prefix = f"model.layers.{layer}"
        for name, source in names.items():
            add(f"blk.{layer}.{name}", read(f"{prefix}.{source}.weight"))
        for part in ("gate", "up", "down"):
            parts = [
                read(f"{prefix}.mlp.experts.{e}.{part}_proj.weight").astype(np.float16)
                for e in range(experts)
            ]
            add(f"blk.{layer}.ffn_{part}_exps", np.stack(parts))
    add("output_norm", read("model.norm.weight"))
    add("output", read("lm_head.weight"))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    settings = llama_cpp.llama_model_quantize_default_params()
    settings.ftype, settings.nthread = llama_cpp.LLAMA_FTYPE_MOSTLY_Q4_0, 1
    failed = llama_cpp.llama_model_quantize(
        half.encode(), f"{target}.part".encode(), ctypes.byref(settings)
    )
    if failed:
        raise SystemExit(f"llama.cpp cannot quantise {half}")
    Path(half).unlink()
    Path(f"{target}.part").rename(target)


def tensor_header(path: Path) -> tuple[int, dict[str, Any]]:
    """Where the tensors of a .safetensors file begin, and what they are."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        return 8 + length, json.loads(file.read(length))


if __name__ == "__main__":
    convert_to_gguf(*sys.argv[1:3])
