r"""What retrieval adds to a decode step on the CPU, and where in a gate the time goes.

    OMP_WAIT_POLICY=PASSIVE .venv/bin/python benchmarks/retrieval.py build/retrieval

OLMoE-1B-7B's shape cut to 4 layers, random weights, int4 with an int8 head; checkpoint, bundle and
memories are made in the folder if they are not there. The frozen model and each memory take turns
token by token in one process over the same segments, so whatever else the machine does meets all
of them alike; CPU time is what the process worked, and what a memory adds the median over tokens of
its step minus the frozen one's beside it. Memories are random entries, compressed to
widths that are forced: random keys have no directions of their own, and which widths real ones
need is not known from them. Calibration is of the kind that `knnmoe memory calibrate` chooses.

Inside of a gate: ONNX Runtime's profiler on the graph of one token, other memory being read in
between. It takes some microseconds more an operator than there are without it.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from time import perf_counter, process_time
from typing import Any

import click
import numpy as np
from cpu_decode import environment
from rich.console import Console
from rich.table import Table

from knnmoe.runtime.bundle import Bundle
from knnmoe.runtime.calibration import Calibration
from knnmoe.runtime.compressed import CompressedMemory
from knnmoe.runtime.gates.base import GateBuffers
from knnmoe.runtime.gates.retrieval import Retrieval
from knnmoe.runtime.memory import MemoryPack
from knnmoe.runtime.model import Model
from knnmoe.runtime.pipeline import Pipeline

ROOT = Path(__file__).resolve().parent.parent
HERE = Path(__file__).resolve().parent
CONTEXT, CAPACITY, SEED = 128, 256, 0
BASE = "frozen"
CALIBRATION = Calibration(
    interpolate=0.0, weight_power=0.0, inverse_temperature=20.0, scale=0.5, power=2.0, midpoint=0.5,
    sharpness=10.0, sequence=1.0, decay=0.97,
)  # fmt: skip
OTHER = np.ones(64 << 17, np.int64)  # 64 MB: what a segment reads between two gates

Run = Callable[[], None]


def prepare(folder: Path) -> Path:
    """The bundle, exported of a random checkpoint unless it is there."""
    checkpoint, bundle = folder / "checkpoint", folder / "bundle"
    if not bundle.exists():
        if not checkpoint.exists():
            script = str(HERE / "make_checkpoint.py")
            command = [sys.executable, script, "olmoe-1b-7b", "--layers", "4", str(checkpoint)]
            subprocess.run(command, check=True)
        export = [str(Path(sys.executable).with_name("knnmoe-export")), "--precision", "int4"]
        subprocess.run([*export, "--head-bits", "8", str(checkpoint), str(bundle)], check=True)
    return bundle


def pack_of(folder: Path, bundle: Path, case: str) -> Path:
    """A compressed memory of random entries for `entries-width-bits-candidates`."""
    entries, width, bits, candidates = map(int, case.split("-"))
    path = folder / "packs" / case
    if not path.exists():
        path.parent.mkdir(exist_ok=True)
        projection = {"scan_width": width, "scan_bits": bits, "candidates": candidates}
        maker = [sys.executable, str(HERE / "decode_contenders.py"), "pack"]
        wanted = [str(bundle), str(entries), str(path), json.dumps(projection)]
        subprocess.run([*maker, *wanted], check=True)
    return path


def opened(path: Path) -> MemoryPack:
    return MemoryPack.open(path, verify=False).with_settings(calibration=CALIBRATION)


class Contender:
    """One memory, or none, over the model's segments."""

    def __init__(self, pipeline: Pipeline) -> None:
        self.pipeline = pipeline
        self.cache = pipeline.new_cache(1, CAPACITY)
        random = np.random.default_rng(SEED)
        pipeline.step(self.cache, random.integers(0, pipeline.vocab_size, (1, CONTEXT)))
        self.tokens = random.integers(0, pipeline.vocab_size, 4096)
        self.cpu_ms: list[float] = []
        self.wall_ms: list[float] = []
        self.gate_ms: list[list[float]] = []

    def step(self, number: int) -> None:
        """One token behind the prompt, timed whole, and once more part by part."""
        token = self.tokens[number][None, None]
        self.cache.lengths[:] = CONTEXT
        wall, work = perf_counter(), process_time()
        self.pipeline.step(self.cache, token)
        self.cpu_ms.append((process_time() - work) * 1e3)
        self.wall_ms.append((perf_counter() - wall) * 1e3)

    def parts(self, number: int) -> None:
        self.cache.lengths[:] = CONTEXT
        times = self.pipeline.timed_step(self.cache, self.tokens[number][None, None]).host
        self.gate_ms.append([ms for name, ms in times.items() if name.startswith("gate")])

    def report(self, base: Contender) -> dict[str, Any]:
        cpu, frozen = np.array(self.cpu_ms), np.array(base.cpu_ms)
        wall, frozen_wall = np.array(self.wall_ms), np.array(base.wall_ms)
        return {
            "cpu_ms": float(np.median(cpu)),
            "wall_ms": float(np.median(wall)),
            "cpu_ratio": float(np.median(cpu) / np.median(frozen)),
            "cpu_ratio_least": float(np.percentile(cpu, 10) / np.percentile(frozen, 10)),
            "cpu_ms_added": float(np.median(cpu - frozen)),
            "cpu_share_added": float(np.median(cpu - frozen) / np.median(frozen)),
            "wall_ratio": float(np.median(wall) / np.median(frozen_wall)),
            "gate_ms": float(np.median(self.gate_ms)),
            "gate_ms_least": float(np.percentile(self.gate_ms, 10)),
        }


