"""The device, the driver, the versions and the commit a measurement was taken with."""

from __future__ import annotations

import platform
import shutil
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

from knnmoe import __version__
from knnmoe.runtime.probes import QUESTIONS, Module, ask_driver, ask_modules
from knnmoe.trt_plugins.library import source_hash

ROOT = Path(__file__).resolve().parent.parent
SMI = (
    "name,driver_version,clocks.sm,clocks.max.sm,clocks.mem,clocks.max.mem,power.limit,"
    "temperature.gpu,mig.mode.current,pcie.link.gen.current"
)  # fmt: skip
PACKAGES = {
    "cupy": "cupy",
    "torch": "torch",
    "triton": "triton",
    "tensorrt": "tensorrt",
    "tensorrt_rtx": "tensorrt-rtx",
    "faiss": "faiss-gpu",
    "cuvs": "cuvs",
    "onnxruntime": "onnxruntime-gpu",
}


def describe_device(cupy: Any) -> dict[str, Any]:
    """What CuPy says of the device."""
    device = cupy.cuda.Device()
    attributes = device.attributes
    free, total = device.mem_info
    name = cupy.cuda.runtime.getDeviceProperties(device.id)["name"]
    return {
        "name": name.decode() if isinstance(name, bytes) else str(name),
        "compute_capability": device.compute_capability,
        "multiprocessors": attributes["MultiProcessorCount"],
        "l2_bytes": attributes["L2CacheSize"],
        "shared_bytes": attributes["MaxSharedMemoryPerBlockOptin"],
        "memory_bytes": total,
        "free_bytes": free,
        "clock_khz": attributes.get("ClockRate"),
        "memory_clock_khz": attributes.get("MemoryClockRate"),
        "memory_bus_bits": attributes.get("GlobalMemoryBusWidth"),
    }


def describe_machine(cupy: Any, commit: str | None) -> dict[str, Any]:
    """Everything that a figure may depend on."""
    driver = ask_driver()
    return {
        "device": describe_device(cupy),
        "driver": driver.version,
        "driver_cuda": None if driver.cuda is None else ".".join(map(str, driver.cuda)),
        "cuda_runtime": cupy.cuda.runtime.runtimeGetVersion(),
        "nvidia_smi": ask_smi(),
        "nvcc": _first_line(["nvcc", "--version"], "release"),
        "sources": source_hash(),
        "commit": commit or current_commit(),
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "numpy": metadata.version("numpy"),
        "knnmoe": __version__,
        "packages": packages(ask_modules({name: QUESTIONS[name] for name in PACKAGES}, timeout=45)),
    }


def packages(modules: dict[str, Module]) -> dict[str, Any]:
    """By the name people know: the version with what it can do, or "absent" with the reason."""
    said: dict[str, Any] = {}
    for module, name in PACKAGES.items():
        answer = modules[module]
        why = absence(answer)
        if why:
            said[name] = {"status": "absent", "why": why}
        else:
            said[name] = {"status": "found", "version": answer.version, **answer.facts}
    return said


def absence(answer: Module) -> str:
    """Why a package does not count as found, nothing if it does."""
    if not answer.found:
        return "not installed"
    if answer.error:
        return f"{answer.version or 'installed'}: {answer.error}"
    facts = answer.facts
    if answer.name == "faiss" and not facts.get("gpu_support"):
        return f"faiss {answer.version} was built without GPU support"
    if answer.name == "onnxruntime" and not any(
        "CUDA" in p or "Tensorrt" in p or "NvTensorRtRtx" in p for p in facts.get("providers", ())
    ):
        return f"onnxruntime {answer.version} has no CUDA provider"
    if answer.name == "torch" and not facts.get("cuda_available"):
        return f"torch {answer.version} sees no CUDA device"
    return ""


def ask_smi() -> dict[str, str] | None:
    """Clocks, power and modes as nvidia-smi says them, where it is there."""
    if shutil.which("nvidia-smi") is None:
        return None
    line = _output(["nvidia-smi", f"--query-gpu={SMI}", "--format=csv,noheader"])
    if not line:
        return None
    values = [value.strip() for value in line.splitlines()[0].split(",")]
    return dict(zip(SMI.split(","), values, strict=False))


def current_commit() -> str:
    """The commit of this checkout, marked where files differ from it; "unknown" without git."""
    head = _output(["git", "-C", str(ROOT), "rev-parse", "HEAD"]).strip()
    if not head:
        return "unknown"
    changed = _output(["git", "-C", str(ROOT), "status", "--porcelain", "-uno"]).strip()
    return f"{head} with changes" if changed else head


def _first_line(command: list[str], word: str) -> str | None:
    lines = [line.strip() for line in _output(command).splitlines() if word in line]
    return lines[0] if lines else None


def _output(command: list[str]) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout if done.returncode == 0 else ""
