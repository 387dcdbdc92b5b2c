"""What the two-stage search finds, against the exact one, on real router inputs of the demo model.

Run `make texts` first; `make demo` too if the memory need not be built here (minutes). Then

    .venv/bin/python benchmarks/two_stage.py

Keys and values are those of a memory of the domain's reference text; queries are router inputs of
test text of the domain and of general text, under the frozen router. Both searches are the NumPy
references in fp32 (runtime/blend.py, runtime/two_stage.py): this measures what int8 loses, and no
time. `int8` alone ranks by int8 keys and keeps their similarities; R candidates are scored again.

The model is small (D 128). Wide router inputs may have a channel that is much larger than the rest,
which takes the int8 steps from the others: further tables stretch one channel of keys and queries.

The last table is of projected keys (`knnmoe memory compress`): recall@8 by width, bits and R, with
all rounding, on the same router inputs and on synthetic keys of D 2048 whose spectrum decays
(standard deviation of direction i: i^-1/2; a topic for fifty keys).
"""

from __future__ import annotations

import json
import platform
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from datetime import date
from pathlib import Path
from typing import Any

import click
import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

from knnmoe import __version__
from knnmoe.calibration.build import build_memory
from knnmoe.calibration.recall import Exact, measure_recall, principal, turned
from knnmoe.calibration.settings import BuildSettings
from knnmoe.runtime.blend import Floats, GateMemory, blend_found, search, unit_rows
from knnmoe.runtime.calibration import Calibration, preset
from knnmoe.runtime.checkpoint import Checkpoint
from knnmoe.runtime.memory import MemoryPack
from knnmoe.runtime.projection import SCAN_BITS
from knnmoe.runtime.routing import RoutingRule
from knnmoe.runtime.two_stage import ScanKeys, quantize_keys, search_in_two_stages

ROOT = Path(__file__).resolve().parent.parent
MODEL = ROOT / "examples" / "demo" / "model"
CANDIDATES = (8, 16, 32, 64)
PROJECTED = (16, 32, 64)
RECALLED = (8, 16)
STRETCHES = (10.0, 30.0)
AT_ONCE = 256  # queries; bounds the matrices of scores

Found = tuple[NDArray[np.int64], Floats, NDArray[np.bool_]]


@dataclass(frozen=True)
class Queries:
    """Router inputs and logits of one text at one gate, [T, D] and [T, E]."""

    x: Floats
    rows: Floats


@click.command()
@click.option("--texts", type=click.Path(path_type=Path, exists=True),
              default=ROOT / "build" / "demo" / "texts")  # fmt: skip
@click.option("--domain", default="scripture", show_default=True)
@click.option("--memory", type=click.Path(path_type=Path), help="Built here if not there.")
@click.option("--max-tokens", default=1000, show_default=True, help="Queries of each text.")
@click.option("--json", "target", type=click.Path(path_type=Path),
              default=ROOT / "benchmarks" / "results" / "two_stage.json")  # fmt: skip
