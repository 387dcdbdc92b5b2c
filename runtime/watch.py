"""Why a text should end before its time: a flag that was set, or a deadline that has passed."""

from __future__ import annotations

import math
from dataclasses import dataclass
from numbers import Real
from time import monotonic
from typing import Protocol

from .errors import SettingError
from .generation import Interruption


class Cancel(Protocol):
    """A flag that another thread may set: a `threading.Event`, for one."""

    def is_set(self) -> bool:
        """Whether the text is to end."""


@dataclass(frozen=True)
class Watch:
    """What is looked at before each step of a text; make one with `Watch.start`."""

    flags: tuple[Cancel, ...]
    end: float

    @staticmethod
    def start(cancel: Cancel | None, closing: Cancel | None, deadline_s: float | None) -> Watch:
        """Begin to watch flags, and the clock, now.

        Raises:
            SettingError: If the deadline is no number of seconds, or a flag cannot be asked.
        """
        if deadline_s is not None and not _is_duration(deadline_s):
            raise SettingError(
                "deadline_s", "out of range", expected="seconds, 0 or more", found=repr(deadline_s)
            )
        if cancel is not None and not callable(getattr(cancel, "is_set", None)):
            raise SettingError(
                "cancel", "cannot be asked", expected="an object with is_set(), as threading.Event",
                found=repr(cancel)[:60],
            )  # fmt: skip
        flags = tuple(flag for flag in (cancel, closing) if flag is not None)
        return Watch(flags, math.inf if deadline_s is None else monotonic() + deadline_s)

    def reason(self) -> Interruption | None:
        """None while it may go on."""
        for flag in self.flags:
            if flag.is_set():
                return "cancelled"
        return "deadline" if monotonic() >= self.end else None


def _is_duration(given: object) -> bool:
    return isinstance(given, Real) and 0 <= float(given) < math.inf
