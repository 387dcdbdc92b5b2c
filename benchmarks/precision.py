"""What each precision costs and saves: NLL on real text, routing decisions that flip, size, speed.

Run `make texts` first; after `make demo` the gain of a memory built on fp32 is measured on every
precision too. Then

    .venv/bin/python benchmarks/precision.py

The demo model is exported at each precision and compared with its fp32 bundle on the same sequences
of three test texts. A decision flips where the set of experts that a gate takes for a token is not
that of fp32; upstream differences count, since every bundle runs by itself. Differences of NLL come
with the 95 % interval of a paired bootstrap over sequences. Times are medians over rounds in which
every bundle takes its turn, one thread.

The demo model is so small that calls, not weights, take the time of a step. `--wide N` times decode
steps of N layers of OLMoE-1B-7B's shape with random weights as well (some GB of disk a layer).
"""

from __future__ import annotations

import json
import shutil
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import click
import ml_dtypes
import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table
from safetensors.numpy import save_file
from versions import environment

from knnmoe.export.exporter import ExportReport, export
from knnmoe.export.storage import QuantizeOptions
from knnmoe.runtime.evaluation import Evaluation, Scores, read_for, score_sequences
from knnmoe.runtime.model import Model
from knnmoe.runtime.statistics import paired_bootstrap
from knnmoe.runtime.texts import TokenSequence

ROOT = Path(__file__).resolve().parent.parent
MODEL = ROOT / "examples" / "demo" / "model"
DEMO = ROOT / "build" / "demo"
TEXTS = ("general", "scripture", "finnish")
CONTEXT = 256
PROMPT, STEPS = 32, 24  # of a round of decoding

Sequences = tuple[TokenSequence, ...]


@dataclass(frozen=True)
class Way:
    """One way to store the model."""

    name: str
    precision: str
    options: QuantizeOptions = field(default_factory=QuantizeOptions)


WAYS = (
    Way("fp32", "fp32"),
    Way("fp16", "fp16"),
    Way("int8", "int8"),
    Way("int8, head int8", "int8", QuantizeOptions(head_bits=8)),
    Way("int4", "int4"),
    Way("int4, no search", "int4", QuantizeOptions(search=False)),
    Way("int4, zero points", "int4", QuantizeOptions(zero_points=True)),
    Way("int4, exact activations", "int4", QuantizeOptions(exact_activations=True)),
    Way("int4, head int8", "int4", QuantizeOptions(head_bits=8)),
    Way("int4, head int4", "int4", QuantizeOptions(head_bits=4)),
)
WIDE_WAYS = (
    Way("fp32", "fp32"),
    Way("int8, head int8", "int8", QuantizeOptions(head_bits=8, search=False)),
    Way("int4", "int4", QuantizeOptions(search=False)),
    Way("int4, head int8", "int4", QuantizeOptions(head_bits=8, search=False)),
    Way("int4 in blocks of 32, head int8", "int4",
        QuantizeOptions(head_bits=8, search=False, block_size=32)),
    Way("int4, zero points, head int8", "int4",
        QuantizeOptions(head_bits=8, search=False, zero_points=True)),
)  # fmt: skip


@dataclass(frozen=True)
class Reading:
    """What a bundle makes of the sequences of one text.

    Attributes:
        scores: NLL of each sequence.
        experts: For each sequence [G, L, k]: the experts taken, ascending.
    """

    scores: Scores
    experts: list[NDArray[np.int32]]


@click.command()
@click.option("--model", type=click.Path(path_type=Path, exists=True), default=MODEL)
@click.option("--demo", type=click.Path(path_type=Path), default=DEMO, help="Of texts and memory.")
@click.option("--json", "target", type=click.Path(path_type=Path),
              default=ROOT / "benchmarks" / "results" / "precision.json")  # fmt: skip
