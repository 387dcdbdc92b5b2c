"""One torch.export of a whole model, with attention and experts as single nodes."""

from __future__ import annotations

import operator
import warnings
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.export.graph_signature import InputKind
from torch.fx import Node

from knnmoe.pretrained import first_line
from knnmoe.runtime.errors import CheckpointError

from .loading import OTHER_FAMILY
from .norms import Norm, find_norms
from .placeholders import ATTENTION, EXPERTS, NAME, register, register_experts, traced_attention

_TYPE_AS = torch.ops.aten.type_as.default


@dataclass(frozen=True)
class Trace:
    """A model as a graph of torch's operators, over token ids [B, S] and positions [B, S].

    Attributes:
        nodes: In the order in which they are computed.
        input_ids, position_ids: The inputs.
        output: The logits [B, S, V].
        tensors: Of the placeholders that are weights or constants.
        names: Of the same, as the model has them.
        experts: The modules that the nodes of experts stand for, by their index.
        order: Of every node, its place among `nodes`.
        norms: The nodes that close an RMS norm, each of which is one operator in the graphs.
    """

    nodes: tuple[Node, ...]
    input_ids: Node
    position_ids: Node
    output: Node
    tensors: Mapping[Node, Tensor]
    names: Mapping[Node, str]
    experts: tuple[Any, ...]
    order: Mapping[Node, int] = field(repr=False)
    norms: Mapping[Node, Norm] = field(repr=False)

    def sources(self, node: Node) -> list[Node]:
        """What a node is computed of; of experts without ids and weights, which gates decide."""
        if node in self.norms:
            return [self.norms[node].rows, self.norms[node].scale]
        if node.target in (EXPERTS, _TYPE_AS):  # which takes of its second argument only the dtype
            return node.all_input_nodes[:1]
        return node.all_input_nodes

    def of(self, target: Any) -> list[Node]:
        """The calls of one operator, in order."""
        return [node for node in self.nodes if node.target is target]

    def needed(
        self, outputs: Iterable[Node], given: Iterable[Node] = (), *, sizes: bool = False
    ) -> list[Node]:
        """What outputs are computed of, in order and themselves included; not what `given` is.

        `sizes`: with the numbers that shapes are made of, which no graph takes from the trace.
        """
        found, stops = set(), set(given)
        queue = [node for node in outputs if node not in stops]
        while queue:
            node = queue.pop()
            if node in found:
                continue
            found.add(node)
            queue += [
                source
                for source in self.sources(node)
                if source not in stops and (sizes or not is_size(source))
            ]
        return sorted(found, key=self.order.__getitem__)


def is_size(node: Node) -> bool:
    """Whether a node is a number that shapes are made of, not a tensor or several."""
    return isinstance(node.meta.get("val"), int | float | torch.SymInt | torch.SymFloat)


