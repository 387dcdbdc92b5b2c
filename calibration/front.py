"""The front of a search within a budget as a picture: gain kept by bytes held."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from knnmoe.runtime.atomic import write_file
from knnmoe.runtime.reports.elements import E, Element
from knnmoe.runtime.reports.plots import Scale, marked_points

from .budget_report import BudgetReport, Point

# What the page of a report does for its plots, for a file that stands alone.
_STYLE = """
svg { background: #fff; font: 12px system-ui, sans-serif; }
text { fill: #5d646d; } .axis { stroke: #d9dde2; }
.mark { fill: #8a94a0; } .gain { fill: #1a7f4b; } .loss { fill: #b3362b; }
"""
_ACROSS, _UP = 520.0, 300.0


def write_front(report: BudgetReport, path: Path) -> None:
    """Draw a report's points into an SVG file.

    Numbers beside the points are those of the printed table. The one that was chosen is green, and
    what costs other text too much is red. Without text, recall is drawn and not gain.

    Raises:
        OutputError: If the file cannot be written.
    """
    write_file(path, front_svg(report).render().encode())


def front_svg(report: BudgetReport) -> Element:
    """The picture as an element that stands alone."""
    by_text = report.judge == "likelihood"
    whole = report.points[0].bytes
    points = [
        (100 * point.bytes / whole, height(point), kind_of(report, point), str(number))
        for number, point in enumerate(report.points)
    ]
    ups = [up for _, up, _, _ in points]
    low, high = min([*ups, 90.0]), max([*ups, 100.0])
    named = "gain kept, %" if by_text else "neighbours found, %"
    plot = marked_points(
        points,
        Scale(0, 105, _ACROSS),
        Scale(low - 0.05 * (high - low), high + 0.05 * (high - low), _UP),
        names=("bytes held, % of the memory as it is", named),
        label="What smaller memories keep",
    )
    attributes = {**plot.attributes, "xmlns": "http://www.w3.org/2000/svg"}
    return replace(plot, attributes=attributes, children=(E("style", _STYLE), *plot.children))


def height(point: Point) -> float:
    """What is drawn of a point, in percent."""
    return 100 * (point.recall if point.kept is None else point.kept.mean)


def kind_of(report: BudgetReport, point: Point) -> str:
    """Its class in the picture."""
    if point is report.chosen:
        return "gain"
    return "unsure" if point.spares(report.limits) else "loss"
