"""What the options of `knnmoe memory build` do to held-out text, beside the defaults.

Run `make demo` first (it writes the texts and the bundle), then

    .venv/bin/python benchmarks/build_options.py

Every row is built from the same reference text with one option changed and used in the same two
ways, fixed beforehand; the test text has chosen nothing. Intervals are paired over sequences.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.table import Table
from variants import delta, sequences, shown
from versions import environment

from knnmoe.calibration.build import build_memory
from knnmoe.calibration.settings import BuildSettings
from knnmoe.runtime.calibration import preset
from knnmoe.runtime.evaluation import Scores, score_sequences
from knnmoe.runtime.memory import MemoryPack
from knnmoe.runtime.model import Model
from knnmoe.runtime.texts import TokenSequence

ROOT = Path(__file__).resolve().parent.parent
MODEL = ROOT / "examples" / "demo" / "model"
ROWS: dict[str, dict[str, Any]] = {
    "defaults": {},
    "--objective next": {"objective": "next"},
    "--gradient straight-through": {"gradient": "straight-through"},
    "--deduplicate 0.99": {"deduplicate": 0.99},
    "--deduplicate 0.95": {"deduplicate": 0.95},
    "--deduplicate 0.9": {"deduplicate": 0.9},
}
USES: dict[str, Any] = {
    "residual, λ = s²": ("residual", {"weighting": "softmax", "power": 2.0}),
    "logits, λ = s³": ("logits", {"weighting": "softmax", "power": 3.0}),
}


@click.command()
@click.option("--demo", type=click.Path(path_type=Path, exists=True),
              default=ROOT / "build" / "demo")  # fmt: skip
@click.option("--domain", default="scripture", show_default=True)
@click.option("--max-tokens", default=20_000, show_default=True)
@click.option("--test-tokens", default=40_000, show_default=True)
@click.option("--only", multiple=True, type=click.Choice(list(ROWS)), help="Others are kept.")
@click.option("--json", "target", type=click.Path(path_type=Path),
              default=ROOT / "benchmarks" / "results" / "build_options.json")  # fmt: skip
def main(
    demo: Path, domain: str, max_tokens: int, test_tokens: int, only: tuple[str, ...], target: Path
) -> None:
    """Print the table and write it as JSON."""
    model = Model.load(demo / "bundle", threads=1)
    text, kept = sequences(model, demo / "texts" / domain / "test.jsonl"), 0
    for count, sequence in enumerate(text):
        kept += sequence.targets
        if kept >= test_tokens:
            text = text[: count + 1]
            break
    frozen = score_sequences(model, text)
    table = Table(title=f"'{domain}', {max_tokens:,} tokens: change of NLL, nats a token")
    for name in ("build", "entries by gate", "bytes", "reference NLL", "tokens/s", *USES):
        table.add_column(name)
    rows: dict[str, Any] = json.loads(target.read_text())["rows"] if only else {}
    for name in only or ROWS:
        options = ROWS[name]
        with tempfile.TemporaryDirectory() as folder:
            report = build_memory(
                MODEL,
                [demo / "texts" / domain / "reference.jsonl"],
                Path(folder) / "pack",
                settings=BuildSettings(max_tokens=max_tokens, **options),
            )
            found = {use: change(model, report.pack, frozen, text, *how)
                     for use, how in USES.items()}  # fmt: skip
            rows[name] = {**report.to_json(), "pack": None, "changes": found}
        entries = ", ".join(f"{count:,}" for count in report.entries.values())
        table.add_row(name, entries, f"{rows[name]['bytes']:,}",
                      f"{report.nll_before:.4f} → {report.nll_after:.4f}",
                      f"{report.tokens_per_second:,.0f}",
                      *(shown(one) for one in found.values()))  # fmt: skip
        Console(width=200).print(table)
        content = {"environment": environment(), "domain": domain, "rows": rows,
                   "test_tokens": sum(one.targets for one in text)}  # fmt: skip
        target.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def change(
    model: Model,
    pack: MemoryPack,
    frozen: Scores,
    text: tuple[TokenSequence, ...],
    variant: Any,
    numbers: dict[str, Any],
) -> dict[str, float]:
    model.swap_memory(pack.with_settings(variant=variant, calibration=preset(variant, **numbers)))
    found = delta(frozen, score_sequences(model, text))
    model.disable_memory()
    return found


if __name__ == "__main__":
    main()
