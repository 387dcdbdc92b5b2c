"""Questions to the machine that need no package: cores, memory, driver, devices, modules.

Foreign modules are imported in processes of their own, all at once: one that crashes, hangs or
prints is a row in a report and not the end of it.
"""

from __future__ import annotations

import ctypes
import json
import os
import re
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

TIMEOUT = 20.0  # seconds for an import; most take a tenth of one
_ANSWER = "knnmoe-probe:"

# What to ask of a module once it is imported: statements that fill `facts`.
QUESTIONS: Mapping[str, str] = {
    "cupy": (
        "import importlib.metadata as d\n"
        "facts['package'] = next((p for p in d.packages_distributions().get('cupy', [])), None)\n"
        "facts['nvrtc'] = list(m.cuda.nvrtc.getVersion())\n"
        "facts['devices'] = m.cuda.runtime.getDeviceCount()\n"
        "facts['usable'] = bool(m.cuda.alloc(16).ptr)\n"
    ),
    "faiss": (
        "facts['gpu_support'] = hasattr(m, 'StandardGpuResources')\n"
        "facts['gpus'] = m.get_num_gpus() if facts['gpu_support'] else 0\n"
    ),
    "onnxruntime": "facts['providers'] = m.get_available_providers()\n",
    "torch": ("facts['cuda'] = m.version.cuda\nfacts['cuda_available'] = m.cuda.is_available()\n"),
    "triton": "",
    "cuvs": "",
    "tensorrt": "",
    "tensorrt_rtx": "",
    "tensorrt_lean": "",
}
# Wheels of TensorRT whose module has another name, and what has to be imported before it.
ALIASES: Mapping[str, tuple[str, str]] = {
    "tensorrt_rtx": ("tensorrt_rtx_libs", "tensorrt_rtx_bindings"),
    "tensorrt_lean": ("tensorrt_lean_libs", "tensorrt_lean_bindings"),
    "tensorrt": ("tensorrt_libs", "tensorrt_bindings"),
}

_PROGRAM = """
import importlib, json, sys
name, before, alias, question, argument = sys.argv[1:6]
answer, facts = {"found": True, "facts": {}}, {}
answer["facts"] = facts
try:
    try:
        m = importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name != name or not alias:
            raise
        try:
            importlib.import_module(before)
        except ModuleNotFoundError:
            raise error from None
        m = importlib.import_module(alias)
    answer["version"] = str(getattr(m, "__version__", "")) or None
    exec(question)
except ModuleNotFoundError as error:
    answer["found"] = (error.name or "").partition(".")[0] != name
    answer["error"] = str(error) if answer["found"] else None
except BaseException as error:
    answer["error"] = type(error).__name__ + ": " + (str(error).strip() or "no message")
print("\\nMARK" + json.dumps(answer), flush=True)
""".replace("MARK", _ANSWER)


@dataclass(frozen=True)
class Module:
    """What a foreign module said of itself; `error` where it is there and cannot be used."""

    name: str
    found: bool
    version: str | None = None
    facts: Mapping[str, Any] = field(default_factory=dict)
    error: str | None = None

    @property
    def works(self) -> bool:
        """Whether it was imported and answered."""
        return self.found and self.error is None


def ask_modules(
    questions: Mapping[str, str], *, argument: str = "", timeout: float = TIMEOUT
) -> dict[str, Module]:
    """Import each module in a process of its own, all at once, and ask it.

    Args:
        questions: By module name, statements over the module `m`, `argument` and the dictionary
            `facts`; what they raise is the module's error.
        argument: A text that the statements may use.
        timeout: Seconds after which a process is ended.
    """
    running = {
        name: subprocess.Popen(
            [sys.executable, "-c", _PROGRAM, name, *ALIASES.get(name, ("", "")), text, argument],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            errors="replace",
        )
        for name, text in questions.items()
    }
    return {name: _read_answer(name, process, timeout) for name, process in running.items()}


def _read_answer(name: str, process: subprocess.Popen[str], timeout: float) -> Module:
    try:
        output, _ = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        process.kill()
        process.communicate()
        return Module(name, True, error=f"did not answer within {timeout:g} seconds")
    lines = [line for line in output.splitlines() if line.startswith(_ANSWER)]
    if not lines:
        code = process.returncode
        how = f"with signal {-code}" if code < 0 else f"with exit code {code}"
        return Module(name, True, error=f"ended its process {how} when imported")
    said = json.loads(lines[-1].removeprefix(_ANSWER))
    return Module(name, said["found"], said.get("version"), said["facts"], said.get("error"))


def cgroup_cores(root: Path = Path("/sys/fs/cgroup")) -> float | None:
    """Cores that a control group allows; None without a limit."""
    try:
        quota, period = (root / "cpu.max").read_text().split()[:2]
    except (OSError, ValueError):
        try:
            quota = (root / "cpu" / "cpu.cfs_quota_us").read_text().strip()
            period = (root / "cpu" / "cpu.cfs_period_us").read_text().strip()
        except OSError:
            return None
    try:
        cores = float(quota) / float(period)
    except (ValueError, ZeroDivisionError):  # "max"
        return None
    return cores if cores > 0 else None


