"""Several layers a segment, shared experts, windows and latent attention do on a device what they
do on the host.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from conftest import write_tiny_pack
from knnmoe.runtime.model import Model
from thinned import thinned
from tiny import make_tiny, make_tiny_olmoe

pytest.importorskip("onnx_ir")
IDS = np.random.default_rng(5).integers(0, 256, 40)
BATCH = np.random.default_rng(6).integers(0, 256, (3, 9))
LENGTHS = np.array([9, 4, 1])
KINDS = [
    ("qwen3_moe", "first and last layers dense, two in a row"),
    ("mixtral", "a window of 5, wide heads, many experts"),
    ("qwen2_moe", "windows of 6 in every other layer, last layer dense"),
    ("gpt_oss", "plain"),
    ("deepseek_v3", "plain"),
]
WAYS = [("split", "primitive"), ("split", "modern"), ("fused", "primitive")]


@pytest.fixture(scope="module")
def bundle(request: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    from knnmoe.export.exporter import export

    root = tmp_path_factory.mktemp("family")
    return export(make_tiny(root / "checkpoint", *request.param), root / "bundle").bundle


@pytest.mark.parametrize(
    ("bundle", "layout", "operators"),
    thinned(
        ((kind, *way) for kind in KINDS for way in WAYS),
        lambda kind, *way: way == WAYS[KINDS.index(kind) % len(WAYS)] or kind[0] == "gpt_oss",
        lambda kind, *way: "-".join((" ".join(kind), *way)),
    ),
    indirect=["bundle"],
)
def test_logits_and_ragged_batches_are_those_of_the_host(
    load: Any, bundle: Path, tmp_path: Path, layout: str, operators: str
) -> None:
    pack = write_tiny_pack(tmp_path / "pack", bundle)
    expected = Model.load(bundle, memory=pack, gate="numpy-float64", threads=1)
    device = load(bundle_path=bundle, memory=pack, layout=layout, operators=operators).model
    np.testing.assert_allclose(device.logits(IDS), expected.logits(IDS), atol=2e-4)
    caches = [model.pipeline.new_cache(3, capacity=16) for model in (device, expected)]
    for ids, lengths in ((BATCH, LENGTHS), *[(BATCH[:, i : i + 1], None) for i in range(4)]):
        found, wanted = (
            model.pipeline.step(cache, ids, lengths).copy()
            for model, cache in zip((device, expected), caches, strict=True)
        )
        np.testing.assert_allclose(found, wanted, atol=2e-4)


def test_weights_in_blocks_are_those_of_the_host(load: Any, tmp_path: Path) -> None:
    """With exact activations, as a device has none rounded to 8 bits."""
    from knnmoe.export.exporter import export
    from knnmoe.export.storage import QuantizeOptions

    checkpoint = make_tiny_olmoe(tmp_path / "c", hidden_size=128, intermediate_size=64)
    exact = QuantizeOptions(exact_activations=True, search=False)
    bundle = export(checkpoint, tmp_path / "b", precision="int4", options=exact).bundle
    expected, device = Model.load(bundle, threads=1), load(bundle_path=bundle).model
    np.testing.assert_allclose(device.logits(IDS), expected.logits(IDS), atol=2e-4)
    caches = [model.pipeline.new_cache(capacity=16) for model in (device, expected)]
    for ids in (IDS[None, :3], IDS[None, 3:4]):  # the engines of prompts, and of single tokens
        found, wanted = (
            model.pipeline.step(cache, ids).copy()
            for model, cache in zip((device, expected), caches, strict=True)
        )
        np.testing.assert_allclose(found, wanted, atol=2e-4)
