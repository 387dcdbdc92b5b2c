"""The picture of a front: an SVG that stands alone and can be read."""

from __future__ import annotations

from itertools import combinations
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from xml.etree import ElementTree

import pytest
from click.testing import CliRunner

from knnmoe.calibration.budget_report import Point
from knnmoe.calibration.cli import memory as memory_commands
from knnmoe.calibration.confidence import Interval, Limits
from knnmoe.calibration.front import front_svg, write_front
from knnmoe.calibration.recipes import Recipe
from knnmoe.runtime.errors import OutputError, SettingError

SVG = "{http://www.w3.org/2000/svg}"
LETTER, HIGH = 8.0, 12.0


def point(held: int, kept: float, general: float = 0.0, *, whole: bool = False) -> Point:
    recipe = None if whole else Recipe("graded", 64, 4, "int8", 0.876, "credit", (32, 96))
    return Point(
        recipe, held, {}, held, 0.9, 0.1, 1.5, Interval(-0.1, -0.2, -0.05),
        Interval(0, 0, general), None, Interval(kept, kept - 0.08, kept + 0.06),
    )  # fmt: skip


def report(*points: Point, chosen: int, judge: str = "likelihood") -> Any:
    """Of 1000 bytes, and a budget of 250."""
    return SimpleNamespace(
        points=(point(1000, 1.0, whole=True), *points), chosen=points[chosen - 1], limit=250,
        judge=judge, limits=Limits(0.002, 5.0),
    )  # fmt: skip


CROWDED = report(
    point(249, 0.97), point(249, 0.96), point(250, 0.955), point(248, 0.94), point(250, 0.99),
    point(150, 0.8, general=0.1), chosen=5,
)  # fmt: skip


def drawn(found: Any) -> Any:
    return ElementTree.fromstring(front_svg(found).render())


def boxes_of_numbers(picture: Any) -> list[tuple[float, float, float, float]]:
    """Of those beside the marks; the same numbers stand below, in a column."""
    found = []
    for text in picture.iter(f"{SVG}text"):
        if "number" in str(text.get("class")) and text.get("x") != "12":
            width = LETTER * len(str(text.text))
            anchor = {"start": 0.0, "middle": 0.5, "end": 1.0}[str(text.get("text-anchor"))]
            left, foot = float(str(text.get("x"))) - anchor * width, float(str(text.get("y")))
            found.append((left, foot - HIGH, left + width, foot))
    return found


def apart(one: tuple[float, ...], other: tuple[float, ...]) -> bool:
    return one[0] >= other[2] or other[0] >= one[2] or one[1] >= other[3] or other[1] >= one[3]


def test_numbers_of_crowded_points_cover_no_other_number() -> None:
    boxes = boxes_of_numbers(drawn(CROWDED))
    assert len(boxes) == 7
    for one, other in combinations(boxes, 2):
        assert apart(one, other), (one, other)


def test_the_budget_is_a_line_where_its_bytes_are() -> None:
    picture = drawn(CROWDED)
    (line,) = [e for e in picture.iter(f"{SVG}line") if e.get("class") == "level"]
    at = float(str(line.get("x1")))
    whole, *smaller = [float(str(e.get("cx"))) for e in picture.iter(f"{SVG}circle")]
    assert at == pytest.approx(smaller[2])  # of 250 bytes
    axis = next(e for e in picture.iter(f"{SVG}line") if e.get("class") == "axis")
    zero = float(str(axis.get("x1")))
    assert (at - zero) / (whole - zero) == pytest.approx(0.25, abs=1e-3)
    words = [e.text for e in picture.iter(f"{SVG}text")]
    assert "budget 25 %" in words


def test_every_point_is_said_in_words_too() -> None:
    words = " ".join(str(e.text) for e in drawn(CROWDED).iter(f"{SVG}text"))
    assert words.count("keys 32×8 + 96×4 bit, scan 64×4 bit, int8 values") == 6
    assert "25.0 %, keeps 99.0 % [91, 105], 1.5 ms a token" in words
    assert words.count("(written)") == words.count("(costs other text too much)") == 1
    assert "bytes held, % of the memory as it is" in words


def test_without_text_recall_is_drawn() -> None:
    plain = Point(None, 1000, {}, 1000, 1.0, 0.0, None)
    small = Point(Recipe("int8", 64, 4, "int8"), 240, {}, 240, 0.91, 0.1, None)
    found = SimpleNamespace(
        points=(plain, small), chosen=small, limit=250, judge="recall", limits=Limits()
    )
    words = " ".join(str(e.text) for e in drawn(found).iter(f"{SVG}text"))
    assert "neighbours found, %" in words
    assert "24.0 %, finds 91.0 %" in words


@pytest.mark.parametrize("name", ["front.png", "front", "front.svg.pdf"])
def test_only_svg_is_drawn_and_that_is_said_before_any_work(tmp_path: Path, name: str) -> None:
    with pytest.raises(SettingError, match=r"--front: is drawn as SVG alone.*front.*\.svg; a"):
        write_front(CROWDED, tmp_path / name)
    # Nothing of what it names is there.
    command = ["compress", "no-pack", "small", "--budget", "25%", "--front", str(tmp_path / name)]
    result = CliRunner().invoke(memory_commands, command)
    assert result.exit_code == 1
    assert "is drawn as SVG alone" in result.output
    assert not list(tmp_path.iterdir())


def test_a_missing_directory_is_said_before_any_work(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match=r"front\.svg: its directory does not exist"):
        write_front(CROWDED, tmp_path / "nowhere" / "front.svg")
