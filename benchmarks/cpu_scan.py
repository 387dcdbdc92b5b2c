"""What a gate's search costs on the CPU: products by operator, gates, and what two stages find.

    OMP_WAIT_POLICY=PASSIVE .venv/bin/python benchmarks/cpu_scan.py

Keys are random directions; queries lie near keys, as router inputs of a domain do. All candidates
of a row take turns on the same queries, so that a busy machine hits them alike: compare within a
row. `recall@8` is that of the gate `two-stage` against the exact neighbours. How well it does on
router inputs of a real model is in benchmarks/two_stage.py. `compressed` is the same gate over
a compressed memory (fp16 keys, `--scan-width` dimensions of 4 bits, `--candidates`): its width is
forced and its directions are random, since these keys have none of their own, so that it finds
nothing here and only its time is meant.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from time import perf_counter
from typing import Any

import click
import numpy as np
import onnx_ir
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table
from versions import environment

from knnmoe.calibration.recall import project_keys
from knnmoe.export.gate_graphs import GateShape, gate_functions, gate_graph
from knnmoe.runtime.blend import GateMemory
from knnmoe.runtime.calibration import Calibration
from knnmoe.runtime.compressed import CompressedMemory
from knnmoe.runtime.engines.base import Run
from knnmoe.runtime.engines.onnx_bytes import Node, NodeList, Tensor, graph_bytes
from knnmoe.runtime.engines.onnxruntime import OrtEngine
from knnmoe.runtime.gates.base import Gate, GateBuffers, GateTrace
from knnmoe.runtime.gates.onnx import FROZEN, OnnxGate
from knnmoe.runtime.gates.scan import best_entries, int8_is_cut_off, int8_scores
from knnmoe.runtime.gates.two_stage import TwoStageGate
from knnmoe.runtime.routing import RoutingRule

ROOT = Path(__file__).resolve().parent.parent
EXPERTS, TOP_K, NEIGHBORS, BLOCK = 64, 8, 8, 128
RULE = RoutingRule(TOP_K)
SECONDS = 1.5  # of each row
FEWEST = 3
RECALLED = 64  # queries
BATCH = 32  # sequences side by side, at most
OTHER = np.zeros(60_000_000 // 8)

Arrays = dict[str, NDArray[Any]]


@click.command()
@click.option("--entries", default="1000,10000,20000,100000", show_default=True)
@click.option("--sizes", default="128,2048", show_default=True)
@click.option("--tokens", default="1,16,128", show_default=True)
@click.option("--threads", default="1,2", show_default=True)
@click.option("--scan-width", default=256, show_default=True, help="Of compressed memories.")
@click.option("--candidates", default=32, show_default=True, help="Of compressed memories.")
@click.option("--operators/--no-operators", default=True, help="The products by operator too.")
@click.option("--json", "target", type=click.Path(path_type=Path),
              default=ROOT / "benchmarks" / "results" / "cpu_scan.json")  # fmt: skip
def main(
    entries: str, sizes: str, tokens: str, threads: str, operators: bool, target: Path,
    scan_width: int, candidates: int,
) -> None:  # fmt: skip
    """Print the table and write it as JSON."""
    console = Console(width=160)
    rows: list[dict[str, Any]] = []
    for size in _numbers(sizes):
        for count in _numbers(entries):
            memory = random_memory(count, size)
            width = min(scan_width, size)
            compressed = random_compressed(memory, width, candidates)
            for workers in _numbers(threads):
                for row in measure(memory, compressed, _numbers(tokens), workers, operators):
                    rows.append(row)
                    console.print(
                        f"D {size} N {count} threads {workers} T {row['tokens']}: "
                        + "  ".join(f"{name} {ms:.2f}" for name, ms in row["ms"].items())
                    )
    console.print(table(rows))
    projection = {"width": scan_width, "bits": 4, "candidates": candidates}
    report = {"environment": environment(), "projection": projection, "rows": rows}
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


def random_memory(count: int, size: int) -> GateMemory:
    random = np.random.default_rng(count + size)
    keys = random.standard_normal((count, size), dtype=np.float32)
    keys /= np.linalg.norm(keys, axis=1, keepdims=True)
    return GateMemory(
        keys=keys,
        key_scales=np.ones((count, 2), np.float32),
        values=random.standard_normal((count, EXPERTS), dtype=np.float32),
        n_valid=count,
        k=NEIGHBORS,
        center=np.zeros(size, np.float32),
        calibration=Calibration(),
        similarity="cosine",
        rule_first=False,
    )


def random_compressed(memory: GateMemory, width: int, candidates: int) -> CompressedMemory:
    """The memory compressed along random directions."""
    random = np.random.default_rng(width)
    size = memory.keys.shape[1]
    directions = np.linalg.qr(random.standard_normal((size, width)))[0].T.astype(np.float32)
    ones = np.ones(len(memory.keys), np.float32)
    return CompressedMemory(
        keys=memory.keys.astype(np.float16),
        multipliers=ones[:, None],
        norms=ones,
        lengths=ones,
        scan=project_keys(memory.keys, directions, 4),
        candidates=candidates,
        values=memory.values,
        n_valid=memory.n_valid,
        k=memory.k,
        center=memory.center,
        calibration=memory.calibration,
        similarity=memory.similarity,
        rule_first=memory.rule_first,
    )


def queries(memory: GateMemory, tokens: int) -> NDArray[np.float32]:
    """Router inputs [T, D] with a cosine of about 0.7 to some key."""
    random = np.random.default_rng(tokens)
    size = memory.keys.shape[1]
    near = memory.keys[random.integers(0, len(memory.keys), tokens)]
    noise = random.standard_normal((tokens, size), dtype=np.float32) / np.float32(np.sqrt(size))
    return np.ascontiguousarray(near + noise)


def read_other_memory() -> None:
    """What a step of a model does between two calls of a gate, whose weights it reads."""
    OTHER.sum()


def measure(
    memory: GateMemory,
    compressed: CompressedMemory,
    tokens: list[int],
    threads: int,
    operators: bool,
) -> list[dict[str, Any]]:
    """A row for each number of tokens."""
    gate = gate_engine(memory, threads, memory.similarity)
    frozen = gate_engine(memory, threads, FROZEN)
    started = perf_counter()
    # Prompts too, however few the entries: whether that pays is to be seen.
    two_stage = replace(TwoStageGate.over(gate, memory, RULE, TOP_K, frozen=frozen), many=True)
    built = perf_counter() - started
    exact = OnnxGate.over(gate, memory)
    projected = TwoStageGate.over(gate, compressed, RULE, TOP_K, frozen=frozen)
    engines = products(memory, threads) if operators else {}
    scan = scan_engine(memory, two_stage.candidates, threads=threads)
    rows = []
    for count in tokens:
        x = queries(memory, count)
        scores = np.zeros((count, len(memory.keys)), np.float32)
        candidates = np.zeros((count, two_stage.candidates), np.int64)
        runs = {
            name: engine.bind({"x": x, **inputs}, {"y": scores})
            for name, (engine, inputs) in engines.items()
        }
        runs["scan"] = scan.bind({"queries": x - memory.center}, {"candidates": candidates})
        gates: dict[str, Gate] = {
            "exact": exact, "two-stage": two_stage, "compressed": projected
        }  # fmt: skip
        runs |= {name: each.bind(buffers(x)) for name, each in gates.items()}
        if 1 < count <= BATCH:
            for name, each in gates.items():
                runs[f"{name}, batch"] = each.bind(buffers(x, count))
        runs["other"] = read_other_memory
        rows.append(
            {
                "entries": len(memory.keys),
                "hidden_size": x.shape[1],
                "threads": threads,
                "tokens": count,
                "ms": interleaved(runs),
                "recall": recall(exact, two_stage, queries(memory, RECALLED)),
                "key_bytes": {
                    "fp32": memory.keys.nbytes,
                    "int8": memory.keys.size,
                    "projected": compressed.scan.codes.nbytes,
                },
                "build_seconds": built,
            }
        )
    return rows


def scan_engine(memory: GateMemory, candidates: int, threads: int) -> OrtEngine:
    """The first stage alone: centred queries [T, D] to candidates [T, R]."""
    g = NodeList()
    scores, weights = int8_scores(g, memory, "queries")
    g.op("Identity", best_entries(g, scores, candidates, len(memory.keys)), out="candidates")
    read = [Tensor("queries", np.float32, ("tokens", memory.keys.shape[1]))]
    left = [Tensor("candidates", np.int64, ("tokens", candidates))]
    graph = graph_bytes(g.nodes, read, left, g.constants, weights)
    return OrtEngine(graph, threads=threads, weights=weights, precise_int8=int8_is_cut_off())


def gate_engine(memory: GateMemory, threads: int, name: str) -> OrtEngine:
    shape = GateShape(memory.keys.shape[1], EXPERTS, TOP_K, RULE)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "gate.onnx"
        onnx_ir.save(gate_graph(name, shape).model(gate_functions(name)), path)
        return OrtEngine(path, threads=threads)


def buffers(x: NDArray[np.float32], sequences: int = 1) -> GateBuffers:
    """Of T router inputs, of one sequence or each of its own."""
    tokens = len(x)
    random = np.random.default_rng(0)
    return GateBuffers(
        router_input=x,
        router_logits=random.standard_normal((tokens, EXPERTS), dtype=np.float32),
        state=np.zeros((sequences, 2), np.float32),
        lengths=np.full(sequences, tokens // sequences),
        expert_ids=np.zeros((tokens, TOP_K), np.int32),
        expert_weights=np.zeros((tokens, TOP_K), np.float32),
        state_out=np.zeros((sequences, 2), np.float32),
    )


def products(memory: GateMemory, threads: int) -> dict[str, tuple[OrtEngine, Arrays]]:
    """Engines of x [T, D] times all keys, y [T, N], by operator, with the inputs beside x."""
    keys = memory.keys
    largest = np.abs(keys).max(axis=1)
    int8 = np.ascontiguousarray(np.rint(keys / largest[:, None] * 127).astype(np.int8).T)
    scales = (largest / 127).astype(np.float32)
    zero = np.zeros(len(keys), np.float32)
    int4, blocks = in_blocks(keys)
    nbits = [("K", keys.shape[1]), ("N", len(keys)), ("bits", 4), ("block_size", BLOCK)]
    quantized = [Node("DynamicQuantizeLinear", ["x"], ["q", "s", "z"])]
    to_float = ["q", "keys", "s", "scales", "z"]
    bytes_times = Node("MatMulIntegerToFloat", to_float, ["y"], domain="com.microsoft")
    made = {
        "fp32 Gemm": (
            [Node("Gemm", ["x", "keys", "zero"], ["y"], [("transB", 1)])],
            {"keys": keys, "zero": zero},
            {},
        ),
        "int4 MatMulNBits": (
            [
                Node(
                    "MatMulNBits", ["x", "keys", "blocks"], ["y"],
                    [*nbits, ("accuracy_level", 4)], "com.microsoft",
                )
            ],
            {},
            {"keys": int4, "blocks": blocks},
        ),
        "int8 weights": ([*quantized, bytes_times], {}, {"keys": int8, "scales": scales}),
        "int8 inputs": ([*quantized, bytes_times], {"keys": int8, "scales": scales}, {}),
    }  # fmt: skip
    shape = ("tokens", keys.shape[1])
    return {
        name: (
            OrtEngine(
                graph_bytes(
                    nodes,
                    [
                        Tensor("x", np.float32, shape),
                        *(Tensor(n, a.dtype, a.shape) for n, a in inputs.items()),
                    ],
                    [Tensor("y", np.float32, ("tokens", len(keys)))],
                    {},
                    weights,
                ),
                threads=threads,
                weights=weights,
            ),
            inputs,
        )
        for name, (nodes, inputs, weights) in made.items()
    }


def in_blocks(keys: NDArray[np.float32]) -> tuple[NDArray[np.uint8], NDArray[np.float32]]:
    """int4 keys [N, blocks, bytes] of MatMulNBits and their scales [N, blocks]."""
    blocks = keys.reshape(len(keys), -1, min(BLOCK, keys.shape[1]))
    scales = np.abs(blocks).max(axis=2) / 7
    rounded = (np.rint(blocks / scales[:, :, None]) + 8).astype(np.uint8)
    return rounded[:, :, 0::2] | rounded[:, :, 1::2] << 4, scales.astype(np.float32)


def interleaved(runs: Mapping[str, Run]) -> dict[str, float]:
    """Median milliseconds of each, taking turns."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    for run in runs.values():
        run()
    end = perf_counter() + SECONDS
    while perf_counter() < end or min(map(len, times.values())) < FEWEST:
        for name, run in runs.items():
            started = perf_counter()
            run()
            times[name].append((perf_counter() - started) * 1e3)
    return {name: float(np.median(each)) for name, each in times.items()}


