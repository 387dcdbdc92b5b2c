"""How fast `knnmoe memory build` is against the model that it runs.

    .venv/bin/python benchmarks/build_throughput.py     # after `make demo`, which writes the text

The bound is what learning must take whoever does it: for each token `steps` times forward and
backward and once forward (recording, and the likelihood after the last step), of the same model in
the same process as transformers gives it, on full batches without padding, with no router opened.
The build has to pad, correct routers, keep rows, write and check them besides; its share of the
bound is measured over the learning of all batches (`learning`) and over the whole call (`whole`),
with text reading, the choice of rates, centres and the pack. Rounds of bound and build alternate,
and each round is a pair.

`--repeat N` gives the text N times, for the memory that a long text takes: anonymous memory of this
process is read after each batch.
"""

from __future__ import annotations

import json
import shutil
import statistics
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
from torch.nn import functional as F  # noqa: N812
from versions import environment

from knnmoe.calibration.build import BuildReport, build_memory
from knnmoe.calibration.corpus import Corpus
from knnmoe.calibration.learners import resolved
from knnmoe.calibration.references import Reference
from knnmoe.calibration.settings import BuildSettings
from knnmoe.calibration.teacher import Teacher
from knnmoe.runtime.tokenizer import Tokenizer

ROOT = Path(__file__).resolve().parent.parent
MODEL = ROOT / "examples" / "demo" / "model"
TEXT = ROOT / "build" / "demo" / "texts" / "scripture" / "reference.jsonl"
BOUND_BATCHES = 6


@click.command()
@click.option("--model", type=click.Path(path_type=Path, exists=True), default=MODEL)
@click.option("--texts", type=click.Path(path_type=Path, exists=True), default=TEXT)
@click.option("--max-tokens", default=20_000, show_default=True)
@click.option("--rounds", default=3, show_default=True)
@click.option("--threads", default=1, show_default=True)
@click.option("--device", default="cpu", show_default=True)
@click.option("--dtype", default="auto", show_default=True)
@click.option("--batch-tokens", default=1024, show_default=True)
@click.option("--repeat", type=int, help="Measure memory on the text given so often instead.")
@click.option("--steps", default=3, show_default=True)
@click.option("--json", "target", type=click.Path(path_type=Path),
              default=ROOT / "benchmarks" / "results" / "build_throughput.json")  # fmt: skip
def main(
    model: Path,
    texts: Path,
    max_tokens: int,
    rounds: int,
    threads: int,
    device: str,
    dtype: str,
    batch_tokens: int,
    repeat: int | None,
    steps: int,
    target: Path,
) -> None:
    """Print the figures and put them into the JSON file."""
    torch.set_num_threads(threads)
    settings = BuildSettings(
        steps=steps, device=device, dtype=dtype, batch_tokens=batch_tokens, max_tokens=max_tokens
    )
    names = resolved(settings)
    settings = replace(settings, device=names[0], dtype=names[1])
    found = (
        throughput(model, texts, settings, rounds)
        if repeat is None
        else memory(model, texts, replace(settings, max_tokens=None), repeat)
    )
    found |= {"threads": threads, "device": names[0], "dtype": names[1], "steps": steps}
    report = json.loads(target.read_text()) if target.exists() else {}
    report |= {"environment": environment() | {"torch": torch.__version__}}
    report["throughput" if repeat is None else "memory"] = found
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    click.echo(json.dumps({k: v for k, v in found.items() if k != "rounds"}, indent=1))


def throughput(model: Path, text: Path, settings: BuildSettings, rounds: int) -> dict[str, Any]:
    """Paired rounds of the bound and of the build."""
    pairs = []
    for _ in range(rounds):
        bound = bound_speed(model, text, settings)
        with tempfile.TemporaryDirectory() as folder:
            report = build_memory(model, [text], Path(folder) / "pack", settings=settings)
        whole = report.tokens / report.seconds
        pairs.append({
            "bound": bound, "learning": report.tokens_per_second, "whole": whole,
            "learning_share": report.tokens_per_second / bound, "whole_share": whole / bound,
        })  # fmt: skip
        click.echo(" ".join(f"{name} {value:.4g}" for name, value in pairs[-1].items()), err=True)
    medians = {name: statistics.median(pair[name] for pair in pairs) for name in pairs[0]}
    return {"tokens": report.tokens, **medians, "rounds": pairs}


