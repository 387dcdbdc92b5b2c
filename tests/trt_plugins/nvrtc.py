"""Compiling a source with NVRTC as CuPy does, where CuPy itself would need a driver."""

from __future__ import annotations

from pathlib import Path

import pytest

from knnmoe.trt_plugins.cupy_prototype import NVRTC_OPTIONS
from knnmoe.trt_plugins.toolchain import find_cuda_headers


def compiled(source: Path, architecture: str) -> bytes:
    """The cubin of a source for one architecture; what NVRTC says of it fails the test."""
    nvrtc = pytest.importorskip("cuda.bindings.nvrtc")
    status, program = nvrtc.nvrtcCreateProgram(source.read_bytes(), source.name.encode(), 0, [], [])
    assert status == nvrtc.nvrtcResult.NVRTC_SUCCESS
    options = [
        *NVRTC_OPTIONS, f"-I{find_cuda_headers()}", f"-arch=sm_{architecture}",
        "--device-as-default-execution-space",
    ]  # fmt: skip
    encoded = [option.encode() for option in options]
    (result,) = nvrtc.nvrtcCompileProgram(program, len(encoded), encoded)
    # Not bytes: NVRTC writes into them, and of length one they are the interpreter's only b" ".
    log = bytearray(nvrtc.nvrtcGetProgramLogSize(program)[1])
    nvrtc.nvrtcGetProgramLog(program, log)
    assert result == nvrtc.nvrtcResult.NVRTC_SUCCESS, log.decode()
    cubin = bytearray(nvrtc.nvrtcGetCUBINSize(program)[1])
    nvrtc.nvrtcGetCUBIN(program, cubin)
    assert cubin.startswith(b"\x7fELF")
    return bytes(cubin)
