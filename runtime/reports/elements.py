"""HTML and SVG as a tree of elements; text is escaped where it is written, and only there."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from html import escape
from typing import TypeAlias

Node: TypeAlias = "Element | str"
Content: TypeAlias = "Node | Iterable[Content] | None"
Attribute: TypeAlias = "str | float | int | None"

_NAME = re.compile(r"[A-Za-z][A-Za-z0-9:_-]*")
_VOID = frozenset({"br", "col", "hr", "img", "meta"})
_RAW = frozenset({"style"})  # whose text HTML does not unescape
_INLINE_CONTROL = {
    code: "\N{REPLACEMENT CHARACTER}" for code in range(32) if chr(code) not in "\t\n"
}


@dataclass(frozen=True)
class Element:
    """One element; make it with `E`."""

    name: str
    attributes: Mapping[str, Attribute] = field(default_factory=dict)
    children: tuple[Node, ...] = ()

    def render(self) -> str:
        """The element as markup."""
        return "".join(_markup(self))


def E(name: str, /, *children: Content, **attributes: Attribute) -> Element:  # noqa: N802
    """An element: `E("p", "text", E("b", "bold"), class_="note", stroke_width=2)`.

    Children are elements, text, None (left out) or iterables of them. In names of attributes `_`
    stands for `-`, but at the end for nothing; attributes that are None are left out.

    Raises:
        ValueError: If a name cannot be one, or a raw element's text would end it.
    """
    named = {key.rstrip("_").replace("_", "-"): value for key, value in attributes.items()}
    for word in (name, *named):
        if not _NAME.fullmatch(word):
            raise ValueError(f"not a name of an element or attribute: {word!r}")
    element = Element(name, named, tuple(_flat(children)))
    if name in _RAW and any("</" in child for child in element.children if isinstance(child, str)):
        raise ValueError(f"text of <{name}> would end it")
    return element


def _flat(content: Content) -> Iterator[Node]:
    if content is None:
        return
    if isinstance(content, str | Element):
        yield content
        return
    for part in content:
        yield from _flat(part)


def _markup(node: Node, raw: bool = False) -> Iterator[str]:
    if isinstance(node, str):
        yield node if raw else escape(node.translate(_INLINE_CONTROL), quote=False)
        return
    yield f"<{node.name}"
    for name, value in node.attributes.items():
        if value is not None:
            yield f' {name}="{escape(_written(value))}"'
    yield ">"
    if node.name in _VOID:
        return
    for child in node.children:
        yield from _markup(child, node.name in _RAW)
    yield f"</{node.name}>"


def _written(value: str | float | int) -> str:
    """Numbers as SVG reads them: two decimals are a fiftieth of a pixel."""
    if isinstance(value, float):
        return f"{value:.2f}".rstrip("0").rstrip(".")
    return str(value).translate(_INLINE_CONTROL)
