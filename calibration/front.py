"""The front of a search within a budget as a picture: gain kept by bytes held.

An SVG that stands alone and says all that its table says, in the width of a phone.
"""

from __future__ import annotations

import math
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from knnmoe.runtime.atomic import readable_size, write_file
from knnmoe.runtime.errors import OutputError, SettingError
from knnmoe.runtime.reports.elements import E, Element
from knnmoe.runtime.reports.plots import Scale, ticks

from .budget_report import BudgetReport, Point

_STYLE = """
text { font: 13px system-ui, sans-serif; fill: #3b424a; }
.title { font-weight: 600; font-size: 15px; } .quiet { fill: #5d646d; }
.number { font-weight: 600; } .axis { stroke: #d9dde2; } .whisker { stroke: #b4bbc3; }
.level { stroke: #3b6ea5; stroke-dasharray: 5 4; } .budget { fill: #3b6ea5; }
.mark { fill: #8a94a0; } .mark.gain { fill: #1a7f4b; } .mark.loss { fill: #b3362b; }
text.gain { fill: #1a7f4b; } text.loss { fill: #b3362b; }
"""
_WIDTH, _LEFT, _RIGHT, _TOP, _UP = 440.0, 44.0, 16.0, 58.0, 250.0
_RADIUS, _HIGH, _LETTER = 5.0, 13.0, 8.0  # of marks; of labels
_LINE, _LETTERS = 17.0, 54  # of the words below
_WORDS = {"gain": "written", "loss": "costs other text too much", "unsure": None}
# Where a label may stand: how far from its mark, and which of its ends is there.
_PLACES = (
    (8.0, -6.0, "start"), (8.0, 14.0, "start"), (-8.0, -6.0, "end"), (-8.0, 14.0, "end"),
    (9.0, 4.5, "start"), (-9.0, 4.5, "end"), (0.0, -10.0, "middle"), (0.0, 19.0, "middle"),
)  # fmt: skip
_SHIFT = {"start": 0.0, "middle": 0.5, "end": 1.0}


def check_front(path: Path) -> None:
    """Raise unless a front can be drawn to this file, before any work is done.

    Raises:
        SettingError: If it is not named as an SVG.
        OutputError: If its directory is not there.
    """
    if path.suffix.lower() != ".svg":
        raise SettingError(
            "--front", "is drawn as SVG alone", expected="a file named .svg", found=path.name,
            fix=f"Name it {path.with_suffix('.svg').name}; a browser shows it, and prints or saves"
            " it as something else.",
        )  # fmt: skip
    if not path.absolute().parent.is_dir():
        raise OutputError(path, "its directory does not exist", fix=f"Create {path.parent} first.")


def write_front(report: BudgetReport, path: Path) -> None:
    """Draw a report's points into an SVG file.

    Without text, recall is drawn and not gain.

    Raises:
        SettingError, OutputError: See `check_front`; or if the file cannot be written.
    """
    check_front(path)
    write_file(path, front_svg(report).render().encode())


def front_svg(report: BudgetReport) -> Element:
    """The picture as an element that stands alone.

    Numbers beside the points are those of the printed table. Lines up and down are intervals. The
    point that was written is green, and what costs other text too much is red.
    """
    whole = report.points[0].bytes
    across = Scale(0, 105, _WIDTH - _LEFT - _RIGHT)
    up = _heights(report)
    base = _TOP + _UP
    marks = [
        _Mark(
            _LEFT + across.at(100 * point.bytes / whole), base - up.at(_height(point)),
            str(number), kind_of(report, point),
        )
        for number, point in enumerate(report.points)
    ]  # fmt: skip
    budget = 100 * report.limit / whole
    words, foot = _below(report, base + 62)
    judged = "neighbours found, %" if report.judge == "recall" else "gain kept, %"
    height = foot + 6
    return E(
        "svg",
        E("style", _STYLE),
        E("title", "What smaller memories keep"),
        E("rect", width=_WIDTH, height=height, fill="#fff"),
        E("text", "What smaller memories keep", x=12.0, y=22.0, class_="title"),
        E("text", judged, x=12.0, y=44.0, class_="quiet"),
        _axes(across, up),
        _level(_LEFT + across.at(budget), f"budget {budget:.3g} %"),
        [_whisker(mark.x, point, up) for mark, point in zip(marks, report.points, strict=True)],
        [E("circle", cx=m.x, cy=m.y, r=_RADIUS, class_=f"mark {m.kind}") for m in marks],
        _labels(marks),
        words,
        xmlns="http://www.w3.org/2000/svg", viewBox=f"0 0 {_WIDTH:g} {height:g}",
        width="100%", style=f"max-width:{1.5 * _WIDTH:g}px", role="img",
    )  # fmt: skip


def kind_of(report: BudgetReport, point: Point) -> str:
    """Its class in the picture."""
    if point is report.chosen:
        return "gain"
    return "unsure" if point.spares(report.limits) else "loss"


def _height(point: Point) -> float:
    """What is drawn of a point, in percent."""
    return 100 * (point.recall if point.kept is None else point.kept.mean)