@click.option("--tokens", default=20_000, show_default=True, help="Of each text.")
@click.option("--rounds", default=40, show_default=True, help="Of timing.")
@click.option("--wide", default=0, help="Layers of OLMoE-1B-7B's shape to time as well.")
def main(model: Path, demo: Path, target: Path, tokens: int, rounds: int, wide: int) -> None:
    """Print the tables and write them as JSON."""
    console = Console()
    report: dict[str, Any] = {"environment": environment()}

    def keep(section: str, figures: dict[str, Any]) -> None:
        report[section] = figures
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")

    with tempfile.TemporaryDirectory() as folder:
        exported = {way.name: bundle_of(model, Path(folder), way) for way in WAYS}
        models = {name: Model.load(found.bundle, threads=1) for name, found in exported.items()}
        texts = {name: sequences(models["fp32"], demo / "texts" / name / "test.jsonl", tokens)
                 for name in TEXTS}  # fmt: skip
        keep("quality", quality(console, models, exported, texts))
        keep("decode", decode(console, "the demo model", models, rounds))
        memory = demo / "memory-scripture"
        if memory.is_dir():
            keep("memory", gains(console, models, memory, texts["scripture"]))
    if wide:
        keep("wide", {"layers": wide, **timed_wide(console, wide, rounds)})


def bundle_of(model: Path, folder: Path, way: Way) -> ExportReport:
    path = folder / way.name.replace(" ", "-").replace(",", "")
    return export(model, path, precision=way.precision, options=way.options, fused=False)


def sequences(model: Model, path: Path, tokens: int) -> Sequences:
    return read_for(model, [path], context=CONTEXT, max_tokens=tokens).sequences


def quality(
    console: Console,
    models: Mapping[str, Model],
    exported: Mapping[str, ExportReport],
    texts: Mapping[str, Sequences],
) -> dict[str, Any]:
    read = {
        name: {text: reading(model, found) for text, found in texts.items()}
        for name, model in models.items()
    }
    table = Table(title="Against fp32 (change of NLL in nats a token, 95 % interval)")
    for column in ("precision", "weights", "relative RMS |Δw|"):
        table.add_column(column)
    for text in texts:
        base = read["fp32"][text].scores.mean_nll
        table.add_column(f"{text}, fp32 {base:.4f}", justify="right")
    table.add_column("flips by gate", justify="right")
    found: dict[str, Any] = {}
    for name, readings in read.items():
        figures: dict[str, Any] = {
            "bytes": exported[name].total_bytes, "weights_bytes": weight_bytes(exported[name]),
            "expert_error": expert_error(exported[name]), "texts": {},
        }  # fmt: skip
        for text, here in readings.items():
            wide = read["fp32"][text]
            mean, low, high = Evaluation(wide.scores, here.scores).delta()
            figures["texts"][text] = {
                "nll": here.scores.mean_nll, "delta": mean, "delta_low": low, "delta_high": high,
                "flips": flips(wide.experts, here.experts),
                "flipped_slots": flipped_slots(wide.experts, here.experts),
            }  # fmt: skip
        found[name] = figures
        overall = np.mean([f["flips"] for f in figures["texts"].values()], axis=0)
        table.add_row(
            name,
            f"{figures['weights_bytes'] / 1e6:.2f} MB",
            f"{figures['expert_error']:.2%}",
            *(
                "{delta:+.4f} [{delta_low:+.4f}, {delta_high:+.4f}]".format(**f)
                for f in figures["texts"].values()
            ),
            " ".join(f"{share:.1%}" for share in overall),
        )
    console.print(table)
    return found


def reading(model: Model, texts: Sequences) -> Reading:
    nll, correct, experts = np.zeros(len(texts)), np.zeros(len(texts), np.int64), []
    for index, sequence in enumerate(texts):
        tokens = sequence.tokens
        cache = model.pipeline.new_cache(capacity=len(tokens))
        logits, records = model.pipeline.traced_step(cache, tokens[None])
        rows = logits[:-1].astype(np.float64)
        rows -= rows.max(axis=1, keepdims=True)
        chosen = rows[np.arange(len(rows)), tokens[1:]]
        nll[index] = (np.log(np.exp(rows).sum(axis=1)) - chosen).sum()
        correct[index] = (rows.argmax(axis=1) == tokens[1:]).sum()
        experts.append(np.stack([np.sort(record.expert_ids, axis=1) for record in records]))
    counts = np.array([sequence.targets for sequence in texts], np.int64)
    return Reading(Scores(nll, correct, counts), experts)


