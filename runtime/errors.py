"""The one family of errors a user of knnmoe can meet.

Every error names where it happened, what was expected, what was found and what to do next.
"""

from __future__ import annotations

from typing import Any


class KnnMoeError(Exception):
    """A stated failure: exit code 1 on the command line.

    Args:
        where: The file, field or argument concerned.
        problem: What is wrong, as a clause without a full stop.
        expected: What would have been right; a tuple of strings: one of these.
        found: What was there instead.
        fix: The next step, as a sentence.
    """

    def __init__(
        self,
        where: object,
        problem: str,
        *,
        expected: object | None = None,
        found: object | None = None,
        fix: str | None = None,
    ) -> None:
        self.where = str(where)
        self.problem = problem
        self.expected = None if expected is None else _said(expected)
        self.found = None if found is None else str(found)
        self.fix = fix
        super().__init__(self._sentence())

    def __reduce__(self) -> tuple[Any, ...]:
        return _restored, (type(self), self.to_json())  # from another process

    def _sentence(self) -> str:
        parts = [f"{self.where}: {self.problem}"]
        if self.expected is not None:
            parts.append(f"expected {self.expected}")
        if self.found is not None:
            parts.append(f"found {self.found}")
        text = "; ".join(parts) + "."
        return f"{text} {self.fix}" if self.fix else text

    def to_json(self) -> dict[str, Any]:
        """The error as the `--json` output of a command."""
        return {
            "error": type(self).__name__,
            "where": self.where,
            "problem": self.problem,
            "expected": self.expected,
            "found": self.found,
            "fix": self.fix,
        }


def _said(expected: object) -> str:
    """What would have been right; strings in a tuple are choices."""
    if not (isinstance(expected, tuple) and all(isinstance(one, str) for one in expected)):
        return str(expected)
    *others, last = expected
    return f"{', '.join(others)} or {last}" if others else last


def _restored(kind: type[KnnMoeError], stated: dict[str, Any]) -> KnnMoeError:
    fields = {name: stated[name] for name in ("expected", "found", "fix")}
    return kind(stated["where"], stated["problem"], **fields)


class CheckpointError(KnnMoeError):
    """The checkpoint cannot be read, or is of a kind that cannot be exported."""


class BundleError(KnnMoeError):
    """The bundle is damaged, incomplete, unsafe or of an unknown schema."""


class MemoryPackError(KnnMoeError):
    """The memory pack is damaged, unsafe or belongs to another model."""


class SettingError(KnnMoeError):
    """A setting (K, λ, variant, sampling option …) is out of its range."""


class InputError(KnnMoeError):
    """A prompt, text or token sequence cannot be used."""


class OutputError(KnnMoeError):
    """The output cannot be written where it was asked for."""


class BackendError(KnnMoeError):
    """A gate or engine backend is missing or does not fit."""


class EngineError(KnnMoeError):
    """Engines are damaged, or belong to another bundle, device, driver or version."""


class DeviceError(KnnMoeError):
    """The device refuses: no memory left, a failed launch, a shape beyond its engines."""


class ProfileError(KnnMoeError):
    """A profile record is damaged, or of another schema."""


class VerificationError(KnnMoeError):
    """A computed result disagrees with its reference."""
