"""The routing rule of each family against the router modules of transformers themselves."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from transformers.models.deepseek_v2.modeling_deepseek_v2 import (
    DeepseekV2Config,
    DeepseekV2TopkRouter,
)
from transformers.models.deepseek_v3.modeling_deepseek_v3 import (
    DeepseekV3Config,
    DeepseekV3TopkRouter,
)
from transformers.models.glm4_moe.modeling_glm4_moe import Glm4MoeConfig, Glm4MoeTopkRouter
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssConfig, GptOssTopKRouter
from transformers.models.mixtral.modeling_mixtral import MixtralConfig, MixtralTopKRouter
from transformers.models.qwen2_moe.modeling_qwen2_moe import Qwen2MoeConfig, Qwen2MoeTopKRouter
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeConfig, Qwen3MoeTopKRouter

from knnmoe.export.gate_graphs import GateShape, gate_graph
from knnmoe.runtime.routing import RoutingRule

HIDDEN, EXPERTS, TOKENS = 16, 32, 400
SIZES = {
    "hidden_size": HIDDEN, "num_experts": EXPERTS, "num_local_experts": EXPERTS,
    "n_routed_experts": EXPERTS, "num_experts_per_tok": 6, "num_attention_heads": 2,
}  # fmt: skip
# Router, config, what the config adds, and the rule that a description of the family states.
FAMILIES: dict[str, tuple[Any, Any, dict[str, Any], RoutingRule]] = {
    "mixtral": (MixtralTopKRouter, MixtralConfig, {}, RoutingRule(6, renormalize=True)),
    "qwen2": (Qwen2MoeTopKRouter, Qwen2MoeConfig, {"norm_topk_prob": False}, RoutingRule(6)),
    "qwen3": (
        Qwen3MoeTopKRouter, Qwen3MoeConfig, {"norm_topk_prob": True},
        RoutingRule(6, renormalize=True),
    ),
    "gpt-oss": (GptOssTopKRouter, GptOssConfig, {}, RoutingRule(6, "softmax-topk")),
    "deepseek-v2": (
        DeepseekV2TopkRouter, DeepseekV2Config,
        {"topk_method": "group_limited_greedy", "n_group": 8, "topk_group": 3,
         "routed_scaling_factor": 16.0},
        RoutingRule(6, scale=16.0, groups=8, top_groups=3, group_score="max"),
    ),
    "deepseek-v2-lite": (
        DeepseekV2TopkRouter, DeepseekV2Config,
        {"topk_method": "greedy", "n_group": 1, "topk_group": 1, "routed_scaling_factor": 1.0},
        RoutingRule(6),
    ),
    "deepseek-v3": (
        DeepseekV3TopkRouter, DeepseekV3Config,
        {"n_group": 8, "topk_group": 4, "routed_scaling_factor": 2.5, "norm_topk_prob": True},
        RoutingRule(
            6, "sigmoid", renormalize=True, scale=2.5, groups=8, top_groups=4, group_score="top2",
            selection_bias=True,
        ),
    ),
    "deepseek-v3 as it is": (
        DeepseekV3TopkRouter, DeepseekV3Config,
        {"n_group": 4, "topk_group": 1, "routed_scaling_factor": 1.0, "norm_topk_prob": False},
        RoutingRule(
            6, "sigmoid", groups=4, top_groups=1, group_score="top2", selection_bias=True
        ),
    ),
    "glm-4": (
        Glm4MoeTopkRouter, Glm4MoeConfig,
        {"n_group": 1, "topk_group": 1, "routed_scaling_factor": 1.5, "norm_topk_prob": True},
        RoutingRule(6, "sigmoid", renormalize=True, scale=1.5, selection_bias=True),
    ),
}  # fmt: skip


def made(family: str, std: float = 0.5) -> tuple[Any, RoutingRule, np.ndarray | None]:
    """A router with random weights, its rule, and its selection bias."""
    module, config, more, rule = FAMILIES[family]
    router = module(config(**SIZES, **more)).eval()
    generator = torch.Generator().manual_seed(len(family))
    with torch.no_grad():
        for parameter in router.parameters():
            parameter.normal_(std=std, generator=generator)
        for buffer in router.buffers():
            buffer.normal_(std=0.1, generator=generator)
    buffers = dict(router.named_buffers())
    assert set(buffers) == ({"e_score_correction_bias"} if rule.selection_bias else set())
    bias = buffers["e_score_correction_bias"].numpy() if rule.selection_bias else None
    return router, rule, bias


def routed(router: Any) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Logits, ids and weights of the router for random inputs, experts in order of their ids."""
    inputs = torch.randn(TOKENS, HIDDEN, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        logits, weights, ids = (tensor.numpy() for tensor in router(inputs))
    return logits, *by_id(ids, weights)


def by_id(ids: np.ndarray, weights: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """DeepSeek's routers leave their selection unsorted."""
    order = np.argsort(ids, axis=1)
    return np.take_along_axis(ids, order, axis=1), np.take_along_axis(weights, order, axis=1)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_rule_selects_and_weighs_as_the_router_of_transformers(family: str) -> None:
    router, rule, bias = made(family)
    logits, expected_ids, expected = routed(router)
    ids, weights = by_id(*rule.apply(logits, bias))
    np.testing.assert_array_equal(ids, expected_ids)
    np.testing.assert_allclose(weights, expected, rtol=1e-6, atol=1e-6)
    if not rule.selects_by_score:  # the case is one: without groups and bias it would be another
        plain = RoutingRule(rule.top_k, rule.score)
        assert (np.sort(plain.apply(logits)[0], axis=1) != ids).any(axis=1).mean() > 0.2


@pytest.mark.parametrize("opset", [20, 21, 24])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_frozen_gate_graph_does_as_well(family: str, opset: int) -> None:
    router, rule, bias = made(family)
    logits, expected_ids, expected = routed(router)
    graph = gate_graph("frozen", GateShape(HIDDEN, EXPERTS, rule.top_k, rule), opset)
    session = onnxruntime.InferenceSession(ir.to_proto(graph.model()).SerializeToString())
    feeds = {"router_input": np.zeros((TOKENS, HIDDEN), np.float32), "router_logits": logits}
    if bias is not None:
        feeds["selection_bias"] = bias
    feeds = {spec.name: feeds[spec.name] for spec in session.get_inputs()}
    found_ids, found = session.run(["expert_ids", "expert_weights"], feeds)
    ids, weights = by_id(found_ids, found)
    np.testing.assert_array_equal(ids, expected_ids)
    np.testing.assert_allclose(weights, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("family", FAMILIES)
def test_of_equal_experts_transformers_takes_any_and_the_rule_the_lower(family: str) -> None:
    """Ties are where the two may differ in ids; the weights are the same."""
    router, rule, bias = made(family, std=0.0)
    if bias is not None:
        bias[...] = 0
    logits, _, expected = routed(router)
    assert (logits == 0).all()
    ids, weights = rule.apply(logits, bias)
    assert (ids == np.arange(rule.top_k)).all()
    np.testing.assert_allclose(np.sort(weights), np.sort(expected), rtol=1e-6)
