"""The TensorRT plugin library: find it, build it with nvcc, load it into a TensorRT registry."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from knnmoe.runtime.errors import BackendError

from .compiler import ARCHITECTURES
from .plan import KERNELS
from .toolchain import link_library

PLUGIN = Path(__file__).parent / "plugin"
SOURCE = PLUGIN / "knn_blend_plugin.cpp"
NAME, VERSION, NAMESPACE = "KnnBlend", "1", "knnmoe"
LIBRARY = "libknnmoe_plugin.so"
# In the folders of sources, but no part of the library.
ELSEWHERE = {"step.cu", "step.cuh", "harness.cpp"}
_MARK = b"knnmoe-plugin-build:"
_ARCHITECTURE = re.compile(r"\d{2,3}[af]?")


@dataclass(frozen=True)
class BuildInfo:
    """What a library was built from, as it says itself.

    Attributes:
        source: `source_hash()` of the sources.
        tensorrt: Version of the headers.
        cuda: Version of the CUDA toolkit, as "13.0".
        architectures: Devices it has code for; one of them as PTX, perhaps.
    """

    source: str
    tensorrt: str
    cuda: str
    architectures: tuple[str, ...]

    @property
    def tensorrt_major(self) -> int:
        """The major version of TensorRT."""
        return int(self.tensorrt.partition(".")[0])


def default_folder() -> Path:
    """Where libraries are kept: a folder of the user's cache for each state of the sources."""
    root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return root / "knnmoe" / "plugin" / source_hash()


def source_hash() -> str:
    """Of everything the library is compiled from."""
    digest = hashlib.sha256()
    for file in sorted([*KERNELS.iterdir(), *PLUGIN.iterdir()]):
        if file.name not in ELSEWHERE:
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
            fix="Run `knnmoe plugin build`, or set KNNMOE_PLUGIN to a library.",
        )  # fmt: skip
    return library


