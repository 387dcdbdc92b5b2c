"""Engines on ONNX Runtime's CUDA provider: the `std` graphs, on the stream of the model."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import onnxruntime as ort

from ..errors import BackendError, EngineError
from .base import Array, Run

if TYPE_CHECKING:
    from ..device.cuda import Cuda

PROVIDER = "CUDAExecutionProvider"


def check_provider() -> None:
    """Raise `BackendError` unless ONNX Runtime can use CUDA."""
    available = ort.get_available_providers()
    if PROVIDER not in available:
        raise BackendError(
            "onnxruntime", f"{PROVIDER} is missing", expected="a build for CUDA",
            found=", ".join(available),
            fix="Run `pip uninstall onnxruntime` and `pip install onnxruntime-gpu`.",
        )  # fmt: skip


class OrtCudaEngine:
    """One graph on the device.

    It is not captured in CUDA graphs: ONNX Runtime allocates while it runs.

    Args:
        path: The graph.
        weights: The directory that its external weights lie in.
        cuda: The device.

    Raises:
        BackendError: If this ONNX Runtime has no CUDA.
        EngineError: If it refuses the graph.
    """

    def __init__(self, path: Path, weights: Path, cuda: Cuda) -> None:
        check_provider()
        self._path = path
        options = ort.SessionOptions()
        options.log_severity_level = 3
        options.add_session_config_entry(
            "session.model_external_initializers_file_folder_path", str(weights)
        )
        device = int(cuda.device.id)
        provider = (PROVIDER, {"device_id": device, "user_compute_stream": str(cuda.stream.ptr)})
        try:
            # From bytes, so that the folder of the weights is the one that counts.
            self._session = ort.InferenceSession(
                path.read_bytes(), sess_options=options, providers=[provider]
            )
        except Exception as error:  # ONNX Runtime's own exceptions share no base class
            raise EngineError(
                path, f"ONNX Runtime {ort.__version__} cannot load this graph",
                found=str(error).splitlines()[0], fix="Build the engines again.",
            ) from error  # fmt: skip
        if PROVIDER not in self._session.get_providers():
            raise BackendError(
                "onnxruntime", f"{PROVIDER} could not be started",
                fix="Install the CUDA and cuDNN libraries of this ONNX Runtime; "
                "`knnmoe doctor` says which are missing.",
            )  # fmt: skip
        self.inputs = tuple(item.name for item in self._session.get_inputs())
        self.outputs = tuple(item.name for item in self._session.get_outputs())
        self._device = device
        self._options = ort.RunOptions()
        # The stream orders everything; a step waits for it once, at its end.
        self._options.add_run_config_entry("disable_synchronize_execution_providers", "1")

    def bind(self, inputs: Mapping[str, Array], outputs: Mapping[str, Array]) -> Run:
        """See `Engine.bind`; buffers are arrays on the device."""
        binding = self._session.io_binding()
        kept = []
        for name in self.inputs:
            array = inputs[name]
            binding.bind_input(name, *self._place(array))
            kept.append(array)
        for name, array in outputs.items():
            if name not in self.outputs:
                raise ValueError(f"the graph has no output {name}; it has {self.outputs}")
            binding.bind_output(name, *self._place(array))
            kept.append(array)

        def run(_kept: tuple[Array, ...] = tuple(kept)) -> None:
            self._session.run_with_iobinding(binding, self._options)

        return run

    def _place(self, array: Array) -> tuple[str, int, object, tuple[int, ...], int]:
        return "cuda", self._device, array.dtype.type, tuple(array.shape), int(array.data.ptr)
