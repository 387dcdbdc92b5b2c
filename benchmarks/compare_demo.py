"""The demo's memory of scripture beside fine-tuning, kNN-LM, controls and the bound.

Run `make demo` first (it builds the bundle and the memory), then

    .venv/bin/python benchmarks/compare_demo.py

which is `knnmoe compare` on the demo's texts: it prints the table, writes the report to
`build/demo/compare.html`, and the figures, without the texts' words, to `results/compare.json`.
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import click
import torch
from versions import environment

from knnmoe.calibration.comparison.bench import Inputs
from knnmoe.calibration.comparison.compare import compare
from knnmoe.calibration.comparison.page import write_page
from knnmoe.calibration.comparison.rows import choose_rows
from knnmoe.calibration.comparison.tables import print_comparison

ROOT = Path(__file__).resolve().parent.parent
DEMO = ROOT / "build" / "demo"
RESULTS = ROOT / "benchmarks" / "results" / "compare.json"


@click.command()
@click.option("--demo", type=click.Path(path_type=Path, exists=True), default=DEMO)
@click.option("--domain", default="scripture", show_default=True)
@click.option("--rows", default="all", show_default=True)
@click.option("--max-tokens", default=5_000, show_default=True, help="Of each test text.")
@click.option("--json", "target", type=click.Path(path_type=Path), default=RESULTS)
def main(demo: Path, domain: str, rows: str, max_tokens: int, target: Path) -> None:
    """Print the table, write the report and the figures."""
    torch.set_num_threads(1)
    started = time.monotonic()
    text, general = demo / "texts" / domain, demo / "texts" / "general"
    found = compare(
        Inputs(
            checkpoint=ROOT / "examples" / "demo" / "model",
            bundle=demo / "bundle",
            memory=demo / f"memory-{domain}",
            reference=[text / "reference.jsonl"],
            validation=[text / "validation.jsonl"],
            text=[text / "test.jsonl"],
            general=[general / "test.jsonl"],
        ),
        rows=choose_rows(rows),
        max_tokens=max_tokens,
        threads=1,
        say=lambda words: click.echo(words, err=True),
    )
    html = demo / "compare.html"
    write_page(html, found)
    print_comparison(found, html)
    figures: dict[str, Any] = {"environment": environment(), **found.to_json()}
    figures["seconds"] = time.monotonic() - started
    for one in (figures["explanation"] or {"texts": {}})["texts"].values():
        del one["gained"], one["lost"]
    target.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
