"""bundle → standard ONNX graphs, made on demand for TensorRT and ONNX Runtime's CUDA provider.

They compute what the bundle's own graphs compute, with activations as they are, and read the same
weight files: a graph is some kilobytes that name places in them. Only for TensorRT are 4- and 8-bit
codes written anew (`signed_codes`).
"""

from __future__ import annotations

from dataclasses import dataclass

import onnx_ir as ir

from knnmoe.runtime.bundle import EXPORT_AGAIN, MANIFEST, Bundle, TensorSpec
from knnmoe.runtime.checkpoint import CONFIG, MAX_JSON_BYTES
from knnmoe.runtime.errors import BundleError, CheckpointError, SettingError
from knnmoe.runtime.manifest import parse_object

from .architecture import Architecture
from .describe import describe_config
from .families import FAMILIES
from .gate_graphs import gate_functions, gate_graph
from .graph import GraphBuilder, keep_names_apart
from .lowering.base import Lowering
from .lowering.std import BLOCK_OPSET, OPSETS, StdLowering
from .lowering.std_attention import ATTENTION
from .lowering.std_experts import EXPERTS
from .lowering.std_ops import HOSTS, PRECISIONS, StdOptions
from .lowering.std_weights import stored_weights
from .split import ModelPlan, fused_graph, segment_graph
from .torch_frontend.names import is_traced

__all__ = ["StdGraph", "StdModel", "StdOptions"]


@dataclass(frozen=True)
class StdGraph:
    """One graph, ready to be parsed.

    Attributes:
        content: The ModelProto; its external data lies in the bundle's `segments` folder.
        inputs, outputs: What goes in and out, in order.
    """

    content: bytes
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]


@dataclass(frozen=True)
class StdModel:
    """The graphs of one bundle, made when they are asked for."""

    bundle: Bundle
    options: StdOptions
    plan: ModelPlan

    @staticmethod
    def of(bundle: Bundle, options: StdOptions) -> StdModel:
        """Read what the graphs of a bundle depend on: its config and its weight files' headers.

        Raises:
            SettingError: If an option is unknown, or does not go with weights in blocks.
            BundleError: If the bundle's config is not that of its manifest, or a weights file is
                malformed.
        """
        for name, choices in (
            ("operators", ATTENTION),
            ("precision", PRECISIONS),
            ("experts", EXPERTS),
            ("host", HOSTS),
        ):
            found = getattr(options, name)
            if found not in choices:
                expected = " or ".join(choices)
                raise SettingError(f"std.{name}", "unknown", expected=expected, found=found)
        if options.capacity is not None and options.capacity < 1:
            raise SettingError(
                "std.capacity", "out of range", expected=">= 1", found=options.capacity
            )
        quantization, opset = bundle.manifest.quantization, OPSETS[options.operators]
        block_size = None
        if quantization is not None:
            opset, block_size = max(opset, BLOCK_OPSET), quantization.block_size
            if options.experts == "moe":
                raise SettingError(
                    "std.experts", "TensorRT's layer takes no weights in blocks of integers",
                    expected="gathered or dense", found=options.experts,
                    fix="Export the checkpoint with --precision fp16, or choose other --experts.",
                )  # fmt: skip

        def lower(plan: ModelPlan, g: GraphBuilder) -> Lowering:
            return StdLowering(g, plan.architecture, plan.stored, options, block_size)

        plan = ModelPlan(
            architecture=_architecture(bundle),
            stored=stored_weights(bundle),
            experts_per_token=bundle.manifest.experts_per_token,
            lower=lower,
            opset=opset,
        )
        return StdModel(bundle, options, plan)

    def segment(self, index: int) -> StdGraph:
        """The segment between gates `index - 1` and `index`.

        Raises:
            SettingError: If there is no such segment.
            BundleError: If the weights files lack a weight.
        """
        count = len(self.bundle.manifest.segments)
        if not 0 <= index < count:
            expected = f"0 to {count - 1}"
            raise SettingError("segment", "out of range", expected=expected, found=index)
        return self._closed(segment_graph(self.plan, index))

    def fused(self) -> StdGraph:
        """The whole model, with the gate graph that the bundle's own fused graph has.

        Raises:
            BundleError: If the bundle has no fused layout, or its weights files lack a weight.
        """
        fused = self.bundle.manifest.fused
        if fused is None:
            raise BundleError(
                self.bundle.path,
                "has no fused layout",
                fix="Export the checkpoint again, without --no-fused.",
            )
        return self._closed(fused_graph(self.plan, fused.gate), fused.gate)

    def gate(self, name: str) -> StdGraph:
        """A gate graph of the bundle, at the opset of the segments.

        Raises:
            SettingError: If the bundle has no gate graph of that name.
        """
        known = self.bundle.manifest.gates
        if name not in known:
            raise SettingError("gate", "unknown", expected=" or ".join(known), found=name)
        return self._closed(gate_graph(name, self.plan.gate_shape, self.plan.opset), name)

    def _closed(self, g: GraphBuilder, gate: str | None = None) -> StdGraph:
        functions = [] if gate is None else gate_functions(gate, self.plan.opset)
        functions = [keep_names_apart(function) for function in functions]
        content = ir.to_proto(g.model(functions)).SerializeToString()
        return StdGraph(content, tuple(g.input_specs), tuple(g.output_specs))


def _architecture(bundle: Bundle) -> Architecture:
    """The sizes and constants of the model, from the config that the bundle carries."""
    manifest, path = bundle.manifest, bundle.file(CONFIG)
    if is_traced(manifest):
        raise BundleError(
            f"{bundle.path / MANIFEST}: family",
            "was traced, and engines are built of families that are described",
            expected=" or ".join(sorted(FAMILIES)),
            found=manifest.family[:100],
            fix="Run the bundle on the CPU"
            + (
                ", or export the checkpoint without --frontend torch."
                if manifest.model_type in FAMILIES
                else "."
            ),
        )
    if manifest.model_type not in FAMILIES:
        raise BundleError(
            f"{bundle.path / MANIFEST}: model_type",
            "unknown architecture",
            expected=" or ".join(sorted(FAMILIES)),
            found=manifest.model_type[:100],
            fix="Use the version of knnmoe that wrote the bundle.",
        )
    try:
        if path.stat().st_size > MAX_JSON_BYTES:
            raise ValueError(f"more than {MAX_JSON_BYTES} bytes")
        config = parse_object(path.read_bytes())
        found = describe_config(config, path, FAMILIES[manifest.model_type])
    except ValueError as error:
        raise BundleError(path, f"is not a JSON object ({error})", fix=EXPORT_AGAIN) from error
    except CheckpointError as error:
        raise BundleError(
            error.where, error.problem, expected=error.expected, found=error.found, fix=EXPORT_AGAIN
        ) from error
    stated = (manifest.architecture, manifest.routing)
    if (found.shape, found.routing) != stated:
        raise BundleError(
            path,
            "describes another model than the manifest",
            expected=stated,
            found=(found.shape, found.routing),
            fix=EXPORT_AGAIN,
        )
    return found
