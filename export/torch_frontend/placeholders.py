"""Operators that stand for attention and experts while a model is traced.

transformers lets both be exchanged by name (`ALL_ATTENTION_FUNCTIONS`, `ALL_EXPERTS_FUNCTIONS`). In
a trace each call becomes one node, which the graphs turn into one operator of the runtime.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

NAME = "knnmoe_trace"  # of the library of operators, and of the implementations in transformers

_library: Any = torch.library  # whose types do not say what it exports
_LIBRARY = _library.Library(NAME, "DEF")
_LIBRARY.define(
    "attention(Tensor query, Tensor key, Tensor value, Tensor? sinks, float scale, float softcap)"
    " -> Tensor"
)
_LIBRARY.define("experts(Tensor rows, Tensor ids, Tensor weights, int index) -> Tensor")

ATTENTION: Any = torch.ops.knnmoe_trace.attention.default
EXPERTS: Any = torch.ops.knnmoe_trace.experts.default


def _attention_shape(
    query: Tensor, key: Tensor, value: Tensor, sinks: Tensor | None, scale: float, softcap: float
) -> Tensor:
    """query [B, H, S, N], key [B, KV, S, N], value [B, KV, S, M] → [B, S, H, M]."""
    return query.new_empty(query.shape[0], query.shape[2], query.shape[1], value.shape[3])


def _experts_shape(rows: Tensor, ids: Tensor, weights: Tensor, index: int) -> Tensor:
    """rows [T, D], ids and weights [T, k] → [T, D]."""
    return torch.empty_like(rows)


_library.register_fake(f"{NAME}::attention", _attention_shape, lib=_LIBRARY)
_library.register_fake(f"{NAME}::experts", _experts_shape, lib=_LIBRARY)


def traced_attention(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **settings: Any
) -> tuple[Tensor, None]:
    """Attention as transformers calls it, as one node; the mask is known from `probing`."""
    scale, softcap = attention_numbers(query, settings)
    return ATTENTION(query, key, value, settings.get("s_aux"), scale, softcap), None


def attention_numbers(query: Tensor, settings: dict[str, Any]) -> tuple[float, float]:
    """The scale of the scores, and what they are capped at softly (0: nothing)."""
    scale, softcap = settings.get("scaling"), settings.get("softcap")
    return float(query.shape[-1] ** -0.5 if scale is None else scale), float(softcap or 0)


def register(attention: Callable[..., Any], mask: Callable[..., Any] | None) -> None:
    """Make transformers know an attention function by `NAME`, and what makes its masks."""
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    functions: Any = ALL_ATTENTION_FUNCTIONS
    masks: Any = ALL_MASK_ATTENTION_FUNCTIONS
    functions.register(NAME, attention)
    masks.register(NAME, mask or (lambda **_: None))


def register_experts(experts: Callable[..., Any]) -> None:
    """Make transformers know an experts function by `NAME`, and whatever that holds on to."""
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    functions: Any = ALL_EXPERTS_FUNCTIONS
    functions.register(NAME, experts)


def forget() -> None:
    """Let go of what the functions that were registered hold on to: a whole model, perhaps."""
    register(_outside, None)
    register_experts(_outside)


def _outside(*_: Any, **__: Any) -> Any:
    raise RuntimeError(f"{NAME} stands for attention and experts only while a model is traced")
