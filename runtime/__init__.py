"""The part an embedded device installs: bundles, memories, gates, engines, generation.

What a program needs is here by name; each is imported when it is first used, so that the command
line answers `--help` without loading ONNX Runtime.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .bundle import Bundle as Bundle
    from .calibration import Calibration as Calibration
    from .entries import NewEntries as NewEntries
    from .errors import KnnMoeError as KnnMoeError
    from .generation import Completion as Completion
    from .generation import Event as Event
    from .memory import MemoryPack as MemoryPack
    from .metrics import Metrics as Metrics
    from .model import Model as Model
    from .model import RoutingTrace as RoutingTrace
    from .sampling import GenerationConfig as GenerationConfig
    from .session import Hooks as Hooks
    from .session import Session as Session
    from .session import StepRecord as StepRecord

_HOMES = {
    "Bundle": "bundle",
    "Calibration": "calibration",
    "Completion": "generation",
    "Event": "generation",
    "GenerationConfig": "sampling",
    "Hooks": "session",
    "KnnMoeError": "errors",
    "MemoryPack": "memory",
    "Metrics": "metrics",
    "Model": "model",
    "NewEntries": "entries",
    "RoutingTrace": "model",
    "Session": "session",
    "StepRecord": "session",
}
__all__ = tuple(sorted(_HOMES))


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_HOMES[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted(__all__)
