"""What a memory would gain by lists of like keys, of which only the nearest are scanned (IVF).

    .venv/bin/python benchmarks/inverted_lists.py build/demo/memory-scripture

Keys of a real memory are held back and searched for among the others: the share of entries that
the nearest lists hold, against the share of the K nearest that are in them. Beside it, what ONNX
Runtime takes to scan everything as constant weights of 4 bits, and blocks of int8 that are gathered
first, as lists must be. Random keys of OLMoE's width serve for that: time does not depend on them.
"""

from __future__ import annotations

import json
from pathlib import Path
from time import thread_time
from typing import Any

import click
import numpy as np
from numpy.typing import NDArray

from knnmoe.calibration.recall import Exact
from knnmoe.runtime.blend import unit_rows
from knnmoe.runtime.engines.base import Run
from knnmoe.runtime.engines.onnx_bytes import FLOAT, NodeList, Tensor, graph_bytes
from knnmoe.runtime.engines.onnxruntime import OrtEngine
from knnmoe.runtime.memory import MemoryPack

ROOT = Path(__file__).resolve().parent.parent
HELD_BACK, SEED, ITERATIONS = 512, 0, 8
LISTS, RECALLS = (64, 256), (0.99, 0.999)
ENTRIES, WIDTH, BLOCK, SHARES = 100_000, 128, 96, (0.06, 0.125, 0.25)
OTHER = np.ones(64 << 17, np.int64)

Floats = NDArray[np.floating[Any]]


def clusters(keys: Floats, count: int) -> tuple[Floats, NDArray[np.int64]]:
    """k-means: unit centres [C, D], and the list of each key [N]."""
    random = np.random.default_rng(SEED)
    centers = keys[random.choice(len(keys), count, replace=False)]
    for last in range(ITERATIONS, -1, -1):
        lists = np.argmax(keys @ unit_rows(centers).T, axis=1)
        if last:
            sums = np.zeros_like(centers)
            np.add.at(sums, lists, keys)
            sizes = np.bincount(lists, minlength=count)[:, None]
            centers = np.where(sizes > 0, sums / np.maximum(sizes, 1), centers)
    return unit_rows(centers), lists


def needed(exact: Exact, keys: Floats, queries: Floats, count: int) -> dict[str, Any]:
    """Lists to scan, and the share of entries in them, for each recall."""
    centers, lists = clusters(keys, count)
    order = np.argsort(-(queries @ centers.T), axis=1)
    places = np.argsort(order, axis=1)  # of each list among the lists of a query
    ranks = np.sort(np.take_along_axis(places, lists[exact.nearest], axis=1).reshape(-1))
    sizes = np.bincount(lists, minlength=count)[order].cumsum(axis=1).mean(axis=0) / len(keys)
    found = {}
    for recall in RECALLS:
        last = int(ranks[int(np.ceil(recall * len(ranks))) - 1])
        found[str(recall)] = {"lists": last + 1, "share": float(sizes[last])}
    return found


def timed(run: Run, repeats: int = 40) -> float:
    """Median milliseconds of CPU time, other memory being read in between."""
    spent = []
    for _ in range(repeats):
        OTHER.sum()
        started = thread_time()
        run()
        spent.append((thread_time() - started) * 1e3)
    return float(np.median(spent))


def whole_scan() -> Run:
    random, g = np.random.default_rng(SEED), NodeList()
    weights: dict[str, NDArray[Any]] = {
        "codes": random.integers(0, 256, (ENTRIES, 1, WIDTH // 2), dtype=np.uint8),
        "scales": np.ones((ENTRIES, 1), np.float32),
    }
    g.op("MatMulNBits", "x", "codes", "scales", out="y", K=WIDTH, N=ENTRIES, bits=4,
         block_size=WIDTH, accuracy_level=4, domain="com.microsoft")  # fmt: skip
    inputs = [Tensor("x", np.float32, (1, WIDTH))]
    outputs = [Tensor("y", np.float32, (1, ENTRIES))]
    graph = graph_bytes(g.nodes, inputs, outputs, g.constants, weights)
    x = random.standard_normal((1, WIDTH), dtype=np.float32)
    y = np.zeros((1, ENTRIES), np.float32)
    return OrtEngine(graph, threads=1, weights=weights).bind({"x": x}, {"y": y})


def list_scan(share: float) -> Run:
    """Blocks of like entries [B, W, 96] int8, of which a share is gathered and multiplied."""
    random, g = np.random.default_rng(SEED), NodeList()
    count = ENTRIES // BLOCK
    arrays: dict[str, NDArray[Any]] = {
        "x": random.integers(0, 256, (1, 1, WIDTH), dtype=np.uint8),
        "blocks": random.integers(-127, 128, (count, WIDTH, BLOCK)).astype(np.int8),
        "nearest": random.choice(count, int(share * count), replace=False),
    }
    products = g.op("MatMulInteger", "x", g.op("Gather", "blocks", "nearest"))
    g.op("Cast", products, to=FLOAT, out="y")
    y = np.zeros((len(arrays["nearest"]), 1, BLOCK), np.float32)
    inputs = [Tensor(name, array.dtype, array.shape) for name, array in arrays.items()]
    graph = graph_bytes(g.nodes, inputs, [Tensor("y", y.dtype, y.shape)], g.constants, {})
    return OrtEngine(graph, threads=1).bind(arrays, {"y": y})


@click.command(help=__doc__)
@click.argument("pack", type=click.Path(path_type=Path, exists=True))
@click.option("--json", "target", type=click.Path(path_type=Path),
              default=ROOT / "benchmarks" / "results" / "inverted_lists.json")  # fmt: skip
def main(pack: Path, target: Path) -> None:
    """Print what was found and write it as JSON."""
    opened = MemoryPack.open(pack, verify=False)
    report: dict[str, Any] = {"gates": {}, "scan_ms": {}}
    for gate in opened.gates:
        entries = opened.read(gate)
        keys = unit_rows(entries.keys.astype(np.float32) - entries.center)
        order = np.random.default_rng(SEED).permutation(len(keys))
        queries, others = keys[order[:HELD_BACK]], keys[order[HELD_BACK:]]
        exact = Exact.of(queries, others, opened.neighbors, "cosine")
        found = {str(count): needed(exact, others, queries, count) for count in LISTS}
        report["gates"][gate.gate] = found
        click.echo(
            f"gate {gate.gate}, {len(others)} entries of {keys.shape[1]} dimensions: {found}"
        )
    report["scan_ms"]["all, constant, 4 bits"] = timed(whole_scan())
    for share in SHARES:
        report["scan_ms"][f"{share} of all, gathered, 8 bits"] = timed(list_scan(share))
    click.echo(f"{ENTRIES} entries of {WIDTH} dimensions, ms: {report['scan_ms']}")
    target.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
