"""What calibration's confidence gains and what it spares, on the demo model's test text.

Run `make demo` first (for both domains: `examples/demo/demo.py --domain scripture --domain
finnish`), then

    .venv/bin/python benchmarks/confidence.py

prints a table for each domain and writes it as JSON. Settings of a pack were chosen on validation
text by `knnmoe memory calibrate`; the hand-picked ones are fixed here, and the best is taken
on the test text itself, which flatters it. Of these two the gain is also told by how far into its
sequence a token is.
"""

from __future__ import annotations

import itertools
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
from knnmoe.runtime.calibration import preset
from knnmoe.runtime.errors import VerificationError
from knnmoe.runtime.evaluation import read_for
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


POSITIONS = (0, 8, 32, 256)  # in a sequence; a gate has seen little at first
Changes = Sequence[NDArray[np.float64]]  # of each sequence, by predicted token


@dataclass(frozen=True)
class Texts:
    """Test text in front of a model, and what the frozen router makes of it."""

    model: Model
    passages: Mapping[str, Sequence[TokenSequence]]
    frozen: Mapping[str, Changes]

    @staticmethod
    def of(model: Model, read: Mapping[str, TokenText], switch_tokens: int) -> Texts:
        passages = {name: text.sequences for name, text in read.items()}
        passages["switch"] = joined(read["domain"], read["general"], switch_tokens)
        model.disable_memory()
        return Texts(
            model, passages, {name: token_nll(model, some) for name, some in passages.items()}
        )

    def changes(self, pack: MemoryPack, name: str) -> Changes:
        """What a pack changes in one text, token by token."""
        self.model.swap_memory(pack)
        found = token_nll(self.model, self.passages[name])
        return [new - old for new, old in zip(found, self.frozen[name], strict=True)]

    def change(self, pack: MemoryPack, *names: str) -> dict[str, Interval]:
        """Nats a token with a pack; of a switch, of the general text after it."""
        return {name: self.interval(name, self.changes(pack, name)) for name in names}

    def interval(self, name: str, changes: Changes) -> Interval:
        documents = np.array([passage.document for passage in self.passages[name]])
        means = np.array([change.mean() for change in changes])
        return interval_of(means, np.array([len(change) for change in changes]), documents)


def token_nll(model: Model, sequences: Sequence[TokenSequence]) -> Changes:
    """Negative log-likelihood of every predicted token of each sequence."""
    return [-model.score(s.tokens)[s.credited].astype(np.float64) for s in sequences]


def by_position(changes: Changes) -> dict[str, float]:
    """Mean change of the tokens that far into their sequences."""
    return {
        f"{start}-{end - 1}": float(np.concatenate([c[start:end] for c in changes]).mean())
        for start, end in itertools.pairwise(POSITIONS)
    }


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
    calibrated = texts.changes(pack, "domain")
    positions = {"calibrated": by_position(calibrated)}
    rows["calibrated"] = {
        "domain": texts.interval("domain", calibrated),
        **texts.change(pack, "general", "switch"),
    }
    rows["the same, constant correction"] = texts.change(
        without_retrieval(pack, background), "domain"
    )
    for name, numbers in HAND_PICKED.items():
        variant = numbers["variant"]
        used = pack.with_settings(
            variant=variant, neighbors=8, evidence="all",
            calibration=preset(variant, weighting="softmax", power=numbers["power"]),
        )  # fmt: skip
        changes = texts.changes(used, "domain")
        rows[f"hand-picked: {name}"] = {"domain": texts.interval("domain", changes)}
        positions[f"hand-picked: {name}"] = by_position(changes)
    default = uncalibrated(pack)
    rows["uncalibrated defaults"] = texts.change(default, "domain", "general")
    forced = shuffled(default, background)
    rows["uncalibrated defaults, values shuffled"] = texts.change(forced, "domain", "general")
    best = min(
        (found["domain"].mean, name) for name, found in rows.items() if name.startswith("hand")
    )
    share = rows["calibrated"]["domain"].mean / best[0]
    positions = {name: positions[name] for name in ("calibrated", best[1])}
    refused = refusal(demo, pack, domain)
    show(console, domain, pack, rows)
    console.print(f"Share of the best hand-picked gain ({best[1]}): {share:.2f}")
    for name, found in positions.items():
        spans = ", ".join(f"{span} {change:+.3f}" for span, change in found.items())
        console.print(f"By position in its sequence, {name}: {spans}")
    console.print(f"Calibrating the shuffled memory: {refused or 'ACCEPTED'}")
    return {
        "settings": pack.provenance["calibration"]["chosen"],
        "rows": {
            name: {text: asdict(one) for text, one in found.items()} for name, found in rows.items()
        },
        "share_of_best_hand_picked": share,
        "by_position": positions,
        "shuffled_refused": refused,
    }


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
