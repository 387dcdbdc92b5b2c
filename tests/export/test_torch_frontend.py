"""Bundles made by tracing compute what transformers computes, described family or not."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from conftest import write_tiny_pack  # noqa: E402
from knnmoe.export.cli import main  # noqa: E402
from knnmoe.export.exporter import export, plan_export  # noqa: E402
from knnmoe.export.frontends import TRACED_FAMILIES  # noqa: E402
from knnmoe.export.std import StdModel, StdOptions  # noqa: E402
from knnmoe.export.verification.cases import CASES  # noqa: E402
from knnmoe.export.verification.verify import verify  # noqa: E402
from knnmoe.runtime.bundle import Bundle  # noqa: E402
from knnmoe.runtime.errors import BackendError, BundleError, CheckpointError, SettingError  # noqa: E402
from knnmoe.runtime.model import Model  # noqa: E402
from knnmoe.runtime.routing import RoutingRule  # noqa: E402
from tiny import make_tiny, write_tiny_tokenizer  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_torch_thread")

PROMPT = np.random.default_rng(2).integers(0, 256, 11)
NEW_TOKENS = 32
# What a family that no description covers is made small by; entries that its config has not are
# left out.
SMALL: dict[str, Any] = {
    "hidden_size": 64, "intermediate_size": 48, "moe_intermediate_size": 32,
    "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32,
    "vocab_size": 272, "num_experts": 8, "num_local_experts": 8, "n_routed_experts": 8,
    "moe_num_experts": 8, "num_experts_per_tok": 2, "moe_k": 2, "moe_topk": 2,
    "max_position_embeddings": 128, "n_group": 1, "topk_group": 1, "n_shared_experts": 1,
    "first_k_dense_replace": 1, "eos_token_id": 256, "pad_token_id": None, "bos_token_id": None,
}  # fmt: skip


def make_other(path: Path, model_type: str, **changes: Any) -> Path:
    """A random checkpoint of any family that transformers has."""
    from transformers import AutoConfig, AutoModelForCausalLM

    configs: Any = AutoConfig
    config = configs.for_model(model_type)
    for name, value in (SMALL | changes).items():
        if hasattr(config, name):
            setattr(config, name, value)
    torch.manual_seed(3)
    model: Any = AutoModelForCausalLM.from_config(config).float()
    with torch.no_grad():
        for name, tensor in (*model.named_parameters(), *model.named_buffers()):
            if tensor.ndim > 1:
                tensor.copy_(1.5 * torch.randn_like(tensor) / tensor.shape[-1] ** 0.5)
            elif "bias" in name:
                tensor.copy_(0.2 * torch.randn_like(tensor))
            elif "norm" in name:
                tensor.copy_(0.5 + torch.rand_like(tensor))
    model.save_pretrained(path)
    write_tiny_tokenizer(path)
    return path


def traced(checkpoint: Path, bundle: Path, **options: Any) -> Bundle:
    return Bundle.open(export(checkpoint, bundle, frontend="torch", **options).bundle)


def likeliest(logits: np.ndarray, tokens: list[int]) -> int:
    """The likeliest token that is not there yet; a random model repeats itself."""
    logits = logits.copy()
    logits[tokens] = -np.inf
    return int(logits.argmax())


def greedy(bundle: Path, memory: Path | None = None, **options: Any) -> list[int]:
    """A continuation, token by token over a cache."""
    model = Model.load(bundle, memory=memory, threads=1, **options)
    cache = model.pipeline.new_cache(capacity=len(PROMPT) + NEW_TOKENS)
    tokens, step = PROMPT.tolist(), PROMPT[None]
    for _ in range(NEW_TOKENS):
        tokens.append(likeliest(model.pipeline.step(cache, step)[0], tokens))
        step = np.array([tokens[-1:]])
    return tokens


@pytest.fixture(scope="module")
def mixtral(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Bundle, dict[str, Any]]:
    """A checkpoint of a described family, the bundle of its trace, and what the command said."""
    root = tmp_path_factory.mktemp("mixtral")
    checkpoint = make_tiny(
        root / "c", "mixtral", num_hidden_layers=2, sliding_window=5, tie_word_embeddings=True
    )
    command = [str(checkpoint), str(root / "b"), "--frontend", "torch", "--verify", "--json"]
    result = CliRunner().invoke(main, command)
    assert result.exit_code == 0, result.output
    return checkpoint, Bundle.open(root / "b"), json.loads(result.stdout)


def test_a_trace_agrees_with_transformers(mixtral: tuple[Path, Bundle, dict[str, Any]]) -> None:
    figures = mixtral[2]
    assert figures["max_abs_error"] <= 5e-5  # measured: 2e-5, with the tied head
    assert len(figures["case_errors"]) == len(CASES)
    assert figures["ties"] == 0


def test_a_trace_has_the_seam_of_the_description(
    mixtral: tuple[Path, Bundle, dict[str, Any]], tmp_path: Path
) -> None:
    checkpoint, bundle, _ = mixtral
    described = Bundle.open(export(checkpoint, tmp_path / "b").bundle).manifest
    assert bundle.manifest.family == "traced:mixtral"
    for field in ("model_type", "fingerprint", "architecture", "routing", "gates",
                  "minimum_onnxruntime"):  # fmt: skip
        assert getattr(bundle.manifest, field) == getattr(described, field), field
    graphs = zip(
        (*bundle.manifest.segments, bundle.manifest.fused),
        (*described.segments, described.fused),
        strict=True,
    )
    for mine, other in graphs:
        assert mine is not None
        assert other is not None
        assert mine.layers == other.layers
        assert set(mine.inputs) == set(other.inputs)
        assert set(mine.outputs) == set(other.outputs)
    # The tied head lies there once.
    assert bundle.total_bytes < sum(spec.size for spec in described.files.values()) * 1.05


def test_a_trace_runs_with_a_memory_as_the_description_does(
    mixtral: tuple[Path, Bundle, dict[str, Any]], tmp_path: Path
) -> None:
    checkpoint, bundle, _ = mixtral
    described = export(checkpoint, tmp_path / "b").bundle
    memory = write_tiny_pack(tmp_path / "memory", described).path
    assert greedy(bundle.path) == greedy(described)
    assert greedy(bundle.path, memory) == greedy(described, memory) != greedy(described)
    assert greedy(bundle.path, memory, layout="fused") == greedy(described, memory)


def test_engines_of_a_trace_are_refused(mixtral: tuple[Path, Bundle, dict[str, Any]]) -> None:
    with pytest.raises(BundleError, match="was traced, and engines are built of families"):
        StdModel.of(mixtral[1], StdOptions())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"precision": "int4"}, "precision: is not to be had for a traced bundle"),
        ({"link": True}, "link: does not go with a trace"),
        ({"frontend": "onnx"}, "frontend: unknown; expected description or torch; found onnx"),
    ],
    ids=lambda value: str(value)[:20],
)
def test_what_a_trace_has_not_is_refused_before_it_is_made(
    tmp_path: Path, options: dict[str, Any], message: str
) -> None:
    checkpoint = make_tiny(tmp_path / "c", "mixtral")
    with pytest.raises(SettingError, match=message):
        plan_export(checkpoint, **({"frontend": "torch"} | options))


def test_without_torch_the_frontend_says_what_is_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = make_tiny(tmp_path / "c", "mixtral")
    monkeypatch.setattr("knnmoe.export.exporter.find_spec", lambda name: None)
    with pytest.raises(BackendError, match="frontend torch: needs the package torch"):
        plan_export(checkpoint, frontend="torch")


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"model_type": "gpt5"}, "is no causal language model of the transformers"),
        ({"quantization_config": {"quant_method": "fp8"}}, "quantised checkpoints are not traced"),
        ({"auto_map": {"AutoModel": "modeling_new.NewModel"}}, "no code of a checkpoint is run"),
    ],
    ids=lambda value: str(value)[:20],
)
def test_checkpoints_that_cannot_be_loaded_are_refused(
    tmp_path: Path, config: dict[str, Any], message: str
) -> None:
    checkpoint = make_tiny(tmp_path / "c", "mixtral", **config)
    with pytest.raises(CheckpointError, match=message):
        plan_export(checkpoint, frontend="torch")


def test_a_family_that_is_not_described_is_told_of_the_trace(tmp_path: Path) -> None:
    checkpoint = make_tiny(tmp_path / "c", "mixtral", model_type="granitemoe")
    with pytest.raises(CheckpointError, match="Try --frontend torch, which traces the model"):
        plan_export(checkpoint)


@pytest.mark.parametrize(
    ("name", "fix"),
    [
        ("GraniteMoeForCausalLM", "Try --frontend torch, which traces that one"),
        ("BetterGranite", "nothing but granitemoe, remove auto_map .* --frontend torch --verify"),
    ],
)
def test_code_of_a_checkpoint_that_transformers_has_too_is_told_of_the_trace(
    tmp_path: Path, name: str, fix: str
) -> None:
    auto_map = {"AutoModelForCausalLM": f"modeling_granite.{name}"}
    checkpoint = make_tiny(tmp_path / "c", "mixtral", model_type="granitemoe", auto_map=auto_map)
    with pytest.raises(CheckpointError, match="GraniteMoeForCausalLM of transformers") as error:
        plan_export(checkpoint)
    assert re.search(fix, str(error.value.fix))


@pytest.mark.parametrize(
    "rule",
    [
        RoutingRule(3, "softmax"),
        RoutingRule(3, "softmax", renormalize=True, scale=1.5),
        RoutingRule(2, "sigmoid", scale=0.25),
        RoutingRule(4, "softmax", groups=4, top_groups=2, group_score="max"),
        RoutingRule(
            3, "sigmoid", renormalize=True, scale=2.5, groups=4, top_groups=3,
            group_score="top2", selection_bias=True,
        ),
    ],
    ids=str,
)  # fmt: skip
def test_a_rule_is_found_by_what_it_does(rule: RoutingRule) -> None:
    from knnmoe.export.torch_frontend.rules import Observed, find_rule

    rng = np.random.default_rng(0)
    logits = rng.normal(0, 2, (256, 16)).astype(np.float32)
    biases = [rng.normal(0, 0.3, 16).astype(np.float32)]
    ids, weights = rule.apply(logits, biases[0] if rule.selection_bias else None)
    found = find_rule(Observed.of(logits, ids, weights), biases)
    assert found is not None
    assert found.rule == rule
    assert (found.bias is not None) == rule.selection_bias


def test_a_rule_that_is_none_is_not_found() -> None:
    from knnmoe.export.torch_frontend.rules import Observed, find_rule

    logits = np.random.default_rng(0).normal(size=(256, 16)).astype(np.float32)
    ids, weights = RoutingRule(3).apply(logits)
    assert find_rule(Observed.of(logits, ids, np.sqrt(weights)), []) is None


def test_windows_are_read_off_the_masks_of_transformers() -> None:
    from transformers import masking_utils as masks

    from knnmoe.export.torch_frontend.probing import visible_window

    assert visible_window(masks.causal_mask_function) is None
    for window in (1, 5, 4096):
        assert visible_window(masks.sliding_window_causal_mask_function(window)) == window
    for other in (
        masks.chunked_causal_mask_function(512, torch.zeros(1, dtype=torch.long)),
        masks.bidirectional_mask_function,
    ):
        with pytest.raises(CheckpointError, match="lets queries see in a way that cannot be"):
            visible_window(other)


@pytest.mark.slow
@pytest.mark.parametrize(
    "family", ["olmoe", "qwen3_moe", "mixtral", "deepseek_v3", *TRACED_FAMILIES]
)
def test_every_family_agrees_with_transformers(tmp_path: Path, family: str) -> None:
    make = make_other if family in TRACED_FAMILIES else make_tiny
    checkpoint = make(tmp_path / "c", family)
    bundle = traced(checkpoint, tmp_path / "b")
    report = verify(checkpoint, bundle)
    assert report.max_abs_error <= 1e-4  # measured: at most 1e-5
    assert report.ties == 0
    assert greedy(bundle.path) == expected_continuation(checkpoint)
    half = traced(checkpoint, tmp_path / "half", precision="fp16")
    assert half.total_bytes < 0.7 * bundle.total_bytes
    assert verify(checkpoint, half).max_abs_error <= 1e-4


def expected_continuation(checkpoint: Path) -> list[int]:
    """That of transformers, without a cache."""
    from transformers import AutoModelForCausalLM

    loader: Any = AutoModelForCausalLM
    model = loader.from_pretrained(checkpoint, dtype=torch.float32).eval()
    tokens = PROMPT.tolist()
    with torch.inference_mode():
        for _ in range(NEW_TOKENS):
            logits = model(torch.tensor([tokens]), use_cache=False).logits[0, -1]
            tokens.append(likeliest(logits.numpy(), tokens))
    return tokens


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "changes", "message"),
    [
        ("phimoe", {}, "router of gate 0: routes by no rule that is known"),
        ("jamba", {"attn_layer_period": 2, "attn_layer_offset": 1},
         "from one token to another by other means than attention"),
        ("jamba", {"num_hidden_layers": 2}, "has no attention that transformers can exchange"),
    ],
)  # fmt: skip
def test_what_cannot_be_expressed_is_refused_by_name(
    tmp_path: Path, family: str, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(CheckpointError, match=message):
        plan_export(make_other(tmp_path / "c", family, **changes), frontend="torch")


@pytest.mark.slow
def test_a_memory_of_a_family_that_is_not_described_belongs_to_its_trace(tmp_path: Path) -> None:
    """Its keys are what the gates of the bundle read, and it makes the text more likely."""
    from knnmoe.calibration.build import build_memory
    from knnmoe.calibration.settings import BuildSettings

    text = tmp_path / "text.txt"
    text.write_text("A heron waited.")
    checkpoint = make_other(tmp_path / "c", "granitemoe")
    settings = BuildSettings(max_length=32, batch_tokens=96, learning_rate=0.2)
    pack = build_memory(checkpoint, [text], tmp_path / "pack", settings=settings).pack
    bundle = traced(checkpoint, tmp_path / "b")
    frozen = Model.load(bundle, threads=1)
    routed = Model.load(bundle, memory=pack, neighbors=1, threads=1)
    ids = routed.tokenizer.encode(text.read_text())
    (first, *_) = routed.routing_trace(ids).gates
    np.testing.assert_allclose(first.trace.similarities[:-1, 0], 1, atol=1e-3)
    np.testing.assert_array_equal(first.trace.neighbors[:-1, 0], np.arange(len(ids) - 1))
    assert routed.score(ids).mean() > frozen.score(ids).mean()
