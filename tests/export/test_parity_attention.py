"""The parts of attention that only GPT-OSS has, alone and in every lowering and precision.

What is compared is the first segment: embedding, attention with sinks and biases in a window or
without, stretched rotary embedding, residual sum, norm and router.
"""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest

from knnmoe.export.describe import describe_config
from knnmoe.export.families.gpt_oss import GPT_OSS
from knnmoe.export.graph import GraphBuilder
from knnmoe.export.lowering.base import Lowering
from knnmoe.export.lowering.ort_weights import segment_weights
from knnmoe.export.lowering.std import OPSETS, StdLowering
from knnmoe.export.lowering.std_ops import StdOptions
from knnmoe.export.split import ModelPlan, segment_graph
from knnmoe.export.weights import plan_file, write_file
from knnmoe.runtime.checkpoint import Checkpoint

pytestmark = [
    pytest.mark.usefixtures("one_torch_thread"),
    pytest.mark.skipif(find_spec("torch") is None, reason="the reference needs torch"),
]

SIZES: dict[str, Any] = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 16, "num_hidden_layers": 1,
    "num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 16, "num_local_experts": 4,
    "num_experts_per_tok": 2, "max_position_embeddings": 128, "sliding_window": 5,
    "attention_bias": True, "pad_token_id": 0, "eos_token_id": 1, "bos_token_id": None,
    "tie_word_embeddings": False,
    "rope_parameters": {
        "rope_type": "yarn", "rope_theta": 1000.0, "factor": 8.0, "beta_fast": 8.0,
        "beta_slow": 1.0, "truncate": False, "original_max_position_embeddings": 64,
    },
}  # fmt: skip
WAYS = {
    "ort": None,
    "primitive": StdOptions("primitive"),
    "modern": StdOptions("modern"),
    "primitive in float16": StdOptions("primitive", "float16"),
    "modern in float16": StdOptions("modern", "float16"),
}
CAPACITY = 24
# Real tokens of each of two sequences, step by step: a prompt, more of it, and single tokens.
STEPS = ((7, 4), (5, 2), (1, 1), (1, 1), (1, 1))
Arrays = dict[str, np.ndarray]


