"""The plugin library for tests: built once for each state of its sources, for one architecture."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import pytest
from emulated import BUILD, alone

from knnmoe.runtime.errors import BackendError
from knnmoe.trt_plugins import library
from knnmoe.trt_plugins.harness import SOURCE, build_harness
from knnmoe.trt_plugins.toolchain import find_nvcc

ARCHITECTURE, USAGE = "90", "usage.txt"


def find_headers() -> Path:
    """TensorRT's headers, of an SDK or of a package that carries them."""
    try:
        return library.find_tensorrt_headers()
    except BackendError as error:
        carrier = find_spec("kernel_lens")
        if carrier is None or carrier.origin is None:
            pytest.skip(str(error))
        return Path(carrier.origin).parent / "include" / "tensorrt"


def need_nvcc() -> None:
    try:
        find_nvcc()
    except BackendError as error:
        pytest.skip(str(error))


def built_plugin() -> Path:
    """What TensorRT sees of it on the host is the same for every architecture."""
    headers = find_headers()
    need_nvcc()
    name = f"{library.source_hash()}-{library.header_version(headers)}-{ARCHITECTURE}"
    folder = BUILD.parent / "plugin" / name
    path = folder / library.LIBRARY
    with alone(folder):
        if not path.is_file():
            library.build(
                path, headers=headers, architectures=(ARCHITECTURE,), ptx=None,
                usage=folder / USAGE,
            )  # fmt: skip
    return path


def usage_of_the_plugin() -> str:
    """What its compiler said of the kernels."""
    return (built_plugin().parent / USAGE).read_text()


def built_harness(headers: Path | None = None) -> Path:
    """The harness for the same headers."""
    headers = headers or find_headers()
    need_nvcc()
    stamp = f"{SOURCE.stat().st_mtime_ns:x}-{library.header_version(headers)}"
    path = BUILD.parent / "plugin" / f"harness-{stamp}.so"
    with alone(path):
        return path if path.is_file() else build_harness(path, headers=headers)
