"""Files that memories are built from, and how densely they are drawn from."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

from knnmoe.runtime.errors import SettingError


@dataclass(frozen=True)
class Reference:
    """A text file and how densely it is drawn from.

    Attributes:
        path: `.txt` or `.jsonl`.
        weight: > 0. Of two files with weights 1 and 0.5, the second gives half as many of its
            tokens; weights of all files the same mean nothing.

    Raises:
        SettingError: If the weight is not a positive number.
    """

    path: Path
    weight: float = 1.0

    def __post_init__(self) -> None:
        if not (math.isfinite(self.weight) and self.weight > 0):
            raise SettingError(
                f"weight of {self.path}",
                "out of range",
                expected="a number above 0",
                found=self.weight,
                fix="Leave a file out that is to have no weight.",
            )

    @staticmethod
    def parse(text: str | Path | Reference) -> Reference:
        """`FILE`, or `FILE@WEIGHT`; a file whose name ends like a weight is that file."""
        if isinstance(text, Reference):
            return text
        name, mark, number = str(text).rpartition("@")
        if not (mark and name) or Path(text).exists():
            return Reference(Path(text))
        try:
            weight = float(number)
        except ValueError:
            return Reference(Path(text))
        return Reference(Path(name), weight)
