"""Whether the ONNX Runtime that is installed can run a bundle."""

from __future__ import annotations

import re

from ..bundle import Bundle
from ..errors import BackendError


def check_onnxruntime(bundle: Bundle, installed: str | None = None) -> None:
    """Raise `BackendError` if the bundle states a newer ONNX Runtime than is installed.

    An older one may load a graph that is quantised or has sliding windows, and compute something
    else.

    Args:
        bundle: Opened.
        installed: Version to check; None takes that of the module.
    """
    wanted = bundle.manifest.minimum_onnxruntime
    if wanted is None:
        return
    if installed is None:
        import onnxruntime

        installed = str(onnxruntime.__version__)
    if _numbers(installed) < _numbers(wanted):
        quantized = bundle.manifest.quantization is not None
        what = f"{bundle.manifest.precision} operators" if quantized else "sliding windows"
        otherwise = (
            ", or, if the model has no sliding windows, export with --precision fp16 or fp32, "
            "which run on every version that knnmoe supports"
        )
        raise BackendError(
            bundle.path,
            f"its {what} need a newer ONNX Runtime",
            expected=f"onnxruntime >= {wanted}",
            found=installed,
            fix=f"Run `pip install 'onnxruntime>={wanted}'` (Python 3.11 or newer)"
            f"{otherwise if quantized else ''}.",
        )


def _numbers(version: str) -> tuple[int, ...]:
    """Major and minor; a suffix does not count."""
    found = re.match(r"(\d+)\.(\d+)", version)
    return tuple(map(int, found.groups())) if found else (0, 0)