def flips(base: list[NDArray[np.int32]], other: list[NDArray[np.int32]]) -> list[float]:
    """For each gate the share of tokens whose set of experts is another."""
    differ = [(a != b).any(axis=2) for a, b in zip(base, other, strict=True)]
    return [float(share) for share in np.concatenate(differ, axis=1).mean(axis=1)]


def flipped_slots(base: list[NDArray[np.int32]], other: list[NDArray[np.int32]]) -> float:
    """Share of all experts taken that fp32 would not have taken."""
    new = [
        (~(b[..., :, None] == a[..., None, :]).any(axis=3)).reshape(-1)
        for a, b in zip(base, other, strict=True)
    ]
    return float(np.concatenate(new).mean())


def weight_bytes(report: ExportReport) -> int:
    return sum(f.size for name, f in report.files.items() if name.endswith(".safetensors"))


def expert_error(report: ExportReport) -> float:
    """Relative RMS error of the experts' weights, the mean over their tensors."""
    errors = [e.relative_rms for e in report.errors if e.name.endswith(("gate_up", "down"))]
    return float(np.mean(errors)) if errors else 0.0


def decode(
    console: Console, what: str, models: Mapping[str, Model], rounds: int
) -> dict[str, dict[str, float]]:
    """Milliseconds of a decode step, and its ratio to fp32 in the same round: medians."""
    rng = np.random.default_rng(0)
    times: dict[str, list[float]] = {name: [] for name in models}
    for turn in range(rounds + 1):
        ids = rng.integers(0, 256, (1, PROMPT + STEPS))
        names = list(models)
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            pipeline = models[name].pipeline
            cache = pipeline.new_cache(capacity=PROMPT + STEPS)
            pipeline.step(cache, ids[:, :PROMPT])
            steps = []
            for index in range(PROMPT, PROMPT + STEPS):
                started = time.perf_counter()
                pipeline.step(cache, ids[:, index : index + 1])
                steps.append(time.perf_counter() - started)
            if turn:  # the first round warms up
                times[name].append(1e3 * float(np.median(steps)))
    table = Table(title=f"A decode step of {what}, one thread, {rounds} rounds")
    for column in ("precision", "ms", "of fp32"):
        table.add_column(column, justify="left" if column == "precision" else "right")
    found = {}
    for name, measured in times.items():
        ratio = float(np.median(np.array(measured) / np.array(times["fp32"])))
        found[name] = {"ms": float(np.median(measured)), "ratio": ratio}
        table.add_row(name, f"{found[name]['ms']:.3f}", f"{ratio:.2f}")
    console.print(table)
    return found


def gains(
    console: Console, models: Mapping[str, Model], memory: Path, texts: Sequences
) -> dict[str, Any]:
    """What the memory built on fp32 does to the NLL of each precision, on its own domain."""
    table = Table(title="The memory of 'scripture', built on fp32: change of its test NLL")
    for column in ("precision", "frozen", "with memory", "gain less that of fp32"):
        table.add_column(column)
    found: dict[str, Any] = {}
    changes = {}
    for name, model in models.items():
        model.disable_memory()
        frozen = score_sequences(model, texts)
        model.swap_memory(memory)
        with_memory = score_sequences(model, texts)
        model.disable_memory()
        mean, low, high = Evaluation(frozen, with_memory).delta()
        changes[name] = (with_memory.nll - frozen.nll) / frozen.tokens
        lost, lost_low, lost_high = paired_bootstrap(changes[name] - changes["fp32"], frozen.tokens)
        found[name] = {
            "nll_frozen": frozen.mean_nll, "nll_memory": with_memory.mean_nll,
            "delta": mean, "delta_low": low, "delta_high": high,
            "lost": lost, "lost_low": lost_low, "lost_high": lost_high,
        }  # fmt: skip
        table.add_row(
            name,
            f"{frozen.mean_nll:.4f}",
            f"{mean:+.4f} [{low:+.4f}, {high:+.4f}]",
            f"{lost:+.4f} [{lost_low:+.4f}, {lost_high:+.4f}]",
        )
    console.print(table)
    return found


