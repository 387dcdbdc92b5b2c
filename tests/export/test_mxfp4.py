"""Checkpoints with experts in MXFP4 are read as the numbers that their blocks stand for."""

from __future__ import annotations

import json
import tracemalloc
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from safetensors.numpy import load_file, save_file

from knnmoe.export import cli
from knnmoe.export.exporter import export, plan_export
from knnmoe.export.mxfp4 import dequantized
from knnmoe.runtime.bundle import Bundle
from knnmoe.runtime.errors import CheckpointError
from tiny import make_tiny, make_tiny_olmoe

needs_torch = pytest.mark.skipif(find_spec("torch") is None, reason="the reference needs torch")
pytestmark = pytest.mark.usefixtures("one_torch_thread")

KIND = "experts in MXFP4"
UP, DOWN = (f"model.layers.1.mlp.experts.{part}_proj" for part in ("gate_up", "down"))


@pytest.fixture
def packed(tmp_path: Path) -> Path:
    return make_tiny(tmp_path / "packed", "gpt_oss", KIND, shards=1)


def changed(source: Path, change: Any) -> Path:
    """The checkpoint with other tensors."""
    tensors = load_file(source / "model.safetensors")
    change(tensors)
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    return source


def by_definition(blocks: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """Sign, exponent and mantissa of every half byte, one after the other, in float64."""
    values = []
    for block, scale in zip(blocks.reshape(-1, 16), scales.reshape(-1), strict=True):
        for half in (half for byte in block.tolist() for half in (byte & 15, byte >> 4)):
            sign, exponent, mantissa = half >> 3, half >> 1 & 3, half & 1
            # An exponent of 0 means a subnormal number.
            size = 2.0 ** (exponent - 1) * (1 + mantissa / 2) if exponent else mantissa / 2
            values.append((-1) ** sign * size * 2.0 ** (int(scale) - 127))
    return np.array(values).reshape(*scales.shape[:-1], -1)


def random_blocks(*rows: int, scales: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    drawn = rng.integers(0, 256, (*rows, 16), np.uint8)
    return drawn, rng.integers(*scales, rows, np.uint8, endpoint=True)


def test_every_byte_is_two_numbers_as_the_definition_has_them() -> None:
    blocks = np.arange(256, dtype=np.uint8).reshape(2, 8, 16)
    scales = np.array([[0, 1, 100, 120, 126, 127, 128, 129], [130, 140, 200, 250, 251, 252, 5, 64]],
                      np.uint8)  # fmt: skip
    found = dequantized(blocks, scales)
    assert found.dtype == np.float32
    assert found.shape == (2, 256)
    np.testing.assert_array_equal(found, by_definition(blocks, scales))


@needs_torch
def test_a_stack_is_what_transformers_makes_of_it() -> None:
    import torch
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    blocks, scales = random_blocks(3, 12, 4, scales=(90, 160))
    found = dequantized(blocks, scales).transpose(0, 2, 1)
    for dtype in (torch.float32, torch.bfloat16):
        expected = convert_moe_packed_tensors(
            torch.from_numpy(blocks), torch.from_numpy(scales), dtype=dtype
        )
        np.testing.assert_array_equal(found, expected.float().numpy())


def test_what_no_number_is_meant_by_is_refused() -> None:
    blocks, scales = random_blocks(4, 2, scales=(120, 130))
    scales[3, 1] = 255
    with pytest.raises(ValueError, match="scale is not a number"):
        dequantized(blocks, scales)
    scales[3, 1], blocks[3, 1] = 254, 0x22  # 1 · 2^127
    assert dequantized(blocks, scales).max() == 2.0**127
    blocks[3, 1, 7] = 0x07  # 6 · 2^127
    with pytest.raises(ValueError, match="too large for fp32"):
        dequantized(blocks, scales)


@pytest.mark.parametrize("precision", ["fp32", "fp16", "int8", "int4"])
def test_the_bundle_is_that_of_the_same_numbers_unpacked(
    packed: Path, tmp_path: Path, precision: str
) -> None:
    plain = make_tiny(tmp_path / "plain", "gpt_oss", KIND, shards=1)
    config = json.loads((plain / "config.json").read_text())
    del config["quantization_config"]
    (plain / "config.json").write_text(json.dumps(config))

    def unpack(tensors: dict[str, np.ndarray]) -> None:
        for name in [name for name in tensors if name.endswith("_blocks")]:
            stack = name.removesuffix("_blocks")
            rows = dequantized(tensors.pop(name), tensors.pop(f"{stack}_scales"))
            tensors[stack] = np.ascontiguousarray(rows.transpose(0, 2, 1))

    changed(plain, unpack)
    export(packed, tmp_path / "a", precision=precision)
    export(plain, tmp_path / "b", precision=precision)
    found, expected = (Bundle.open(tmp_path / name).manifest for name in "ab")
    weights = [name for name in expected.files if name.endswith(".safetensors")]
    assert weights
    assert [found.files[name] for name in weights] == [expected.files[name] for name in weights]
    assert found.fingerprint != expected.fingerprint


def test_a_dry_run_counts_numbers_and_not_blocks(packed: Path, tmp_path: Path) -> None:
    result = CliRunner().invoke(cli.main, [str(packed), "--dry-run", "--json"])
    assert result.exit_code == 0, result.output
    figures = json.loads(result.stdout)
    assert (figures["family"], figures["gates"], figures["experts"]) == ("gpt_oss", 4, 8)
    report = export(packed, tmp_path / "b")
    on_disk = (tmp_path / "b" / "segments").glob("*.safetensors")
    assert figures["bytes"]["weights"] == sum(file.stat().st_size for file in on_disk)
    assert plan_export(packed).weight_bytes == figures["bytes"]["weights"] < report.total_bytes


@pytest.mark.parametrize("kind", [KIND, "plain"])
def test_memory_stays_far_below_the_size_of_stacked_experts(tmp_path: Path, kind: str) -> None:
    source = make_tiny(
        tmp_path / "c", "gpt_oss", kind, dtype="bfloat16", hidden_size=512, intermediate_size=512,
        num_local_experts=8, num_hidden_layers=1, layer_types=["full_attention"],
    )  # fmt: skip
    tracemalloc.start()
    try:
        export(source, tmp_path / "b", precision="int8")
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 14e6  # as fp32 the experts are 25 MB


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop(f"{UP}_scales"), "tensor .*gate_up_proj_scales is missing"),
        (lambda t: t.pop(f"{DOWN}_blocks"), "tensor .*down_proj_blocks is missing"),
        (lambda t: t.pop(f"{DOWN}_bias"), "tensor .*down_proj_bias is missing"),
        (lambda t: t.update({f"{UP}_scales": t[f"{UP}_scales"][:, :, :1]}),
         r"gate_up_proj_scales: has another shape.*\[8, 64, 2\]; found \[8, 64, 1\]"),
        (lambda t: t.update({f"{UP}_blocks": t[f"{UP}_blocks"].reshape(8, 64, 32)}),
         r"gate_up_proj_blocks: has another shape.*\[8, 64, 2, 16\]; found \[8, 64, 32\]"),
        (lambda t: t.update({f"{UP}_blocks": t[f"{UP}_blocks"].astype("f4")}),
         "gate_up_proj_blocks: has a dtype .*expected U8; found F32"),
        (lambda t: t.update({"model.norm.weight": t["model.norm.weight"].astype("u1")}),
         "model.norm.weight: has a dtype .*expected F32 or F16 or BF16; found U8"),
        (lambda t: t.update({UP: np.zeros((8, 64, 64), "f4")}), "is not a tensor of the family"),
    ],
)  # fmt: skip
def test_blocks_and_scales_that_do_not_fit_are_refused(
    packed: Path, tmp_path: Path, change: Any, message: str
) -> None:
    with pytest.raises(CheckpointError, match=message):
        export(changed(packed, change), tmp_path / "b")
    assert [path.name for path in tmp_path.iterdir()] == ["packed"]


