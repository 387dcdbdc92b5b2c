"""The bundle computes what transformers computes, in every shape and for every kind of OLMoE."""

from __future__ import annotations

import shutil
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
from safetensors.numpy import load_file

from knnmoe.export.exporter import export
from knnmoe.export.verification.cases import CASES
from knnmoe.export.verification.verify import verify
from knnmoe.runtime.bundle import Bundle
from knnmoe.runtime.calibration import Calibration
from knnmoe.runtime.errors import VerificationError
from tiny import make_tiny_olmoe

needs_torch = pytest.mark.skipif(find_spec("torch") is None, reason="the reference needs torch")
pytestmark = pytest.mark.usefixtures("one_torch_thread")


KINDS = {
    "plain": {"dtype": "float32"},
    "bfloat16, sharded, renormalised, unclipped": {
        "dtype": "bfloat16", "shards": 3, "norm_topk_prob": True, "clip_qkv": None,
    },
    "tied head, a key head for every query head": {
        "tie_word_embeddings": True, "num_key_value_heads": None,
    },
    "one key head, other rope, tight clipping": {
        "num_key_value_heads": 1, "rope_theta": 300.0, "clip_qkv": 0.5, "dtype": "float16",
    },
    "config of transformers 5": {
        "rope_theta": None, "rope_parameters": {"rope_theta": 500.0, "rope_type": "default"},
    },
}  # fmt: skip


@needs_torch
@pytest.mark.parametrize("kind", KINDS)
def test_logits_agree_with_transformers_within_1e_4(tmp_path, kind):
    checkpoint = make_tiny_olmoe(tmp_path / "checkpoint", seed=1, **KINDS[kind])
    export(checkpoint, tmp_path / "bundle")
    report = verify(checkpoint, Bundle.open(tmp_path / "bundle"))
    assert report.max_abs_error <= 1e-4
    assert len(report.gates) == 3
    assert len(report.cases) == len(CASES) >= 6
    assert report.ties == 0


@needs_torch
@pytest.mark.parametrize("theta", [10000.0, 500000.0])
def test_rotary_tables_are_those_of_transformers_up_to_the_last_position(tmp_path, theta):
    import torch
    from transformers import OlmoeConfig
    from transformers.models.olmoe.modeling_olmoe import OlmoeRotaryEmbedding

    sizes = {"hidden_size": 256, "num_attention_heads": 2, "max_position_embeddings": 4096}
    checkpoint = make_tiny_olmoe(tmp_path / "c", rope_theta=theta, num_hidden_layers=1, **sizes)
    export(checkpoint, tmp_path / "b")
    tables = load_file(tmp_path / "b" / "segments" / "00.safetensors")
    config = OlmoeConfig(rope_parameters={"rope_theta": theta, "rope_type": "default"}, **sizes)
    positions = torch.arange(4096)[None]
    for name, expected in zip(
        ("rope.cos", "rope.sin"),
        OlmoeRotaryEmbedding(config)(torch.zeros(1), positions),
        strict=True,
    ):
        np.testing.assert_allclose(tables[name], expected[0, :, :64].numpy(), atol=1e-5)


@needs_torch
def test_room_for_more_experts_changes_no_logits(tmp_path):
    checkpoint = make_tiny_olmoe(tmp_path / "checkpoint")
    export(checkpoint, tmp_path / "bundle", experts_per_token=5)
    bundle = Bundle.open(tmp_path / "bundle")
    assert bundle.manifest.experts_per_token == 5
    assert verify(checkpoint, bundle).max_abs_error <= 1e-4


@needs_torch
def test_a_wrong_weight_is_noticed(tmp_path):
    checkpoint = make_tiny_olmoe(tmp_path / "checkpoint")
    export(checkpoint, tmp_path / "bundle")
    weights = tmp_path / "bundle" / "segments" / "02.safetensors"
    data = bytearray(weights.read_bytes())
    values = np.frombuffer(data, np.float32, offset=len(data) - 4000)
    values += 0.05
    weights.write_bytes(data)
    with pytest.raises(VerificationError, match="disagrees with transformers"):
        verify(checkpoint, Bundle.open(tmp_path / "bundle", verify=False))


@needs_torch
def test_a_wrong_routing_rule_is_noticed(tmp_path):
    checkpoint = make_tiny_olmoe(tmp_path / "checkpoint")
    other = shutil.copytree(checkpoint, tmp_path / "other")
    config = (other / "config.json").read_text()
    (other / "config.json").write_text(
        config.replace('"norm_topk_prob": false', '"norm_topk_prob": true')
    )
    export(other, tmp_path / "bundle")
    with pytest.raises(VerificationError):
        verify(checkpoint, Bundle.open(tmp_path / "bundle"))