class _Whole(torch.nn.Module):
    """A model with the arguments that a trace has."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, position_ids: Tensor) -> Tensor:
        output = self.model(
            input_ids=input_ids,
            attention_mask=torch.ones_like(input_ids),
            position_ids=position_ids,
            use_cache=False,
        )
        logits: Tensor = output.logits
        return logits


def trace(model: Any) -> Trace:
    """Trace a model of transformers; its weights stay where they are.

    Raises:
        CheckpointError: If torch cannot trace it, or its experts are none that transformers can
            exchange.
    """
    where = type(model).__name__
    modules: list[Any] = []

    def experts(module: Any, rows: Tensor, ids: Tensor, weights: Tensor, *more: Any) -> Tensor:
        if more:
            raise ValueError(f"{type(module).__name__} takes more than rows, ids and weights")
        modules.append(module)
        result: Tensor = EXPERTS(rows, ids, weights, len(modules) - 1)
        return result

    register(traced_attention, None)
    register_experts(experts)
    if not model._can_set_experts_implementation():
        raise CheckpointError(
            where,
            "has no experts that transformers can exchange",
            expected="a Mixture-of-Experts model whose experts go through transformers' experts "
            "functions",
            fix=OTHER_FAMILY,
        )
    model.set_attn_implementation(NAME)
    model.set_experts_implementation(NAME)
    batch, length = torch.export.Dim("batch"), torch.export.Dim("length")
    dynamic = ({0: batch, 1: length}, {0: batch, 1: length})
    ids = torch.zeros(2, 5, dtype=torch.long)
    positions = torch.arange(5).expand(2, 5).contiguous()
    try:
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            program = torch.export.export(
                _Whole(model), (ids, positions), dynamic_shapes=dynamic, strict=False
            )
            met = tuple(modules)
            found = _read(program, met)
            if not _is_pure(found):
                # Takes twice as long as the export itself.
                found = _read(program.run_decompositions({}), met)
    except Exception as error:  # torch.export raises of many kinds
        raise CheckpointError(
            where, f"cannot be traced ({first_line(error)})", fix=OTHER_FAMILY
        ) from error
    if not found.of(EXPERTS) or not found.of(ATTENTION):
        raise CheckpointError(
            where,
            "was traced without a layer of experts, or without attention",
            expected="a Mixture-of-Experts model of transformers",
            fix=OTHER_FAMILY,
        )
    return found


def _read(program: Any, experts: tuple[Any, ...]) -> Trace:
    """The graph of an exported program, with its weights beside their nodes."""
    nodes = tuple(program.graph.nodes)
    inputs, tensors, names = [], {}, {}
    placeholders = [node for node in nodes if node.op == "placeholder"]
    for node, spec in zip(placeholders, program.graph_signature.input_specs, strict=True):
        if spec.kind is InputKind.USER_INPUT:
            inputs.append(node)
            continue
        lifted = program.state_dict.get(spec.target)
        tensors[node] = program.constants[spec.target] if lifted is None else lifted
        names[node] = spec.target.removeprefix("model.")
    (output,) = nodes[-1].all_input_nodes
    return Trace(
        nodes=nodes,
        input_ids=inputs[0],
        position_ids=inputs[1],
        output=output,
        tensors=tensors,
        names=_distinct(tensors, names),
        experts=experts,
        order={node: place for place, node in enumerate(nodes)},
        norms=find_norms(nodes),
    )


def _is_pure(found: Trace) -> bool:
    """Whether what graphs are made of is changed nowhere in place, and is no graph of its own.

    What the routers change in place may stay: it is run as it is, if each change is seen by who
    reads it. Changes through a view are not.
    """
    needed, run = set(found.needed([found.output])), set(descend([found.output]))
    for node in found.nodes:
        if node.op == "get_attr" and node in run:
            return False
        if node.op != "call_function" or node.target is operator.getitem:
            continue
        schema = getattr(node.target, "_schema", None)
        if schema is None:
            if node in run:
                return False
        elif schema.is_mutable:
            changed = set(_viewed(node))
            if changed & needed or (changed & run and node not in run):
                return False
    return True


def _viewed(node: Node) -> Iterator[Node]:
    """What a node is a view of, or changes: its first argument, what that is a view of, and on."""
    while node.op == "call_function" and node.all_input_nodes:
        schema = getattr(node.target, "_schema", None)
        aliased = schema is not None and bool(schema.arguments) and schema.arguments[0].alias_info
        if not aliased and node.target is not operator.getitem:
            return
        node = node.all_input_nodes[0]
        yield node


def _distinct(tensors: Mapping[Node, Tensor], names: Mapping[Node, str]) -> dict[Node, str]:
    """The names, where tensors that are one (a tied head) have that of the first."""
    first: dict[tuple[int, torch.Size], str] = {}
    return {
        node: first.setdefault((tensor.data_ptr(), tensor.shape), names[node])
        if tensor.numel()
        else names[node]
        for node, tensor in tensors.items()
    }


_SAME = {
    torch.ops.aten.view.default, torch.ops.aten.reshape.default, torch.ops.aten.alias.default,
    torch.ops.aten._unsafe_view.default, torch.ops.aten.clone.default,
    torch.ops.aten.contiguous.default, torch.ops.aten.detach.default,
    torch.ops.aten._to_copy.default, torch.ops.aten.to.dtype, torch.ops.aten.to.device,
    torch.ops.aten.type_as.default,
    torch.ops.aten.squeeze.dim, torch.ops.aten.unsqueeze.default, torch.ops.aten.flatten.using_ints,
    torch.ops.aten.slice.Tensor, torch.ops.aten.dropout.default,
}  # fmt: skip


def origin(node: Node) -> Node:
    """The node whose rows these are: what only reshapes [B, S, D] to [T, D] or back is left out."""
    while node.target in _SAME:
        source = node.all_input_nodes[0]
        here, there = node.meta["val"], source.meta["val"]
        if not here.shape or not there.shape or here.dtype != there.dtype:
            return node
        if here.shape[-1] != there.shape[-1] or here.numel() != there.numel():
            return node
        node = source
    return node


def descend(outputs: Iterable[Node]) -> Iterator[Node]:
    """All that outputs are computed of, nearest first, ids and weights of experts included."""
    seen, queue = set(), list(outputs)
    while queue:
        node = queue.pop(0)
        if node not in seen:
            seen.add(node)
            yield node
            queue += node.all_input_nodes