def timed_wide(console: Console, layers: int, rounds: int) -> dict[str, Any]:
    """Decode steps of random weights in OLMoE-1B-7B's shape; one bundle loaded at a time."""
    found: dict[str, Any] = {"weights_bytes": {}, "export_seconds": {}, "decode": {}}
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = wide_checkpoint(Path(folder) / "checkpoint", layers)
        models: dict[str, Model] = {}
        for way in WIDE_WAYS:
            report = bundle_of(checkpoint, Path(folder), way)
            found["weights_bytes"][way.name] = weight_bytes(report)
            found["export_seconds"][way.name] = report.seconds
            console.print(
                f"{way.name}: {weight_bytes(report) / 1e9:.2f} GB in {report.seconds:.0f} s"
            )
            models[way.name] = Model.load(report.bundle, threads=1)
        title = f"{layers} layers of OLMoE-1B-7B's shape"
        found["decode"] = decode(console, title, models, rounds)
        models.clear()
    return found


def wide_checkpoint(path: Path, layers: int) -> Path:
    """Random weights in bfloat16, one shard a layer."""
    rng = np.random.default_rng(0)
    config = json.loads((MODEL / "config.json").read_text())
    config |= {
        "hidden_size": 2048, "intermediate_size": 1024, "num_experts": 64, "vocab_size": 50304,
        "num_experts_per_tok": 8, "num_hidden_layers": layers, "num_attention_heads": 16,
        "num_key_value_heads": 16, "max_position_embeddings": 4096,
    }  # fmt: skip
    path.mkdir(parents=True)
    for name in ("tokenizer.json", "generation_config.json"):
        shutil.copy(MODEL / name, path / name)
    (path / "config.json").write_text(json.dumps(config))
    index: dict[str, str] = {}

    def random(*shape: int) -> NDArray[Any]:
        values = rng.standard_normal(shape, np.float32) / np.float32(np.sqrt(shape[-1]))
        return values.astype(ml_dtypes.bfloat16)

    def shard(number: int, tensors: dict[str, NDArray[Any]]) -> None:
        file = f"model-{number:05d}.safetensors"
        save_file(tensors, path / file)
        index.update(dict.fromkeys(tensors, file))

    def ones(width: int) -> NDArray[Any]:
        return np.ones(width, ml_dtypes.bfloat16)

    shard(0, {"model.embed_tokens.weight": random(50304, 2048), "model.norm.weight": ones(2048),
              "lm_head.weight": random(50304, 2048)})  # fmt: skip
    for layer in range(layers):
        prefix = f"model.layers.{layer}"
        tensors = {
            f"{prefix}.{part}.weight": ones(2048)
            for part in ("input_layernorm", "post_attention_layernorm", "self_attn.q_norm",
                         "self_attn.k_norm")
        }  # fmt: skip
        for part in "qkvo":
            tensors[f"{prefix}.self_attn.{part}_proj.weight"] = random(2048, 2048)
        tensors[f"{prefix}.mlp.gate.weight"] = random(64, 2048)
        for expert in range(64):
            for part, shape in (
                ("gate", (1024, 2048)),
                ("up", (1024, 2048)),
                ("down", (2048, 1024)),
            ):
                name = f"{prefix}.mlp.experts.{expert}.{part}_proj.weight"
                tensors[name] = random(*shape)
        shard(layer + 1, tensors)
    (path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    return path


if __name__ == "__main__":
    main()
