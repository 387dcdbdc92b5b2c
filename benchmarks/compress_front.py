"""Predicted against measured time of compressed memories, and what a quarter of the bytes keeps.

    .venv/bin/python benchmarks/compress_front.py          # after `make demo`

1. The demo's memory in several forms, and one of made-up entries for a model of 2048 dimensions:
   what `knnmoe memory compress --budget` predicts of a decode step, and what the step takes. One
   thread; the times are the processor's, so that other work on the machine counts less.
2. `--budget 25%` of the demo's memories (that of Finnish: `examples/demo/demo.py --domain finnish`;
   `--domains scripture` does without), chosen on validation text; what the packs that it writes
   keep of the gain on test text, which chose nothing. The share is of two gains of the same tokens,
   its interval drawn by document.

Writes the figures to benchmarks/results/compress_front.json.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click
import make_checkpoint as checkpoints
import numpy as np
from rich.console import Console
from rich.table import Table
from versions import environment

from knnmoe.calibration.budget import Budget, compress_to_budget
from knnmoe.calibration.budget_report import BudgetReport
from knnmoe.calibration.budget_search import BudgetSettings
from knnmoe.calibration.compress import compress_pack
from knnmoe.calibration.confidence import Interval, interval_of
from knnmoe.calibration.costs import clock_of, decode_step, measure_costs, turn_by_turn
from knnmoe.calibration.recipes import Recipe
from knnmoe.export.exporter import export
from knnmoe.runtime.calibration import preset
from knnmoe.runtime.evaluation import score_sequences
from knnmoe.runtime.memory import MemoryPack
from knnmoe.runtime.model import Model
from knnmoe.runtime.pack_parts import GateEntries
from knnmoe.runtime.pack_writing import write_pack
from knnmoe.runtime.pipeline import Pipeline
from knnmoe.runtime.statistics import drawn_units, paired_share
from knnmoe.runtime.texts import TokenText, read_text

ROOT = Path(__file__).resolve().parent.parent
DEMO = ROOT / "build" / "demo"
RESULTS = ROOT / "benchmarks" / "results" / "compress_front.json"
CANDIDATES, CONTEXT = 32, 32
NARROW = (
    Recipe("projected", 32, 4, "int4"),
    Recipe("projected", 96, 4, "int4"),
    Recipe("projected", 96, 8, "int8"),
    Recipe("int8", 64, 4, "int4"),
    Recipe("fp16", 128, 4, "fp16"),
    Recipe("projected", 128, 4, "int4"),
    Recipe("graded", 64, 4, "int8", key_widths=(32, 96)),
)
WIDE = (
    Recipe("graded", 128, 4, "int8", key_widths=(128, 384)),
    Recipe("projected", 128, 4, "int4"),
    Recipe("projected", 512, 4, "int4"),
    Recipe("projected", 256, 8, "int8"),
    Recipe("int8", 256, 4, "int4"),
    Recipe("fp16", 256, 4, "fp16"),
)
WIDE_MODEL = {"intermediate_size": 64, "vocab_size": 512, "num_hidden_layers": 2}


@click.command()
@click.option("--demo", type=click.Path(path_type=Path, exists=True), default=DEMO)
@click.option("--json", "target", type=click.Path(path_type=Path), default=RESULTS)
@click.option("--parts", default="times,wide,quarter", show_default=True)
@click.option("--domains", default="scripture,finnish", show_default=True)
@click.option("--front/--no-front", default=True, help="Whether other sizes are measured too.")
@click.option("--tokens", default=12_000, show_default=True, help="Of validation text.")
@click.option("--test-tokens", default=12_000, show_default=True)
@click.option("--seconds", default=6.0, show_default=True, help="Of timing, each memory.")
@click.option("--entries", default=8000, show_default=True, help="Of a gate of the wide model.")
def main(
    demo: Path, target: Path, parts: str, domains: str, front: bool, tokens: int, test_tokens: int,
    seconds: float, entries: int,
) -> None:  # fmt: skip
    """Print the tables and write them as JSON."""
    console = Console(width=120, highlight=False)
    report: dict[str, Any] = json.loads(target.read_text()) if target.exists() else {}
    report["environment"] = environment()
    with tempfile.TemporaryDirectory() as folder:
        for part in parts.split(","):
            if part == "times":
                model = Model.load(demo / "bundle", threads=1)
                pack = MemoryPack.open(demo / "memory-scripture")
                report["demo"] = times(console, "demo", model, pack, NARROW, seconds, Path(folder))
            elif part == "wide":
                model, pack = wide(Path(folder), entries)
                report["wide"] = times(console, "D 2048", model, pack, WIDE, seconds, Path(folder))
            else:
                for domain in domains.split(","):
                    settings = BudgetSettings(max_tokens=tokens, front=front, threads=1)
                    found = quarter(console, demo, domain, settings, test_tokens, Path(folder))
                    report.setdefault("quarter", {})[domain] = found
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


def times(
    console: Console,
    title: str,
    model: Model,
    pack: MemoryPack,
    recipes: Sequence[Recipe],
    seconds: float,
    folder: Path,
) -> dict[str, Any]:
    """Predicted and measured milliseconds of a decode step by recipe."""
    costs = measure_costs(model, pack, CANDIDATES, title, 1)
    pipelines: dict[Any, Pipeline] = {}
    for number, recipe in enumerate(recipes):
        # Recall is not what is looked at here: whatever the width finds is taken.
        report = compress_pack(pack, folder / f"{title}-{number}", recipe.settings(CANDIDATES))
        model.swap_memory(report.pack)
        pipelines[recipe] = Pipeline(model.pipeline.layout)
    model.disable_memory()
    pipelines["frozen"] = Pipeline(model.pipeline.layout)
    measured = step_times(pipelines, seconds)
    frozen = measured["frozen"]
    rows: list[dict[str, Any]] = []
    for recipe in recipes:
        shapes = [recipe.shape(pack, gate, CANDIDATES) for gate in pack.gates]
        predicted = costs.token_ms(shapes)
        rows.append({
            "recipe": recipe.name,
            "bytes": recipe.bytes(pack, pack.gates, CANDIDATES),
            "predicted_ms": predicted,
            "measured_ms": measured[recipe],
            "off": predicted / measured[recipe] - 1,
            "off_to_frozen": predicted / costs.frozen_ms * frozen / measured[recipe] - 1,
        })  # fmt: skip
    table = Table(
        title=f"{title}: {pack.entries:,} entries in each of {len(pack.gates)} gates, frozen step"
        f" {measured['frozen']:.3f} ms (predicted {costs.frozen_ms:.3f})"
    )
    for name in ("memory", "MB", "predicted ms", "measured ms", "off", "off, × frozen"):
        table.add_column(name, justify="left" if name == "memory" else "right")
    for row in rows:
        table.add_row(
            row["recipe"], f"{row['bytes'] / 1e6:.2f}", f"{row['predicted_ms']:.3f}",
            f"{row['measured_ms']:.3f}", f"{row['off']:+.1%}",
            f"{row['off_to_frozen']:+.1%}",
        )  # fmt: skip
    console.print(table)
    return {"costs": asdict(costs), "frozen_ms": measured["frozen"], "rows": rows}


def step_times(pipelines: Mapping[Any, Pipeline], seconds: float) -> dict[Any, float]:
    """Median processor milliseconds of a decode step of each, in turn with the frozen step.

    More at once would have each find the caches as the memories of all others left them. Each is
    scaled by what the frozen step took beside it: other work makes the machine slower for a while.
    """
    runs = {name: decode_step(pipeline, CONTEXT) for name, pipeline in pipelines.items()}
    found: dict[Any, float] = {}
    frozen: list[float] = []
    for name in pipelines:
        if name == "frozen":
            continue
        pair = {"frozen": runs["frozen"], name: runs[name]}
        samples = turn_by_turn(pair, clock_of(1), seconds)
        found[name] = float(np.median(samples[name]) / np.median(samples["frozen"]))
        frozen += samples["frozen"]
    step = float(np.median(frozen))
    return {**{name: ratio * step for name, ratio in found.items()}, "frozen": step}


def wide(folder: Path, entries: int) -> tuple[Model, MemoryPack]:
    """A model of 2048 dimensions with small experts, and a memory of keys of a skewed spectrum."""
    checkpoints.CONFIGS["wide"] = {**checkpoints.CONFIGS["olmoe-1b-7b"], **WIDE_MODEL}
    checkpoint = checkpoints.make_checkpoint("wide", folder / "checkpoint")
    model = Model.load(export(checkpoint, folder / "bundle").bundle, threads=1)
    size, experts = model.identity.hidden_size, model.identity.num_experts
    random = np.random.default_rng(0)
    spread = np.arange(1, size + 1, dtype=np.float32) ** -0.5
    gates = {}
    for gate in range(model.identity.num_gates):
        keys = (random.standard_normal((entries, size), np.float32) * spread).astype(np.float16)
        values = random.standard_normal((2, entries, experts), np.float32).astype(np.float16)
        center = keys.mean(axis=0, dtype=np.float32)
        gates[gate] = GateEntries(keys, values[0], values[1], center)
    pack = write_pack(
        folder / "wide", model=model.identity, gates=gates, variant="residual", neighbors=8,
        similarity="cosine", calibration=preset("residual"), origins=None, provenance={},
    )  # fmt: skip
    return model, pack


def quarter(
    console: Console,
    demo: Path,
    domain: str,
    settings: BudgetSettings,
    test_tokens: int,
    folder: Path,
) -> dict[str, Any]:
    """What `--budget 25%` chooses, and what that keeps on test text."""
    texts = {name: demo / "texts" / name for name in (domain, "general")}
    memory, small = demo / f"memory-{domain}", folder / domain
    report = compress_to_budget(
        memory, small, Budget(share=0.25),
        settings, bundle=demo / "bundle",
        domain=[texts[domain] / "validation.jsonl"],
        general=[texts["general"] / "validation.jsonl"], costs=folder / "costs.json",
    )  # fmt: skip
    model = Model.load(demo / "bundle", threads=1)
    packs = {"whole": MemoryPack.open(memory), "small": MemoryPack.open(small)}
    found: dict[str, Any] = {"report": report.to_json(), "stored_before": packs["whole"].bytes}
    found["report"]["pack"] = small.name
    for name, root in texts.items():
        read = read_text(
            [root / "test.jsonl"], model.tokenizer, max_tokens=test_tokens,
            vocab_size=model.bundle.manifest.architecture.vocab_size,
        )  # fmt: skip
        found[name] = on_test(model, read, packs)
    print_quarter(console, domain, report, found)
    return found


def print_quarter(
    console: Console, domain: str, report: BudgetReport, found: Mapping[str, Any]
) -> None:
    """The front on validation text, and what became of the test text."""
    front = Table(title=f"{domain}: validation text (the half that judges)")
    for column in ("memory", "of the bytes", "recall", "gain kept, %"):
        front.add_column(column, justify="left" if column == "memory" else "right")
    for point in report.points:
        front.add_row(
            point.name, f"{point.bytes / report.points[0].bytes:.1%}", f"{point.recall:.3f}",
            share(asdict(point.kept)) if point.kept else "-",
            style="bold" if point is report.chosen else None,
        )  # fmt: skip
    console.print(front)
    own, other = found[domain], found["general"]
    stored = found["report"]["stored_bytes"] / found["stored_before"]
    console.print(
        f"Settings {report.calibration}. Test text, {own['tokens']:,} tokens, {stored:.1%} of the"
        f" bytes on disk: {domain} {Interval(**own['small'])} of {Interval(**own['whole'])},"
        f" {share(own['kept'])} % kept; general {Interval(**other['small']).text(5)}"
    )


def share(kept: Mapping[str, float]) -> str:
    """`97.5 [93.1, 101.9]`."""
    mean, low, high = (f"{100 * kept[name]:.1f}" for name in ("mean", "low", "high"))
    return f"{mean} [{low}, {high}]"


def on_test(model: Model, text: TokenText, packs: Mapping[str, MemoryPack]) -> dict[str, Any]:
    """Change of NLL by pack, nats a token, and the share of the whole one's that is kept."""
    sequences = text.sequences
    model.disable_memory()
    frozen = score_sequences(model, sequences)
    found: dict[str, Any] = {"tokens": int(frozen.tokens.sum()), "frozen": frozen.mean_nll}
    documents = np.array([s.document for s in text.sequences])
    units, found["drawn"] = drawn_units(documents)
    changes = {}
    for name, pack in packs.items():
        model.swap_memory(pack)
        changes[name] = score_sequences(model, sequences).nll - frozen.nll
        found[name] = asdict(interval_of(changes[name] / frozen.tokens, frozen.tokens, documents))
    kept = paired_share(changes["small"], changes["whole"], units=units)
    found["kept"] = asdict(Interval(*kept))
    return found


if __name__ == "__main__":
    main()
