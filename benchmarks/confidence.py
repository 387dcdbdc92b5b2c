"""What calibration's confidence gains and what it spares, on the demo model's test text.

Run `make demo` first (for both domains: `examples/demo/demo.py --domain scripture --domain
finnish`), then

    .venv/bin/python benchmarks/confidence.py

prints a table for each domain and writes it as JSON. Settings of a pack were chosen on validation
text by `knnmoe memory calibrate`; the hand-picked ones are fixed here, and the best is taken
on the test text itself, which flatters it. "Before" is the gate that the running mean of evidence
opens, half way between the two texts, as calibration once fitted it.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import click
import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table
from versions import environment

from knnmoe.calibration.calibrate import calibrate
from knnmoe.calibration.confidence import Interval, interval_of
from knnmoe.calibration.controls import background_of, shuffled, without_retrieval
from knnmoe.calibration.settings import UseSettings
from knnmoe.calibration.switching import joined
from knnmoe.runtime.calibration import Calibration, preset
from knnmoe.runtime.errors import VerificationError
from knnmoe.runtime.evaluation import read_for, score_sequences
from knnmoe.runtime.memory import MemoryPack
from knnmoe.runtime.model import Model
from knnmoe.runtime.pack_writing import write_pack
from knnmoe.runtime.texts import TokenSequence, TokenText

ROOT = Path(__file__).resolve().parent.parent
DEMO = ROOT / "build" / "demo"
HAND_PICKED: Mapping[str, Mapping[str, Any]] = {
    "logits, λ = s̄²": {"variant": "logits", "power": 2.0},
    "logits, λ = s̄³": {"variant": "logits", "power": 3.0},
    "residual, λ = s̄²": {"variant": "residual", "power": 2.0},
}


@dataclass(frozen=True)
class Texts:
    """Test text in front of a model, and what the frozen router makes of it."""

    model: Model
    passages: Mapping[str, Sequence[TokenSequence]]
    frozen: Mapping[str, NDArray[np.float64]]

    @staticmethod
    def of(model: Model, read: Mapping[str, TokenText], switch_tokens: int) -> Texts:
        passages = {name: text.sequences for name, text in read.items()}
        passages["switch"] = joined(read["domain"], read["general"], switch_tokens)
        model.disable_memory()
        return Texts(
            model,
            passages,
            {name: score_sequences(model, some).nll for name, some in passages.items()},
        )

    def change(self, pack: MemoryPack, *names: str) -> dict[str, Interval]:
        """Nats a token with a pack; of a switch, of the general text after it."""
        self.model.swap_memory(pack)
        found = {}
        for name in names:
            some = self.passages[name]
            tokens = np.array([p.targets for p in some])
            change = (score_sequences(self.model, some).nll - self.frozen[name]) / tokens
            found[name] = interval_of(change, tokens, np.array([p.document for p in some]))
        return found


@click.command()
@click.option("--demo", type=click.Path(path_type=Path, exists=True), default=DEMO)
@click.option("--json", "target", type=click.Path(path_type=Path),
              default=ROOT / "benchmarks" / "results" / "confidence.json")  # fmt: skip
@click.option("--domains", default="scripture,finnish", show_default=True)
@click.option("--tokens", default=20_000, show_default=True, help="Of each test text.")
def main(demo: Path, target: Path, domains: str, tokens: int) -> None:
    """Print the tables and write them as JSON."""
    console = Console(highlight=False)
    model = Model.load(demo / "bundle", threads=1)
    report: dict[str, Any] = {}
    if target.exists():
        report = json.loads(target.read_text(encoding="utf-8"))
    report |= {"environment": environment(), "tokens": tokens}
    for domain in domains.split(","):
        report.setdefault("domains", {})[domain] = one_domain(console, model, demo, domain, tokens)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


def one_domain(
    console: Console, model: Model, demo: Path, domain: str, tokens: int
) -> dict[str, Any]:
    pack = MemoryPack.open(demo / f"memory-{domain}")
    if not pack.calibrated:
        raise click.ClickException(f"{pack.path} is not calibrated: run the demo")
    read = {
        name: read_for(model, [demo / "texts" / folder / "test.jsonl"], max_tokens=tokens)
        for name, folder in (("domain", domain), ("general", "general"))
    }  # fmt: skip
    texts = Texts.of(model, read, tokens // 2)
    background = background_of(pack)
    rows: dict[str, dict[str, Interval]] = {}
    rows["calibrated"] = texts.change(pack, "domain", "general", "switch")
    rows["the same, running mean (before)"] = texts.change(running_mean(pack), "general", "switch")
    rows["the same, constant correction"] = texts.change(
        without_retrieval(pack, background), "domain"
    )
    for name, numbers in HAND_PICKED.items():
        variant = numbers["variant"]
        used = pack.with_settings(
            variant=variant, neighbors=8, evidence="all",
            calibration=preset(variant, weighting="softmax", power=numbers["power"]),
        )  # fmt: skip
        rows[f"hand-picked: {name}"] = texts.change(used, "domain")
    default = uncalibrated(pack)
    rows["uncalibrated defaults"] = texts.change(default, "domain", "general")
    forced = shuffled(default, background)
    rows["uncalibrated defaults, values shuffled"] = texts.change(forced, "domain", "general")
    best = min(
        (found["domain"].mean, name) for name, found in rows.items() if name.startswith("hand")
    )
    share = rows["calibrated"]["domain"].mean / best[0]
    refused = refusal(demo, pack, domain)
    show(console, domain, pack, rows)
    console.print(f"Share of the best hand-picked gain ({best[1]}): {share:.2f}")
    console.print(f"Calibrating the shuffled memory: {refused or 'ACCEPTED'}")
    return {
        "settings": pack.provenance["calibration"]["chosen"],
        "rows": {
            name: {text: asdict(one) for text, one in found.items()} for name, found in rows.items()
        },
        "share_of_best_hand_picked": share,
        "shuffled_refused": refused,
    }


def running_mean(pack: MemoryPack) -> MemoryPack:
    """The pack with a gate as calibration fitted it before evidence was forgotten."""
    stated = pack.provenance["calibration"]["evidence"]

    def numbers(gate: int, own: Calibration) -> Calibration:
        near, far = (stated[str(gate)][name] for name in ("domain", "general"))
        sharpness = 2 / (near - far) if near > far else 0.0
        return replace(own, decay=1.0, sequence=1.0, midpoint=(near + far) / 2, sharpness=sharpness)

    return pack.with_settings(
        calibration={gate.gate: numbers(gate.gate, gate.calibration) for gate in pack.gates}
    )


def uncalibrated(pack: MemoryPack) -> MemoryPack:
    """The pack as `knnmoe memory build` writes it."""
    use = UseSettings()
    numbers = preset(
        use.variant, confidence=use.confidence, weighting=use.weighting,
        temperature=use.temperature, scale=use.scale, power=use.power,
    )  # fmt: skip
    return pack.with_settings(
        variant=use.variant, neighbors=use.neighbors, calibration=numbers, unused=()
    )


def refusal(demo: Path, pack: MemoryPack, domain: str) -> str | None:
    """What calibration says of the memory with its values shuffled; None if it takes it."""
    rng = np.random.default_rng(0)
    gates = {}
    for gate in pack.gates:
        entries, order = pack.read(gate), np.arange(gate.entries)
        learned = np.flatnonzero(~pack.background(gate))
        order[learned] = rng.permutation(learned)
        gates[gate.gate] = replace(
            entries, residuals=entries.residuals[order], router_logits=entries.router_logits[order]
        )
    folder = Path(tempfile.mkdtemp())
    validation = {
        name: [demo / "texts" / name / "validation.jsonl"] for name in (domain, "general")
    }
    try:
        written = write_pack(
            folder / "shuffled", model=pack.model, gates=gates, variant="residual", neighbors=8,
            similarity=pack.similarity, calibration=preset("residual", weighting="softmax"),
            origins=pack.read_origins(), evidence=pack.evidence, provenance={},
        )  # fmt: skip
        calibrate(
            demo / "bundle", written.path, validation[domain], validation["general"],
            max_tokens=3000, max_latency=None, threads=1,
        )  # fmt: skip
    except VerificationError as error:
        return f"{error.problem}; {error.found}"
    finally:
        shutil.rmtree(folder)
    return None


def show(
    console: Console, domain: str, pack: MemoryPack, rows: Mapping[str, Mapping[str, Interval]]
) -> None:
    chosen = pack.provenance["calibration"]["chosen"]
    table = Table(title=f"'{domain}' ({chosen}): change of test NLL, nats a token")
    table.add_column("use of the memory")
    for column in (domain, "general", f"general after {domain}"):
        table.add_column(column, justify="right")
    for name, found in rows.items():
        cells = (found.get(text) for text in ("domain", "general", "switch"))
        table.add_row(name, *("" if one is None else str(one) for one in cells))
    console.print(table)


if __name__ == "__main__":
    main()
