"""Reading JSON of strangers: every access names the field, checks the type and the range."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from .errors import KnnMoeError

MAX_TEXT = 4096
MAX_MANIFEST_BYTES = 16 << 20


@dataclass(frozen=True)
class ManifestKind:
    """One kind of directory that its JSON file describes.

    Attributes:
        name: What it is called, with its article.
        file: The JSON file in it.
        schema: Of that file.
        older: Schemas that are read too.
        error: What to raise.
        fix: The next step when it is damaged.
        other_schema: The next step when its schema is another.
    """

    name: str
    file: str
    schema: str
    error: type[KnnMoeError]
    fix: str
    other_schema: str
    older: tuple[str, ...] = ()

    def read(self, root: Path) -> Fields:
        """The manifest of a directory; its schema is right, its fields are not checked yet."""
        path = root / self.file
        if not root.is_dir() or path.is_symlink() or not path.is_file():
            raise self.error(
                root,
                f"not {self.name}",
                expected=f"a directory with a file {self.file}",
                fix=self.fix,
            )
        content = read_object(path, self.error, self.fix)
        found = content.get("schema")
        if found != self.schema and found not in self.older:
            raise self.error(
                f"{path}: schema",
                "unknown",
                expected=self.schema,
                found=str(found)[:100],
                fix=self.other_schema,
            )
        return Fields(str(path), content, self.error, self.fix)


def read_object(
    path: Path, error: type[KnnMoeError], fix: str, *, most_bytes: int = MAX_MANIFEST_BYTES
) -> dict[str, Any]:
    """A file that is one JSON object.

    Args:
        path: The file.
        error: What to raise if it is too large, cannot be read, or is none (see `parse_object`).
        fix: The next step which that names.
        most_bytes: Its size at most; of a larger one nothing is read.
    """
    try:
        size = path.stat().st_size
        if size > most_bytes:
            raise error(
                path, "is too large", expected=f"at most {most_bytes} bytes", found=size, fix=fix
            )
        with path.open("rb") as stream:
            # Not `most_bytes`: as many are set aside as are asked for.
            return parse_object(stream.read(size))
    except OSError as refused:
        raise error(path, f"cannot be read ({refused.strerror})", fix=fix) from refused
    except ValueError as malformed:
        raise error(path, f"is not valid JSON ({malformed})", fix=fix) from malformed


def parse_object(data: bytes) -> dict[str, Any]:
    """Parse a JSON object; `ValueError` for anything else, repeated keys, NaN and deep nesting."""
    try:
        content = json.loads(
            data.decode("utf-8"), object_pairs_hook=_unique, parse_constant=_refuse_constant
        )
    except RecursionError as error:
        raise ValueError("nested too deeply") from error
    if not isinstance(content, dict):
        raise ValueError(f"expected an object, found a {type(content).__name__}")
    return content


def is_finite(number: float) -> bool:
    """Whether a number is finite as fp64; JSON may hold whole numbers that are beyond it."""
    try:
        return math.isfinite(number)
    except OverflowError:
        return False


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) != len(pairs):
        seen: set[str] = set()
        for name, _ in pairs:
            if name in seen:
                raise ValueError(f"{name!r} is there twice")
            seen.add(name)
    return content


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")


@dataclass(frozen=True)
class Fields:
    """A JSON object whose fields are read one by one; the wrong ones raise `error`.

    Attributes:
        where: Path of the object, as errors name it.
        content: The parsed object.
        error: Which kind of error to raise.
        fix: The next step that errors name.
    """

    where: str
    content: dict[str, Any]
    error: type[KnnMoeError]
    fix: str

    @property
    def names(self) -> tuple[str, ...]:
        """The names of the fields."""
        return tuple(self.content)

    def wrong(
        self, name: str, problem: str, *, expected: object = None, found: object = None
    ) -> KnnMoeError:
        """The error to raise about one field."""
        shown = None if found is None else str(found)[:200]
        return self.error(
            f"{self.where}: {name}", problem, expected=expected, found=shown, fix=self.fix
        )

    def only(self, *names: str, optional: Sequence[str] = ()) -> None:
        """Raise unless the object has exactly these fields, and perhaps the optional ones."""
        for name in names:
            if name not in self.content:
                raise self.wrong(name, "missing")
        for name in self.content:
            if name not in names and name not in optional:
                raise self.wrong(name[:100], "unknown field")

    def has(self, name: str) -> bool:
        """Whether the field is there and not null."""
        return self.content.get(name) is not None

    def raw(self, name: str) -> Any:
        """The field, unchecked."""
        if name not in self.content:
            raise self.wrong(name, "missing")
        return self.content[name]

    def text(
        self, name: str, *, choices: Sequence[str] | None = None, pattern: str | None = None
    ) -> str:
        """A string, one of `choices` or matching `pattern` if given."""
        found = self.raw(name)
        if not isinstance(found, str) or len(found) > MAX_TEXT:
            raise self.wrong(name, "malformed", expected="a string", found=found)
        if choices is not None and found not in choices:
            raise self.wrong(name, "unknown", expected=" or ".join(choices), found=found)
        if pattern is not None and re.fullmatch(pattern, found) is None:
            raise self.wrong(name, "malformed", expected=f"text like {pattern}", found=found)
        return found

    def integer(self, name: str, low: int, high: int) -> int:
        """A whole number from `low` to `high`."""
        found = self.raw(name)
        if type(found) is not int or not low <= found <= high:
            raise self.wrong(
                name, "out of range", expected=f"a whole number from {low} to {high}", found=found
            )
        return found

    def integers(self, name: str, low: int, high: int) -> list[int]:
        """A list of whole numbers from `low` to `high`."""
        found = self.raw(name)
        if not isinstance(found, list) or not all(
            type(number) is int and low <= number <= high for number in found
        ):
            raise self.wrong(
                name, "malformed", expected=f"whole numbers from {low} to {high}", found=found
            )
        return found

    def texts(self, name: str) -> tuple[str, ...]:
        """A list of strings."""
        found = self.raw(name)
        if not isinstance(found, list) or not all(
            isinstance(text, str) and len(text) <= MAX_TEXT for text in found
        ):
            raise self.wrong(name, "malformed", expected="a list of strings", found=found)
        return tuple(found)

    def number(self, name: str) -> float:
        """A finite number."""
        found = self.raw(name)
        if isinstance(found, bool) or not isinstance(found, int | float):
            raise self.wrong(name, "malformed", expected="a number", found=found)
        if not is_finite(found):
            raise self.wrong(name, "malformed", expected="a finite number", found=found)
        return float(found)

    def numbers(self, name: str) -> list[float]:
        """A list of finite numbers."""
        found = self.raw(name)
        if not isinstance(found, list) or not all(
            type(number) in (int, float) and is_finite(number) for number in found
        ):
            raise self.wrong(name, "malformed", expected="a list of finite numbers", found=found)
        return [float(number) for number in found]

    def boolean(self, name: str) -> bool:
        """True or false."""
        found = self.raw(name)
        if not isinstance(found, bool):
            raise self.wrong(name, "malformed", expected="true or false", found=found)
        return found

    def object(self, name: str) -> Fields:
        """An object."""
        return self._nested(name, self.raw(name))

    def objects(self, name: str) -> Iterator[Fields]:
        """A list of objects."""
        found = self.raw(name)
        if not isinstance(found, list):
            raise self.wrong(name, "malformed", expected="a list", found=found)
        for index, entry in enumerate(found):
            yield self._nested(f"{name}[{index}]", entry)

    def items(self) -> Iterator[tuple[str, Fields]]:
        """The fields of an object of objects."""
        for name, entry in self.content.items():
            yield name, self._nested(name, entry)

    def _nested(self, name: str, found: Any) -> Fields:
        if not isinstance(found, dict):
            raise self.wrong(name, "malformed", expected="an object", found=found)
        return Fields(f"{self.where}: {name}", found, self.error, self.fix)
