"""`confidence.py` once more: another draw of the demo's texts, and if given another model.

    make train  # or: examples/demo/train.py TEXTS OTHER --seed 1, a model of another seed
    .venv/bin/python benchmarks/replication.py FOLDER --model OTHER

Memories are built from the second half of the reference documents (the demo draws from all),
calibrated on what the demo tests on, and measured on what it calibrates on; a memory that
calibration refuses is named. FOLDER keeps bundle, texts, memories and the table's figures.
"""

from __future__ import annotations

from pathlib import Path

import click
import confidence

from knnmoe.calibration.build import build_memory
from knnmoe.calibration.calibrate import calibrate
from knnmoe.calibration.settings import BuildSettings
from knnmoe.export.exporter import export
from knnmoe.runtime.errors import VerificationError

ROOT = Path(__file__).resolve().parent.parent
TEXTS = ROOT / "build" / "demo" / "texts"
SWAPPED = {"validation": "test", "test": "validation"}


@click.command()
@click.argument("folder", type=click.Path(path_type=Path))
@click.option("--texts", type=click.Path(path_type=Path, exists=True), default=TEXTS)
@click.option("--model", type=click.Path(path_type=Path, exists=True),
              default=ROOT / "examples" / "demo" / "model")  # fmt: skip
@click.option("--domain", "domains", multiple=True, default=("scripture", "finnish"))
@click.option("--max-tokens", default=20_000, show_default=True, help="Of the reference text.")
@click.option("--calibration-tokens", default=6000, show_default=True)
@click.option("--test-tokens", default=12_000, show_default=True)
def main(
    folder: Path, texts: Path, model: Path, domains: tuple[str, ...], max_tokens: int,
    calibration_tokens: int, test_tokens: int,
) -> None:  # fmt: skip
    """Make what is missing in FOLDER, then measure."""
    for name in (*domains, "general"):
        arrange(texts / name, folder / "texts" / name)
    if not (folder / "bundle").exists():
        export(model, folder / "bundle")
    serving: list[str] = []
    for domain in domains:
        pack = folder / f"memory-{domain}"
        own, general = folder / "texts" / domain, folder / "texts" / "general"
        if not pack.exists():
            settings = BuildSettings(max_tokens=max_tokens)
            build_memory(model, [own / "reference.jsonl"], pack, settings=settings)
        try:
            calibrate(
                folder / "bundle", pack, [own / "validation.jsonl"],
                [general / "validation.jsonl"], max_tokens=calibration_tokens, threads=1,
            )  # fmt: skip
            serving.append(domain)
        except VerificationError as refusal:
            click.echo(f"{domain}: refused: {refusal}")
    if serving:
        confidence.main(
            ["--demo", str(folder), "--tokens", str(test_tokens), "--domains", ",".join(serving),
             "--json", str(folder / "confidence.json")],
        )  # fmt: skip


def arrange(source: Path, target: Path) -> None:
    """The second half of the reference documents; validation and test text change places."""
    target.mkdir(parents=True, exist_ok=True)
    lines = (source / "reference.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    half = "".join(lines[len(lines) // 2 :])
    (target / "reference.jsonl").write_text(half, encoding="utf-8")
    for name, other in SWAPPED.items():
        content = (source / f"{other}.jsonl").read_bytes()
        (target / f"{name}.jsonl").write_bytes(content)


if __name__ == "__main__":
    main()