def recall(exact: OnnxGate, two_stage: TwoStageGate, x: NDArray[np.float32]) -> float:
    """Share of the exact neighbours that the two stages find, one token at a time."""
    found = []
    row = np.zeros_like(x[:1])
    traces = [GateTrace.empty(1, NEIGHBORS) for _ in range(2)]
    bind: Callable[[Any, GateTrace], Run] = lambda gate, trace: gate.bind(buffers(row), trace)  # noqa: E731
    runs = [bind(gate, trace) for gate, trace in zip((exact, two_stage), traces, strict=True)]
    for query in x:
        row[0] = query
        for run in runs:
            run()
        found.append(np.isin(traces[0].neighbors, traces[1].neighbors).mean())
    return float(np.mean(found))


def table(rows: list[dict[str, Any]]) -> Table:
    names = list(dict.fromkeys(name for row in rows for name in row["ms"]))
    shown = Table(title="Median ms")
    for name in ("D", "N", "threads", "T", *names, "gate gains", "recall@8", "built in s"):
        shown.add_column(name, justify="right")
    for row in rows:
        ms = row["ms"]
        shown.add_row(
            *(str(row[name]) for name in ("hidden_size", "entries", "threads", "tokens")),
            *(f"{ms[name]:.2f}" if name in ms else "" for name in names),
            f"{ms['exact'] / ms['two-stage']:.2f}×",
            f"{row['recall']:.4f}",
            f"{row['build_seconds']:.2f}",
        )
    return shown


def _numbers(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


if __name__ == "__main__":
    main()
