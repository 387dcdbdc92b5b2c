"""Why a text should end before its time: a flag that was set, or a deadline that has passed."""

from __future__ import annotations

import math
from dataclasses import dataclass
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
            SettingError: If the deadline is no number of seconds.
        """
        if deadline_s is not None and not 0 <= deadline_s < math.inf:
            raise SettingError(
                "deadline_s", "out of range", expected="seconds, 0 or more", found=deadline_s
            )
        flags = tuple(flag for flag in (cancel, closing) if flag is not None)
        return Watch(flags, math.inf if deadline_s is None else monotonic() + deadline_s)

    def reason(self) -> Interruption | None:
        """None while it may go on."""
        for flag in self.flags:
            if flag.is_set():
                return "cancelled"
        return "deadline" if monotonic() >= self.end else None
