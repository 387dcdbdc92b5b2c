"""Which gate runs which memory."""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec
from typing import Literal, get_args

import numpy as np
from numpy.typing import NDArray

from ..compressed import CompressedMemory, Memory, widened
from ..engines.onnxruntime import OrtEngine
from ..errors import BackendError
from ..routing import RoutingRule
from .base import Gate
from .faiss import EXACT_ENTRIES, FaissGate, FaissGpuGate, build_index, check_gpu, load_faiss
from .numpy import NumpyGate
from .onnx import FROZEN, OnnxGate, graph_name
from .two_stage import TwoStageGate, fits, pays

Backend = Literal["auto", "onnx", "numpy", "numpy-float64", "two-stage", "faiss", "faiss-gpu"]
BACKENDS: tuple[Backend, ...] = get_args(Backend)

EngineOf = Callable[[str], OrtEngine]


def make_gate(
    backend: Backend,
    memory: Memory | None,
    rule: RoutingRule,
    experts_per_token: int,
    engine_of: EngineOf,
    selection_bias: NDArray[np.float32] | None = None,
) -> Gate:
    """One gate on the backend asked for.

    Args:
        backend: A name, or `auto` (see `choose`).
        memory: None for a gate the memory does not cover: the frozen router.
        engine_of: Loads a gate graph of the bundle by name.
        selection_bias: [E], of this gate, where the rule has one.

    Raises:
        BackendError: If the backend is unknown, or what it needs is missing: faiss, a GPU.
        SettingError: If the memory asks for more neighbours than the backend can find.
    """
    if backend not in BACKENDS:
        raise BackendError("gate", "no backend of the CPU", expected=BACKENDS, found=backend)
    chosen = choose(memory) if backend == "auto" else backend
    if chosen == "two-stage" and memory is not None:
        engine = engine_of(graph_name(memory))
        return TwoStageGate.over(
            engine, memory, rule, experts_per_token, selection_bias, frozen=engine_of(FROZEN)
        )
    memory = widened(memory)
    if chosen in ("onnx", "two-stage"):
        return OnnxGate.over(engine_of(graph_name(memory)), memory, selection_bias)
    if chosen == "faiss" and memory is not None:
        index = build_index(memory)
        return FaissGate(
            rule, experts_per_token, memory, selection_bias=selection_bias, index=index
        )
    if chosen == "faiss-gpu":
        if memory is not None:
            index = build_index(memory, gpu=True)
            return FaissGpuGate(
                rule, experts_per_token, memory, selection_bias=selection_bias, index=index
            )
        check_gpu(load_faiss())  # a gate without a memory would hide that there is none
    dtype = np.float64 if chosen == "numpy-float64" else np.float32
    return NumpyGate(rule, experts_per_token, memory, dtype, selection_bias)


def choose(memory: Memory | None) -> Backend:
    """The ONNX graph, which scans the keys as they are; for larger memories the two stages.

    Of compressed ones these are taken for any size: the graph would hold keys and values in fp32,
    and takes longer for one token, though less for several where entries are few. For memories too
    large to scan whole at every token, and not compressed, it is faiss, if that is installed.
    """
    if memory is None:
        return "onnx"
    if isinstance(memory, CompressedMemory):
        return "two-stage" if fits(memory) else "onnx"
    if memory.n_valid > EXACT_ENTRIES and find_spec("faiss") is not None:
        return "faiss"
    return "two-stage" if pays(memory) else "onnx"
