"""What a process holds, for soak.py: bytes, objects, files; and whether that grows."""

from __future__ import annotations

import ctypes
import os
import sys
import tempfile
import threading
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from xml.etree import ElementTree

import numpy as np

from knnmoe.runtime.profiling.account import resident_bytes

SETTLED = 0.25  # of the samples, after which growth is looked for


@dataclass(frozen=True)
class Sample:
    """What the process held at rest.

    Attributes:
        used: Bytes that the C library's allocator has given out; what is resident where it does
            not say so.
        blocks: That Python's own allocator has given out, about one an object.
        resident: Bytes.
    """

    seconds: float
    used: int
    blocks: int
    resident: int
    files: int
    threads: int
    memories: int

    @staticmethod
    def now(seconds: float, memories: int) -> Sample:
        """What the process holds now, of which memories are counted by whoever knows them."""
        pages, used = resident(), used_bytes()
        return Sample(
            seconds, pages if used is None else used, sys.getallocatedblocks(), pages,
            open_files(), threading.active_count(), memories,
        )  # fmt: skip


def growth(samples: Sequence[Sample], name: str) -> int:
    """What one of the counts grows by over the run: the median slope of pairs (Theil, Sen)."""
    settled = samples[int(SETTLED * len(samples)) :]
    pairs = min(len(settled) * (len(settled) - 1) // 2, 20_000)
    if pairs < 10:
        return 0
    draw = np.random.default_rng(0)
    seconds = np.array([sample.seconds for sample in settled])
    counts = np.array([getattr(sample, name) for sample in settled], float)
    one, other = draw.integers(len(settled), size=(2, pairs))
    apart = seconds[one] != seconds[other]
    slopes = (counts[one] - counts[other])[apart] / (seconds[one] - seconds[other])[apart]
    return int(np.median(slopes) * (samples[-1].seconds - samples[0].seconds))


def used_bytes() -> int | None:
    """Bytes that the C library has given out, in all of its arenas; None if it is not glibc."""
    libc = ctypes.CDLL(None)
    if not hasattr(libc, "malloc_info"):
        return None
    libc.fopen.restype = ctypes.c_void_p
    with tempfile.NamedTemporaryFile() as file:
        stream = ctypes.c_void_p(libc.fopen(file.name.encode(), b"w"))
        libc.malloc_info(0, stream)
        libc.fclose(stream)
        told = ElementTree.parse(file.name).getroot()
    totals = {one.get("type"): int(one.get("size", 0)) for one in told.findall("total")}
    system = next(one for one in told.findall("system") if one.get("type") == "current")
    return int(system.get("size", 0)) - totals["fast"] - totals["rest"] + totals["mmap"]


def resident() -> int:
    """Resident bytes; whole pages that the C library keeps are given back first."""
    with suppress(AttributeError, OSError):  # another C library than glibc
        ctypes.CDLL(None).malloc_trim(0)
    return resident_bytes() or 0


def open_files() -> int:
    return len(os.listdir("/proc/self/fd"))