class Small:
    """A random model of one layer of this kind, and the weights of its first segment."""

    def __init__(self, root: Path, kind: str) -> None:
        import torch
        import transformers

        settings: Any = SIZES | {"layer_types": [kind]}
        config = transformers.GptOssConfig(**settings)
        torch.manual_seed(0)
        self.model: Any = transformers.AutoModelForCausalLM.from_config(
            config, attn_implementation="eager"
        ).eval()
        for parameter in self.model.parameters():
            torch.nn.init.normal_(parameter, std=0.4)
        self.model.save_pretrained(root)
        content = json.loads((root / "config.json").read_text())
        self.architecture = describe_config(content, root / "config.json", GPT_OSS)
        planned = segment_weights(self.architecture, Checkpoint.open(root), 0)
        self.weights = plan_file("00.safetensors", planned)
        write_file(self.weights, root, lambda _: None)
        self.root = root

    def expected(self, tokens: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """What leaves the first segment for one whole sequence: hidden [L, D], router logits."""
        import torch

        seen: list[Any] = []
        layer = self.model.model.layers[0]
        hooks = [
            layer.post_attention_layernorm.register_forward_pre_hook(
                lambda _, i: seen.append(i[0])
            ),
            layer.mlp.router.register_forward_hook(lambda _m, _i, out: seen.append(out[0])),
        ]
        with torch.inference_mode():
            self.model(torch.from_numpy(tokens)[None])
        for hook in hooks:
            hook.remove()
        hidden, logits = (np.asarray(value).reshape(len(tokens), -1) for value in seen)
        return hidden, logits

    def graph(self, options: StdOptions | None) -> GraphBuilder:
        """The first segment in one lowering."""
        lowered: dict[str, Any] = {}
        if options is not None:

            def lower(plan: ModelPlan, g: GraphBuilder) -> Lowering:
                return StdLowering(g, plan.architecture, plan.stored, options)

            lowered = {"lower": lower, "opset": OPSETS[options.operators]}
        stored = self.weights.stored
        return segment_graph(ModelPlan(self.architecture, stored, 2, **lowered), 0)

    def session(self, g: GraphBuilder) -> onnxruntime.InferenceSession:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        folder = "session.model_external_initializers_file_folder_path"
        options.add_session_config_entry(folder, str(self.root))
        content = ir.to_proto(g.model()).SerializeToString()
        return onnxruntime.InferenceSession(content, options)


@pytest.fixture(scope="module", params=["sliding_attention", "full_attention"])
def small(request: Any, tmp_path_factory: pytest.TempPathFactory) -> Small:
    return Small(tmp_path_factory.mktemp("gpt-oss"), request.param)


def test_the_sinks_matter(small: Small) -> None:
    import torch

    tokens = np.arange(3, 15)
    with_sinks, _ = small.expected(tokens)
    sinks = small.model.model.layers[0].self_attn.sinks
    kept = sinks.detach().clone()
    with torch.no_grad():
        sinks.fill_(-100.0)
    without, _ = small.expected(tokens)
    with torch.no_grad():
        sinks.copy_(kept)
    assert np.abs(with_sinks - without).max() > 0.05


@pytest.mark.parametrize("way", WAYS)
def test_the_first_segment_is_that_of_transformers(small: Small, way: str) -> None:
    options, g = WAYS[way], small.graph(WAYS[way])
    session, rng = small.session(g), np.random.default_rng(4)
    totals = np.sum(STEPS, axis=0)
    sequences = [rng.integers(0, 64, total) for total in totals]
    expected = [small.expected(tokens) for tokens in sequences]
    dtype = "float32" if options is None else options.precision
    shape = small.architecture.shape
    size = (2, shape.num_kv_heads, CAPACITY, shape.head_size)
    caches = {f"past_{part}_0": np.zeros(size, dtype) for part in ("key", "value")}
    starts, worst = np.zeros(2, np.int64), 0.0
    for counts in STEPS if options is not None else by_column(STEPS):
        width = max(counts)
        ids = np.zeros((2, width), np.int64)
        for b, count in enumerate(counts):
            ids[b, :count] = sequences[b][starts[b] : starts[b] + count]
        ends = np.maximum(starts + counts, starts + 1)
        values: Arrays = caches | {
            "input_ids": ids, "past_lengths": starts, "seqlens_k": (ends - 1).astype(np.int32),
            "total_sequence_length": np.array(ends.max(), np.int32),
        }  # fmt: skip
        names = [output.name for output in session.get_outputs()]
        feeds = {spec.name: values[spec.name] for spec in session.get_inputs()}
        found = dict(zip(names, session.run(names, feeds), strict=True))
        keep(caches, found, starts, counts)
        logits = found["router_logits_out"].reshape(2, width, -1)
        for b, count in enumerate(counts):
            span = slice(starts[b], starts[b] + count)
            for got, want in zip((found["hidden_out"], logits), expected[b], strict=True):
                worst = np.max([worst, np.abs(got[b, :count] - want[span]).max(initial=0)])
        starts = starts + counts
    assert (starts == totals).all()
    assert worst <= (1e-4 if dtype == "float32" else 0.05)


def by_column(steps: tuple[tuple[int, ...], ...]) -> list[tuple[int, ...]]:
    """GroupQueryAttention takes several tokens of several sequences only where no past is."""
    first, *rest = steps
    columns = [
        tuple(int(index < count) for count in counts)
        for counts in rest
        for index in range(max(counts))
    ]
    return [first, *columns]


def keep(caches: Arrays, found: Arrays, starts: np.ndarray, counts: tuple[int, ...]) -> None:
    """Take the cache over as it is after a step, or append what is new."""
    for name, value in found.items():
        kind, _, rest = name.partition("_")
        if kind == "present":
            caches[f"past_{rest}"] = value
        elif kind == "new":
            for b, (start, count) in enumerate(zip(starts, counts, strict=True)):
                caches[f"past_{rest}"][b, :, start : start + count] = value[b, :, :count]


def test_frequencies_and_magnitude_are_those_of_transformers(small: Small) -> None:
    rotary: Any = small.model.model.rotary_emb
    rope = small.architecture.rope
    np.testing.assert_allclose(rope.frequencies(16), rotary.inv_freq.numpy(), rtol=1e-6)
    assert rope.magnitude == pytest.approx(rotary.attention_scaling)
