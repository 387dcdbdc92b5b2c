"""Access to a checkpoint's `config.json`, in which every entry may be wrong."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from knnmoe.runtime.errors import CheckpointError

NOT_DESCRIBED = (
    "knnmoe has no description of such checkpoints. Try --frontend torch, which traces the model "
    "that transformers has: into fp32 or fp16, for the CPU, with all of it in memory in fp32."
)


class Config:
    """Access to `config.json` with the family's defaults; every error names the entry.

    Args:
        content: Of the file, or of an object in it.
        where: Its path, for messages.
        defaults: What an entry is where the content leaves it out.
        aliases: Entries by another name: (name in some files, name here).

    Raises:
        CheckpointError: If an entry is there by both its names, and they disagree.
    """

    def __init__(
        self,
        content: Mapping[str, Any],
        where: Path | str,
        defaults: tuple[tuple[str, Any], ...] = (),
        aliases: tuple[tuple[str, str], ...] = (),
    ) -> None:
        self.where = where
        self._content = dict(defaults) | dict(content)
        for other, name in aliases:
            if other not in content:
                continue
            if content.get(name, content[other]) != content[other]:
                raise self.wrong(other, f"is not what {name} says", str(content[name]))
            self._content[name] = content[other]

    def raw(self, name: str) -> Any:
        """What an entry holds; None where it is absent."""
        return self._content.get(name)

    def wrong(self, name: str, problem: str, expected: str) -> CheckpointError:
        """The error that an entry is not what it must be."""
        return CheckpointError(
            f"{self.where}: {name}",
            problem,
            expected=expected,
            found=str(self._content.get(name, "nothing"))[:200],
            fix=NOT_DESCRIBED if name in self._content else "Use the checkpoint's own config.json.",
        )

    def count(self, name: str, *, default: int | None = None) -> int:
        """A positive whole number."""
        found = self.raw(name)
        if found is None and default is not None:
            return default
        if type(found) is not int or not 1 <= found < 1 << 31:
            raise self.wrong(name, "malformed", "a positive whole number")
        return found

    def natural(self, name: str) -> int:
        """A whole number from 0; 0 where the entry is null or absent."""
        found = self.raw(name)
        if found is None:
            return 0
        if type(found) is not int or not 0 <= found < 1 << 31:
            raise self.wrong(name, "malformed", "a whole number")
        return found

    def inside(self, name: str) -> Config:
        """Access to an object that is an entry."""
        return Config(self.raw(name), f"{self.where}: {name}")

    def counts(self, name: str) -> list[int]:
        """Numbers from 0; none where the entry is null."""
        found = self.raw(name)
        if found is None:
            return []
        if not isinstance(found, list) or not all(type(n) is int and n >= 0 for n in found):
            raise self.wrong(name, "malformed", "a list of whole numbers")
        return found

    def positive(self, name: str) -> float:
        """A positive number."""
        found = self.raw(name)
        if isinstance(found, bool) or not isinstance(found, int | float) or not 0 < found < 1e38:
            raise self.wrong(name, "malformed", "a positive number")
        return float(found)

    def flag(self, name: str) -> bool:
        """True or false."""
        found = self.raw(name)
        if not isinstance(found, bool):
            raise self.wrong(name, "malformed", "true or false")
        return found

    def must_be(self, name: str, value: Any) -> None:
        """Refuse an entry that holds anything else."""
        if self.raw(name) != value:
            raise self.wrong(name, "is not supported", str(value))
