from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import transformers
from torch import Tensor

from knnmoe.calibration.credit import pass_over_choice
from knnmoe.calibration.optimize import learn
from knnmoe.calibration.settings import Gradient, Objective
from knnmoe.calibration.teacher import Teacher
from knnmoe.runtime.errors import CheckpointError

SHAPE: dict[str, Any] = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 16, "moe_intermediate_size": 16,
    "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8,
    "num_experts": 8, "num_local_experts": 8, "num_experts_per_tok": 2, "pad_token_id": 0,
    "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
FAMILIES: dict[str, Any] = {
    "olmoe": lambda: transformers.OlmoeConfig(**SHAPE),
    "qwen3_moe": lambda: transformers.Qwen3MoeConfig(**SHAPE, norm_topk_prob=True),
    "mixtral": lambda: transformers.MixtralConfig(**SHAPE, sliding_window=3),
    "gpt_oss": lambda: transformers.GptOssConfig(**SHAPE, sliding_window=3),
    "glm4_moe": lambda: transformers.Glm4MoeConfig(
        **SHAPE, n_routed_experts=8, n_shared_experts=1, first_k_dense_replace=0,
        routed_scaling_factor=2.5, norm_topk_prob=True,
    ),
}  # fmt: skip
TOKENS = torch.randint(3, 64, (2, 7), generator=torch.Generator().manual_seed(0))


def teacher(family: str, objective: Objective = "future", gradient: Gradient = "plain") -> Teacher:
    torch.manual_seed(0)
    config = FAMILIES[family]()
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    # The default initialisation is so small that routing hardly shows in the logits.
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return Teacher(model, objective=objective, gradient=gradient)


def slopes(found: Teacher, losses: list[Tensor] | None = None) -> list[list[Tensor]]:
    """Of every position's log-likelihood of its next token, the gradient at each gate [B·S, E]."""
    deltas: list[Tensor] = []

    def record(gate: int, x: Tensor, logits: Tensor) -> Tensor:
        deltas.append(torch.zeros_like(logits).requires_grad_())
        return logits + deltas[-1]

    log = found.logits(TOKENS, record)[:, :-1].log_softmax(-1)
    each = log.gather(-1, TOKENS[:, 1:, None])[..., 0]
    wanted = [each.sum()] if losses is None else [each[:, t].sum() for t in range(each.shape[1])]
    return [list(torch.autograd.grad(one, deltas, retain_graph=True)) for one in wanted]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    ("objective", "gradient"), [("next", "plain"), ("future", "straight-through")]
)
def test_what_the_model_says_stays_the_same(
    family: str, objective: Objective, gradient: Gradient
) -> None:
    expected = teacher(family).logits(TOKENS)
    other = teacher(family, objective, gradient)
    # While gradients are recorded, which is when experts that were not chosen run too.
    found = other.logits(TOKENS, lambda gate, x, logits: logits.clone().requires_grad_())
    assert found.requires_grad
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", ["olmoe", "mixtral", "gpt_oss"])
def test_next_is_the_slope_of_each_tokens_own_next_token(family: str) -> None:
    """As plain backpropagation gives it, one token's likelihood at a time."""
    one_by_one = slopes(teacher(family), [])
    (together,) = slopes(teacher(family, "next"))
    width = TOKENS.shape[1]
    for gate, found in enumerate(together):
        found = found.reshape(2, width, -1)
        for t in range(width - 1):
            expected = one_by_one[t][gate].reshape(2, width, -1)[:, t]
            torch.testing.assert_close(found[:, t], expected, rtol=1e-3, atol=1e-5)
        assert found[:, :-1].any(dim=-1).all()
    # The whole future is something else, at the first gate.
    (future,) = slopes(teacher(family))
    assert not torch.allclose(future[0], together[0], atol=1e-4)


