"""What the exporter needs of a model, be that found out from a description or from a trace."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

from knnmoe.runtime.bundle import ModelShape
from knnmoe.runtime.routing import RoutingRule

from .gate_graphs import GateShape
from .graph import GraphBuilder, StoredTensor
from .storage import Storage
from .weights import PlannedTensor


class Graphs(Protocol):
    """The graphs of a bundle, made when they are asked for."""

    def segment(self, index: int) -> GraphBuilder:
        """The segment between gates `index - 1` and `index`."""

    def fused(self, gate: str) -> GraphBuilder:
        """The whole model, with gate graph `gate` at every gate."""


class Exportable(Protocol):
    """A checkpoint as the exporter sees it."""

    @property
    def name(self) -> str:
        """Of its family, as the manifest has it."""

    @property
    def shape(self) -> ModelShape:
        """Its sizes."""

    @property
    def routing(self) -> RoutingRule:
        """Of all its gates."""

    @property
    def windows(self) -> tuple[int | None, ...]:
        """How many tokens a query of each layer sees; None for all before it."""

    @property
    def tied_head(self) -> bool:
        """Whether the head is the embedding."""

    @property
    def left_out(self) -> tuple[str, ...]:
        """Tensors of the checkpoint that no bundle has."""

    def segment_layers(self, segment: int) -> tuple[int, ...]:
        """The layers whose key-value cache a segment holds."""

    def weights(self, segment: int) -> list[PlannedTensor]:
        """What the weights file of a segment holds, in order, as fp32."""

    def selection_biases(self) -> PlannedTensor | None:
        """Those of all gates [G, E], if the routing rule has them."""

    def check(self) -> None:
        """Look at what only a pass over weights can tell; `CheckpointError` if it is wrong."""

    def graphs(
        self, stored: Mapping[str, StoredTensor], gate: GateShape, storage: Storage
    ) -> Graphs:
        """The graphs over weights that lie at `stored`."""