class Pair:
    """The split layout with ONNX gates and the fused layout, side by side on the same tokens."""

    def __init__(self, path: Path, memory: list[dict[str, np.ndarray]], batch: int) -> None:
        bundle = Bundle.open(path)
        self.manifest, self.shape = bundle.manifest, bundle.manifest.architecture
        assert self.manifest.fused is not None
        self.segments = [_session(bundle, s.file) for s in self.manifest.segments]
        self.gate = _session(bundle, self.manifest.gates[self.manifest.fused.gate].file)
        self.fused = _session(bundle, self.manifest.fused.file)
        self.memory = memory
        size = (batch, self.shape.num_kv_heads, 64, self.shape.head_size)
        gates = range(self.shape.num_gates)
        cache = {f"past_{p}_{layer}": np.zeros(size, np.float32)
                 for p in ("key", "value") for layer in range(self.shape.num_layers)}  # fmt: skip
        states = {f"state_{g}": np.zeros((batch, 2), np.float32) for g in gates}
        self.split_state, self.fused_state = cache | states, cache | states

    def step(self, ids: np.ndarray, totals: np.ndarray, lengths: np.ndarray):
        common = {
            "input_ids": ids, "seqlens_k": (totals - 1).astype(np.int32),
            "total_sequence_length": np.array(totals.max(), np.int32),
            "logit_rows": np.arange(ids.size), "lengths": lengths,
        }  # fmt: skip
        return self._split(common), self._fused(common)

    def _split(self, common: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        values, seen = common | self.split_state, {}
        for index, segment in enumerate(self.segments):
            for name, value in _run(segment, values).items():
                key = name.replace("present_", "past_").removesuffix("_out")
                values[key] = value
            if index == len(self.segments) - 1:
                break
            routed = _run(self.gate, values | self.memory[index]
                          | {"state": values[f"state_{index}"]})  # fmt: skip
            values[f"state_{index}"] = routed.pop("state_out")
            values |= routed
            seen |= {f"{name}_{index}": value for name, value in routed.items()}
        self.split_state = {name: values[name] for name in self.split_state}
        return seen | {"logits": values["logits"]} | self.split_state

    def _fused(self, common: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        suffixed = {f"{name}_{g}": value for g, one in enumerate(self.memory)
                    for name, value in one.items()}  # fmt: skip
        values = _run(self.fused, common | self.fused_state | suffixed)
        renamed = {name.replace("present_", "past_").replace("state_out_", "state_"): value
                   for name, value in values.items()}  # fmt: skip
        self.fused_state = {name: renamed[name] for name in self.fused_state}
        return renamed


def _session(bundle: Bundle, file: str) -> onnxruntime.InferenceSession:
    return onnxruntime.InferenceSession(bundle.file(file))


def _run(session: onnxruntime.InferenceSession, values: dict[str, np.ndarray]):
    names = [spec.name for spec in session.get_outputs()]
    feeds = {spec.name: values[spec.name] for spec in session.get_inputs()}
    return dict(zip(names, session.run(names, feeds), strict=True))


def random_memory(shape, seed: int, **numbers: float) -> list[dict[str, np.ndarray]]:
    rng = np.random.default_rng(seed)
    memory = []
    for _ in range(shape.num_gates):
        keys = rng.normal(size=(40, shape.hidden_size)).astype(np.float32)
        keys /= np.linalg.norm(keys, axis=1, keepdims=True)
        memory.append({
            "keys": keys, "key_scales": np.ones((40, 2), np.float32),
            "values": rng.normal(size=(40, shape.num_experts)).astype(np.float32),
            "evidence_weights": np.ones(40, np.float32),
            "n_valid": np.array([30]), "k": np.array([4]),
            "center": np.zeros(shape.hidden_size, np.float32),
            "calibration": replace(Calibration(), **numbers).vector(),
        })  # fmt: skip
    return memory


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("room", [2, 5])
def test_split_and_fused_layouts_agree_bit_for_bit(tmp_path, batch, room):
    checkpoint = make_tiny_olmoe(tmp_path / "checkpoint", seed=3)
    export(checkpoint, tmp_path / "bundle", experts_per_token=room)
    shape = Bundle.open(tmp_path / "bundle").manifest.architecture
    numbers = {"power": 0.3, "sequence": 1.0, "sharpness": 3.0, "midpoint": 0.1}
    pair = Pair(tmp_path / "bundle", random_memory(shape, 4, **numbers), batch)
    rng = np.random.default_rng(5)
    lengths = np.full(batch, 7)
    totals = np.zeros(batch, np.int64)
    for width in (7, 1, 1, 1):
        lengths = np.full(batch, width)
        totals = totals + lengths
        split, fused = pair.step(rng.integers(0, 256, (batch, width)), totals, lengths)
        assert split["confidence_1"].mean() > 0.1  # the memory does take part
        for name, value in fused.items():
            assert value.tobytes() == split[name].tobytes(), name
