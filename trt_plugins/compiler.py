"""Compiling the kernels: for every architecture with nvcc, and what they then need of a device."""

from __future__ import annotations

import re
import subprocess
from dataclasses import dataclass
from pathlib import Path

from knnmoe.runtime.errors import BackendError

from .plan import SOURCE
from .toolchain import find_nvcc

# Ampere, Jetson Orin, Ada, Hopper, Blackwell, Jetson Thor, Blackwell workstation.
ARCHITECTURES = ("80", "86", "87", "89", "90", "100", "110", "120")


@dataclass(frozen=True)
class KernelUsage:
    """What one kernel needs of a device, as ptxas reports it."""

    architecture: str
    kernel: str
    registers: int
    stack_bytes: int
    spilled_bytes: int
    static_shared_bytes: int


def compile_kernels(
    architecture: str, output: Path | None = None, source: Path = SOURCE
) -> list[KernelUsage]:
    """Compile the kernels for one architecture (a number, as "90"); returns what they need.

    Args:
        architecture: Compute capability without the point.
        output: Where the cubin goes; nowhere if not given.
        source: The file of kernels.

    Raises:
        BackendError: If nvcc is missing or refuses the source.
    """
    command = [
        str(find_nvcc()), "-std=c++17", "-cubin", f"-arch=sm_{architecture}", "-Xptxas=-v",
        "--Werror=all-warnings", "-o", str(output or "/dev/null"), str(source),
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise BackendError(
            source.name,
            f"nvcc does not compile it for sm_{architecture}",
            found=done.stderr.strip()[-2000:],
            fix="Use the CUDA toolkit 13.0, or name an architecture that your toolkit knows.",
        )
    return usages(architecture, done.stdout + done.stderr)


def compile_ptx(output: Path, architecture: str = "80") -> None:
    """Compile the kernels to PTX, which a driver compiles for whatever device it has.

    Raises:
        BackendError: If nvcc is missing or refuses the source.
    """
    command = [
        str(find_nvcc()), "-std=c++17", "-ptx", f"-arch=compute_{architecture}",
        "-o", str(output), str(SOURCE),
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise BackendError(
            SOURCE.name, "nvcc does not compile it to PTX", found=done.stderr.strip()[-2000:]
        )


_ENTRY = re.compile(r"Compiling entry function '(\w+)'")
_STACK = re.compile(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads")
_USED = re.compile(r"Used (\d+) registers(?:.*?(\d+) bytes smem)?")


def usages(architecture: str, report: str) -> list[KernelUsage]:
    """What kernels need of one architecture, of what nvcc says with `-Xptxas=-v`."""
    found, kernel, stack, spilled = [], "", 0, 0
    for line in report.splitlines():
        if entry := _ENTRY.search(line):
            kernel = entry[1]
        elif frame := _STACK.search(line):
            stack, spilled = int(frame[1]), int(frame[2]) + int(frame[3])
        elif used := _USED.search(line):
            shared = int(used[2] or 0)
            found.append(KernelUsage(architecture, kernel, int(used[1]), stack, spilled, shared))
    return sorted(found, key=lambda usage: usage.kernel)
