"""Plots of times: bars of a waterfall, a span of percentiles, lines over a size.

Bars and spans have no words and stretch with their column; their rows are HTML. Lines have axes,
and are drawn no wider than a phone, so that their words keep their size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from .elements import E, Element
from .plots import Scale, ticks

WIDTH = 1000.0  # of what stretches
BAR = 12.0


@dataclass(frozen=True)
class Piece:
    """A part of a bar: its kind (a class of the page) and how long it is."""

    kind: str
    length: float


def waterfall_bar(
    start: float, pieces: Sequence[Piece], total: float, *, bound: float | None, label: str
) -> Element:
    """A bar from `start` on a scale from 0 to `total`; `bound` marks where it could end at best."""
    scale = Scale(0.0, total or 1.0, WIDTH)
    at, parts = start, []
    for piece in pieces:
        width = max(scale.at(at + piece.length) - scale.at(at), 1.5)
        parts.append(
            E("rect", x=scale.at(at), y=0.0, width=width, height=BAR, class_=f"piece {piece.kind}")
        )
        at += piece.length
    if bound is not None:
        x = scale.at(start + bound)
        parts.append(E("line", x1=x, x2=x, y1=0.0, y2=BAR, class_="bound"))
    return _stretched("waterfall", label, parts)


def span(marks: Sequence[float], high: float, *, bound: float | None, label: str) -> Element:
    """Growing percentiles on a scale from 0 to `high`: a line to the last, a bar to the first."""
    scale = Scale(0.0, high or 1.0, WIDTH)
    first, *others = (scale.at(mark) for mark in marks)
    middle = BAR / 2
    parts = [
        E("rect", x=0.0, y=2.0, width=first, height=BAR - 4, class_="piece whole"),
        E("line", x1=first, x2=others[-1], y1=middle, y2=middle, class_="tail"),
    ]
    parts += [E("line", x1=x, x2=x, y1=2.0, y2=BAR - 2, class_="tail") for x in others]
    if bound is not None:
        x = scale.at(bound)
        parts.append(E("line", x1=x, x2=x, y1=0.0, y2=BAR, class_="bound"))
    return _stretched("span", label, parts)


def stack(pieces: Sequence[Piece], *, label: str) -> Element:
    """One bar of the whole width, divided."""
    total = sum(piece.length for piece in pieces) or 1.0
    return waterfall_bar(0.0, pieces, total, bound=None, label=label)


@dataclass(frozen=True)
class Dot:
    """A measured point with its interval."""

    x: float
    y: float
    low: float
    high: float


def lines(
    dots: Sequence[Dot],
    fitted: Sequence[Dot],
    *,
    level: float | None,
    label: str,
    width: float = 360.0,
    height: float = 240.0,
) -> Element:
    """Dots with intervals, a line with its band through them, a horizontal line at `level`.

    Both axes begin at 0. x are counts, y milliseconds.
    """
    left, foot, top, right = 44.0, 26.0, 10.0, 14.0
    highest = max(
        [*(dot.high for dot in dots), *(dot.y for dot in fitted), level or 0.0], default=1.0
    )
    across = Scale(0.0, max((dot.x for dot in dots), default=1.0) or 1.0, width - left - right)
    up = Scale(0.0, highest * 1.05 or 1.0, height - foot - top)

    def x(number: float) -> float:
        return left + across.at(number)

    def y(number: float) -> float:
        return height - foot - up.at(number)

    parts: list[Element] = []
    for number in ticks(0.0, up.high, 5):
        parts.append(
            E("line", x1=left, x2=width - right, y1=y(number), y2=y(number), class_="axis")
        )
        parts.append(E("text", f"{number:g}", x=left - 6, y=y(number) + 4, text_anchor="end"))
    for number in ticks(0.0, across.high, 4):
        anchor = "end" if number > 0.9 * across.high else "middle"
        parts.append(E("text", short(number), x=x(number), y=height - 8, text_anchor=anchor))
    if fitted:
        edge = [(dot.x, dot.high) for dot in fitted] + [(dot.x, dot.low) for dot in fitted[::-1]]
        band = " ".join(f"{x(a):.1f},{y(b):.1f}" for a, b in edge)
        way = " ".join(f"{x(dot.x):.1f},{y(dot.y):.1f}" for dot in fitted)
        parts += [
            E("polygon", points=band, class_="band"),
            E("polyline", points=way, class_="fitted"),
        ]
    if level is not None:
        parts.append(
            E("line", x1=left, x2=width - right, y1=y(level), y2=y(level), class_="budget")
        )
    for dot in dots:
        parts.append(
            E("line", x1=x(dot.x), x2=x(dot.x), y1=y(dot.low), y2=y(dot.high), class_="tail")
        )
        parts.append(E("circle", cx=x(dot.x), cy=y(dot.y), r=4.0, class_="dot"))
    return E(
        "svg", E("title", label), parts, viewBox=f"0 0 {width:g} {height:g}", width=width,
        height=height, class_="plot lines", role="img",
    )  # fmt: skip


def short(count: float) -> str:
    """A count in few letters: 20k, 1.5M."""
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if count >= size:
            return f"{count / size:g}{letter}"
    return f"{count:g}"


def _stretched(kind: str, label: str, parts: Sequence[Element]) -> Element:
    return E(
        "svg", E("title", label), parts, viewBox=f"0 0 {WIDTH:g} {BAR:g}",
        preserveAspectRatio="none", class_=f"stretched {kind}", role="img",
    )  # fmt: skip
