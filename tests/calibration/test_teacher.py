from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from torch import Tensor

from knnmoe.calibration.optimize import learn
from knnmoe.calibration.teacher import Teacher
from knnmoe.runtime.errors import CheckpointError
from knnmoe.runtime.routing import RoutingRule
from tiny import make_tiny_olmoe

TINY: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 16,
    "moe_intermediate_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "num_experts": 8,
    "num_local_experts": 8,
    "num_experts_per_tok": 2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
# Selection in groups, experts in every layer, and the latent attention of DeepSeek.
GROUPED: dict[str, Any] = {
    "n_routed_experts": 8, "n_group": 4, "topk_group": 2, "norm_topk_prob": True,
    "topk_method": "group_limited_greedy", "routed_scaling_factor": 2.5, "n_shared_experts": 1,
    "first_k_dense_replace": 0,
}  # fmt: skip
LATENT: dict[str, Any] = {
    "num_key_value_heads": 4, "q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8, "v_head_dim": 8,
}  # fmt: skip


def with_entries(config: Any, entries: dict[str, Any]) -> Callable[..., Any]:
    return lambda **given: config(**given | entries)


FAMILIES = {
    "olmoe": transformers.OlmoeConfig,
    "qwen2_moe": transformers.Qwen2MoeConfig,
    "qwen3_moe": transformers.Qwen3MoeConfig,
    "mixtral": transformers.MixtralConfig,
    "gpt_oss": transformers.GptOssConfig,
    "deepseek_v2": with_entries(
        transformers.DeepseekV2Config, GROUPED | LATENT | {"norm_topk_prob": False}
    ),
    "deepseek_v3": with_entries(transformers.DeepseekV3Config, GROUPED | LATENT),
    "glm4_moe": with_entries(transformers.Glm4MoeConfig, GROUPED),
}
# What their routers do with logits, of those that do not do as OLMoE's.
RULES = {
    "gpt_oss": RoutingRule(2, "softmax-topk"),
    "deepseek_v2": RoutingRule(2, scale=2.5, groups=4, top_groups=2),
    "deepseek_v3": RoutingRule(
        2, "sigmoid", renormalize=True, scale=2.5, groups=4, top_groups=2, group_score="top2",
        selection_bias=True,
    ),
}  # fmt: skip
RULES["glm4_moe"] = RULES["deepseek_v3"]
TOKENS = torch.randint(64, (2, 9), generator=torch.Generator().manual_seed(0))


def random_model(config: Any) -> Any:
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    # The default initialisation is so small that routing hardly shows in the logits.
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    for name, buffer in model.named_buffers():
        if name.endswith("e_score_correction_bias"):
            buffer.normal_(std=0.2)
    return model.eval()


def unchanged(gate: int, x: Tensor, logits: Tensor) -> Tensor:
    return logits


@pytest.mark.parametrize("family", FAMILIES)
def test_any_familys_routers_are_opened_without_changing_the_model(family: str) -> None:
    model = random_model(FAMILIES[family](**TINY))
    with torch.no_grad():
        plain = model(input_ids=TOKENS, use_cache=False).logits
    teacher = Teacher(model)
    assert (teacher.num_gates, teacher.hidden_size, teacher.num_experts) == (2, 32, 8)
    with torch.no_grad():
        assert torch.equal(teacher.logits(TOKENS), plain)
        assert torch.equal(teacher.logits(TOKENS, unchanged), plain)
        moved = teacher.logits(TOKENS, lambda gate, x, logits: logits.flip(1))
    assert (moved - plain).abs().max() > 1e-2


@pytest.mark.parametrize("family", FAMILIES)
def test_the_gates_see_what_transformers_records(family: str) -> None:
    model = random_model(FAMILIES[family](**TINY))
    teacher = Teacher(model)
    seen: dict[int, tuple[Tensor, Tensor]] = {}

    def note(gate: int, x: Tensor, logits: Tensor) -> Tensor:
        seen[gate] = (x, logits)
        return logits

    with torch.no_grad():
        teacher.logits(TOKENS, note)
        recorded = model(input_ids=TOKENS, use_cache=False, output_router_logits=True)
    assert list(seen) == [0, 1]
    routers = [
        module for name, module in model.named_modules() if name.endswith((".gate", ".router"))
    ]
    for gate, expected in enumerate(recorded.router_logits):
        x, logits = seen[gate]
        assert torch.equal(logits, expected.reshape(-1, 8))
        linear = torch.nn.functional.linear(
            x, routers[gate].weight, getattr(routers[gate], "bias", None)
        )
        torch.testing.assert_close(linear, logits)


