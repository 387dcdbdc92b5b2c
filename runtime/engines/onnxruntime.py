"""Engines on ONNX Runtime, with bindings that outlive the call.

`InferenceSession.run` with a dictionary costs up to a millisecond a call in look-ups and copies; a
binding made once costs some ten microseconds.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import onnxruntime as ort

from ..errors import BackendError
from ..shortage import is_shortage, shortage
from .base import Array, Run

_SMALLER = "Close what else uses the memory, or take a shorter prompt, a smaller batch or model."


class OrtEngine:
    """One ONNX graph on ONNX Runtime's CPU provider.

    Args:
        graph: Its file, from whose directory external weights are mapped, or its bytes.
        threads: Threads of one operator; None lets ONNX Runtime take the physical cores.
        weights: External weights of a graph given as bytes, by name. They are copied.
        precise_int8: Do not let the sum of two products of bytes be cut off at 16 bits, as x86
            processors without dot products of bytes do. Elsewhere this takes time for nothing.
        profile: Note the time of every operator, for `end_profile`: how its file's name begins.

    Raises:
        BackendError: If ONNX Runtime refuses the graph.
    """

    def __init__(
        self,
        graph: Path | bytes,
        *,
        threads: int | None = None,
        weights: Mapping[str, Array] | None = None,
        precise_int8: bool = False,
        profile: Path | None = None,
    ) -> None:
        self.threads = threads
        self.name = "a graph made in memory" if isinstance(graph, bytes) else str(graph)
        self.file = None if isinstance(graph, bytes) else graph
        options = ort.SessionOptions()
        options.log_severity_level = 3
        options.intra_op_num_threads = threads or 0
        options.inter_op_num_threads = 1
        # The segments run one after another, each with threads of its own: those of a finished
        # segment must not spin on the cores that the next one needs. Nor do they within one: an
        # operator takes long enough to be woken for, and on a shared machine a thread that spins
        # takes the core from the one it waits for (two threads on two busy cores: a
        # quarter less time a step without).
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        # An arena keeps the most that its engine ever took, and there are two engines a layer, of
        # which one runs at a time: freed instead, what one took serves the next.
        options.enable_cpu_mem_arena = False
        if precise_int8:
            options.add_session_config_entry("session.x64quantprecision", "1")
        if profile is not None:
            options.enable_profiling = True
            options.profile_file_prefix = str(profile)
        values = {name: _value(array) for name, array in (weights or {}).items()}
        if values:
            options.add_external_initializers(list(values), list(values.values()))
        try:
            self._session = ort.InferenceSession(
                graph if isinstance(graph, bytes) else str(graph),
                sess_options=options,
                providers=["CPUExecutionProvider"],
            )
        except Exception as error:  # ONNX Runtime's own exceptions share no base class
            if is_shortage(error):
                raise shortage(error, self.name, None, _SMALLER) from error
            raise BackendError(
                self.name,
                f"ONNX Runtime {ort.__version__} cannot load this graph",
                found=str(error).splitlines()[0],
                fix="Export the bundle again with this version installed.",
            ) from error
        self.inputs = tuple(item.name for item in self._session.get_inputs())
        self.outputs = tuple(item.name for item in self._session.get_outputs())

    def bind(self, inputs: Mapping[str, Array], outputs: Mapping[str, Array]) -> Run:
        """See `Engine.bind`; buffers are C-contiguous NumPy arrays."""
        session = self._session
        binding = session.io_binding()
        for name in self.inputs:
            binding.bind_ortvalue_input(name, _value(inputs[name]))
        for name, array in outputs.items():
            if name not in self.outputs:
                raise ValueError(f"the graph has no output {name}; it has {self.outputs}")
            binding.bind_ortvalue_output(name, _value(array))
        buffers = (*inputs.values(), *outputs.values())
        return _Bound(session, binding, buffers, self.name).run

    def end_profile(self) -> Path:
        """Write what was noted of the runs so far, and note no more: the file."""
        return Path(self._session.end_profiling())


class _Bound:
    """A binding together with the buffers it borrows."""

    __slots__ = ("_binding", "_buffers", "_name", "_session")

    def __init__(
        self,
        session: ort.InferenceSession,
        binding: ort.IOBinding,
        buffers: tuple[Array, ...],
        name: str,
    ) -> None:
        self._session = session
        self._binding = binding
        self._buffers = buffers
        self._name = name

    def run(self) -> None:
        try:
            self._session.run_with_iobinding(self._binding)
        except Exception as error:  # of no common base class
            if is_shortage(error):
                what = f"{self._name}: a step's intermediate results"
                raise shortage(error, what, None, _SMALLER) from error
            raise BackendError(
                self._name,
                "ONNX Runtime does not run this graph",
                found=str(error).splitlines()[0],
                fix="Check the bundle with `knnmoe-export --verify`, or export it again.",
            ) from error


def _value(array: Array) -> ort.OrtValue:
    if not array.flags.c_contiguous or not isinstance(array, np.ndarray):
        raise ValueError("a bound buffer must be a C-contiguous array")
    return ort.OrtValue.ortvalue_from_numpy(array)
