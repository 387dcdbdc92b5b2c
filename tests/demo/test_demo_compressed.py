"""A calibrated memory of the shipped model, compressed: one routing on every route, on real text.

Needs what `make demo` makes.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from emulated import blend, store

from knnmoe.calibration.compress import CompressSettings, compress_pack
from knnmoe.calibration.recorded import GateInputs, record_inputs
from knnmoe.runtime.engines.onnxruntime import OrtEngine
from knnmoe.runtime.gates.base import GateBuffers, GateTrace
from knnmoe.runtime.gates.numpy import NumpyGate
from knnmoe.runtime.gates.onnx import OnnxGate, graph_name
from knnmoe.runtime.gates.two_stage import TwoStageGate
from knnmoe.runtime.memory import MemoryPack
from knnmoe.runtime.model import Model
from knnmoe.runtime.texts import read_text

ROOT = Path(__file__).resolve().parents[2]
DEMO = ROOT / "build" / "demo"
TEXTS = DEMO / "texts"
TOKENS = 48
EMULATED, ENTRIES = 4, 1000  # the emulation is slow: few tokens, and the first entries alone


@pytest.fixture(scope="module")
def bundle() -> Path:
    if not (DEMO / "memory-scripture" / "memory.json").is_file():
        pytest.skip("the demo's memory is not there: run `make demo` first")
    return DEMO / "bundle"


@pytest.fixture(scope="module")
def pack(tmp_path_factory: pytest.TempPathFactory, bundle: Path) -> MemoryPack:
    """The demo's calibrated memory without full keys and with 4-bit values."""
    settings = CompressSettings(
        scan_width=96, scan_bits=4, candidates=64, keys="projected", values="int4"
    )
    target = tmp_path_factory.mktemp("memory") / "small"
    return compress_pack(DEMO / "memory-scripture", target, settings).pack


def route(gate: Any, asked: GateInputs, state: Any) -> tuple[GateBuffers, GateTrace]:
    """One call over all tokens of one sequence."""
    tokens = len(asked.x)
    buffers = GateBuffers(
        asked.x, asked.router_logits, state, np.array([tokens]), np.zeros((tokens, 4), np.int32),
        np.zeros((tokens, 4), np.float32), np.zeros((1, 2), np.float32),
    )  # fmt: skip
    trace = GateTrace.empty(tokens, gate.neighbors)
    gate.bind(buffers, trace)()
    return buffers, trace


@pytest.mark.slow
@pytest.mark.parametrize("text", ["scripture", "general"])
def test_every_route_chooses_the_same_experts(bundle: Path, pack: MemoryPack, text: str) -> None:
    assert pack.calibrated
    model = Model.load(bundle, threads=1)
    rule, seam = model.bundle.manifest.routing, model.bundle.manifest.experts_per_token
    assert seam == 4
    vocabulary = model.bundle.manifest.architecture.vocab_size
    read = read_text([TEXTS / text / "test.jsonl"], model.tokenizer, vocab_size=vocabulary)
    ids = read.sequences[0].tokens[:TOKENS]
    assert len(ids) == TOKENS
    asked = record_inputs(model, [ids], lambda _: None)
    start = np.zeros((1, 2), np.float32)
    moved = 0.0
    for stated in pack.gates:
        memory = pack.compressed_memory(stated, rule)
        assert memory is not None
        one, widened = asked[stated.gate], memory.widened()
        path = model.bundle.file(model.bundle.manifest.gates[graph_name(memory)].file)
        engine = OrtEngine(path, threads=1)
        reference, seen = route(NumpyGate(rule, seam, widened), one, start)
        moved = max(moved, float(seen.confidence.max()))
        two_stage = TwoStageGate.over(engine, memory, rule, seam)
        for gate in (OnnxGate.over(engine, widened), two_stage):
            found, _ = route(gate, one, start)
            np.testing.assert_array_equal(found.expert_ids, reference.expert_ids)
            np.testing.assert_allclose(found.expert_weights, reference.expert_weights, atol=1e-4)
        state = start
        for token in range(TOKENS):  # as a decode does
            piece = slice(token, token + 1)
            found, _ = route(two_stage, GateInputs(one.x[piece], one.router_logits[piece]), state)
            state = found.state_out
            np.testing.assert_array_equal(found.expert_ids, reference.expert_ids[piece])
        few = replace(
            widened, keys=widened.keys[:ENTRIES], key_scales=widened.key_scales[:ENTRIES],
            values=widened.values[:ENTRIES], n_valid=ENTRIES,
        )  # fmt: skip
        first = GateInputs(one.x[:EMULATED], one.router_logits[:EMULATED])
        kernel = blend(
            store(few, "f32", half_values=False), first.x, first.router_logits, start.copy(),
            np.array([EMULATED]),
        )  # fmt: skip
        expected, near = route(NumpyGate(rule, seam, few), first, start)
        np.testing.assert_array_equal(kernel.neighbors, near.neighbors)
        np.testing.assert_array_equal(rule.apply(kernel.rows)[0], expected.expert_ids)
    assert moved > 0.3 if text == "scripture" else moved < 0.9
