"""The TensorRT plugin library: find it, build it with nvcc, load it into a TensorRT registry."""

from __future__ import annotations

import hashlib
import os
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from knnmoe.runtime.errors import BackendError

from .compiler import ARCHITECTURES
from .plan import KERNELS
from .toolchain import find_nvcc

PLUGIN = Path(__file__).parent / "plugin"
SOURCE = PLUGIN / "knn_blend_plugin.cpp"
NAME, VERSION, NAMESPACE = "KnnBlend", "1", "knnmoe"
LIBRARY = "libknnmoe_plugin.so"


def default_folder() -> Path:
    """Where libraries are kept: a folder of the user's cache for each state of the sources."""
    root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return root / "knnmoe" / "plugin" / source_hash()


def source_hash() -> str:
    """Of everything the library is compiled from."""
    digest = hashlib.sha256()
    for file in sorted([*KERNELS.iterdir(), *PLUGIN.iterdir()]):
        digest.update(file.name.encode() + b"\0" + file.read_bytes())
    return digest.hexdigest()[:16]


def find_library() -> Path:
    """The library named by KNNMOE_PLUGIN, else the one built here.

    Raises:
        BackendError: If there is none.
    """
    named = os.environ.get("KNNMOE_PLUGIN")
    library = Path(named) if named else default_folder() / LIBRARY
    if not library.is_file():
        raise BackendError(
            library, "the TensorRT plugin is not built",
            fix="Build it with knnmoe.trt_plugins.library.build(), or set KNNMOE_PLUGIN.",
        )  # fmt: skip
    return library


def find_tensorrt_headers() -> Path:
    """The folder with NvInferRuntime.h: of TENSORRT_ROOT, else where packages put it.

    Raises:
        BackendError: If there is none.
    """
    root = os.environ.get("TENSORRT_ROOT")
    system = ("/usr/include/x86_64-linux-gnu", "/usr/include/aarch64-linux-gnu", "/usr/include")
    folders = [Path(root) / "include", Path(root)] if root else [Path(s) for s in system]
    for folder in folders:
        if (folder / "NvInferRuntime.h").is_file():
            return folder
    raise BackendError(
        "NvInferRuntime.h",
        "not found",
        expected=f"the headers of TensorRT in {' or '.join(map(str, folders))}",
        fix="Install the TensorRT SDK, or set TENSORRT_ROOT to where it is.",
    )


def build(
    output: Path | None = None,
    *,
    headers: Path | None = None,
    architectures: Sequence[str] = ARCHITECTURES,
    ptx: str | None = ARCHITECTURES[0],
) -> Path:
    """Build the library with nvcc; returns where it is.

    Args:
        output: The library to write; in `default_folder()` if not given.
        headers: Folder of TensorRT's headers, of the major version that will load the library.
        architectures: Devices to compile for.
        ptx: Architecture of the PTX that serves every newer device; none if None.

    Raises:
        BackendError: If nvcc or the headers are missing, or nvcc refuses.
    """
    headers = headers or find_tensorrt_headers()
    output = output or default_folder() / LIBRARY
    output.parent.mkdir(parents=True, exist_ok=True)
    partial = output.with_name(output.name + ".partial")
    targets = [f"-gencode=arch=compute_{a},code=sm_{a}" for a in architectures]
    if ptx is not None:
        targets.append(f"-gencode=arch=compute_{ptx},code=compute_{ptx}")
    command = [
        str(find_nvcc()), "-std=c++17", "-O3", "-shared", "-x", "cu", *targets, "--threads=0",
        "-Xcompiler=-fPIC,-fvisibility=hidden", "-cudart=static", "-Xlinker=-z,defs",
        f"-Xlinker=--version-script={PLUGIN / 'exports.map'}", f"-I{KERNELS}", "-isystem",
        str(headers), "-o", str(partial), str(SOURCE),
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise BackendError(
            SOURCE.name, "nvcc does not build the plugin", found=done.stderr.strip()[-2000:],
            fix="Build against the headers of the TensorRT you run, 10.x or newer.",
        )  # fmt: skip
    partial.replace(output)
    return output


def load(tensorrt: Any, library: Path | None = None) -> Any:
    """Load the library into the registry of a TensorRT module; returns the plugin's creator.

    Args:
        tensorrt: `tensorrt`, `tensorrt_rtx` or `tensorrt_lean`, imported.
        library: What to load; `find_library()` if not given.

    Raises:
        BackendError: If the registry refuses the library.
    """
    library = library or find_library()
    registry = tensorrt.get_plugin_registry()
    creator = registry.get_creator(NAME, VERSION, NAMESPACE)
    if creator is None:
        registry.load_library(str(library))
        creator = registry.get_creator(NAME, VERSION, NAMESPACE)
    if creator is None:
        raise BackendError(
            library,
            "TensorRT does not take the plugin",
            expected=f"a library for TensorRT {tensorrt.__version__}",
            fix="Build it against that version's headers.",
        )
    return creator
