from __future__ import annotations

import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from browser import Browser, executable
from knnmoe.runtime.errors import ProfileError
from knnmoe.runtime.profiling.budget import fit_budget
from knnmoe.runtime.profiling.html import profile_page
from knnmoe.runtime.profiling.record import Point, ProfileRecord
from knnmoe.runtime.reports.timing_plots import (
    Dot,
    Piece,
    lines,
    short,
    span,
    stack,
    waterfall_bar,
)
from profiles import synthetic_record

VOID = {"br", "col", "hr", "img", "meta"}
BUDGET = 4.0


def sized_record(gates: int = 3) -> ProfileRecord:
    """With steps of three memory sizes more at the first shape, each slower than the last."""
    record = synthetic_record(gates=gates)
    full, frozen = record.points[:2]

    def between(entries: int) -> Point:
        share = entries / full.memory_entries
        whole = tuple(
            a + (b - a) * share for a, b in zip(frozen.whole_ms, full.whole_ms, strict=True)
        )
        return replace(full, memory_entries=entries, whole_ms=whole)

    more = tuple(between(entries) for entries in (250, 500, 1000))
    return replace(record, points=(*record.points, *more))


class Tree(HTMLParser):
    """Checks that elements are closed in their order; collects names and attributes."""

    def __init__(self, document: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.feed(document)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def text_of(document: str) -> str:
    return " ".join(re.sub(r"<[^>]*>", " ", re.sub(r"<style>.*?</style>", "", document)).split())


def test_the_page_is_whole_and_fetches_and_runs_nothing() -> None:
    record = sized_record()
    tree = Tree(profile_page(record, fit_budget(record, BUDGET)))
    names = {name for name, _ in tree.found}
    assert not names & {"script", "link", "img", "iframe", "object", "base", "form"}
    for name, attributes in tree.found:
        assert not {"src", "href", "style", "onload"} & set(attributes)
        if name == "svg":
            assert re.fullmatch(r"0 0 [\d.]+ [\d.]+", attributes["viewbox"] or "")
            assert attributes["role"] == "img"
    assert "url(" not in profile_page(record)


def test_the_page_says_what_the_record_says() -> None:
    record = replace(sized_record(), warnings=("The clock <drifted>.",))
    text = text_of(profile_page(record, fit_budget(record, BUDGET)))
    for part in record.points[0].parts:
        assert part.name in text
    for words in (
        "The clock &lt;drifted&gt;.", "Decode at 512, frozen", "Prompt of 64, 2,000 entries",
        f"budget of {BUDGET:g} ms", "keys and values of the context", "a processor", "GB/s",
        "noise: jitter p99 us", "weights 11.4 MiB", "12.5",
    ):  # fmt: skip
        assert words in text, words


def test_a_step_is_drawn_with_its_gates_insides_and_bounds() -> None:
    record = sized_record(gates=2)
    tree = Tree(profile_page(record))
    kinds = [attributes.get("class") for _, attributes in tree.found]
    points = [point for point in record.points if point.parts]
    with_memory = sum(1 for point in points if point.memory_entries)
    assert kinds.count("piece segment") == 3 * len(points)
    assert kinds.count("piece scan") == kinds.count("piece blend") == 2 * with_memory
    assert kinds.count("piece gate") == 2 * (len(points) - with_memory)
    bounds = sum(part.bound is not None for point in points for part in point.parts)
    assert kinds.count("bound") == bounds + len(points)  # and one a row of the table


def test_sizes_are_drawn_where_there_are_several() -> None:
    assert "Latency over memory size" not in text_of(profile_page(synthetic_record()))
    record = sized_record()
    plain = profile_page(record)
    assert plain.count('class="plot lines"') == 1
    assert plain.count('class="budget"') == 0
    assert profile_page(record, fit_budget(record, BUDGET)).count('class="budget"') == 1


def test_an_interrupted_record_says_so_and_one_without_steps_is_refused() -> None:
    record = replace(synthetic_record(finished=False), machine_bounds=None)
    assert "was interrupted" in text_of(profile_page(record))
    empty = tuple(replace(p, whole_ms=(), rounds=(), parts=()) for p in record.points)
    with pytest.raises(ProfileError, match="no measured step"):
        profile_page(replace(record, points=empty))


def test_a_size_that_was_hardly_measured_is_no_dot() -> None:
    record = sized_record()
    full, *others, last = record.points
    hardly = replace(last, whole_ms=last.whole_ms[:1], rounds=(0,), parts=())
    page = profile_page(replace(record, points=(full, *others, hardly)))
    assert page.count('class="dot"') == profile_page(record).count('class="dot"') - 1


def test_a_layout_that_cannot_be_taken_apart_has_no_waterfall() -> None:
    record = synthetic_record()
    fused = tuple(replace(point, layout="fused", parts=()) for point in record.points)
    assert "cannot be taken apart" in profile_page(replace(record, points=fused))


def test_plots_are_well_formed_and_stay_inside() -> None:
    dots = [Dot(0, 1.0, 0.9, 1.1), Dot(2e6, 3.0, 2.5, 3.5)]
    plots = [
        waterfall_bar(1, [Piece("scan", 2), Piece("blend", 1)], 4, bound=9.0, label="gate <0>"),
        span((1, 2, 3), 3, bound=0.5, label="x"),
        stack([Piece("weights", 5)], label="y"),
        lines(dots, dots, level=9.0, label="z"),
        lines([], [], level=None, label="none"),
    ]
    for plot in plots:
        root = ElementTree.fromstring(plot.render())
        _, _, width, height = map(float, root.attrib["viewBox"].split())
        for shape in root.iter():
            for name, limit in (("x", width), ("x1", width), ("x2", width), ("y", height),
                                ("y1", height), ("cx", width), ("cy", height)):  # fmt: skip
                assert 0 <= float(shape.attrib.get(name, 0)) <= limit


@pytest.mark.parametrize(("count", "text"), [(20000, "20k"), (1.5e6, "1.5M"), (50, "50")])
def test_counts_on_an_axis_are_short(count: float, text: str) -> None:
    assert short(count) == text


# What a browser makes of it


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Any:
    program = executable()
    if program is None:
        pytest.skip("no Chromium here; Debian has it as the package chromium")
    with Browser(program, tmp_path_factory.mktemp("browser")) as found:
        yield found


@pytest.mark.slow
@pytest.mark.parametrize(
    ("width", "dark", "medium"),
    [(1280, False, "screen"), (390, False, "screen"), (390, True, "screen"), (800, True, "print")],
)
def test_nothing_is_wider_than_the_window_and_the_plots_are_there(
    browser: Browser, tmp_path: Path, width: int, dark: bool, medium: str
) -> None:
    record = sized_record(gates=12)
    file = tmp_path / "report.html"
    file.write_text(profile_page(record, fit_budget(record, 100)), encoding="utf-8")
    browser.open(file, width, dark=dark, medium=medium)
    assert browser.value("document.documentElement.scrollWidth") <= width
    sizes = browser.value(
        "[...document.querySelectorAll('svg')].filter(e => e.checkVisibility())"
        ".map(e => e.getBoundingClientRect()).map(r => [r.left, r.right, r.height])"
    )
    assert len(sizes) > 30
    for left, right, height in sizes:
        assert 0 <= left < right <= width
        assert height > 5
    columns = browser.value(
        "[...document.querySelectorAll('.bars')].filter(e => e.checkVisibility())"
        ".map(e => getComputedStyle(e).gridTemplateColumns.split(' ').length)"
    )
    assert set(columns) == {3}  # name, bar, number
    paper = browser.value("getComputedStyle(document.body).backgroundColor")
    assert (paper == "rgb(255, 255, 255)") == (not dark or medium == "print")
    letters = browser.value(
        "Math.min(...[...document.querySelectorAll('svg.lines text')]"
        ".map(e => e.getBoundingClientRect().height))"
    )
    assert letters > 10
    browser.screenshot(tmp_path / "report.png")
    assert (tmp_path / "report.png").read_bytes().startswith(b"\x89PNG")
    shown = browser.value(
        "[...document.querySelectorAll('details .bars')].map(e => e.checkVisibility())"
    )
    assert len(shown) > 3
    assert set(shown) == {medium == "print"}  # on paper nothing can be opened