def usable_cores(root: Path = Path("/sys/fs/cgroup")) -> float:
    """Cores that this process may use: its affinity, and what its control group allows."""
    affinity = getattr(os, "sched_getaffinity", None)
    cores = len(affinity(0)) if affinity is not None else os.cpu_count() or 1
    limit = cgroup_cores(root)
    return float(cores) if limit is None else min(float(cores), limit)


def memory_bytes(
    meminfo: Path = Path("/proc/meminfo"), root: Path = Path("/sys/fs/cgroup")
) -> int | None:
    """Memory that this process may use: the machine's, or what its control group allows."""
    try:
        total = re.search(r"^MemTotal:\s+(\d+) kB", meminfo.read_text(), re.MULTILINE)
    except OSError:
        return None
    sizes = [int(total[1]) * 1024] if total else []
    limits = (_number(root / n) for n in ("memory.max", "memory/memory.limit_in_bytes"))
    return min([*sizes, *(limit for limit in limits if limit is not None)], default=None)


def _number(file: Path) -> int | None:
    try:
        return int(file.read_text())
    except (OSError, ValueError):  # "max"
        return None


def jetson_release(file: Path = Path("/etc/nv_tegra_release")) -> str | None:
    """Release of Jetson Linux, as `36.4.3`; None elsewhere."""
    try:
        text = file.read_text(errors="replace")
    except OSError:
        return None
    found = re.search(r"R(\d+)\b.*?REVISION:\s*([\d.]+)", text)
    return f"{found[1]}.{found[2]}" if found else text.strip().splitlines()[0][:80]


@dataclass(frozen=True)
class Device:
    """One NVIDIA device."""

    name: str
    compute_capability: str
    memory_bytes: int


@dataclass(frozen=True)
class Driver:
    """The NVIDIA driver: what it supports and what it drives; `error` where it does not answer."""

    found: bool
    version: str | None = None  # as 580.95.05, where NVML tells
    cuda: tuple[int, int] | None = None  # the newest CUDA it supports
    devices: tuple[Device, ...] = ()
    error: str | None = None


DRIVER_LIBRARIES = ("libcuda.so.1", "libcuda.so")
NVML_LIBRARIES = ("libnvidia-ml.so.1", "libnvidia-ml.so")


def ask_driver(
    libraries: Sequence[str] = DRIVER_LIBRARIES, nvml: Sequence[str] = NVML_LIBRARIES
) -> Driver:
    """Ask libcuda and NVML, in this process and without making a context."""
    cuda = _library(libraries)
    if cuda is None:
        return Driver(found=False)
    number = ctypes.c_int()
    if status := cuda.cuDriverGetVersion(ctypes.byref(number)):
        return Driver(found=True, error=f"cuDriverGetVersion failed with {status}")
    supported = (number.value // 1000, number.value % 1000 // 10)
    version = _nvml_version(nvml)
    status = cuda.cuInit(0)
    if status:
        return Driver(True, version, supported, error=_cuda_error(cuda, status))
    count = ctypes.c_int()
    if status := cuda.cuDeviceGetCount(ctypes.byref(count)):
        return Driver(True, version, supported, error=_cuda_error(cuda, status))
    devices = tuple(_device(cuda, index) for index in range(count.value))
    return Driver(True, version, supported, devices)


def _library(names: Sequence[str]) -> Any:
    return next((library for name in names if (library := _opened(name)) is not None), None)


def _opened(name: str) -> Any:
    try:
        return ctypes.CDLL(name)
    except OSError:
        return None


def _cuda_error(cuda: Any, status: int) -> str:
    text = ctypes.c_char_p()
    cuda.cuGetErrorString(status, ctypes.byref(text))
    said = (text.value or b"").decode(errors="replace")
    return f"{said or 'unknown error'} (CUDA error {status})"


def _device(cuda: Any, index: int) -> Device:
    handle, name = ctypes.c_int(), ctypes.create_string_buffer(256)
    major, minor, size = ctypes.c_int(), ctypes.c_int(), ctypes.c_size_t()
    cuda.cuDeviceGet(ctypes.byref(handle), index)
    cuda.cuDeviceGetName(name, len(name), handle)
    cuda.cuDeviceGetAttribute(ctypes.byref(major), 75, handle)  # compute capability
    cuda.cuDeviceGetAttribute(ctypes.byref(minor), 76, handle)
    cuda.cuDeviceTotalMem_v2(ctypes.byref(size), handle)
    capability = f"{major.value}.{minor.value}"
    return Device(name.value.decode(errors="replace"), capability, size.value)


def _nvml_version(names: Sequence[str]) -> str | None:
    nvml = _library(names)
    if nvml is None or nvml.nvmlInit_v2():
        return _kernel_module_version()
    text = ctypes.create_string_buffer(96)
    status = nvml.nvmlSystemGetDriverVersion(text, len(text))
    nvml.nvmlShutdown()
    return None if status else text.value.decode(errors="replace")


def _kernel_module_version(file: Path = Path("/proc/driver/nvidia/version")) -> str | None:
    try:
        found = re.search(r"\b(\d{3}\.\d+(?:\.\d+)?)\b", file.read_text(errors="replace"))
    except OSError:
        return None
    return found[1] if found else None
