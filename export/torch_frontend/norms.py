"""RMS norms in a trace: transformers writes them in torch's smallest operators, ONNX has one."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Node

aten: Any = torch.ops.aten
_CASTS = (aten.to.dtype, aten._to_copy.default)
_PRODUCT, _SUM = aten.mul.Tensor, aten.add.Tensor
_LAST = ([-1], (-1,))


@dataclass(frozen=True)
class Norm:
    """x / √(mean(x²) + epsilon) · scale, over the last axis."""

    rows: Node
    scale: Node
    epsilon: float


def find_norms(nodes: Iterable[Node]) -> dict[Node, Norm]:
    """The products that close an RMS norm, and what it is a norm of."""
    found = ((node, _norm(node)) for node in nodes if node.target is _PRODUCT)
    return {node: norm for node, norm in found if norm is not None}


def _norm(node: Node) -> Norm | None:
    for scale, normed in _pairs(node):
        if _rank(scale) != 1 or normed.target is not _PRODUCT:
            continue
        for rows, inverse in _pairs(normed):
            epsilon = _epsilon(inverse, rows)
            if epsilon is not None and rows.meta["val"].dtype == torch.float32:
                return Norm(rows, scale, epsilon)
    return None


def _epsilon(inverse: Node, rows: Node) -> float | None:
    """The epsilon of 1 / √(mean(rows²) + epsilon); None for anything else."""
    if inverse.target is not aten.rsqrt.default:
        return None
    (total,) = (_plain(n) for n in inverse.all_input_nodes)
    if total.target is not _SUM or not isinstance(total.args[1], float):
        return None
    (mean,) = (_plain(n) for n in total.all_input_nodes)
    if mean.target is not aten.mean.dim or mean.args[1:] not in [(axes, True) for axes in _LAST]:
        return None
    (square,) = (_plain(n) for n in mean.all_input_nodes)
    if square.target is not aten.pow.Tensor_Scalar or square.args[1] != 2:
        return None
    (source,) = (_plain(n) for n in square.all_input_nodes)
    return total.args[1] if source is rows else None


def _pairs(node: Node) -> list[tuple[Node, Node]]:
    """The factors of a product, either way round."""
    factors = [_plain(n) for n in node.args if isinstance(n, Node)]
    return [(factors[0], factors[1]), (factors[1], factors[0])] if len(factors) == 2 else []


def _plain(node: Node) -> Node:
    """A node without casts to the dtype that it has."""
    while node.target in _CASTS:
        source = node.all_input_nodes[0]
        if source.meta["val"].dtype != node.meta["val"].dtype:
            return node
        node = source
    return node


def _rank(node: Node) -> int:
    value = node.meta.get("val")
    return value.ndim if isinstance(value, torch.Tensor) else -1
