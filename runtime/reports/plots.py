"""Static plots as SVG elements, coloured by the page's classes.

Sizes are in CSS pixels of the view box; plots scale down with their container. Words are left to
HTML beside the plots as far as that goes, so that they stay readable where a plot is small.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from .elements import E, Element


@dataclass(frozen=True)
class Scale:
    """A linear scale from numbers to pixels; numbers outside are drawn at its ends."""

    low: float
    high: float
    width: float

    def at(self, number: float) -> float:
        """Pixels from the left."""
        inside = min(max(number, self.low), self.high)
        return self.width * (inside - self.low) / (self.high - self.low)

    def holds(self, number: float) -> bool:
        """Whether the number lies on the scale."""
        return self.low <= number <= self.high


def ticks(low: float, high: float, count: int = 5) -> list[float]:
    """About `count` round numbers from `low` to `high`."""
    rough = (high - low) / count
    power = 10.0 ** math.floor(math.log10(rough))
    step = power * min((m for m in (1, 2, 5, 10) if m * power >= rough), default=10)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [round(number * step, 12) + 0.0 for number in range(first, last + 1)]


def interval_bar(
    mean: float, low: float, high: float, scale: Scale, *, height: float = 22, label: str = ""
) -> Element:
    """A mean with its interval on a scale with a line at zero; arrows where it goes beyond.

    An interval that does not touch zero has the class `gain` or `loss`, one that does `unsure`.
    """
    kind = "gain" if high < 0 else "loss" if low > 0 else "unsure"
    middle, pad = height / 2, 7.0

    def x(number: float) -> float:
        return pad + scale.at(number)

    parts = [
        E("line", x1=x(0), x2=x(0), y1=0.0, y2=height, class_="zero"),
        E("line", x1=x(low), x2=x(high), y1=middle, y2=middle, class_="whisker"),
    ]
    parts += [
        E("line", x1=x(end), x2=x(end), y1=middle - 5, y2=middle + 5, class_="whisker")
        for end in (low, high)
        if scale.holds(end)
    ]
    for beyond, end, sign in ((low < scale.low, low, -1), (high > scale.high, high, 1)):
        if beyond:
            at = x(end)
            points = f"{at + 6 * sign:g},{middle:g} {at:g},{middle - 5:g} {at:g},{middle + 5:g}"
            parts.append(E("polygon", points=points, class_="mark"))
    if scale.holds(mean):
        parts.append(E("circle", cx=x(mean), cy=middle, r=4.5, class_="mark"))
    width = scale.width + 2 * pad
    return _svg(width, height, f"interval {kind}", label, parts)


def interval_axis(scale: Scale, *, unit: str = "") -> Element:
    """The axis of `interval_bar`s of the same scale."""
    pad = 7.0
    marks = []
    for number in ticks(scale.low, scale.high, 4):
        x = pad + scale.at(number)
        marks.append(E("line", x1=x, x2=x, y1=0.0, y2=4.0, class_="axis"))
        near_end = scale.at(number) > scale.width - 14, scale.at(number) < 14
        anchor = "end" if near_end[0] else "start" if near_end[1] else "middle"
        shift = 6.0 if near_end[0] else -6.0 if near_end[1] else 0.0
        marks.append(E("text", f"{number:+g}" if number else "0", x=x + shift, y=17.0,
                       text_anchor=anchor))  # fmt: skip
    return _svg(scale.width + 2 * pad, 20, "interval", unit, marks)


def histogram(
    series: Sequence[tuple[str, Sequence[float]]],
    low: float,
    high: float,
    *,
    label: str,
    width: float = 300,
    height: float = 110,
) -> Element:
    """Outlines of some histograms over the same bins from `low` to `high`; heights are shares.

    Args:
        series: Class (`a`, `b`, …) and share of each bin.
    """
    foot, top = 20.0, 6.0
    highest = max((max(shares) for _, shares in series), default=0.0) or 1.0
    parts = [E("line", x1=0.0, x2=width, y1=height - foot, y2=height - foot, class_="axis")]
    for name, shares in series:
        step = width / len(shares)
        points = [f"0,{height - foot:g}"]
        for number, share in enumerate(shares):
            y = height - foot - (height - foot - top) * share / highest
            points += [f"{number * step:.1f},{y:.1f}", f"{(number + 1) * step:.1f},{y:.1f}"]
        points.append(f"{width:g},{height - foot:g}")
        parts.append(E("polygon", points=" ".join(points), class_=f"area {name}"))
    for at, anchor in ((low, "start"), ((low + high) / 2, "middle"), (high, "end")):
        x = width * (at - low) / (high - low)
        parts.append(E("text", f"{at:g}", x=x, y=height - 5, text_anchor=anchor))
    return _svg(width, height, "plot", label, parts)


def paired_bars(
    pairs: Sequence[tuple[float, float]],
    *,
    label: str,
    level: float | None = None,
    width: float = 300,
    height: float = 110,
) -> Element:
    """Two bars (`a`, `b`) for each thing, numbered from 0; a dashed line at `level`."""
    foot, top = 20.0, 6.0
    highest = max((max(pair) for pair in pairs), default=0.0)
    highest = max(highest, level or 0.0) or 1.0

    def y(number: float) -> float:
        return height - foot - (height - foot - top) * number / highest

    slot = width / max(len(pairs), 1)
    bar = slot * 0.4
    parts = []
    for number, pair in enumerate(pairs):
        for side, (name, value) in enumerate(zip("ab", pair, strict=True)):
            parts.append(
                E("rect", x=number * slot + slot * 0.1 + side * bar, y=y(value), width=bar,
                  height=height - foot - y(value), class_=f"bar {name}")
            )  # fmt: skip
    if level is not None:
        parts.append(E("line", x1=0.0, x2=width, y1=y(level), y2=y(level), class_="level"))
    every = max(math.ceil(len(pairs) / 8), 1)
    parts += [
        E("text", str(number), x=(number + 0.5) * slot, y=height - 5, text_anchor="middle")
        for number in range(0, len(pairs), every)
    ]
    return _svg(width, height, "plot", label, parts)


def _svg(width: float, height: float, class_: str, label: str, parts: Sequence[Element]) -> Element:
    return E(
        "svg",
        E("title", label) if label else None,
        parts,
        viewBox=f"0 0 {width:g} {height:g}",
        width=float(width),
        height=float(height),
        class_=class_,
        role="img",
    )
