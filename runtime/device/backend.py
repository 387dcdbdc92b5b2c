"""Where a bundle runs on a CUDA device: an engine set, resident memories, gates, one stream."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from knnmoe.trt_plugins import library
from knnmoe.trt_plugins.cupy_prototype import CupyBlend
from knnmoe.trt_plugins.plan import MAX_NEIGHBORS
from knnmoe.trt_plugins.step_kernels import StepKernels

from ..blend import GateMemory
from ..bundle import Bundle, describe_file
from ..compressed import Memory, widened
from ..engines.base import Array, Engine
from ..engines.engine_set import EngineSet, check_producer, find_engines
from ..entries import trimmed
from ..errors import BackendError, SettingError
from ..gates.base import Gate
from ..gates.cuda import CudaGate, resident_blend
from ..gates.onnx import OnnxGate, graph_name
from ..host import LayoutName, fused_memory
from ..layouts import FusedWiring, Layout, SplitWiring, Wiring, bias_inputs
from ..selection_bias import read_selection_biases
from .append import AppendingEngine
from .cuda import Cuda
from .layout import DeviceLayout, DeviceLimits
from .resident import ResidentMemory

DeviceGate = Literal["cuda", "plugin"]
DEVICE_GATES: tuple[DeviceGate, ...] = get_args(DeviceGate)
LoadEngine = Callable[[Path], Engine]


@dataclass(frozen=True)
class DeviceSettings:
    """How a model runs on the device.

    Attributes:
        gate: In the split layout: `cuda`, our kernels through CuPy; `plugin`, the gate graphs as
            TensorRT engines with the plugin inside.
        keys: dtype of the resident keys where `gate` is `cuda`, as `ResidentMemory` takes it;
            engines have theirs.
        cuda_graph: Capture decode steps in a CUDA graph, where the engines allow it.
    """

    gate: DeviceGate = "cuda"
    keys: str = "float16"
    cuda_graph: bool = True


class DeviceBackend:
    """See `ModelBackend`.

    Args:
        bundle: What to run.
        engines: An engine set of the bundle; None takes the newest in the cache.
        settings: How to run it.
        cuda: The device; CuPy's current one if not given.
        load: Makes an engine of a file; by default what the engine set's backend says.

    Raises:
        BackendError: If CuPy, a device, TensorRT or the plugin is missing.
        EngineError: If the engines are damaged or of another bundle, device or version.
        DeviceError: If the device has too little memory.
    """

    def __init__(
        self,
        bundle: Bundle,
        engines: EngineSet | str | Path | None = None,
        settings: DeviceSettings = DeviceSettings(),
        *,
        cuda: Cuda | None = None,
        load: LoadEngine | None = None,
    ) -> None:
        if settings.gate not in DEVICE_GATES:
            raise BackendError(
                "gate", "no backend of the device", expected=DEVICE_GATES, found=settings.gate
            )
        if not isinstance(engines, EngineSet):
            engines = EngineSet.open(engines or find_engines(bundle), bundle)
        self._bundle, self._set, self._settings = bundle, engines, settings
        self.layout_name: LayoutName = "fused" if engines.layout == "fused" else "split"
        self._cuda = Cuda() if cuda is None else cuda
        self._load = load or engine_loader(engines, bundle, self._cuda)
        self._kernels = StepKernels(cupy=self._cuda.cupy)
        self._selection_biases = _on_device(self._cuda, read_selection_biases(bundle))
        self._engines: dict[str, Engine] = {}
        self._layout: DeviceLayout | None = None
        self._resident: ResidentMemory | None = None
        self._covered: tuple[bool, ...] = ()
        for files in engines.phases.values():
            for file in files:
                self._engine(file)

    def layout(self, memories: Sequence[Memory | None]) -> DeviceLayout:
        """See `ModelBackend.layout`: in place where the resident block has room.

        Raises:
            BackendError: If a memory does not fit the gates of the engines.
            SettingError: If a memory has more entries than the engines were built for.
            DeviceError: If the device has too little memory.
        """
        covered = tuple(memory is not None for memory in memories)
        return self._layout_of([widened(memory) for memory in memories], covered)

    def extended(
        self, memories: Sequence[Memory | None], changed: Collection[int], before: Layout
    ) -> DeviceLayout:
        """See `ModelBackend.extended`; in place where the resident block has room.

        Raises:
            SettingError: If a memory has more entries than the engines were built for.
            DeviceError: If the device has too little memory.
        """
        whole = [trimmed(widened(memory)) for memory in memories]
        if self.layout_name == "fused":
            whole = [fused_memory(self._bundle, memory) for memory in whole]
        assert isinstance(before, DeviceLayout)
        assert self._resident is not None
        if self._resident.fits(whole):
            self._resident.append(whole)
            return before
        layout = self._bound_anew(whole, self._covered)
        layout.memory = before.memory
        return layout

    def beside(self, memories: Sequence[Memory | None]) -> DeviceLayout:
        """See `ModelBackend.beside`: with a resident block of its own."""
        ready = self._fitting([widened(memory) for memory in memories])
        return self._new_layout(self._new_resident(ready))

    @property
    def cuda(self) -> Cuda:
        """The device."""
        return self._cuda

    @property
    def engine_set(self) -> EngineSet:
        """The engines."""
        return self._set

    def _fitting(self, memories: Sequence[GateMemory | None]) -> Sequence[GateMemory | None]:
        """The memories as the engines take them."""
        if self.layout_name == "fused":
            memories = [fused_memory(self._bundle, memory) for memory in memories]
            self._check_neighbors(memories)
        return memories

    def _new_resident(self, memories: Sequence[GateMemory | None]) -> ResidentMemory:
        in_engines = self.layout_name == "fused" or self._settings.gate == "plugin"
        return ResidentMemory(
            self._cuda,
            memories,
            key_dtype=self._set.keys if in_engines else self._settings.keys,
            limit=self._set.limits.entries if in_engines else None,
        )

    def _layout_of(
        self, memories: Sequence[GateMemory | None], covered: tuple[bool, ...]
    ) -> DeviceLayout:
        memories = self._fitting(memories)
        last, resident = self._layout, self._resident
        same = covered == self._covered and (self._set.plugin is not None or self._same_k(memories))
        if last and resident and same and resident.fits(memories):
            resident.swap(memories)
            last.memory = object()
            return last
        return self._bound_anew(memories, covered)

    def _bound_anew(
        self, memories: Sequence[GateMemory | None], covered: tuple[bool, ...]
    ) -> DeviceLayout:
        resident = self._new_resident(memories)
        layout = self._new_layout(resident)
        self._resident, self._layout, self._covered = resident, layout, covered
        return layout

    def _same_k(self, memories: Sequence[GateMemory | None]) -> bool:
        """Whether graphs that compute as many columns as K go on as they are bound."""
        if self.layout_name == "split" or self._resident is None:
            return True
        pairs = zip(memories, self._resident.memories, strict=True)
        return all(new is None or old is None or new.k == old.k for new, old in pairs)

    def _check_neighbors(self, memories: Sequence[GateMemory | None]) -> None:
        """Engines without the plugin look for a fixed number of neighbours."""
        fixed = self._set.neighbors
        asked = {memory.k for memory in memories if memory is not None and memory.n_valid}
        if fixed is not None and not asked <= {fixed}:
            raise SettingError(
                "neighbors", "the engines were built for another K", expected=fixed,
                found=sorted(asked), fix=f"Build them with the plugin or with --neighbors "
                f"{max(asked)}, or load the memory with neighbors={fixed}.",
            )  # fmt: skip

    def _new_layout(self, resident: ResidentMemory) -> DeviceLayout:
        phases = self._set.phases
        gates = self._gates(resident) if self.layout_name == "split" else ()
        wirings = {phase: self._wiring(files, gates, resident) for phase, files in phases.items()}
        limits = self._set.limits
        half = self._set.precision == "float16"
        return DeviceLayout(
            self._cuda,
            wirings["decode"],
            wirings.get("prefill"),
            limits=DeviceLimits(limits.batch, limits.context, limits.prefill),
            cache_dtype=np.float16 if half else np.float32,
            room=limits.context if self._set.operators == "modern" else None,
            capturable=self._settings.cuda_graph and self._set.backend != "onnxruntime",
            shown_neighbors=resident.neighbors,
        )

    def _wiring(
        self, files: tuple[str, ...], gates: tuple[Gate, ...], resident: ResidentMemory
    ) -> Wiring:
        manifest, zeros = self._bundle.manifest, self._cuda.zeros
        shape, room = manifest.architecture, manifest.experts_per_token
        engines = tuple(self._segment(file) for file in files)
        if self.layout_name == "split":
            layers = tuple(segment.layers for segment in manifest.segments)
            return SplitWiring(shape, room, engines, layers, gates, zeros)
        inputs = bias_inputs(self._selection_biases)
        for gate in range(shape.num_gates):
            inputs |= {f"{name}_{gate}": a for name, a in resident.arrays(gate).items()}
        columns = tuple(self._engine_columns(resident, g) for g in range(shape.num_gates))
        return FusedWiring(shape, room, engines[0], inputs, columns, zeros)

    def _gates(self, resident: ResidentMemory) -> tuple[Gate, ...]:
        gates: list[Gate] = []
        beside: CupyBlend | None = None
        for index, memory in enumerate(resident.memories):
            gate = self._gate(index, memory, resident, beside)
            beside = getattr(gate, "blend", None) or beside
            gates.append(gate)
        return tuple(gates)

    def _gate(
        self,
        gate: int,
        memory: GateMemory | None,
        resident: ResidentMemory,
        beside: CupyBlend | None,
    ) -> Gate:
        rule, bias = self._bundle.manifest.routing, self._selection_biases[gate]
        if self._settings.gate == "plugin":
            name = graph_name(memory)
            if name not in self._set.gates:
                raise BackendError(
                    self._set.path, f"holds no engine of the gate {name}",
                    expected=f"one of {', '.join(self._set.gates) or 'none'}",
                    fix="Build the engines with the plugin (`knnmoe plugin build`), or load the "
                    "model with gate='cuda'.",
                )  # fmt: skip
            engine = self._engine(self._set.gates[name])
            if memory is None:
                return OnnxGate(engine, {}, 0, bias)
            columns = self._engine_columns(resident, gate)
            return OnnxGate(engine, resident.arrays(gate), columns, bias)
        if memory is None:
            return CudaGate(self._cuda, self._kernels, rule, selection_bias=bias)
        columns = resident.columns(gate)
        blend = resident_blend(
            self._cuda,
            memory,
            resident.arrays(gate),
            columns=columns,
            max_tokens=self._most_tokens,
            beside=beside,
        )
        return CudaGate(self._cuda, self._kernels, rule, blend, memory.rule_first, columns, bias)

    @property
    def _most_tokens(self) -> int:
        limits = self._set.limits
        return limits.batch * (limits.prefill if "prefill" in self._set.phases else 1)

    def _engine_columns(self, resident: ResidentMemory, gate: int) -> int:
        """K' of a gate inside an engine: what the plugin has, or what the function computes."""
        capacity = resident.capacity(gate)
        if self._set.plugin is not None:
            return min(capacity, MAX_NEIGHBORS)
        memory = resident.memories[gate]
        if self._set.neighbors is not None or memory is None:
            return min(self._set.neighbors or 0, capacity)
        return min(memory.k, capacity)

    def _segment(self, file: str) -> Engine:
        engine = self._engine(file)
        if self._set.operators == "modern":
            return engine
        return AppendingEngine(engine, self._cuda, self._kernels)

    def _engine(self, file: str) -> Engine:
        """The engine of a file, loaded once."""
        if file not in self._engines:
            self._engines[file] = self._load(self._set.file(file))
        return self._engines[file]