def inside(pack: MemoryPack, bundle: Bundle, runs: int) -> dict[str, float]:
    """Median microseconds of the stages of a gate of one token, by the profiler."""
    manifest = bundle.manifest
    memory = pack.memory_of(pack.gates[0], manifest.routing)
    assert isinstance(memory, CompressedMemory)
    retrieval = Retrieval.over(memory, memory.candidates, threads=1)
    with tempfile.TemporaryDirectory() as folder:
        engine = retrieval.make(profile=Path(folder, "gate"))
        experts = manifest.experts_per_token
        buffers = GateBuffers(
            np.zeros((1, memory.size), np.float32),
            np.zeros((1, memory.values.shape[1]), np.float32),
            np.zeros((1, 2), np.float32),
            np.ones(1, np.int64),
            np.zeros((1, experts), np.int32),
            np.zeros((1, experts), np.float32),
            np.zeros((1, 2), np.float32),
        )
        blended = np.zeros_like(buffers.router_logits)
        run = replace(retrieval, engine=engine).bind(buffers, blended, None)
        random = np.random.default_rng(SEED)
        for _ in range(runs):
            buffers.router_input[...] = random.standard_normal((1, memory.size))
            OTHER.sum()
            run()
        events = json.loads(engine.end_profile().read_text(encoding="utf-8"))
    operators = [event for event in events if event["name"].endswith("_kernel_time")]
    count = len(operators) // runs
    stages: dict[str, list[float]] = {}
    for first in range(0, count * runs, count):
        of_run: dict[str, float] = {}
        for stage, event in zip(stages_of(operators[:count]), operators[first:], strict=False):
            of_run[stage] = of_run.get(stage, 0.0) + event["dur"]
        for stage, spent in of_run.items():
            stages.setdefault(stage, []).append(spent)
    return {
        **{stage: float(np.median(spent)) for stage, spent in stages.items()},
        "operators": float(count),
    }


