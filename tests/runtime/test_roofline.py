"""What a step must move and compute, beside what a person counts by hand."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from knnmoe.runtime.bundle import Bundle, ModelShape
from knnmoe.runtime.errors import BundleError
from knnmoe.runtime.gates.numpy import NumpyGate
from knnmoe.runtime.gates.onnx import OnnxGate
from knnmoe.runtime.profiling.plan import Shape
from knnmoe.runtime.profiling.record import MachineBounds, ReadRate
from knnmoe.runtime.profiling.roofline import (
    Cost,
    Weights,
    attention_cost,
    bound,
    expected_experts,
    gate_cost,
    read_weights,
    segment_cost,
)
from knnmoe.runtime.routing import RoutingRule
from memories import random_memory

# 10 experts, 4 heads of 8, of which 2 are cached.
MODEL = ModelShape(
    hidden_size=32, vocab_size=100, num_layers=2, num_gates=2, num_experts=10, num_heads=4,
    num_kv_heads=2, head_size=8, max_positions=64,
)  # fmt: skip
MACHINE = MachineBounds((ReadRate(1000, 50.0), ReadRate(1_000_000, 10.0)), 8.0, 100.0, 1, "")


def test_a_token_reads_the_dense_weights_and_k_of_the_experts() -> None:
    weights = Weights(dense=(4000, 1000), experts=(80_000, 20_000), row_bytes=128)
    one = Shape("decode", 1, 1, 7)
    found = segment_cost(weights, 0, MODEL, active=2, shape=one, rows=1)
    # 2 of 10 experts: 16,000 bytes, 4,000 numbers; and one row that is looked up.
    assert found == Cost(4000 + 16_000 + 128, 2 * 1000 + 2 * 4000)


def test_the_head_is_multiplied_with_the_rows_whose_logits_are_wanted() -> None:
    weights = Weights(head=(12_800, 3200))
    prompt = Shape("prefill", 1, 16, 0)
    assert segment_cost(weights, 0, MODEL, 2, prompt, rows=1) == Cost(12_800, 6400)


def test_attention_reads_what_is_cached_and_writes_what_is_new() -> None:
    # A token after 7: reads 8 positions, writes 1, each 2 heads of 8 keys and as many values, fp32.
    one = attention_cost(MODEL, Shape("decode", 1, 1, 7))
    assert one == Cost((8 + 1) * 2 * 8 * 2 * 4, 4 * 8 * 2 * (8 + 8))
    # Three tokens see 1, 2 and 3 positions; two sequences twice as much of all.
    three = attention_cost(MODEL, Shape("prefill", 2, 3, 0))
    assert three.flops == 2 * (1 + 2 + 3) * 4 * (8 + 8) * 2
    assert three.bytes == 2 * (3 + 3) * 128
    latent = replace(MODEL, num_kv_heads=1, head_size=20, latent_size=16)
    found = attention_cost(latent, Shape("decode", 1, 1, 0))
    assert found == Cost(2 * 20 * 4, 4 * 2 * (20 + 16))


def test_many_tokens_need_nearly_all_experts() -> None:
    assert expected_experts(10, 2, 1) == pytest.approx(2)
    assert expected_experts(10, 2, 2) == pytest.approx(10 * (1 - 0.8**2))
    assert expected_experts(10, 2, 100) == pytest.approx(10)


def test_exact_gates_read_all_keys_once_and_k_values_a_token() -> None:
    memory = random_memory(0, entries=100, hidden_size=16, num_experts=8, k=5)
    rule = RoutingRule(2, "softmax", False, 1.0)
    numpy_gate = NumpyGate(rule, 2, memory)
    engine: Any = None
    onnx_gate = OnnxGate.over(engine, memory)
    count, size = memory.keys.shape
    expected = Cost(count * size * 4 + 3 * 5 * 8 * 4, 3 * (2 * count * size + 2 * 5 * 8))
    assert gate_cost(numpy_gate, 3) == gate_cost(onnx_gate, 3) == expected
    # NumPy takes 64 rows at once, and reads the keys for each of these anew.
    many = gate_cost(numpy_gate, 65).bytes - gate_cost(onnx_gate, 65).bytes
    assert many == count * size * 4
    assert gate_cost(NumpyGate(rule, 2), 3) == gate_cost(OnnxGate(engine, {}, 0), 3) == Cost()


def test_the_bound_is_the_longer_of_moving_and_computing() -> None:
    # 1 MB at 10 GB/s is 0.1 ms; 1 MFLOP at 100 GFLOP/s is 0.01 ms.
    assert bound(Cost(1_000_000, 1_000_000), MACHINE, 10**7).ms == pytest.approx(0.1)
    assert bound(Cost(1000, 10**9), MACHINE, 10**7).ms == pytest.approx(10.0)
    # A step that fits into the cache is bound by the cache.
    assert bound(Cost(1_000_000, 0), MACHINE, 999_999).ms == pytest.approx(0.02)


def test_weights_of_a_bundle_are_all_counted_and_nothing_twice(tiny_bundle: Path) -> None:
    bundle = Bundle.open(tiny_bundle)
    shape = bundle.manifest.architecture
    found = read_weights(bundle)
    assert len(found) == shape.num_gates + 1
    assert found[-1].head == (4 * shape.vocab_size * shape.hidden_size,
                              shape.vocab_size * shape.hidden_size)  # fmt: skip
    experts = [weights.experts for weights in found]
    assert experts[0] == (0, 0)
    assert all(size == 4 * numbers > 0 for size, numbers in experts[1:])
    files = [spec.size for name, spec in bundle.manifest.files.items() if ".safetensors" in name]
    looked_up = 4 * shape.vocab_size * shape.hidden_size  # the embedding
    stored = sum(files) - looked_up
    counted = sum(weights.bytes for weights in found)
    assert 0.9 * stored < counted < stored  # headers and rotary tables are the rest
    vectors = sum(weights.dense[0] - 4 * weights.dense[1] for weights in found)
    assert 0 < vectors < 0.1 * counted  # norms are read, and multiply nothing


def test_a_file_without_a_header_is_refused(tiny_bundle: Path, tmp_path: Path) -> None:
    import shutil

    copy = tmp_path / "bundle"
    shutil.copytree(tiny_bundle, copy)
    bundle = Bundle.open(copy)
    file = copy / "segments" / "01.safetensors"
    file.write_bytes(np.uint64(20).tobytes() + b'{"a": {"dtype": "F7"')
    with pytest.raises(BundleError, match=r"01\.safetensors: has a malformed header"):
        read_weights(bundle)
