"""A traced checkpoint, as the exporter sees it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor
from torch.fx import Node
from torch.nn import Parameter

from knnmoe.export.gate_graphs import GateShape
from knnmoe.export.graph import GraphBuilder, StoredTensor
from knnmoe.export.storage import Storage
from knnmoe.export.weights import PlannedTensor, row_chunks
from knnmoe.pretrained import quiet_transformers
from knnmoe.runtime.bundle import ModelShape
from knnmoe.runtime.checkpoint import CONFIG, Checkpoint
from knnmoe.runtime.errors import CheckpointError
from knnmoe.runtime.routing import RoutingRule
from knnmoe.runtime.selection_bias import TENSOR

from .experts import describe_experts
from .gates import Site, find_sites
from .graphs import Pieces, fused_graph, is_inline, segment_graph
from .loading import OTHER_FAMILY, load_model
from .names import CONSTANT, PREFIX, ROUTER
from .placeholders import ATTENTION, EXPERTS, forget
from .probing import attention_windows
from .rules import Routing, find_routing
from .tracing import Trace, origin, trace


@dataclass(frozen=True)
class Traced:
    """See `Exportable`.

    Attributes:
        model_type: Of the checkpoint.
        pieces: What the graphs are made of.
        gates: The routing of each gate.
        names: Of the weights in the bundle.
        left_out: See `Exportable.left_out`; a trace has all that the model uses.
    """

    model_type: str
    pieces: Pieces
    gates: tuple[Routing, ...]
    names: Mapping[Node, str]
    left_out: tuple[str, ...] = ()

    @staticmethod
    def of(source: Checkpoint) -> Traced:
        """Load a checkpoint with transformers and trace it: all of it is in memory, in fp32.

        Raises:
            CheckpointError: If it cannot be loaded or traced, or cannot be expressed as segments
                between gates; with the name of what is in the way.
        """
        model = load_model(source)
        try:
            with quiet_transformers():
                windows = attention_windows(model)
                traced = trace(model)
        finally:
            forget()
        sites = find_sites(traced)
        gates = find_routing(traced, sites)
        index = {node: number for number, node in enumerate(traced.of(EXPERTS))}
        experts = tuple(
            describe_experts(traced.experts[index[site.experts]], site.number) for site in sites
        )
        layers = _layers(traced, windows)
        shape = _shape(source, model, traced, sites, layers)
        pieces = Pieces(traced, sites, experts, layers, windows, shape)
        found = [layer for segment in range(len(sites) + 1)
                 for layer in pieces.segment_layers(segment)]  # fmt: skip
        if found != list(range(len(layers))):
            raise CheckpointError(
                "trace", "has layers of attention that are not one behind another",
                expected=f"0 to {len(layers) - 1}", found=found, fix=OTHER_FAMILY,
            )  # fmt: skip
        return Traced(source.model_type, pieces, gates, _weight_names(traced, sites))

    @property
    def name(self) -> str:
        """See `Exportable.name`."""
        return PREFIX + self.model_type

    @property
    def shape(self) -> ModelShape:
        """See `Exportable.shape`."""
        return self.pieces.shape

    @property
    def routing(self) -> RoutingRule:
        """See `Exportable.routing`."""
        return self.gates[0].rule

    @property
    def windows(self) -> tuple[int | None, ...]:
        """See `Exportable.windows`."""
        return self.pieces.windows

    @property
    def tied_head(self) -> bool:
        """False: no precision of a trace stores a head apart from its embedding."""
        return False

    def segment_layers(self, segment: int) -> tuple[int, ...]:
        """See `Exportable.segment_layers`."""
        return self.pieces.segment_layers(segment)

    def weights(self, segment: int) -> list[PlannedTensor]:
        """See `Exportable.weights`; a weight that several segments read lies with the first."""
        earlier = {name for before in range(segment) for name in self._needed(before)}
        planned = [
            tensor
            for site, experts in zip(self.pieces.sites, self.pieces.experts, strict=True)
            if site.number == segment - 1
            for tensor in experts.weights()
        ]
        return planned + [
            PlannedTensor(name, tuple(tensor.shape), partial(_chunks, tensor))
            for name, tensor in self._needed(segment).items()
            if name not in earlier
        ]

    def selection_biases(self) -> PlannedTensor | None:
        """See `Exportable.selection_biases`."""
        biases = [gate.bias for gate in self.gates if gate.bias is not None]
        if not biases:
            return None
        return PlannedTensor(
            TENSOR, (len(biases), self.shape.num_experts), lambda: iter([np.stack(biases)])
        )

    def check(self) -> None:
        """Nothing is left to look at: the weights are loaded."""

    def graphs(
        self, stored: Mapping[str, StoredTensor], gate: GateShape, storage: Storage
    ) -> TracedGraphs:
        """See `Exportable.graphs`."""
        return TracedGraphs(self.pieces, stored, gate, self.names)

    def _needed(self, segment: int) -> dict[str, Tensor]:
        tensors = self.pieces.trace.tensors
        return {
            self.names[node]: tensors[node]
            for node in self.pieces.nodes(segment)
            if node in tensors and not is_inline(tensors[node])
        }


@dataclass(frozen=True)
class TracedGraphs:
    """See `Graphs`."""

    pieces: Pieces
    stored: Mapping[str, StoredTensor]
    gate: GateShape
    names: Mapping[Node, str]

    def segment(self, index: int) -> GraphBuilder:
        """See `Graphs.segment`."""
        return segment_graph(self.pieces, self.names, self.stored, self.gate, index)

    def fused(self, gate: str) -> GraphBuilder:
        """See `Graphs.fused`."""
        return fused_graph(self.pieces, self.names, self.stored, self.gate, gate)


def _chunks(tensor: Tensor) -> Iterator[NDArray[np.float32]]:
    yield from row_chunks(tensor.detach().float().contiguous().numpy())


def _weight_names(traced: Trace, sites: tuple[Site, ...]) -> dict[Node, str]:
    """Names of the weights in the bundle: those of transformers, and what stays fp32."""
    names = {
        node: name if isinstance(traced.tensors[node], Parameter) else name + CONSTANT
        for node, name in traced.names.items()
    }
    for site in sites:
        for node in map(origin, site.logits.all_input_nodes):
            if node in names:
                names[node] += ROUTER
    return names


def _layers(traced: Trace, windows: tuple[int | None, ...]) -> tuple[Node, ...]:
    """The calls of attention, which all have one shape."""
    alive = set(traced.needed([traced.output]))
    layers = tuple(node for node in traced.of(ATTENTION) if node in alive)
    sizes = {
        tuple(int(n) for part in node.args[:3] for n in _sizes(part)) for node in layers
    }  # fmt: skip
    if len(layers) != len(windows):
        raise CheckpointError(
            "attention",
            "is not there as often in the trace as in a run of the model",
            expected=len(windows),
            found=len(layers),
            fix=OTHER_FAMILY,
        )
    if len(sizes) != 1:
        raise CheckpointError(
            "attention",
            "differs from layer to layer in the number or size of its heads",
            expected="one shape of query, key and value in all layers",
            found=sorted(sizes)[:3],
            fix=OTHER_FAMILY,
        )
    return layers


def _sizes(part: Any) -> tuple[Any, Any]:
    """Heads and head size of a query, key or value."""
    shape = part.meta["val"].shape
    return shape[1], shape[3]


def _shape(
    source: Checkpoint, model: Any, traced: Trace, sites: tuple[Site, ...], layers: tuple[Node, ...]
) -> ModelShape:
    (heads, size), (kv_heads, _), (_, value_size) = (_sizes(part) for part in layers[0].args[:3])
    text = model.config.get_text_config()
    positions = getattr(text, "max_position_embeddings", None)
    if not isinstance(positions, int):
        raise CheckpointError(
            f"{source.path / CONFIG}: max_position_embeddings", "is missing",
            expected="the longest text that the model takes", found=positions, fix=OTHER_FAMILY,
        )  # fmt: skip
    widths = {
        (int(s.router_input.meta["val"].shape[-1]), int(s.logits.meta["val"].shape[-1]))
        for s in sites
    }
    if len(widths) != 1:
        raise CheckpointError(
            "gates", "differ in width", expected="one hidden size and one number of experts",
            found=sorted(widths), fix=OTHER_FAMILY,
        )  # fmt: skip
    ((hidden, experts),) = widths
    return ModelShape(
        hidden_size=hidden,
        vocab_size=int(traced.output.meta["val"].shape[-1]),
        num_layers=len(layers),
        num_gates=len(sites),
        num_experts=experts,
        num_heads=int(heads),
        num_kv_heads=int(kv_heads),
        head_size=max(int(size), int(value_size)),
        max_positions=positions,
    )