@pytest.mark.parametrize("family", RULES)
def test_the_rule_of_a_family_routes_the_corrected_logits(family: str) -> None:
    """What is learned for logits is what the runtime's rule then makes of them."""
    model = random_model(FAMILIES[family](**TINY))
    teacher = Teacher(model)
    routers = [
        module for name, module in model.named_modules() if name.endswith(("gate", "router"))
    ]
    routed: list[Any] = []
    hooks = [r.register_forward_hook(lambda *call: routed.append(call[2])) for r in routers]
    corrected: list[Tensor] = []

    def correct(gate: int, x: Tensor, logits: Tensor) -> Tensor:
        corrected.append(logits - logits.roll(1, 1))
        return corrected[-1]

    with torch.no_grad():
        teacher.logits(TOKENS, correct)
    for hook in hooks:
        hook.remove()
    assert len(routed) == len(corrected) == 2
    for router, logits, (_, weights, ids) in zip(routers, corrected, routed, strict=True):
        bias = getattr(router, "e_score_correction_bias", None)
        expected = RULES[family].assignments(logits.numpy(), None if bias is None else bias.numpy())
        found = np.zeros_like(expected)
        np.put_along_axis(found, ids.numpy(), weights.numpy(), axis=1)
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("family", FAMILIES)
def test_residuals_are_learned_for_every_family(family: str) -> None:
    teacher = Teacher(random_model(FAMILIES[family](**TINY)))
    sequences = [row.numpy() for row in TOKENS]
    learned = learn(teacher, sequences, {0: 0.3, 1: 0.3}, steps=3)
    assert learned.nll_after < learned.nll_before
    for rows in learned.gates.values():
        assert rows.residuals.any()
        assert rows.router_logits.dtype == rows.residuals.dtype == np.float32


@pytest.mark.parametrize("family", ["qwen2_moe", "qwen3_moe"])
def test_gates_are_counted_and_not_layers(family: str) -> None:
    layers = {"num_hidden_layers": 5, "mlp_only_layers": [0, 3]}
    teacher = Teacher(random_model(FAMILIES[family](**TINY | layers)))
    assert teacher.num_gates == 3
    seen: list[int] = []

    def note(gate: int, x: Tensor, logits: Tensor) -> Tensor:
        seen.append(gate)
        return logits

    teacher.logits(TOKENS, note)
    assert seen == [0, 1, 2]


def test_the_weights_are_frozen(tiny_checkpoint: Path) -> None:
    teacher = Teacher.load(tiny_checkpoint)
    assert not any(p.requires_grad for p in teacher.model.parameters())
    assert not teacher.model.training


def test_a_failing_correction_does_not_stay(tiny_checkpoint: Path) -> None:
    teacher = Teacher.load(tiny_checkpoint)
    plain = teacher.logits(TOKENS)

    def fail(gate: int, x: Tensor, logits: Tensor) -> Tensor:
        raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        teacher.logits(TOKENS, fail)
    assert torch.equal(teacher.model(input_ids=TOKENS, use_cache=False).logits, plain)


def test_padding_at_the_right_changes_nothing_before_it(tiny_checkpoint: Path) -> None:
    teacher = Teacher.load(tiny_checkpoint)
    short = TOKENS[:1, :5]
    padded = torch.cat([short, torch.zeros(1, 4, dtype=torch.long)], dim=1)
    both = torch.cat([padded, TOKENS[1:]])
    torch.testing.assert_close(
        teacher.logits(both)[:1, :5], teacher.logits(short), rtol=1e-5, atol=1e-5
    )


def test_a_dense_model_is_refused() -> None:
    model = random_model(transformers.LlamaConfig(**TINY))
    with pytest.raises(CheckpointError, match="no routers"):
        Teacher(model)


def test_a_router_of_two_linear_maps_is_refused() -> None:
    model = random_model(transformers.OlmoeConfig(**TINY))
    router = model.model.layers[0].mlp.gate
    forward = router.forward

    def twice(hidden: Tensor) -> Any:
        torch.nn.functional.linear(hidden, router.weight)
        return forward(hidden)

    router.forward = twice
    with pytest.raises(CheckpointError, match=r"cannot be opened.*one linear map.*found 2"):
        Teacher(model)


def test_a_checkpoint_with_a_missing_tensor_is_refused(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    path = make_tiny_olmoe(tmp_path / "tiny")
    tensors = load_file(path / "model.safetensors")
    del tensors["model.layers.1.mlp.gate.weight"]
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"missing.*layers\.1\.mlp\.gate"):
        Teacher.load(path)


def test_a_checkpoint_of_an_unknown_architecture_is_refused(tmp_path: Path) -> None:
    path = make_tiny_olmoe(tmp_path / "tiny", model_type="no_such_model")
    with pytest.raises(CheckpointError, match="transformers cannot load it"):
        Teacher.load(path)
