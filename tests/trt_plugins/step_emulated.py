"""The kernels of step.cu on a CPU."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from functools import cache

from emulated import compile_emulation


def build(flags: Sequence[str] = ()) -> ctypes.CDLL:
    """The emulation of the kernels."""
    loaded = ctypes.CDLL(str(compile_emulation(flags=flags, source="step.cpp")))
    loaded.knnmoe_launch.restype = ctypes.c_char_p
    loaded.knnmoe_step_run.restype = ctypes.c_char_p
    return loaded


@cache
def library() -> ctypes.CDLL:
    return build()
