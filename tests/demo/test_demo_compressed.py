"""A calibrated memory of the shipped model, compressed: one routing on every route, on real text.

Needs the texts that `make texts` extracts.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from emulated import blend, store

from knnmoe.calibration.build import build_memory
from knnmoe.calibration.calibrate import calibrate
from knnmoe.calibration.compress import CompressSettings, compress_pack
from knnmoe.calibration.confidence import Way
from knnmoe.calibration.recorded import Asked, record_inputs
from knnmoe.calibration.settings import BuildSettings
from knnmoe.runtime.engines.onnxruntime import OrtEngine
from knnmoe.runtime.gates.base import GateBuffers, GateTrace
from knnmoe.runtime.gates.numpy import NumpyGate
from knnmoe.runtime.gates.onnx import OnnxGate, graph_name
from knnmoe.runtime.gates.two_stage import TwoStageGate
from knnmoe.runtime.memory import MemoryPack
from knnmoe.runtime.model import Model
from knnmoe.runtime.texts import read_documents

ROOT = Path(__file__).resolve().parents[2]
CHECKPOINT = ROOT / "examples" / "demo" / "model"
TEXTS = ROOT / "build" / "demo" / "texts"
TOKENS, EMULATED = 96, 10


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from knnmoe.export.exporter import export

    return export(CHECKPOINT, tmp_path_factory.mktemp("demo") / "bundle").bundle


@pytest.fixture(scope="module")
def pack(tmp_path_factory: pytest.TempPathFactory, bundle: Path) -> MemoryPack:
    """A small memory of scripture, calibrated, then without full keys and with 4-bit values."""
    root = tmp_path_factory.mktemp("memory")
    scripture, general = TEXTS / "scripture", TEXTS / "general"
    build_memory(
        CHECKPOINT, [scripture / "reference.jsonl"], root / "plain",
        settings=BuildSettings(max_tokens=4000),
    )  # fmt: skip
    calibrate(
        bundle, root / "plain", [scripture / "validation.jsonl"], [general / "validation.jsonl"],
        ways=[Way("logits", 8, 1.0, "sequence", 0.97)], max_tokens=2500, max_general_loss=0.05,
        max_switch_loss=50, max_latency=None, threads=1,
    )  # fmt: skip
    settings = CompressSettings(
        scan_width=96, scan_bits=4, candidates=64, keys="projected", values="int4"
    )
    return compress_pack(root / "plain", root / "small", settings).pack


def route(gate: Any, asked: Asked, state: Any) -> tuple[GateBuffers, GateTrace]:
    """One call over all tokens of one sequence."""
    tokens = len(asked.x)
    buffers = GateBuffers(
        asked.x, asked.rows, state, np.array([tokens]), np.zeros((tokens, 4), np.int32),
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
    document = next(iter(read_documents(TEXTS / text / "test.jsonl")))
    ids = np.array(model.tokenizer.encode(document)[:TOKENS])
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
            found, _ = route(two_stage, Asked(one.x[piece], one.rows[piece]), state)
            state = found.state_out
            np.testing.assert_array_equal(found.expert_ids, reference.expert_ids[piece])
        kernel = blend(
            store(widened, "f32", half_values=False), one.x[:EMULATED], one.rows[:EMULATED],
            start.copy(), np.array([EMULATED]),
        )  # fmt: skip
        chosen, _ = rule.apply(kernel.rows)
        np.testing.assert_array_equal(chosen, reference.expert_ids[:EMULATED])
    assert moved > 0.3 if text == "scripture" else moved < 0.9
