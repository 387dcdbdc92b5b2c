"""Which gradient a token's vector follows: two options beside plain backpropagation.

`next`: only the likelihood of the token that follows counts for a token's vector, not what the
vector does to later tokens through attention. Attention passes no gradient from one position to
another then; its numbers stay what they are.

`straight-through`: a router's choice of experts has no slope, so plain backpropagation moves the
logits only by what the chosen experts do. Here the choice is passed over as if it were not there
(Bengio, Léonard and Courville, arXiv 1308.3432): every expert is run, those not chosen with weight
zero, and gradients reach the logits as though each counted with the weight that its logit stands
for. SparseMixer (Liu et al., arXiv 2310.00811, and 2409.12136) estimates the same missing term from
the experts chosen alone, by drawing them; Default MoE (Panda et al., arXiv 2504.12463) puts a mean
of each expert's outputs for what was not computed. A memory is built once and offline, so the term
is computed here instead: experts cost E/k times as much.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812 - the name everybody knows it by

from knnmoe.runtime.errors import CheckpointError

NEXT_ATTENTION = "knnmoe_own_position"
_TOLERANCE = 2e-2  # of weights in bf16


def register_next_attention() -> str:
    """Make attention without gradients between positions known to transformers; its name."""
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    ALL_ATTENTION_FUNCTIONS.register(NEXT_ATTENTION, _next_attention)
    ALL_MASK_ATTENTION_FUNCTIONS.register(NEXT_ATTENTION, ALL_MASK_ATTENTION_FUNCTIONS["eager"])
    return NEXT_ATTENTION


def _next_attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    **options: Any,
) -> tuple[Tensor, Tensor]:
    """Attention of [B, heads, S, size]; keys and values of other positions are constants.

    Terms that are zero, and whose gradient is not, bring back what a position does to itself.
    """
    groups = query.shape[1] // key.shape[1]
    key, value = (part.repeat_interleave(groups, dim=1) for part in (key, value))
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    scores = query @ key.detach().transpose(2, 3) * scale
    own = (query * (key - key.detach())).sum(-1) * scale
    scores = scores + torch.diag_embed(own)
    if attention_mask is not None:
        scores = scores + attention_mask
    if (sinks := options.get("s_aux")) is not None:
        column = sinks.reshape(1, -1, 1, 1).expand(*scores.shape[:3], 1).to(scores.dtype)
        weights = F.softmax(torch.cat([scores, column], -1), -1, dtype=torch.float32)[..., :-1]
    else:
        weights = F.softmax(scores, -1, dtype=torch.float32)
    weights = weights.to(query.dtype)
    output = weights @ value.detach()
    diagonal = weights.diagonal(dim1=2, dim2=3)[..., None]
    output = output + diagonal * (value - value.detach())
    return output.transpose(1, 2).contiguous(), weights


def pass_over_choice(logits: Tensor, routed: Any) -> Any:
    """A router's result with every expert in it, those not chosen with weight zero and a gradient.

    The weight that a logit stands for is found from the weights chosen: rules that score by softmax
    keep them in the ratio of the exponentials, those that score by sigmoid in that of the sigmoids.

    Args:
        logits: [T, E], as corrected.
        routed: What the router returned: anything, expert weights [T, k], expert ids [T, k].

    Raises:
        CheckpointError: If it is none of this.
    """
    if not (isinstance(routed, tuple) and len(routed) == 3 and routed[1].shape == routed[2].shape):
        raise CheckpointError(
            "gradient straight-through",
            "this architecture's routers do not say which experts they chose",
            expected="logits, expert weights and expert ids",
            fix="Build with --gradient plain.",
        )
    first, weights, ids = routed
    wide, chosen = logits.float(), weights.float()
    every = torch.arange(logits.shape[-1], device=logits.device).expand_as(logits)
    anchor = chosen.argmax(-1, keepdim=True)
    for size in (torch.log_softmax(wide, -1), F.logsigmoid(wide)):
        relative = (size - size.gather(-1, ids).gather(-1, anchor)).exp()
        ghost = chosen.gather(-1, anchor) * relative
        if torch.allclose(ghost.gather(-1, ids), chosen, rtol=_TOLERANCE, atol=1e-6):
            break
    else:
        raise CheckpointError(
            "gradient straight-through",
            "this architecture's expert weights do not follow from its logits",
            expected="weights in the ratio of a softmax or of sigmoids",
            fix="Build with --gradient plain.",
        )
    unchosen = torch.ones_like(wide).scatter(-1, ids, 0.0)
    dense = torch.zeros_like(wide).scatter(-1, ids, chosen)
    return first, (dense + unchosen * (ghost - ghost.detach())).to(weights.dtype), every
