"""Who holds how many bytes while a model runs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..bundle import Bundle, ModelShape
from ..gates.base import Gate
from ..layouts import FusedWiring, HostLayout, SplitWiring
from .plan import Shape
from .record import Resident

_STATUS = Path("proc/self/status")


def resident_bytes(root: Path = Path("/")) -> int | None:
    """Resident memory of this process now; None where the system does not tell."""
    return _status(root, "VmRSS:")


def peak_bytes(root: Path = Path("/")) -> int | None:
    """The most resident memory that this process ever had."""
    stated = _status(root, "VmHWM:")
    if stated is not None:
        return stated
    try:
        import resource
        import sys
    except ImportError:  # Windows
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def weight_bytes(bundle: Bundle, layouts: int = 1) -> int:
    """Of the segments' weights; every layout loads them for itself."""
    linked = bundle.manifest.linked or ()
    files = bundle.manifest.files.items()
    weights = [spec.size for name, spec in files if name.endswith(".safetensors")
               and name.startswith("segments/") and name not in linked]  # fmt: skip
    return layouts * sum(weights)


def cache_bytes(model: ModelShape, shape: Shape, item_bytes: int = 4) -> int:
    """Keys and values of all layers at the end of a step."""
    positions = shape.batch * (shape.past + shape.tokens)
    return positions * model.num_layers * model.cache_width * item_bytes


def memory_bytes(layout: Any) -> int | None:
    """What the gates of a layout on the host hold of a memory, each array once."""
    if not isinstance(layout, HostLayout):
        return None
    wiring = layout.wiring
    if isinstance(wiring, FusedWiring):
        return _distinct(wiring.memory_inputs.values())
    assert isinstance(wiring, SplitWiring)
    return sum(gate_bytes(gate) for gate in wiring.gates)


def account(
    *, weights: int, kv_cache: int, retrieval: int | None, before: int | None, device: int | None
) -> Resident:
    """The account of the process as it is now.

    Args:
        weights, kv_cache, retrieval: Bytes, as counted.
        before: Resident before the model was loaded.
        device: Bytes taken on the device.
    """
    peak = peak_bytes()
    workspace = None
    if peak is not None and before is not None and device is None:
        workspace = max(0, peak - before - weights - kv_cache - (retrieval or 0))
    return Resident(weights, kv_cache, retrieval, workspace, peak, device)


def gate_bytes(gate: Gate) -> int:
    """What a gate on the host holds of a memory, each array once."""
    inputs = getattr(gate, "inputs", None)
    if inputs is not None:
        return _distinct(inputs.values())
    memory, retrieval = getattr(gate, "memory", None), getattr(gate, "retrieval", None)
    if memory is None:
        return 0
    if retrieval is None:
        return _distinct([memory.keys, memory.key_scales, memory.values])
    scanned = int(retrieval.entries * retrieval.width * retrieval.bits) // 8
    # Its inputs are the keys and values as they are stored.
    return scanned + _distinct([memory.key_scales, *retrieval.inputs.values()])


def _distinct(arrays: Any) -> int:
    return sum({id(array): int(array.nbytes) for array in arrays}.values())


def _status(root: Path, name: str) -> int | None:
    try:
        lines = (root / _STATUS).read_text(encoding="ascii", errors="replace").splitlines()
    except OSError:
        return None
    for line in lines:
        if line.startswith(name):
            return int(line.split()[1]) * 1024
    return None