def _on_device(
    cuda: Cuda, biases: Sequence[NDArray[np.float32] | None]
) -> tuple[Array | None, ...]:
    """The selection biases [E] of the gates on the device, where they stay."""
    there: list[Array | None] = []
    for bias in biases:
        there.append(None if bias is None else cuda.zeros(bias.shape, bias.dtype))
        if bias is not None:
            cuda.upload(bias, there[-1])
    cuda.synchronize()  # the host's go now
    return tuple(there)


def engine_loader(engines: EngineSet, bundle: Bundle, cuda: Cuda) -> LoadEngine:
    """What loads the engines of a set, once it is known that this machine can run them.

    Raises:
        BackendError: If what the engines need is not installed.
        EngineError: If they were built for another device, version or plugin.
    """
    found: dict[str, Any] = {"capability": cuda.capability, "driver": cuda.driver}
    if engines.backend == "onnxruntime":
        import onnxruntime

        from ..engines.onnxruntime_cuda import OrtCudaEngine, check_provider

        check_provider()
        check_producer(engines, {**found, "backend_version": onnxruntime.__version__})
        weights = bundle.path / "segments"
        return lambda path: OrtCudaEngine(path, weights, cuda)
    from ..engines.tensorrt import Scratch, TensorRTEngine, load_tensorrt

    tensorrt = load_tensorrt(engines.backend)
    found["backend_version"] = tensorrt.version
    found["plugin"] = None
    if engines.plugin is not None:
        plugin = library.find_library()
        found["plugin"] = describe_file(plugin).sha256
    check_producer(engines, found)
    if engines.plugin is not None:
        library.load(tensorrt.module, plugin)
    scratch = Scratch(cuda)
    return lambda path: TensorRTEngine(tensorrt, path, cuda, scratch)
