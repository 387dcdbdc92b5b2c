"""Damage to a directory of ours: JSON fields of other values, bytes that flipped, files cut off."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

# What a field may turn into; `...` removes it.
VALUES: tuple[Any, ...] = (
    ..., None, True, -1, 0, 1, 3, 1 << 31, 1 << 70, 0.5, 1e308, -1e-3, "", "x", "../x",
    "/etc/passwd", "a\0b", "\ud800", "x" * 5000, [], [0], [[]], {}, {"x": 1},
)  # fmt: skip


def fields(content: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The path of every field of a JSON value, lists by their first and last element."""
    if path:
        yield path
    if isinstance(content, dict):
        for name, entry in content.items():
            yield from fields(entry, (*path, name))
    elif isinstance(content, list) and content:
        for index in sorted({0, len(content) - 1}):
            yield from fields(content[index], (*path, index))


def changed(content: Any, path: tuple[Any, ...], value: Any) -> Any:
    """A copy with another value at a path."""
    copy = json.loads(json.dumps(content))
    place = copy
    for step in path[:-1]:
        place = place[step]
    if value is ...:
        del place[path[-1]]
    elif value == "+1":
        place[path[-1]] += 1
    else:
        place[path[-1]] = value
    return copy


def wrong_manifests(content: Any, draw: random.Random, each: int) -> Iterator[tuple[str, bytes]]:
    """Every field with some other values: what was changed, and the file's content."""
    for path in fields(content):
        values = list(draw.sample(VALUES, each))
        found = content
        for step in path:
            found = found[step]
        if type(found) in (int, float):
            values.append("+1")
        for value in values:
            if value == found and type(value) is type(found):
                continue
            text = json.dumps(changed(content, path, value))
            yield f"{'.'.join(map(str, path))} = {str(value)[:20]!r}", text.encode()


def wrong_bytes(data: bytes, draw: random.Random, count: int) -> Iterator[tuple[str, bytes]]:
    """A file with a bit flipped, and cut off, here and there: at its start and end above all."""
    places = {0, 7, 8, len(data) - 1, *(draw.randrange(len(data)) for _ in range(count))}
    for place in sorted(place for place in places if 0 <= place < len(data)):
        flipped = bytearray(data)
        flipped[place] ^= 1 << draw.randrange(8)
        yield f"byte {place} flipped", bytes(flipped)
        yield f"cut off at {place}", data[:place]
    yield "a byte more", data + b"\0"


def files(root: Path) -> list[Path]:
    """All files below a directory."""
    return sorted(path for path in root.rglob("*") if path.is_file())