def build_info(library: Path) -> BuildInfo | None:
    """What the library was built from; None if it does not say.

    Raises:
        BackendError: If the file cannot be read.
    """
    try:
        content = library.read_bytes()
    except OSError as error:
        raise BackendError(library, "cannot be read", found=error.strerror) from error
    start = content.find(_MARK)
    if start < 0:
        return None
    start += len(_MARK)
    try:
        said = json.loads(content[start : content.index(b"\0", start)])
        return BuildInfo(
            str(said["source"]),
            str(said["tensorrt"]),
            f"{said['cuda'] // 1000}.{said['cuda'] % 1000 // 10}",
            tuple(str(number // 10) for number in said["architectures"]),
        )
    except (ValueError, KeyError, TypeError) as error:
        raise BackendError(
            library, "says what it was built from in an unknown way", found=error
        ) from error


def header_version(headers: Path) -> str:
    """The version of TensorRT's headers in a folder, as "11.1.0".

    Raises:
        BackendError: If NvInferVersion.h is missing or says nothing.
    """
    file = headers / "NvInferVersion.h"
    try:
        text = file.read_text(errors="replace")
    except OSError as error:
        raise BackendError(file, "cannot be read", found=error.strerror) from error
    # NV_TENSORRT_MAJOR is a number, or the name of another macro that is one.
    macros = dict(re.findall(r"^#define\s+(\w+)\s+(\w+)", text, re.MULTILINE))
    parts = []
    for part in ("MAJOR", "MINOR", "PATCH"):
        value = str(macros.get(f"NV_TENSORRT_{part}", ""))
        parts.append(str(macros.get(value, value)))
    if not all(part.isdecimal() for part in parts):
        raise BackendError(file, "does not say which version it is")
    return ".".join(parts)


def find_tensorrt_headers(root: str | Path | None = None) -> Path:
    """The folder with NvInferRuntime.h: of `root` or TENSORRT_ROOT, else where packages put it.

    Raises:
        BackendError: If there is none.
    """
    root = root or os.environ.get("TENSORRT_ROOT")
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
    jobs: int = 0,
    usage: Path | None = None,
) -> Path:
    """Build the library with nvcc; returns where it is.

    Args:
        output: The library to write; in `default_folder()` if not given.
        headers: Folder of TensorRT's headers, of the major version that will load the library.
        architectures: Devices to compile for, as "87".
        ptx: Architecture of the PTX that serves every newer device; none if None.
        jobs: How many architectures are compiled at a time; 0: as many as there are cores.
        usage: A file for what the kernels need of a device, as `compiler.usages` reads it.

    Raises:
        BackendError: If nvcc or the headers are missing, or nvcc refuses.
        OutputError: If the library cannot be written there.
    """
    for architecture in (*architectures, *([ptx] if ptx else [])):
        if not _ARCHITECTURE.fullmatch(architecture):
            raise BackendError(
                "architecture", "not a compute capability without its point",
                expected="as 87 or 120", found=architecture,
            )  # fmt: skip
    headers = headers or find_tensorrt_headers()
    output = output or default_folder() / LIBRARY
    targets = [f"-gencode=arch=compute_{a},code=sm_{a}" for a in dict.fromkeys(architectures)]
    if ptx is not None:
        targets.append(f"-gencode=arch=compute_{ptx},code=compute_{ptx}")
    arguments = [
        "-std=c++17", "-O3", "-shared", "-x", "cu", *targets, f"--threads={jobs}",
        "-Xcompiler=-fPIC,-fvisibility=hidden", "-cudart=static", "-Xlinker=-z,defs",
        f"-Xlinker=--version-script={PLUGIN / 'exports.map'}", f"-I{KERNELS}", "-isystem",
        str(headers), f"-DKNNMOE_SOURCE={source_hash()}", str(SOURCE),
        str(PLUGIN / "build_info.cpp"),
    ]  # fmt: skip
    fix = "Build against the headers of the TensorRT you run, 10.x or newer."
    if usage is None:
        link_library(SOURCE, output, arguments, fix=fix)
    else:
        usage.write_text(link_library(SOURCE, output, ["-Xptxas=-v", *arguments], fix=fix))
    return output


def load(tensorrt: Any, library: Path | None = None, *, other_major: bool = False) -> Any:
    """Load the library into the registry of a TensorRT module; returns the plugin's creator.

    Args:
        tensorrt: `tensorrt`, `tensorrt_rtx` or `tensorrt_lean`, imported.
        library: What to load; `find_library()` if not given.
        other_major: Also load a library that was built for another major version of TensorRT. It
            computes the same, but ILogger and ILoggerFinder have another layout from 11 on: a
            library built for 11 crashes in 10.16 as soon as it has something to report.

    Raises:
        BackendError: If the library is of another major version, or the registry refuses it.
    """
    library = library or find_library()
    registry = tensorrt.get_plugin_registry()
    creator = registry.get_creator(NAME, VERSION, NAMESPACE)
    if creator is None:
        info = build_info(library)
        built = f"built for TensorRT {info.tensorrt}" if info else "built for an unknown TensorRT"
        if info is not None and not other_major and _other_major(tensorrt, info):
            raise BackendError(
                library,
                "built for another major version of TensorRT",
                expected=f"a library for TensorRT {tensorrt.__version__}",
                found=built,
                fix="Run `knnmoe plugin build --tensorrt-root` with the root of that version.",
            )
        registry.load_library(str(library))
        creator = registry.get_creator(NAME, VERSION, NAMESPACE)
        if creator is None:
            raise BackendError(
                library,
                "TensorRT does not take the plugin",
                expected=f"a library for TensorRT {tensorrt.__version__}",
                found=built,
                fix="Run `knnmoe plugin build` against that version's headers.",
            )
    return creator


def _other_major(tensorrt: Any, info: BuildInfo) -> bool:
    # TensorRT-RTX counts its versions alone. It has the logger of 11; what a library built for 10
    # reports goes to standard error there (seen in 1.7).
    if "rtx" in tensorrt.__name__:
        return False
    return int(tensorrt.__version__.partition(".")[0]) != info.tensorrt_major
