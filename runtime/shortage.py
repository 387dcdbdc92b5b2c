"""Memory that is not to be had: one stated failure, whoever was refused it and however it says so.

NumPy and Python raise `MemoryError`. ONNX Runtime, torch, the loader of libraries and the operating
system raise errors of their own, which only their words tell from others.
"""

from __future__ import annotations

import errno
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from .atomic import readable_size
from .errors import DeviceError, KnnMoeError

_WORDS = re.compile(
    r"bad_alloc|bad allocation|[Ff]ailed to allocate memory|can't allocate memory"
    r"|[Cc]annot allocate memory|[Nn]ot enough memory|failed to map segment|\(os error 12\)"
    r"|can't start new thread"
)
_ASKED = re.compile(r"requested buffer of size (\d+)|tried to allocate (\d+) bytes")
_UNITS = {"kB": 1 << 10}


def is_shortage(error: BaseException) -> bool:
    """Whether an error says that there is not enough memory."""
    if isinstance(error, KnnMoeError):
        return False  # stated already
    if isinstance(error, MemoryError):
        return True
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno == errno.ENOMEM
    return isinstance(error, Exception) and _WORDS.search(str(error)) is not None


def shortage(error: BaseException, what: str, needed_bytes: int | None, fix: str) -> DeviceError:
    """The stated failure.

    Args:
        error: What was raised.
        what: What the memory was for, as a noun: `the key-value cache of 4096 tokens`.
        needed_bytes: What it takes in all, if known; otherwise the allocation that failed.
        fix: The next step.
    """
    asked = _ASKED.search(str(error))
    if needed_bytes is None and asked:
        needed_bytes = int(asked[1] or asked[2])
    free = available_bytes()
    return DeviceError(
        what,
        "not enough memory",
        expected=None if needed_bytes is None else f"{readable_size(needed_bytes)} free",
        found=None if free is None else f"{readable_size(free)} free",
        fix=fix,
    )


@contextmanager
def memory_for(
    what: str,
    needed_bytes: int | None = None,
    fix: str = "Close what else uses the memory, or take a smaller context, batch or memory pack.",
) -> Iterator[None]:
    """Let a failed allocation in the block be a `DeviceError` that says what needed how much."""
    try:
        yield
    except Exception as error:
        if not is_shortage(error):
            raise
        raise shortage(error, what, needed_bytes, fix) from error


def available_bytes() -> int | None:
    """Bytes that this process may still take, by the machine and its own limit; None if unknown."""
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        stated = {name: rest.split() for name, _, rest in (line.partition(":") for line in lines)}
        free = int(stated["MemAvailable"][0]) * _UNITS[stated["MemAvailable"][1]]
        import resource

        limit = resource.getrlimit(resource.RLIMIT_AS)[0]
        if limit != resource.RLIM_INFINITY:
            pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0])
            free = min(free, limit - pages * resource.getpagesize())
    except (OSError, ImportError, KeyError, ValueError, IndexError, MemoryError):
        return None
    return max(free, 0)
