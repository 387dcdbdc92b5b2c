"""Where the CUDA compiler and its headers are."""

from __future__ import annotations

import os
import shutil
import subprocess
from functools import cache
from importlib.util import find_spec
from pathlib import Path

from knnmoe.runtime.errors import BackendError


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
