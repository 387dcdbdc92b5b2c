"""What a trace does not show, found by running the model on a few tokens.

How far each attention sees is decided by masks that transformers makes from functions of
positions; these are asked here at far more positions than a run has tokens. And a model that
carries anything from one token to another by other means than attention (a state, a convolution)
would trace like any other, and come out wrong as soon as a text is fed piece by piece: so attention
is replaced by one in which each token sees itself alone, and no token may have an influence on
another.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from knnmoe.pretrained import first_line
from knnmoe.runtime.errors import CheckpointError

from .loading import OTHER_FAMILY
from .placeholders import NAME, register

_TOKENS = 6
_FAR = 1 << 22  # positions that masks are asked about
_MARK = "knnmoe_window"
_HARMLESS = ("position_ids", "cache_position")  # tensors among attention's arguments


@dataclass(frozen=True)
class _Span:
    """How far a query sees: `window` tokens, itself the last of them; None for all before it."""

    window: int | None


def attention_windows(model: Any) -> tuple[int | None, ...]:
    """The window of every attention of a model, in the order in which a pass meets them.

    Raises:
        CheckpointError: If the model cannot be run with its attention exchanged, attention sees in
            another way than causally with or without a window, or something else carries
            information between tokens.
    """
    windows: list[int | None] = []

    def attend(
        module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **settings: Any
    ) -> tuple[Tensor, None]:
        windows.append(_window(module, attention_mask, settings))
        groups = query.shape[1] // value.shape[1]
        return value.repeat_interleave(groups, dim=1).transpose(1, 2).contiguous(), None

    register(attend, _marked_mask)
    where = type(model).__name__
    try:
        model.set_attn_implementation(NAME)
        if model._can_set_experts_implementation():
            model.set_experts_implementation("eager")
        with torch.no_grad():
            ids = torch.arange(_TOKENS)[None] % 7
            first = _logits(model, ids)
            found = tuple(windows)
            ids[0, 2] += 11
            second = _logits(model, ids)
    except CheckpointError:
        raise
    except Exception as error:  # whatever a model's own code may raise
        raise CheckpointError(
            where,
            f"cannot be run with its attention exchanged ({first_line(error)})",
            fix=OTHER_FAMILY,
        ) from error
    if not found:
        raise CheckpointError(
            where,
            "has no attention that transformers can exchange",
            expected="attention through transformers' attention functions",
            fix=OTHER_FAMILY,
        )
    others = [row for row in range(_TOKENS) if row != 2]
    influence = float((first - second).abs()[others].max())
    if not influence <= 1e-4 * (1 + float(first.abs().max())):
        raise CheckpointError(
            where,
            "carries information from one token to another by other means than attention: a state, "
            "a convolution or the like",
            expected="nothing but attention between tokens",
            found=f"one token changes the logits of others by {influence:.2g}",
            fix="Such layers cannot be expressed in a bundle.",
        )
    return found


def _logits(model: Any, ids: Tensor) -> Tensor:
    """Logits [S, V] of one sequence, in the way the trace runs the model."""
    output = model(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        position_ids=torch.arange(ids.shape[1])[None],
        use_cache=False,
    )
    logits: Tensor = output.logits[0].float()
    return logits


def _window(module: Any, mask: Any, settings: dict[str, Any]) -> int | None:
    """The window of one attention call."""
    where = type(module).__name__
    span = getattr(mask, _MARK, None)
    if span is None:
        raise CheckpointError(
            where,
            "is given a mask that is not one of transformers' own",
            expected="a causal mask, with or without a sliding window",
            fix=OTHER_FAMILY,
        )
    unknown = [
        name
        for name, value in settings.items()
        if isinstance(value, Tensor) and name not in (*_HARMLESS, "s_aux")
    ]
    if unknown:
        raise CheckpointError(
            where,
            "passes something to its attention that cannot be expressed",
            expected="query, key, value and sinks",
            found=", ".join(unknown),
            fix=OTHER_FAMILY,
        )
    window: int | None = span.window
    return window


def _marked_mask(*, mask_function: Callable[..., Any], **_: Any) -> Tensor:
    """A mask whose content nobody reads, marked with how far it lets queries see."""
    mask = torch.zeros(1, 1, 1, 1)
    setattr(mask, _MARK, _Span(visible_window(mask_function)))
    return mask


def visible_window(mask_function: Callable[..., Any]) -> int | None:
    """How many tokens a query sees by a mask function of transformers; None for all before it.

    Raises:
        CheckpointError: If it is not causal attention, with or without a sliding window.
    """

    def sees(query: Any, key: Any) -> Any:
        zero = torch.zeros((), dtype=torch.long)
        found = mask_function(zero, zero, torch.as_tensor(query), torch.as_tensor(key))
        return np.broadcast_to(np.asarray(found), np.shape(query))

    low, high = 0, _FAR  # the farthest distance that is seen lies between them
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if bool(sees(_FAR, _FAR - middle)) else (low, middle - 1)
    window = None if low == _FAR else low + 1
    rng = np.random.default_rng(0)
    reach = 4 * (window or 1024)
    queries = np.concatenate([rng.integers(0, reach, 4000), rng.integers(0, _FAR, 4000)])
    keys = np.maximum(queries - rng.integers(-8, reach, 8000), 0)
    expected = keys <= queries
    if window is not None:
        expected &= queries - keys < window
    if not np.array_equal(sees(queries, keys), expected):
        raise CheckpointError(
            "attention mask",
            "lets queries see in a way that cannot be expressed",
            expected="all tokens before a query, or a sliding window of them",
            found=getattr(mask_function, "__qualname__", str(mask_function))[:100],
            fix=OTHER_FAMILY,
        )
    return window
