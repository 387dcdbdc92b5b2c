"""A tiny model that routes as DeepSeek-V3 does: OLMoE's tensors and a bias of each gate."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file, save_file

from knnmoe.runtime.routing import RoutingRule
from tiny import make_tiny_olmoe

BIAS = "model.layers.{layer}.mlp.gate.e_score_correction_bias"
ROUTING = {
    "num_experts": 16, "num_experts_per_tok": 3, "norm_topk_prob": True,
    "n_group": 4, "topk_group": 2, "routed_scaling_factor": 2.5,
}  # fmt: skip
RULE = RoutingRule(
    3, "sigmoid", renormalize=True, scale=2.5, groups=4, top_groups=2, group_score="top2",
    selection_bias=True,
)  # fmt: skip


def biased_family() -> Any:
    """The family of `make_biased`; it goes into `FAMILIES` in place of OLMoE."""
    from knnmoe.export.families.olmoe import OLMOE

    return replace(
        OLMOE,
        score="sigmoid",
        group_score="top2",
        tensors=replace(OLMOE.tensors, selection_bias=BIAS),
        config=replace(
            OLMOE.config,
            routing_scale="routed_scaling_factor",
            groups="n_group",
            top_groups="topk_group",
        ),
    )


def make_biased(path: str | Path, **config: Any) -> Path:
    """Write the checkpoint; its biases are large enough to change what is selected."""
    root = make_tiny_olmoe(path, **(ROUTING | config))
    file = root / "model.safetensors"
    tensors = load_file(file)
    rng = np.random.default_rng(7)
    for layer in range(3):
        tensors[BIAS.format(layer=layer)] = rng.normal(0, 0.2, 16).astype(np.float32)
    save_file(tensors, file, metadata={"format": "pt"})
    return root