def main(texts: Path, domain: str, memory: Path | None, max_tokens: int, target: Path) -> None:
    """Print the tables and write them as JSON."""
    console = Console(width=100)
    pack = domain_memory(texts, domain, memory or texts.parent / f"memory-{domain}")
    rule = RoutingRule(1)  # asked for by the variant `assignment` alone, which is not used here
    pack = pack.with_settings(variant="logits")
    memories = {gate.gate: pack.gate_memory(gate, rule) for gate in pack.gates}
    asked = {name: queries(texts / name / "test.jsonl", max_tokens) for name in (domain, "general")}
    report: dict[str, Any] = {
        "environment": environment(),
        "entries": pack.entries,
        "hidden_size": pack.model.hidden_size,
        "neighbors": pack.neighbors,
        "queries": {name: len(gates[0].x) for name, gates in asked.items()},
        "texts": {},
        "stretched": {},
    }
    for name, by_gate in asked.items():
        found = {g: compare(memories[g], by_gate[g]) for g in memories}
        report["texts"][name] = found
        console.print(table(f"Queries of '{name}' to the memory of '{domain}'", found, pack))
    for stretch in STRETCHES:
        found = {
            g: compare(*stretched(memories[g], asked[domain][g], stretch), quick=True)
            for g in memories
        }
        report["stretched"][f"{stretch:g}"] = found
        console.print(table(f"Queries of '{domain}', widest channel × {stretch:g}", found, pack))
    projected: dict[str, Any] = {}
    for name, by_gate in asked.items():
        for g in memories:
            size = pack.model.hidden_size
            widths = range(size // 4, size + 1, size // 4)
            projected[f"{name}, gate {g}"] = projections(
                memories[g], by_gate[g].x - memories[g].center, widths
            )
    keys, x = decaying(20_000, 2048, 300)
    projected["decaying spectrum"] = projections(keys, x, (64, 128, 256, 512))
    report["projected"] = projected
    console.print(projection_table(projected))
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


def domain_memory(texts: Path, domain: str, path: Path) -> MemoryPack:
    if path.exists():
        return MemoryPack.open(path)
    settings = BuildSettings(max_tokens=20_000)
    folder = Path(tempfile.mkdtemp()) / "memory"
    return build_memory(
        MODEL, [texts / domain / "reference.jsonl"], folder, settings=settings
    ).pack  # fmt: skip


def queries(text: Path, max_tokens: int) -> dict[int, Queries]:
    """By gate: what a memory of the text would have as keys, unlearned."""
    settings = BuildSettings(steps=0, max_tokens=max_tokens, precision="fp32")
    with tempfile.TemporaryDirectory() as folder:
        pack = build_memory(MODEL, [text], Path(folder) / "queries", settings=settings).pack
        entries = {gate.gate: pack.read(gate) for gate in pack.gates}
    return {g: Queries(np.array(e.keys), np.array(e.router_logits)) for g, e in entries.items()}


def stretched(memory: GateMemory, asked: Queries, stretch: float) -> tuple[GateMemory, Queries]:
    """The memory and the queries with the channel in which keys differ most widened."""
    factors = np.ones(memory.keys.shape[1], np.float32)
    factors[memory.keys.std(axis=0).argmax()] = stretch
    keys = memory.keys * factors
    keys /= np.linalg.norm(keys, axis=1, keepdims=True)
    x = memory.center + (asked.x - memory.center) * factors
    return replace(memory, keys=keys), Queries(x[:300], asked.rows[:300])


def compare(memory: GateMemory, asked: Queries, *, quick: bool = False) -> dict[str, Any]:
    """Recall and change of the blended rows by method, against the exact search."""
    scan = quantize_keys(memory.keys)
    exact = in_pieces(asked, memory)
    found: dict[str, Any] = {}
    for candidates in (0, *CANDIDATES):
        got = in_pieces(asked, memory, scan, candidates)
        widths = [k for k in sorted({*RECALLED, memory.k}) if k <= got[0].shape[1]]
        row: dict[str, Any] = {
            "recall": {k: recall(exact[0][:, :k], got[0][:, :k]) for k in widths}
        }
        if not quick:
            row["change"] = {
                label: change(memory, numbers, asked, exact, got)
                for label, numbers in (
                    ("calibrated", memory.calibration),
                    ("paper", preset("logits")),
                )
            }
        found[f"R {candidates}" if candidates else "int8"] = row
    return found


def in_pieces(
    asked: Queries, memory: GateMemory, scan: ScanKeys | None = None, candidates: int = 0
) -> Found:
    """All queries' neighbours, exact, in two stages or by the int8 keys alone.

    As many as there can be: the first K of them are those that K alone would give.
    """
    parts = []
    memory = replace(memory, k=candidates or max(*RECALLED, memory.k))
    if scan and not candidates:
        memory = replace(memory, keys=scan.keys.astype(np.float32), key_scales=scan.scales)
    for start in range(0, len(asked.x), AT_ONCE):
        x = asked.x[start : start + AT_ONCE]
        if scan and candidates:
            parts.append(search_in_two_stages(x, memory, scan, candidates, np.float32))
        else:
            parts.append(search(x, memory, np.float32))
    ids, similarities, exist = (np.concatenate(part) for part in zip(*parts, strict=True))
    return ids, similarities, exist


def projections(memory: GateMemory, centred: Floats, widths: Iterable[int]) -> dict[str, Any]:
    """recall@8 of projected keys by width, bits and R."""
    exact = Exact.of(centred.astype(np.float32), memory.keys, RECALLED[0], memory.similarity)
    directions = principal(memory.keys)
    return {
        f"width {width}, {bits} bits": {
            f"R {r}": measure_recall(exact, turned(directions, width, 0), bits, r)
            for r in PROJECTED
        }
        for width in widths
        for bits in SCAN_BITS
    }


def decaying(count: int, size: int, asked: int) -> tuple[GateMemory, Floats]:
    """A memory of keys whose spectrum decays, and queries like them."""
    random = np.random.default_rng(0)
    spread = (np.arange(1, size + 1) ** -0.5).astype(np.float32)
    topics = random.standard_normal((count // 50, size), dtype=np.float32) * spread

    def draw(rows: int) -> Floats:
        noise = random.standard_normal((rows, size), dtype=np.float32) * spread
        return unit_rows(topics[random.integers(0, len(topics), rows)] + noise)

    empty = GateMemory.empty(size, 1)
    return replace(empty, keys=draw(count), n_valid=count), draw(asked)


def projection_table(projected: dict[str, Any]) -> Table:
    shown = Table(title=f"recall@{RECALLED[0]} of projected keys")
    for name in ("queries", "projection", *(f"R {r}" for r in PROJECTED)):
        shown.add_column(name, justify="right")
    for name, found in projected.items():
        for kind, row in found.items():
            shown.add_row(name, kind, *(f"{value:.4f}" for value in row.values()))
        shown.add_section()
    return shown


def recall(exact: NDArray[np.int64], got: NDArray[np.int64]) -> float:
    """Share of the exact neighbours that were found."""
    return float((exact[:, :, None] == got[:, None, :]).any(axis=2).mean())


def change(
    memory: GateMemory, numbers: Calibration, asked: Queries, exact: Found, got: Found
) -> dict[str, float]:
    """What the blended rows [T, E] differ by, in units of the router logits' root mean square."""
    state, lengths = np.zeros((1, 2), np.float32), np.array([len(asked.x)])
    used = replace(memory, calibration=numbers)
    right, other = (
        blend_found(
            asked.rows,
            used,
            ids[:, : memory.k],
            similarities[:, : memory.k],
            exist[:, : memory.k],
            state,
            lengths,
        ).rows
        for ids, similarities, exist in (exact, got)
    )
    size = float(np.sqrt(np.mean(asked.rows**2)))
    off = np.abs(other - right) / size
    return {
        "rms": float(np.sqrt(np.mean(off**2))),
        "p99": float(np.quantile(off.max(axis=1), 0.99)),
        "max": float(off.max()),
    }


def table(title: str, found: dict[int, dict[str, Any]], pack: MemoryPack) -> Table:
    """A row a gate and method."""
    widths = sorted({*RECALLED, pack.neighbors})
    shown = Table(title=title)
    for name in ("gate", "search", *(f"recall@{k}" for k in widths)):
        shown.add_column(name, justify="right")
    changes = any("change" in row for by_name in found.values() for row in by_name.values())
    if changes:
        for name in ("calibrated: Δr' rms", "max", "paper: Δr' rms", "max"):
            shown.add_column(name, justify="right")
    for gate, by_name in found.items():
        for name, row in by_name.items():
            cells: Sequence[str] = [
                f"{row['recall'][k]:.4f}" if k in row["recall"] else "" for k in widths
            ]
            if "change" in row:
                of = row["change"]
                numbers = [of[label][kind] for label in of for kind in ("rms", "max")]
                cells = [*cells, *(f"{number:.1e}" for number in numbers)]
            shown.add_row(str(gate), name, *cells)
        shown.add_section()
    return shown


def environment() -> dict[str, str]:
    return {
        "knnmoe": __version__,
        "numpy": np.__version__,
        "python": platform.python_version(),
        "machine": platform.machine(),
        "model": Checkpoint.open(MODEL).fingerprint(),
        "date": date.today().isoformat(),
    }


if __name__ == "__main__":
    main()
