"""What a result was measured with."""

from __future__ import annotations

import platform
from datetime import date

import numpy as np
import onnxruntime

from knnmoe import __version__


def environment() -> dict[str, str]:
    """Versions, machine and day."""
    return {
        "knnmoe": __version__,
        "onnxruntime": onnxruntime.__version__,
        "numpy": np.__version__,
        "python": platform.python_version(),
        "machine": platform.machine(),
        "date": date.today().isoformat(),
    }