def stages_of(operators: list[dict[str, Any]]) -> list[str]:
    """The stage of each operator in the order they run."""
    names = [event["args"]["op_name"] for event in operators]
    products = [place for place, name in enumerate(names) if name == "MatMulNBits"]
    widening = names.index("Cast")
    scoring = names.index("MatMul")
    found = []
    for place, name in enumerate(names):
        if place < products[0]:
            found.append("query")
        elif place in products:
            found.append("projection" if place == products[0] else "scan")
        elif place == widening - 1:
            found.append("gathering")
        elif place == widening:
            found.append("widening")
        elif place < widening:
            found.append("scores" if name == "Gemm" else "selection")
        else:
            found.append("scores" if name == "Gemm" or place <= scoring + 1 else "blend")
    return found


@click.command(help=__doc__)
@click.argument("folder", type=click.Path(path_type=Path))
@click.option("--cases", default="10000-128-4-32,100000-64-4-64", show_default=True,
              help="entries-width-bits-candidates of memories, separated by commas.")  # fmt: skip
@click.option("--tokens", default=60, show_default=True)
@click.option("--json", "target", type=click.Path(path_type=Path),
              default=ROOT / "benchmarks" / "results" / "retrieval.json")  # fmt: skip
def main(folder: Path, cases: str, tokens: int, target: Path) -> None:
    """Print the tables and write them as JSON."""
    folder.mkdir(parents=True, exist_ok=True)
    bundle = prepare(folder)
    packs = {case: opened(pack_of(folder, bundle, case)) for case in cases.split(",")}
    model = Model.load(bundle, threads=1, gate="two-stage")
    contenders = {BASE: Contender(Pipeline(model.pipeline.layout))}
    loading: dict[str, float] = {}
    for case, pack in packs.items():
        begun = perf_counter()
        model.swap_memory(pack)
        loading[case] = perf_counter() - begun
        contenders[case] = Contender(Pipeline(model.pipeline.layout))
    order = list(contenders.values())
    for number in range(tokens + 2):
        for contender in order:
            contender.step(number)
        for contender in order:
            contender.parts(number)
        order.reverse()
    for contender in order:  # the first calls touch pages for the first time
        del contender.cpu_ms[:2], contender.wall_ms[:2], contender.gate_ms[:2]
    rows = {name: each.report(contenders[BASE]) for name, each in contenders.items()}
    opened_bundle = Bundle.open(bundle)
    for case, pack in packs.items():
        rows[case] |= {
            "load_seconds": loading[case],
            "inside_us": inside(pack, opened_bundle, tokens),
        }
    show(rows)
    report = {"environment": environment(bundle), "threads": 1, "context": CONTEXT,
              "tokens": tokens, "calibration": CALIBRATION.to_json(), "rows": rows}  # fmt: skip
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


def show(rows: dict[str, dict[str, Any]]) -> None:
    console = Console(width=140)
    table = Table(title="A decode step, 1 thread")
    columns = (
        "entries-width-bits-candidates", "CPU ms", "× frozen", "of the least tenth",
        "CPU ms added", "share added", "wall × frozen", "gate ms", "least tenth", "load s",
    )  # fmt: skip
    for place, name in enumerate(columns):
        table.add_column(name, justify="right" if place else "left")
    for name, row in rows.items():
        table.add_row(
            name, f"{row['cpu_ms']:.1f}", f"{row['cpu_ratio']:.3f}",
            f"{row['cpu_ratio_least']:.3f}", f"{row['cpu_ms_added']:.2f}",
            f"{row['cpu_share_added']:.1%}",
            f"{row['wall_ratio']:.3f}", f"{row['gate_ms']:.3f}", f"{row['gate_ms_least']:.3f}",
            f"{row['load_seconds']:.1f}" if "load_seconds" in row else "",
        )  # fmt: skip
    console.print(table)
    table = Table(title="Inside of a gate, microseconds")
    cases = [name for name in rows if "inside_us" in rows[name]]
    for name in ("", *cases):
        table.add_column(name, justify="right" if name else "left")
    for stage in rows[cases[0]]["inside_us"]:
        table.add_row(stage, *(f"{rows[case]['inside_us'][stage]:.0f}" for case in cases))
    console.print(table)


if __name__ == "__main__":
    main()
