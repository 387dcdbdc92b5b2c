"""The page around a report; readable on small screens, in the dark and printed."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ..atomic import write_file
from .elements import Content, E, Element

_STYLE = """
:root { color-scheme: light dark; --paper: #fff; --ink: #1c1e21; --soft: #5d646d; --line: #d9dde2;
  --shade: #f4f5f7; --gain: #1a7f4b; --loss: #b3362b; --unsure: #6b7480; --a: #8a94a0;
  --b: #2563ae; --mark: #ffe9a8; }
@media (prefers-color-scheme: dark) { :root { --paper: #15181c; --ink: #e6e8eb; --soft: #a3abb5;
  --line: #343a42; --shade: #1e2227; --gain: #57c98c; --loss: #f0887d; --unsure: #9aa4b0;
  --a: #77818d; --b: #6fa8ee; --mark: #5c4a12; } }
@media print { :root { --paper: #fff; --ink: #000; --soft: #444; --line: #bbb; --shade: #f4f4f4;
  --gain: #1a7f4b; --loss: #b3362b; --unsure: #6b7480; --a: #999; --b: #2563ae; --mark: #eee; }
  section { break-inside: avoid-page; } body { font-size: 10pt; } details > * { display: block; }
  details::details-content { content-visibility: visible; height: auto; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1.5rem 1rem 4rem; max-width: 68rem; background: var(--paper);
  color: var(--ink); font: 16px/1.5 system-ui, -apple-system, "Segoe UI", sans-serif; }
h1 { font-size: 1.7rem; line-height: 1.2; margin: 0 0 .5rem; }
h2 { font-size: 1.2rem; margin: 2.5rem 0 .25rem; border-top: 1px solid var(--line);
  padding-top: 1.25rem; }
h3 { font-size: 1rem; margin: 1.25rem 0 .25rem; }
p, ul { margin: .5rem 0; max-width: 46rem; }
.soft, figcaption, caption { color: var(--soft); font-size: .875rem; }
.key i { display: inline-block; width: .8em; height: .8em; border-radius: 2px; margin: 0 .3em 0
  .9em; } .key i:first-child { margin-left: 0; }
.key .a { background: var(--a); } .key .b { background: var(--b); }
table { border-collapse: collapse; width: 100%; margin: .75rem 0; }
th:first-child { max-width: 18rem; }
th { text-align: left; font-weight: 600; font-size: .875rem; vertical-align: bottom; }
th, td { padding: .35rem .6rem .35rem 0; border-bottom: 1px solid var(--line);
  vertical-align: top; }
td.number, th.number { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
tr.group td { color: var(--soft); font-size: .8rem; padding-top: 1rem; border-bottom-width: 2px;
  text-transform: uppercase; letter-spacing: .04em; }
tr.best td { background: var(--shade); }
.change { white-space: nowrap; font-variant-numeric: tabular-nums; }
.change small { color: var(--soft); display: block; }
.gain { --kind: var(--gain); } .loss { --kind: var(--loss); } .unsure { --kind: var(--unsure); }
.change b { color: var(--kind); font-weight: 600; }
.grid { display: grid; gap: 1rem 1.5rem; grid-template-columns: repeat(auto-fill,
  minmax(16rem, 1fr)); margin: .75rem 0; }
figure { margin: 0; } figcaption b { color: var(--ink); }
svg { display: block; max-width: 100%; height: auto; }
svg text { fill: var(--soft); font: 12px system-ui, sans-serif; }
svg.interval { overflow: visible; min-width: 13.5rem; }
svg.interval text { font-size: 14px; }
.zero, line.axis { stroke: var(--line); } .zero { stroke: var(--soft); stroke-dasharray: 2 2; }
.whisker { stroke: var(--kind, var(--soft)); stroke-width: 2; }
.mark { fill: var(--kind, var(--soft)); }
.area { fill-opacity: .3; stroke-width: 1.5; } .area.a { fill: var(--a); stroke: var(--a); }
.area.b { fill: var(--b); stroke: var(--b); }
.bar.a { fill: var(--a); } .bar.b { fill: var(--b); }
.level { stroke: var(--soft); stroke-dasharray: 4 3; }
mark { background: var(--mark); color: inherit; border-radius: 2px; padding: 0 .1em; }
.text { overflow-wrap: anywhere; font-size: .9375rem; }
.change + svg { margin-top: .15rem; }
@media (max-width: 44rem) {
  body { padding: 1rem .75rem 3rem; }
  table.cards, .cards tbody, .cards tr, .cards td { display: block; width: 100%; }
  .cards thead { display: none; }
  .cards tr { border-bottom: 1px solid var(--line); padding: .6rem 0; }
  .cards td, .cards td.number { border: 0; padding: .1rem 0; text-align: left; }
  .cards tr.group { padding: .75rem 0 0; border-bottom-width: 2px; }
  .cards tr.best { background: var(--shade); }
  .cards td[data-label]::before { content: attr(data-label) " "; color: var(--soft);
    font-size: .875rem; }
  .cards td:empty { display: none; }
  .cards .change, .cards .change small { display: inline; }
  .cards .change small { margin-left: .5em; }
  .cards tr.axis { display: none; }
}
"""


def page(title: str, *content: Content, style: str = "") -> str:
    """A whole document that fetches and runs nothing; `style` comes after the common one."""
    policy = "default-src 'none'; style-src 'unsafe-inline'"
    head = E(
        "head",
        E("meta", charset="utf-8"),
        E("meta", http_equiv="Content-Security-Policy", content=policy),
        E("meta", name="viewport", content="width=device-width, initial-scale=1"),
        E("title", title),
        E("style", _STYLE + style),
    )
    html = E("html", head, E("body", E("h1", title), *content), lang="en")
    return f"<!doctype html>\n{html.render()}\n"


def write_html(path: Path, document: str) -> None:
    """Write a page; a report that is there is replaced, whole or not at all.

    Raises:
        OutputError: If it cannot be written.
    """
    write_file(path, document.encode("utf-8"))


def section(heading: str, *content: Content) -> Element:
    """A part of a page under a heading."""
    return E("section", E("h2", heading), *content)


def table(columns: Sequence[str], rows: Sequence[Element], *, cards: bool = True) -> Element:
    """A table with those heads; with `cards`, each row is a block of its own on narrow screens."""
    heads = [E("th", name, scope="col") for name in columns]
    return E(
        "table", E("thead", E("tr", heads)), E("tbody", rows), class_="cards" if cards else None
    )


def cell(content: Content, label: str = "", *, number: bool = False) -> Element:
    """A cell; `label` names its column where the heads are not shown."""
    return E("td", content, data_label=label or None, class_="number" if number else None)


def figure(plot: Element, *caption: Content) -> Element:
    """A plot with words below it."""
    return E("figure", plot, E("figcaption", *caption))


def grid(figures: Sequence[Element]) -> Element:
    """Figures side by side, as many as the width holds."""
    return E("div", figures, class_="grid")


def colour_key(*names: str) -> Element:
    """What the colours `a` and `b` of the plots stand for."""
    return E(
        "p",
        [(E("i", class_=colour), name) for colour, name in zip("ab", names, strict=False)],
        class_="key soft",
    )
