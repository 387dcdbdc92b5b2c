"""A checkpoint of a family that `export/families` describes, as the exporter sees it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial

from knnmoe.runtime.bundle import ModelShape, Quantization
from knnmoe.runtime.checkpoint import Checkpoint
from knnmoe.runtime.routing import RoutingRule
from knnmoe.runtime.selection_bias import TENSOR

from .architecture import Architecture
from .describe import describe
from .families import family_of
from .gate_graphs import GateShape
from .graph import GraphBuilder, StoredTensor
from .lowering.base import Lowering
from .lowering.ort_quantized import QuantizedOrtLowering
from .lowering.ort_weights import segment_weights
from .refusals import check_tied_head
from .split import ModelPlan, fused_graph, segment_graph
from .storage import Storage
from .tensors import further_tensors
from .weights import PlannedTensor, row_chunks


@dataclass(frozen=True)
class Described:
    """See `Exportable`."""

    source: Checkpoint
    architecture: Architecture

    @staticmethod
    def of(source: Checkpoint) -> Described:
        """Read a checkpoint by the description of its family.

        Raises:
            CheckpointError: If its family is not described, or it is not as described.
        """
        return Described(source, describe(source, family_of(source)))

    @property
    def name(self) -> str:
        """See `Exportable.name`."""
        return self.architecture.family.name

    @property
    def shape(self) -> ModelShape:
        """See `Exportable.shape`."""
        return self.architecture.shape

    @property
    def routing(self) -> RoutingRule:
        """See `Exportable.routing`."""
        return self.architecture.routing

    @property
    def windows(self) -> tuple[int | None, ...]:
        """See `Exportable.windows`."""
        return tuple(layer.window for layer in self.architecture.layers)

    @property
    def tied_head(self) -> bool:
        """See `Exportable.tied_head`."""
        return self.architecture.tied_head

    @property
    def left_out(self) -> tuple[str, ...]:
        """See `Exportable.left_out`."""
        return further_tensors(self.source, self.architecture)

    def segment_layers(self, segment: int) -> tuple[int, ...]:
        """See `Exportable.segment_layers`."""
        return tuple(self.architecture.segment_layers(segment))

    def weights(self, segment: int) -> list[PlannedTensor]:
        """See `Exportable.weights`."""
        return segment_weights(self.architecture, self.source, segment)

    def selection_biases(self) -> PlannedTensor | None:
        """See `Exportable.selection_biases`."""
        template, source = self.architecture.family.tensors.selection_bias, self.source
        if template is None:
            return None
        names = [template.format(layer=layer) for layer in self.architecture.gate_layers]
        size = (len(names), self.shape.num_experts)
        return PlannedTensor(
            TENSOR, size, lambda: (rows for n in names for rows in row_chunks(source.tensor(n)))
        )

    def check(self) -> None:
        """See `Exportable.check`."""
        check_tied_head(self.source, self.architecture)

    def graphs(
        self, stored: Mapping[str, StoredTensor], gate: GateShape, storage: Storage
    ) -> DescribedGraphs:
        """See `Exportable.graphs`."""
        plan = ModelPlan(self.architecture, stored, gate.experts_per_token)
        if storage.precision != "fp32":
            lower = partial(_lower_quantized, storage.quantization)
            plan = ModelPlan(self.architecture, stored, gate.experts_per_token, lower)
        return DescribedGraphs(plan)


@dataclass(frozen=True)
class DescribedGraphs:
    """See `Graphs`."""

    plan: ModelPlan

    def segment(self, index: int) -> GraphBuilder:
        """See `Graphs.segment`."""
        return segment_graph(self.plan, index)

    def fused(self, gate: str) -> GraphBuilder:
        """See `Graphs.fused`."""
        return fused_graph(self.plan, gate)


def _lower_quantized(
    quantization: Quantization | None, plan: ModelPlan, g: GraphBuilder
) -> Lowering:
    return QuantizedOrtLowering(
        g, plan.architecture, plan.stored, plan.experts_per_token, quantization
    )