@pytest.mark.parametrize("family", ["olmoe", "glm4_moe"])
def test_straight_through_is_the_slope_of_all_experts_at_once(family: str) -> None:
    """At the last gate: what a mixture of all experts would do for the loss, weights as scored."""
    plain = teacher(family)
    block = plain.model.model.layers[-1].mlp
    kept: dict[str, Tensor] = {}

    def keep(module: Any, inputs: Any, output: Tensor) -> None:
        output.retain_grad()
        kept["x"], kept["y"] = inputs[0].detach(), output

    handle = block.register_forward_hook(keep)
    logits_of: dict[int, Tensor] = {}

    def record(gate: int, x: Tensor, logits: Tensor) -> Tensor:
        logits_of[gate] = logits.detach().requires_grad_()
        return logits_of[gate]

    log = plain.logits(TOKENS, record)[:, :-1].log_softmax(-1)
    log.gather(-1, TOKENS[:, 1:, None]).sum().backward()
    handle.remove()
    slope, x = kept["y"].grad.reshape(-1, 32), kept["x"].reshape(-1, 32)  # type: ignore[union-attr]
    ones = torch.ones(len(x), 1)
    outputs = torch.stack(
        [block.experts(x, torch.full((len(x), 1), e), ones) for e in range(8)], dim=1
    )
    logits = logits_of[1].detach().requires_grad_()
    score = logits.softmax(-1) if family == "olmoe" else logits.sigmoid()
    if family == "glm4_moe":
        # Selected by score, and weighted relative to the sum of the selected.
        score = 2.5 * score / (score.topk(2).values.sum(-1, keepdim=True) + 1e-20)
    ((score[..., None] * outputs).sum(1) * slope).sum().backward()
    found = slopes(teacher(family, gradient="straight-through"))[0][1]
    torch.testing.assert_close(found, logits.grad, rtol=2e-3, atol=1e-4)
    assert not torch.allclose(slopes(teacher(family))[0][1], found, atol=1e-3)


@pytest.mark.parametrize(
    ("objective", "gradient"), [("next", "plain"), ("future", "straight-through")]
)
def test_either_makes_the_text_more_likely(objective: Objective, gradient: Gradient) -> None:
    sequences = [np.asarray(row) for row in TOKENS]
    rates = dict.fromkeys(range(2), 0.3)
    learned = learn(teacher("olmoe", objective, gradient), sequences, rates, steps=2)
    assert learned.nll_after < learned.nll_before - 0.01
    plain = learn(teacher("olmoe"), sequences, rates, steps=2)
    assert learned.nll_before == pytest.approx(plain.nll_before, rel=1e-5)
    assert not np.allclose(learned.gates[0].residuals, plain.gates[0].residuals, atol=1e-4)


def test_prompts_are_read_as_they_always_were() -> None:
    sequences = [np.asarray(row) for row in TOKENS]
    credited = [np.array([False] * 3 + [True] * 3)] * 2
    found = learn(teacher("olmoe"), sequences, {0: 1.0}, steps=1, credited=credited)
    assert len(found.gates[0].residuals) == 6
    deltas = torch.zeros(2, 7, 8)
    deltas[:, 3:6] = torch.from_numpy(found.gates[0].residuals).reshape(2, 3, 8)

    def correct(gate: int, x: Tensor, logits: Tensor) -> Tensor:
        return logits + deltas.reshape(14, 8) if gate == 0 else logits

    with torch.no_grad():
        log = teacher("olmoe").logits(TOKENS, correct).log_softmax(-1)
    expected = -log[:, 3:6].gather(-1, TOKENS[:, 4:, None]).sum()
    assert found.nll_after == pytest.approx(expected.item(), rel=1e-5)


@pytest.mark.parametrize(
    ("routed", "message"),
    [
        (torch.zeros(3, 8), "do not say which experts"),
        ((None, torch.full((3, 2), 0.3), torch.tensor([[0, 1]] * 3)), "do not follow from"),
    ],
)
def test_routers_that_cannot_be_passed_over_are_refused(routed: Any, message: str) -> None:
    logits = torch.randn(3, 8, generator=torch.Generator().manual_seed(0))
    with pytest.raises(CheckpointError, match=message):
        pass_over_choice(logits, routed)


def test_attention_that_cannot_be_opened_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers.models.olmoe.modeling_olmoe import (
        ALL_ATTENTION_FUNCTIONS,
        eager_attention_forward,
    )

    found = teacher("olmoe", "next")
    monkeypatch.setitem(
        ALL_ATTENTION_FUNCTIONS._global_mapping, "knnmoe_own_position", eager_attention_forward
    )
    with pytest.raises(CheckpointError, match=r"between positions.*--objective future"):
        found._check_own_positions()
