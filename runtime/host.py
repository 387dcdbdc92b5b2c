"""Where a bundle runs on the host: ONNX Runtime's CPU provider, in one of the two layouts."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import replace
from typing import Literal, Protocol, get_args

from .blend import GateMemory
from .bundle import Bundle, FusedSpec
from .compressed import Memory, widened
from .engines.onnxruntime import OrtEngine
from .engines.requirements import check_onnxruntime
from .errors import BackendError, SettingError
from .gates.base import Gate
from .gates.onnx import graph_name
from .gates.select import Backend, EngineOf, make_gate
from .layouts import FusedWiring, HostLayout, Layout, SplitWiring
from .selection_bias import read_selection_biases

LayoutName = Literal["split", "fused"]
LAYOUTS: tuple[LayoutName, ...] = get_args(LayoutName)
SMALL_SEGMENT = 16 << 20
MAX_THREADS = 1024


class ModelBackend(Protocol):
    """Makes layouts of one bundle on one device."""

    @property
    def layout_name(self) -> LayoutName:
        """`split` or `fused`."""

    def layout(self, memories: Sequence[Memory | None]) -> Layout:
        """The model with these memories, one a gate; None for a gate that routes frozen.

        May be the layout of the last call, with the memories put in place; if that fails, the last
        layout is as it was.
        """

    def extended(
        self, memories: Sequence[Memory | None], changed: Collection[int], before: Layout
    ) -> Layout:
        """The last layout with entries more in the memories of some gates.

        What caches know of the memory stays. May be the last layout itself, with the entries put in
        place; if that fails, it is as it was.

        Args:
            memories: One a gate, as the last layout's but for those that changed.
            changed: The gates that have more entries now.
            before: The last layout.
        """

    def beside(self, memories: Sequence[Memory | None]) -> Layout:
        """Another layout with other memories, which serves beside those there are."""


class HostBackend:
    """ONNX Runtime on the CPU; loads each graph once.

    Args:
        bundle: What to run.
        layout: `split` or `fused`.
        gate: Backend of the gates in the split layout.
        threads: Of one operator; None takes the physical cores, or one for a tiny model. What was
            taken is the attribute of that name, None for the physical cores.

    Raises:
        SettingError: If the threads are out of their range.
        BackendError: If the layout is unknown, not in the bundle, or ONNX Runtime is too old or
            refuses a graph.
    """

    def __init__(
        self,
        bundle: Bundle,
        *,
        layout: LayoutName = "split",
        gate: Backend = "auto",
        threads: int | None = None,
    ) -> None:
        check_layout(layout)
        if threads is not None and not (isinstance(threads, int) and 1 <= threads <= MAX_THREADS):
            raise SettingError(
                "threads", "out of range", expected=f"a whole number from 1 to {MAX_THREADS}",
                found=repr(threads),
            )  # fmt: skip
        check_onnxruntime(bundle)
        self.layout_name = layout
        self._bundle, self._gate = bundle, gate
        self.threads = threads if threads is not None else _sensible_threads(bundle)
        self._selection_biases = read_selection_biases(bundle)
        self._engines: dict[str, OrtEngine] = {}
        segments = bundle.manifest.segments
        files = [fused_spec(bundle).file] if layout == "fused" else [s.file for s in segments]
        self._segments = tuple(self._engine(file) for file in files)

    def layout(self, memories: Sequence[Memory | None]) -> HostLayout:
        """See `ModelBackend.layout`; always a new one."""
        manifest = self._bundle.manifest
        shape, room = manifest.architecture, manifest.experts_per_token
        if self.layout_name == "fused":
            ready = tuple(fused_memory(self._bundle, widened(memory)) for memory in memories)
            biases = self._selection_biases
            return HostLayout(FusedWiring.over(shape, room, self._segments[0], ready, biases))
        gates = [self._make_gate(gate, memory) for gate, memory in enumerate(memories)]
        wiring = SplitWiring(
            architecture=shape,
            experts_per_token=room,
            segments=self._segments,
            layers=tuple(segment.layers for segment in manifest.segments),
            gates=tuple(gates),
        )
        return HostLayout(wiring)

    def extended(
        self, memories: Sequence[Memory | None], changed: Collection[int], before: Layout
    ) -> HostLayout:
        """See `ModelBackend.extended`; gates that are not changed stay."""
        assert isinstance(before, HostLayout)
        wiring = before.wiring
        if isinstance(wiring, SplitWiring):
            gates = list(wiring.gates)
            for gate in changed:
                gates[gate] = self._make_gate(gate, memories[gate])
            return replace(before, wiring=replace(wiring, gates=tuple(gates)))
        return replace(before, wiring=self.layout(memories).wiring)

    def _make_gate(self, gate: int, memory: Memory | None) -> Gate:
        manifest = self._bundle.manifest
        engine: EngineOf = lambda name: self._engine(manifest.gates[name].file)  # noqa: E731
        bias = self._selection_biases[gate]
        room = manifest.experts_per_token
        return make_gate(self._gate, memory, manifest.routing, room, engine, bias)

    def beside(self, memories: Sequence[Memory | None]) -> HostLayout:
        """See `ModelBackend.beside`."""
        return self.layout(memories)

    def _engine(self, file: str) -> OrtEngine:
        """The engine of a graph of the bundle, loaded once."""
        if file not in self._engines:
            self._engines[file] = OrtEngine(self._bundle.file(file), threads=self.threads)
        return self._engines[file]


def check_layout(layout: str) -> None:
    """Raise `BackendError` unless there is such a layout."""
    if layout not in LAYOUTS:
        raise BackendError("layout", "unknown", expected=LAYOUTS, found=layout)


def fused_spec(bundle: Bundle) -> FusedSpec:
    """The fused graph of a bundle; `BackendError` if it has none."""
    if bundle.manifest.fused is None:
        raise BackendError(
            bundle.path,
            "this bundle has no fused graph",
            fix="Export it again without --no-fused, or load it with layout='split'.",
        )
    return bundle.manifest.fused


def fused_memory(bundle: Bundle, memory: GateMemory | None) -> GateMemory:
    """A memory that the fused graph can take; an empty one stands for the frozen router.

    Raises:
        BackendError: If the memory is of another kind than the gates in the graph.
    """
    shape = bundle.manifest.architecture
    if memory is None:
        return GateMemory.empty(shape.hidden_size, shape.num_experts)
    wanted = fused_spec(bundle).gate
    if graph_name(memory) != wanted:
        raise BackendError(
            "layout 'fused'",
            "its gates are of another kind than this memory",
            expected=wanted,
            found=graph_name(memory),
            fix="Load the model with layout='split', which takes every kind.",
        )
    return memory


def _sensible_threads(bundle: Bundle) -> int | None:
    """One for segments below `SMALL_SEGMENT` bytes of weights, else what ONNX Runtime takes.

    An operator of some microseconds gains nothing from a second thread, and waits a whole time
    slice for it when another program holds the core.
    """
    # Of a file that is linked, a segment may use little.
    linked = bundle.manifest.linked or ()
    files = bundle.manifest.files.items()
    sizes = (spec.size for name, spec in files if "segments/" in name and name not in linked)
    return 1 if max(sizes) < SMALL_SEGMENT else None
