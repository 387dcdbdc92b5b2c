from __future__ import annotations

from xml.etree import ElementTree

import pytest

from knnmoe.runtime.reports.elements import E
from knnmoe.runtime.reports.page import page
from knnmoe.runtime.reports.plots import (
    Scale,
    histogram,
    interval_axis,
    interval_bar,
    paired_bars,
    ticks,
)


def test_text_and_attributes_are_escaped() -> None:
    element = E("p", "a < b & c", title='"x" & <y>', data_label="ok")
    expected = '<p title="&quot;x&quot; &amp; &lt;y&gt;" data-label="ok">a &lt; b &amp; c</p>'
    assert element.render() == expected


def test_nothing_is_left_of_none_and_iterables_are_flat() -> None:
    assert E("p", None, ["a", (E("b", "c"), None)], id=None).render() == "<p>a<b>c</b></p>"
    assert E("br").render() == "<br>"


def test_control_characters_do_not_reach_the_page() -> None:
    assert E("p", "a\x00b\x1bc\n").render() == "<p>a\ufffdb\ufffdc\n</p>"


@pytest.mark.parametrize("name", ["p onload=x", "1p", "", "p>"])
def test_what_is_no_name_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match="not a name"):
        E(name)


def test_a_style_cannot_be_ended_by_its_text() -> None:
    assert E("style", "a > b {}").render() == "<style>a > b {}</style>"
    with pytest.raises(ValueError, match="would end it"):
        E("style", "</style><b>")


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [(0, 1, [0, 0.2, 0.4, 0.6, 0.8, 1]), (-0.13, 0.1, [-0.1, -0.05, 0, 0.05, 0.1]), (3, 4.1, None)],
)
def test_ticks_are_round_and_inside(low: float, high: float, expected: list[float] | None) -> None:
    found = ticks(low, high)
    assert expected is None or found == pytest.approx(expected)
    assert 2 <= len(found) <= 12
    assert all(low <= number <= high for number in found)


@pytest.mark.parametrize(
    ("interval", "kind"),
    [((-2.0, -3.0, -1.0), "gain"), ((2.0, 1.0, 3.0), "loss"), ((0.1, -1.0, 1.0), "unsure")],
)
def test_an_interval_is_coloured_by_what_it_says(
    interval: tuple[float, float, float], kind: str
) -> None:
    plot = interval_bar(*interval, Scale(-4, 4, 100))
    assert plot.attributes["class"] == f"interval {kind}"


def test_an_interval_beyond_the_scale_becomes_one_arrow() -> None:
    def marks(mean: float, low: float, high: float) -> tuple[int, int]:
        markup = interval_bar(mean, low, high, Scale(-1, 1, 100)).render()
        return markup.count("<polygon"), markup.count("<circle")

    assert marks(0.0, -0.5, 0.5) == (0, 1)
    assert marks(5.0, 4.0, 6.0) == (1, 0)
    assert marks(0.5, 0.2, 3.0) == (1, 1)
    assert marks(0.0, float("-inf"), float("inf")) == (2, 1)


def test_plots_are_well_formed_and_stay_inside() -> None:
    plots = [
        interval_axis(Scale(-0.3, 0.1, 200)),
        histogram([("a", [0.5, 0.5]), ("b", [0.0, 1.0])], 0, 1, label="λ <1"),
        paired_bars([(0.1, 0.2), (0.9, 0.8)], level=0.5, label="load"),
        paired_bars([], label="none"),
    ]
    for plot in plots:
        root = ElementTree.fromstring(plot.render())
        _, _, width, height = map(float, root.attrib["viewBox"].split())
        for shape in root.iter():
            for name, limit in (("x", width), ("x1", width), ("y", height), ("y1", height)):
                assert 0 <= float(shape.attrib.get(name, 0)) <= limit


def test_a_page_allows_nothing_to_be_fetched_or_run() -> None:
    document = page("A <title>", E("p", "text"))
    assert "default-src &#x27;none&#x27;" in document
    assert "<title>A &lt;title&gt;</title>" in document
    assert document.startswith("<!doctype html>\n<html lang=")