def test_a_scale_that_is_not_a_number_is_named_and_nothing_is_left(
    packed: Path, tmp_path: Path
) -> None:
    def spoil(tensors: dict[str, np.ndarray]) -> None:
        tensors[f"{DOWN}_scales"][5, 3, 0] = 255

    with pytest.raises(CheckpointError, match=r"layers\.1.*down_proj_scales: expert 5: .*scale"):
        export(changed(packed, spoil), tmp_path / "b")
    assert [path.name for path in tmp_path.iterdir()] == ["packed"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"quantization_config": {"quant_method": "gptq"}}, "quantised already.*mxfp4; found gptq"),
        ({"quantization_config": {"quant_method": "mxfp4", "block": 16}}, "mxfp4 with block"),
        ({"quantization_config": "mxfp4"}, "quantised already.*found 'mxfp4'"),
        ({"quantization_config": {}}, "an unnamed method"),
        ({"quantization_config": None}, "gate_up_proj is missing"),
        ({"hidden_size": 80}, "hidden_size: is not in whole blocks of MXFP4; .* multiple of 32"),
        ({"intermediate_size": 48}, "intermediate_size: is not in whole blocks of MXFP4"),
    ],
)
def test_a_config_that_says_otherwise_is_refused(
    packed: Path, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    path = packed / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    with pytest.raises(CheckpointError, match=message):
        export(packed, tmp_path / "b")


def test_a_family_without_stacked_experts_has_none_in_mxfp4(tmp_path: Path) -> None:
    source = make_tiny_olmoe(tmp_path / "c", quantization_config={"quant_method": "mxfp4"})
    with pytest.raises(CheckpointError, match="float16 or bfloat16; found mxfp4"):
        export(source, tmp_path / "b")
