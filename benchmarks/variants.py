"""The paper's variants, ours and a control, side by side on the demo model's test text.

Run `make demo` first (it builds the bundle and the memories), then

    .venv/bin/python benchmarks/variants.py

Every variant reads the same memory packs. The settings of the calibrated row were chosen on
validation text by `knnmoe memory calibrate`; those of the other rows are fixed beforehand. The test
text has chosen nothing. The control keeps everything and gives each entry another one's values.
"""

from __future__ import annotations

import json
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.table import Table
from versions import environment

from knnmoe.calibration.comparison.controls import changed_pack, shuffled
from knnmoe.runtime.calibration import Variant, preset
from knnmoe.runtime.evaluation import Evaluation, Scores, read_for, score_sequences
from knnmoe.runtime.memory import MemoryPack
from knnmoe.runtime.model import Model
from knnmoe.runtime.texts import TokenSequence

ROOT = Path(__file__).resolve().parent.parent
DEMO = ROOT / "build" / "demo"
TEST_TOKENS = 40_000  # drawn from all over the test text, the same for every row


@dataclass(frozen=True)
class Row:
    """One way to use a memory; `numbers` None keeps the pack's own calibration."""

    name: str
    variant: Variant
    numbers: dict[str, Any] | None
    shuffled: bool = False


ROWS = (
    Row("paper v2: logits, λ = mean similarity", "logits", {}),
    Row("paper v1: assignments, λ = summed similarity", "assignment", {"confidence": "sum"}),
    Row("logits, softmax weights, λ = s³", "logits", {"weighting": "softmax", "power": 3.0}),
    Row("residual, softmax weights, λ = s²", "residual", {"weighting": "softmax", "power": 2.0}),
    Row("calibrated", "residual", None),
    Row("calibrated, values shuffled (control)", "residual", None, shuffled=True),
)


@click.command()
@click.option("--demo", type=click.Path(path_type=Path, exists=True), default=DEMO)
@click.option("--json", "target", type=click.Path(path_type=Path),
              default=ROOT / "benchmarks" / "results" / "variants.json")  # fmt: skip
@click.option("--domains", default="scripture", show_default=True)
def main(demo: Path, target: Path, domains: str) -> None:
    """Print the table and write it as JSON."""
    console = Console()
    model = Model.load(demo / "bundle", threads=1)
    texts = {name: sequences(model, demo / "texts" / name / "test.jsonl")
             for name in ("general", *domains.split(","))}  # fmt: skip
    frozen = {name: score_sequences(model, found) for name, found in texts.items()}
    report: dict[str, Any] = {"environment": environment(), "domains": {}}
    for domain in domains.split(","):
        table = Table(
            title=f"Memory of '{domain}': change of test NLL, nats a token (95 % interval)"
        )
        table.add_column("variant")
        table.add_column(f"{domain}, frozen {frozen[domain].mean_nll:.4f}", justify="right")
        table.add_column(f"general, frozen {frozen['general'].mean_nll:.4f}", justify="right")
        rows: dict[str, Any] = {}
        for row in ROWS:
            model.swap_memory(used(MemoryPack.open(demo / f"memory-{domain}"), row))
            found = {name: delta(frozen[name], score_sequences(model, texts[name]))
                     for name in (domain, "general")}  # fmt: skip
            rows[row.name] = found
            table.add_row(row.name, *(shown(found[name]) for name in (domain, "general")))
        report["domains"][domain] = rows
        console.print(table)
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


def sequences(model: Model, path: Path) -> tuple[TokenSequence, ...]:
    return read_for(model, [path], context=256, max_tokens=TEST_TOKENS).sequences


def used(pack: MemoryPack, row: Row) -> MemoryPack:
    if row.shuffled:
        path = Path(tempfile.mkdtemp()) / "shuffled"
        pack = changed_pack(pack, path, shuffled, "values shuffled")
    if row.numbers is None:
        return pack
    return pack.with_settings(variant=row.variant, calibration=preset(row.variant, **row.numbers))


def delta(frozen: Scores, memory: Scores) -> dict[str, float]:
    mean, low, high = Evaluation(frozen, memory).delta()
    return {"nll": memory.mean_nll, "delta": mean, "delta_low": low, "delta_high": high}


def shown(found: dict[str, float]) -> str:
    return "{delta:+.4f} [{delta_low:+.4f}, {delta_high:+.4f}]".format(**found)


if __name__ == "__main__":
    main()
