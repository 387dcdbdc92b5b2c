"""Every way in which a checkpoint can be wrong: what the error says, and that nothing is touched.

Each case is an export that should replace a bundle: afterwards that bundle is as it was, and
nothing lies beside it.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from knnmoe.export.exporter import export
from knnmoe.runtime.bundle import Bundle
from knnmoe.runtime.errors import CheckpointError
from tiny import make_tiny

FIRST, SECOND, THIRD = (f"model-0000{n}-of-00003.safetensors" for n in (1, 2, 3))
INDEX = "model.safetensors.index.json"
HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"
ROUTER = "model.layers.0.mlp.gate.weight"
Break = Callable[[Path], object]


@pytest.fixture(scope="module")
def bundle(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("bundles")
    export(make_tiny(tmp_path_factory.mktemp("good")), root / "b")
    return root / "b"


def content(root: Path) -> dict[str, bytes]:
    return {str(p.relative_to(root)): p.read_bytes() for p in root.rglob("*") if p.is_file()}


def refused(source: Path, bundle: Path) -> CheckpointError:
    before = content(bundle.parent)
    with pytest.raises(CheckpointError) as caught:
        export(source, bundle, overwrite=True)
    assert content(bundle.parent) == before
    assert [entry.name for entry in bundle.parent.iterdir()] == [bundle.name]
    assert caught.value.fix
    return caught.value


# --- how to break a checkpoint ------------------------------------------------------------------


def config(**changes: Any) -> Break:
    def apply(root: Path) -> None:
        path = root / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return apply


def index(change: Callable[[dict[str, str]], object]) -> Break:
    def apply(root: Path) -> None:
        stated = json.loads((root / INDEX).read_text())
        change(stated["weight_map"])
        (root / INDEX).write_text(json.dumps(stated))

    return apply


def tensors(change: Callable[[dict[str, np.ndarray]], object]) -> Break:
    """Change the tensors, and write them as one file."""

    def apply(root: Path) -> None:
        found: dict[str, np.ndarray] = {}
        for shard in sorted(root.glob("*.safetensors")):
            found |= load_file(shard)
            shard.unlink()
        (root / INDEX).unlink()
        change(found)
        save_file(found, root / "model.safetensors")

    return apply


def both(*breaks: Break) -> Break:
    return lambda root: [apply(root) for apply in breaks]


def header(change: Callable[[dict[str, Any]], object]) -> Break:
    """Rewrite the header of the second shard, its data as they were."""

    def apply(root: Path) -> None:
        data = (root / SECOND).read_bytes()
        (length,) = struct.unpack("<Q", data[:8])
        stated = json.loads(data[8 : 8 + length])
        stated.pop("__metadata__", None)
        change(stated)
        text = json.dumps(stated).encode()
        (root / SECOND).write_bytes(struct.pack("<Q", len(text)) + text + data[8 + length :])

    return apply


def stretched(stated: dict[str, Any]) -> None:
    """The last tensor claims a row more than there is."""
    last = max(stated.values(), key=lambda entry: entry["data_offsets"][1])
    row = 4 * int(np.prod(last["shape"][1:], dtype=int))
    last["shape"][0] += 1
    last["data_offsets"][1] += row


def shortened(stated: dict[str, Any]) -> None:
    next(iter(stated.values()))["data_offsets"][1] -= 4


def length(number: int) -> Break:
    return lambda root: (root / SECOND).write_bytes(
        struct.pack("<Q", number) + (root / SECOND).read_bytes()[8:]
    )


def stacked(name: str) -> Callable[[dict[str, np.ndarray]], object]:
    return lambda found: found.update({name: np.tile(found[name], (2, 1))})


def tied(change: Callable[[dict[str, np.ndarray]], object]) -> Break:
    return both(config(tie_word_embeddings=True), tensors(change))


# --- what the shards and the index say ------------------------------------------------------------

FILES: dict[str, tuple[Break, dict[str, str]]] = {
    "a shard is missing": (
        lambda root: (root / SECOND).unlink(),
        {"problem": "a shard is missing", "expected": f"a file {SECOND}"},
    ),
    "the index lists a tensor in another shard": (
        index(lambda names: names.update({HEAD: SECOND})),
        {"where": INDEX, "problem": f"disagree about tensor {HEAD}",
         "expected": SECOND, "found": THIRD},
    ),
    "the index lists a tensor that is nowhere": (
        index(lambda names: names.update({"extra": FIRST})),
        {"problem": "disagree about tensor extra", "expected": FIRST, "found": "no such tensor"},
    ),
    "a shard holds a tensor that the index does not list": (
        index(lambda names: names.pop(HEAD)),
        {"problem": f"disagree about tensor {HEAD}", "expected": "no such tensor", "found": THIRD},
    ),
    "a tensor is in two shards": (
        lambda root: save_file(
            load_file(root / SECOND) | {EMBEDDING: load_file(root / FIRST)[EMBEDDING]},
            root / SECOND,
        ),
        {"where": SECOND, "problem": f"tensor {EMBEDDING} is also in {FIRST}"},
    ),
    "a shard ends early": (
        lambda root: (root / SECOND).write_bytes((root / SECOND).read_bytes()[:-5]),
        {"where": SECOND, "problem": "is truncated", "expected": "bytes", "found": "bytes"},
    ),
    "a header claims more data than there are": (
        header(stretched), {"where": SECOND, "problem": "is truncated"},
    ),
    "a header's offsets are not what its shape takes": (
        header(shortened), {"where": SECOND, "problem": "malformed header entry"},
    ),
    "a header is longer than its file": (
        length(1 << 40),
        {"where": SECOND, "problem": "malformed header or is truncated",
         "found": "1099511627776 bytes"},
    ),
    "a header is shorter than it was": (
        length(100), {"where": SECOND, "problem": "malformed header"},
    ),
}  # fmt: skip

# --- what tensors there are -----------------------------------------------------------------------

TENSORS: dict[str, tuple[Break, dict[str, str]]] = {
    "a tensor that no OLMoE has": (
        tensors(lambda t: t.update({"model.layers.0.mlp.bias": np.zeros(3, np.float32)})),
        {"where": "model.layers.0.mlp.bias", "problem": "is not a tensor of the family olmoe"},
    ),
    "a shape of twice the rows": (
        tensors(stacked("model.layers.1.self_attn.o_proj.weight")),
        {"where": "layers.1.self_attn.o_proj.weight", "problem": "has another shape",
         "expected": "[64, 64]", "found": "[128, 64]"},
    ),
    "no head, though it is not tied": (
        tensors(lambda t: t.pop(HEAD)),
        {"problem": f"tensor {HEAD} is missing, and the config does not tie the head",
         "fix": "set tie_word_embeddings to true"},
    ),
    "a head of other values, though it is tied": (
        tied(lambda t: t.update({HEAD: t[EMBEDDING] + np.float32(1e-3)})),
        {"where": HEAD, "problem": "differs from the embedding, to which the config ties it",
         "expected": f"the values of {EMBEDDING}", "fix": "set tie_word_embeddings to false"},
    ),
    "a head of another shape, though it is tied": (
        tied(lambda t: t.update({HEAD: t[HEAD][:100]})),
        {"where": HEAD, "problem": "has another shape than the embedding",
         "expected": "[272, 64]", "found": "[100, 64]"},
    ),
}  # fmt: skip

# --- what the config says -------------------------------------------------------------------------

CONFIGS: dict[str, tuple[Break, dict[str, str]]] = {
    "more experts than on disk": (
        config(num_experts=9),
        {"where": ROUTER, "problem": "another shape than the config states",
         "expected": "[9, 64]", "found": "[8, 64]", "fix": "the config.json that belongs to"},
    ),
    "more experts than on disk, and a router that has them": (
        both(config(num_experts=9), tensors(lambda t: t.update(
            {name: np.zeros((9, 64), np.float32) for name in t if name.endswith("mlp.gate.weight")}
        ))),
        {"problem": "tensor model.layers.0.mlp.experts.8.gate_proj.weight is missing"},
    ),
    "fewer experts than on disk": (
        config(num_experts=7),
        {"where": ROUTER, "expected": "[7, 64]", "found": "[8, 64]"},
    ),
    "fewer experts than on disk, and a router of theirs": (
        both(config(num_experts=7), tensors(lambda t: t.update(
            {name: t[name][:7] for name in t if name.endswith("mlp.gate.weight")}
        ))),
        {"where": "mlp.experts.7", "problem": "is not a tensor of the family olmoe"},
    ),
    "more experts a token than there are": (
        config(num_experts_per_tok=9),
        {"where": "num_experts_per_tok", "problem": "is more than there are experts",
         "expected": "at most 8", "found": "9"},
    ),
    "other heads": (
        config(num_attention_heads=2, num_key_value_heads=2),
        {"where": "layers.0.self_attn.k_proj.weight", "expected": "[64, 64]", "found": "[32, 64]"},
    ),
    "another number of key heads": (
        config(num_key_value_heads=4),
        {"where": "k_proj.weight", "expected": "[64, 64]", "found": "[32, 64]"},
    ),
    "heads of another size": (
        config(head_dim=32),
        {"where": "head_dim", "problem": "is not the hidden size over the heads",
         "expected": "16", "found": "32"},
    ),
    "heads that do not divide": (
        config(num_attention_heads=5),
        {"where": "num_attention_heads", "problem": "does not divide the hidden size"},
    ),
}  # fmt: skip

# --- code and quantised weights -------------------------------------------------------------------


def remote(name: Any, **changes: Any) -> Break:
    return config(auto_map={"AutoConfig": "configuration_x.XConfig", "AutoModelForCausalLM": name},
                  **changes)  # fmt: skip


def quantized(method: str, **more: Any) -> tuple[Break, dict[str, str]]:
    expected = {"where": "quantization_config", "problem": "quantised already", "found": method,
                "fix": "the checkpoint it was made from"}  # fmt: skip
    return config(quantization_config={"quant_method": method, **more}), expected


def packed(ending: str, method: str) -> tuple[Break, dict[str, str]]:
    """A quantised checkpoint whose config does not say so."""
    name = "model.layers.0.self_attn.q_proj"

    def change(found: dict[str, np.ndarray]) -> None:
        found[name + ending] = np.zeros((8, 64), np.int32)
        del found[f"{name}.weight"]

    expected = {"where": name + ending, "problem": "is a part of a quantised weight",
                "found": method, "fix": "the checkpoint it was made from"}  # fmt: skip
    return tensors(change), expected


def float8(stated: dict[str, Any]) -> None:
    """A tensor of 8-bit powers of two, as some quantised checkpoints have their scales in."""
    next(iter(stated.values()))["dtype"] = "F8_E8M0"


KINDS: dict[str, tuple[Break, dict[str, str]]] = {
    "code of its own": (
        remote("modeling_x.XForCausalLM", model_type="x"),
        {"where": "auto_map", "problem": "no code of a checkpoint is run",
         "expected": "or olmoe or", "found": "modeling_x.XForCausalLM",
         "fix": "convert it with transformers"},
    ),
    "code of its own under the name of a family": (
        remote("someone/repo--modeling_x.BetterOlmoe"),
        {"where": "auto_map", "expected": "OlmoeForCausalLM of transformers",
         "found": "someone/repo--modeling_x.BetterOlmoe", "fix": "but olmoe, remove auto_map"},
    ),
    "an auto_map that is no object": (
        config(auto_map="x.Y"), {"where": "auto_map", "found": "x.Y"},
    ),
    "GPTQ": quantized("gptq", bits=4, group_size=128),
    "AWQ": quantized("awq", bits=4),
    "compressed-tensors": quantized("compressed-tensors", format="pack-quantized"),
    "fp8": quantized("fp8", activation_scheme="dynamic"),
    "bitsandbytes": quantized("bitsandbytes", load_in_4bit=True),
    "GPTQ or AWQ, unsaid": packed(".qweight", "GPTQ or AWQ"),
    "compressed-tensors, unsaid": packed(".weight_packed", "compressed-tensors"),
    "fp8, unsaid": packed(".weight_scale_inv", "fp8"),
    "bitsandbytes, unsaid": packed(".weight.absmax", "bitsandbytes"),
    "tensors of 8-bit powers of two": (
        header(float8),
        {"where": SECOND, "problem": "has an unsupported dtype", "found": "F8_E8M0",
         "fix": "if it is quantised, take the one it was made from"},
    ),
}  # fmt: skip

CASES = FILES | TENSORS | CONFIGS | KINDS


@pytest.mark.parametrize("case", CASES)
def test_a_checkpoint_that_is_wrong_is_refused_and_the_output_untouched(tmp_path, bundle, case):
    source = make_tiny(tmp_path / "c", shards=3)
    apply, parts = CASES[case]
    apply(source)
    error = refused(source, bundle)
    for name, part in parts.items():
        assert part in str(getattr(error, name)), (name, str(error))


# --- what looks wrong and is right ----------------------------------------------------------------


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_a_head_that_repeats_the_embedding_it_is_tied_to_is_taken(tmp_path, dtype):
    source = make_tiny(tmp_path / "c", shards=3, dtype="float16")
    tied(lambda t: t.update({HEAD: t[EMBEDDING].astype(dtype)}))(source)
    export(source, tmp_path / "b")
    files = Bundle.open(tmp_path / "b").path / "segments"
    assert not any("head" in load_file(file) for file in files.glob("*.safetensors"))


def test_a_family_of_transformers_may_still_name_the_code_it_had_before(tmp_path):
    source = make_tiny(tmp_path / "c", shards=3)
    remote("modeling_olmoe.OlmoeForCausalLM")(source)
    export(source, tmp_path / "b")
    assert Bundle.open(tmp_path / "b")
