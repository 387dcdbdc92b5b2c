"""The machine and versions that a measurement was taken with."""

from __future__ import annotations

import os
import platform
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import Any

from ... import __version__
from .sensors import limits

PACKAGES = ("numpy", "onnxruntime", "onnxruntime-gpu", "tokenizers", "faiss-cpu", "cupy-cuda13x")


def environment() -> dict[str, Any]:
    """CPU model, cores, limits, operating system, versions and the date (UTC), ready for JSON."""
    return {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "cpu": cpu_model(),
        "architecture": platform.machine(),
        "cores": os.cpu_count(),
        "cores_usable": usable_cores(),
        **limits(),
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "knnmoe": __version__,
        **{name: version for name in PACKAGES if (version := _version(name)) is not None},
        "onnxruntime_providers": _providers(),
    }


def cpu_model() -> str:
    """Name of the processor, or of the board where the kernel names no processor."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
        board = Path("/proc/device-tree/model")
        names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
        if not names and board.is_file():
            names = [board.read_text(encoding="utf-8", errors="replace").strip("\0\n ")]
    except OSError:  # not Linux
        names = []
    return names[0] if names else platform.processor() or "unknown"


def usable_cores() -> int | None:
    """Cores that this process may run on, where the system tells."""
    affinity = getattr(os, "sched_getaffinity", None)
    return len(affinity(0)) if affinity is not None else os.cpu_count()


def _providers() -> list[str]:
    """What the installed ONNX Runtime could run graphs on."""
    import onnxruntime

    providers: list[str] = onnxruntime.get_available_providers()
    return providers


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
