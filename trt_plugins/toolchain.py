"""Where the CUDA compiler and its headers are."""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
from collections.abc import Sequence
from functools import cache
from importlib.util import find_spec
from pathlib import Path

from knnmoe.runtime.errors import BackendError, OutputError


def find_nvcc() -> Path:
    """nvcc from CUDA_HOME, else from PATH.

    Raises:
        BackendError: If there is none.
    """
    home = os.environ.get("CUDA_HOME")
    found = shutil.which("nvcc", path=f"{home}/bin") if home else shutil.which("nvcc")
    if found is None:
        raise BackendError(
            "nvcc",
            "not found",
            expected=f"{home}/bin/nvcc" if home else "nvcc on PATH, or CUDA_HOME set",
            fix="Install the CUDA toolkit 12.8 or newer, or set CUDA_HOME.",
        )
    return Path(found)


def link_library(
    source: Path, output: Path, arguments: Sequence[str], *, fix: str | None = None
) -> str:
    """Compile a source to a shared library with nvcc, whole or not at all; returns what nvcc said.

    Args:
        source: What is compiled; `arguments` name it.
        output: The library to write, atomically; its folder is made.
        arguments: What nvcc is told beside where to write.
        fix: What to do where nvcc refuses.

    Raises:
        BackendError: If nvcc is missing or refuses; with the first it said.
        OutputError: If the library cannot be written there.
    """
    nvcc = find_nvcc()
    partial = output.with_name(f".{output.name}.{os.getpid()}")
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        try:
            done = subprocess.run(
                [nvcc, *arguments, "-o", partial], capture_output=True, text=True, check=False
            )
            if done.returncode != 0:
                raise BackendError(
                    source.name, "nvcc does not compile it",
                    found=(done.stderr + done.stdout).strip()[:2000], fix=fix,
                )  # fmt: skip
            partial.replace(output)
            return done.stdout + done.stderr
        finally:
            partial.unlink(missing_ok=True)
    except OSError as error:
        raise OutputError(output, "cannot be written", found=error.strerror) from error


@cache
def find_cuda_headers() -> Path:
    """The folder with cuda_fp16.h: of the toolkit, else of the PyPI package.

    Raises:
        BackendError: If neither is there.
    """
    for folder in (*_toolkit_headers(), *_package_headers()):
        if (folder / "cuda_fp16.h").is_file():
            return folder
    raise BackendError(
        "cuda_fp16.h",
        "not found",
        expected="the headers of a CUDA toolkit",
        fix="Install the CUDA toolkit, or run `pip install nvidia-cuda-runtime nvidia-cuda-crt`.",
    )


def _toolkit_headers() -> list[Path]:
    try:
        nvcc = find_nvcc()
    except BackendError:
        return []
    # nvcc itself knows best where it is installed: it may have been reached by a wrapper.
    listing = subprocess.run(
        [nvcc, "--dryrun", "-x", "cu", os.devnull], capture_output=True, text=True, check=False
    ).stderr
    tops = [Path(line.partition("TOP=")[2]) for line in listing.splitlines() if " TOP=" in line]
    return [top.resolve() / "include" for top in (*tops, nvcc.parent.parent)]


def _package_headers() -> list[Path]:
    spec = find_spec("nvidia")
    roots = [Path(root) for root in (spec.submodule_search_locations or [] if spec else [])]
    return [header.parent for root in roots for header in root.glob("*/include/cuda_fp16.h")]


def native_architectures() -> list[str]:
    """Compute capabilities of this machine's devices, as "87", asked of the driver.

    Raises:
        BackendError: If there is no driver or no device.
    """
    fix = "Name the architecture, as in `--arch 87`."
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError as error:
        raise BackendError("CUDA driver", "not found", found=error, fix=fix) from error

    def asked(function: str, *arguments: int) -> int:
        value = ctypes.c_int()
        status = getattr(driver, function)(ctypes.byref(value), *arguments)
        if status != 0:
            raise BackendError("CUDA driver", f"{function} fails", found=status, fix=fix)
        return value.value

    if driver.cuInit(0) != 0:
        raise BackendError("CUDA driver", "finds no device", fix=fix)
    major, minor = 75, 76  # CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_…
    found = []
    for number in range(asked("cuDeviceGetCount")):
        device = asked("cuDeviceGet", number)
        parts = [asked("cuDeviceGetAttribute", part, device) for part in (major, minor)]
        found.append("".join(map(str, parts)))
    if not found:
        raise BackendError("CUDA driver", "finds no device", fix=fix)
    return sorted(set(found), key=int)