def _heights(report: BudgetReport) -> Scale:
    numbers = [90.0, 100.0, *map(_height, report.points)]
    for point in report.points:
        if point.kept is not None and math.isfinite(point.kept.low):
            numbers += [100 * point.kept.low, 100 * point.kept.high]
    low, high = min(numbers), max(numbers)
    room = 0.05 * (high - low)
    return Scale(low - room, high + room, _UP)


def _axes(across: Scale, up: Scale) -> list[Element]:
    base, right = _TOP + _UP, _WIDTH - _RIGHT
    parts = [
        E("text", "bytes held, % of the memory as it is", x=right, y=base + 36,
          text_anchor="end", class_="quiet"),
        E("line", x1=_LEFT, x2=right, y1=base, y2=base, class_="axis"),
    ]  # fmt: skip
    for number in ticks(0, 100):
        at = _LEFT + across.at(number)
        parts.append(E("text", f"{number:g}", x=at, y=base + 18, text_anchor="middle",
                       class_="quiet"))  # fmt: skip
    for number in ticks(up.low, up.high):
        at = base - up.at(number)
        parts += [
            E("line", x1=_LEFT, x2=right, y1=at, y2=at, class_="axis"),
            E("text", f"{number:g}", x=_LEFT - 7, y=at + 4.5, text_anchor="end", class_="quiet"),
        ]
    return parts


def _level(x: float, word: str) -> list[Element]:
    """The budget, from foot to top, with its name above."""
    end = x > _WIDTH / 2
    return [
        E("line", x1=x, x2=x, y1=_TOP - 8, y2=_TOP + _UP, class_="level"),
        E("text", word, x=x + (-4 if end else 4), y=_TOP - 3, text_anchor="end" if end else "start",
          class_="budget"),
    ]  # fmt: skip


def _whisker(x: float, point: Point, up: Scale) -> Element | None:
    kept = point.kept
    if kept is None or kept.low == kept.high or not math.isfinite(kept.low):
        return None
    low, high = (_TOP + _UP - up.at(100 * end) for end in (kept.low, kept.high))
    return E("line", x1=x, x2=x, y1=high, y2=low, class_="whisker")


@dataclass(frozen=True)
class _Mark:
    x: float
    y: float
    word: str
    kind: str


_Box = tuple[float, float, float, float]  # left, top, right, bottom


def _labels(marks: Sequence[_Mark]) -> list[Element]:
    """A word beside each mark, where it covers least of other marks and words."""
    taken: list[_Box] = [
        (m.x - _RADIUS, m.y - _RADIUS, m.x + _RADIUS, m.y + _RADIUS) for m in marks
    ]
    parts = []
    for mark in marks:
        boxes = [_box(mark, place) for place in _PLACES]
        costs = [sum(_overlap(box, other) for other in taken) + _outside(box) for box in boxes]
        best = min(range(len(boxes)), key=costs.__getitem__)
        taken.append(boxes[best])
        right, down, anchor = _PLACES[best]
        parts.append(E("text", mark.word, x=mark.x + right, y=mark.y + down, text_anchor=anchor,
                       class_=f"number {mark.kind}"))  # fmt: skip
    return parts


def _box(mark: _Mark, place: tuple[float, float, str]) -> _Box:
    width = _LETTER * len(mark.word)
    left = mark.x + place[0] - _SHIFT[place[2]] * width
    foot = mark.y + place[1] + 1
    return left, foot - _HIGH, left + width, foot


def _overlap(one: _Box, other: _Box) -> float:
    wide = min(one[2], other[2]) - max(one[0], other[0])
    high = min(one[3], other[3]) - max(one[1], other[1])
    return max(0.0, wide) * max(0.0, high)


def _outside(box: _Box) -> float:
    beyond = max(0.0, box[2] - (_WIDTH - 2)) + max(0.0, _LEFT - box[0])
    return 1e3 * (beyond + max(0.0, box[3] - (_TOP + _UP)))


def _below(report: BudgetReport, top: float) -> tuple[list[Element], float]:
    """What the points are, line by line, and where that ends."""
    parts, y = [], top
    for number, point in enumerate(report.points):
        kind = kind_of(report, point)
        parts.append(E("text", str(number), x=12.0, y=y, class_=f"number {kind}"))
        name = point.name if _WORDS[kind] is None else f"{point.name} ({_WORDS[kind]})"
        lines = textwrap.wrap(name, _LETTERS)
        for line in lines:
            parts.append(E("text", line, x=36.0, y=y, class_=kind))
            y += _LINE
        parts.append(E("text", _figures(report, point), x=36.0, y=y, class_="quiet"))
        y += _LINE + 6
    return parts, y - _LINE


def _figures(report: BudgetReport, point: Point) -> str:
    parts = [readable_size(point.bytes), f"{100 * point.bytes / report.points[0].bytes:.1f} %"]
    if point.kept is None:
        parts.append(f"finds {100 * point.recall:.1f} %")
    else:
        parts.append(f"keeps {point.kept.percent()}")
    if point.ms is not None:
        parts.append(f"{point.ms:.3g} ms a token")
    return ", ".join(parts)