def bound_speed(path: Path, text: Path, settings: BuildSettings) -> float:
    """Predicted tokens a second of the passes alone."""
    teacher = Teacher.load(path, device=settings.device, dtype=resolved(settings)[1])
    batches = full_batches(path, text, settings, teacher)
    timed_pass(teacher, batches[0], backward=True)  # the first is slower
    forward = sum(timed_pass(teacher, batch, backward=False) for batch in batches)
    both = sum(timed_pass(teacher, batch, backward=True) for batch in batches)
    targets = sum(batch.shape[0] * (batch.shape[1] - 1) for batch in batches)
    return targets / (settings.steps * both + forward)


def full_batches(
    path: Path, text: Path, settings: BuildSettings, teacher: Teacher
) -> list[torch.Tensor]:
    """Sequences of the text of full length, as many as a batch has room for."""
    corpus = Corpus.read(
        [Reference(text)], Tokenizer.load(path), vocab_size=teacher.vocab_size,
        max_length=settings.max_length,
    )  # fmt: skip
    full = np.flatnonzero(corpus.index.lengths == settings.max_length)
    rows = max(1, settings.batch_tokens // settings.max_length)
    return [
        torch.from_numpy(np.stack([corpus.piece(int(s)).tokens for s in full[n : n + rows]])).long()
        .to(teacher.device)
        for n in range(0, min(len(full) - rows, BOUND_BATCHES * rows) + 1, rows)
    ][:BOUND_BATCHES]  # fmt: skip


def timed_pass(teacher: Teacher, tokens: torch.Tensor, *, backward: bool) -> float:
    """Seconds of one pass; backward goes to what enters the first layer."""
    model = teacher.model
    synchronize(tokens)
    started = time.perf_counter()
    embedded = model.get_input_embeddings()(tokens).detach().requires_grad_(backward)
    with torch.set_grad_enabled(backward):
        logits = model(inputs_embeds=embedded, use_cache=False).logits[:, :-1]
        loss = F.cross_entropy(
            logits.flatten(0, 1).float(), tokens[:, 1:].flatten(), reduction="sum"
        )
    if backward:
        torch.autograd.grad(loss, embedded)
    synchronize(tokens)
    return time.perf_counter() - started


def synchronize(tokens: torch.Tensor) -> None:
    """Wait for the device; a CPU has done its work already."""
    if tokens.is_cuda:
        torch.cuda.synchronize(tokens.device)


def memory(model: Path, text: Path, settings: BuildSettings, repeat: int) -> dict[str, Any]:
    """What a long text takes: anonymous memory of the process, in MiB, as the build goes on."""
    read: list[int] = []
    done: list[int] = []

    def progress(tokens: int, total: int) -> None:
        read.append(anonymous())
        done.append(tokens)

    with tempfile.TemporaryDirectory() as folder:
        long = Path(folder) / text.name
        with long.open("wb") as stream:
            for _ in range(repeat):
                with text.open("rb") as source:
                    shutil.copyfileobj(source, stream)
        size = long.stat().st_size
        report: BuildReport = build_memory(
            model, [long], Path(folder) / "pack", settings=settings, progress=progress
        )
        read.append(anonymous())
        return {
            "text_bytes": size, "entries": report.pack.entries, "pack_bytes": report.pack.bytes,
            "anonymous_mib_after_loading": read[0], "anonymous_mib_at_most": max(read),
            "anonymous_mib_at_the_end": read[-1], "seconds": report.seconds,
            "tokens_per_second": report.tokens_per_second,
        }  # fmt: skip


def anonymous() -> int:
    """MiB of this process that no file stands behind."""
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith("RssAnon"):
            return int(line.split()[1]) >> 10
    return 0


if __name__ == "__main__":
    main()
