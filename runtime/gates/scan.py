"""The first stage of the gate `two-stage`: parts of a graph that find candidates.

What is scanned are weights of a graph, because ONNX Runtime multiplies by int8 and int4 at speed
only what it could rearrange beforehand.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..blend import GateMemory
from ..compressed import CompressedMemory
from ..engines.onnx_bytes import NodeList, Tensor, graph_bytes
from ..engines.onnxruntime import OrtEngine
from ..projection import block_size
from ..two_stage import quantize_keys

# Entries above which the best are looked for among the best blocks: a block's maximum is found
# faster than a list of the best is kept.
BLOCKED_ENTRIES = 1 << 15
BLOCK = 32
_QUANTIZED_AT_ONCE = 1 << 22  # elements


def projected_scores(
    g: NodeList, memory: CompressedMemory, queries: str, count: int
) -> tuple[str, dict[str, NDArray[Any]]]:
    """Append the scan of projected keys: scores [T, count], and the weights it multiplies by.

    Args:
        g: Where to.
        memory: Its projection is scanned.
        queries: Centred router inputs [T, D]; for cosine of any length.
        count: N or more; what is more has a score of -inf.
    """
    size, scan, rbf = memory.size, memory.scan, memory.similarity == "rbf"
    bias = -memory.norms if rbf else np.zeros(memory.entries, np.float32)
    bias = np.where(np.arange(len(bias)) < memory.n_valid, bias, -np.inf).astype(np.float32)
    missing = (0, count - len(bias))
    codes = np.pad(scan.codes, (missing, (0, 0)))
    scales = np.pad(memory.scan_scales() * np.float32(2 if rbf else 1), missing)
    directions = scan.projection.view(np.uint8) ^ np.uint8(128)  # the same steps from 128
    weights: dict[str, NDArray[Any]] = {
        "directions": _in_blocks(directions, size, 1),
        "direction_scales": _block_scales(scan.projection_scales, size),
        "codes": _in_blocks(codes, scan.width, 8 // scan.bits),
        "code_scales": _block_scales(scales, scan.width),
        "bias": np.pad(bias, missing, constant_values=-np.inf),
    }
    projected = _bits_product(g, [queries, "directions", "direction_scales"], (scan.width, size), 8)
    scores = _bits_product(
        g, [projected, "codes", "code_scales", "", "", "bias"], (count, scan.width), scan.bits
    )
    return scores, weights


def int8_scores(
    g: NodeList, memory: GateMemory, queries: str
) -> tuple[str, dict[str, NDArray[Any]]]:
    """Append the scan of int8 keys: scores [T, N], and the weights it multiplies by.

    Args:
        g: Where to.
        memory: Its keys are made int8 now.
        queries: Centred router inputs [T, D]; for cosine of any length.
    """
    keys, scales, norms = _scan_weights(memory)
    valid = np.arange(len(memory.keys)) < memory.n_valid
    largest = g.op("ReduceMax", g.op("Abs", queries), g.ints(1))
    positive = g.op("Greater", largest, g.number(0))
    unit = g.op("Div", queries, g.op("Where", positive, largest, g.number(1)))
    step, middle = g.number(1 / 127), g.constant("middle", np.array(128, np.uint8))
    rounded = g.op("QuantizeLinear", unit, step, middle)
    weights: dict[str, NDArray[Any]] = {"int8_keys": keys, "int8_scales": scales}
    factors = [rounded, "int8_keys", step, "int8_scales", middle]
    if memory.similarity == "cosine":
        # Of one query all scores may be as many times too large: the mask can ride in the product.
        mask = g.constant("mask", np.where(valid, 0, -np.inf).astype(np.float32))
        return _times(g, [*factors, "", mask]), weights
    g.constant("norms", np.where(valid, norms, np.inf).astype(np.float32))
    nearness = g.op("Mul", _times(g, factors), g.op("Add", largest, largest))
    return g.op("Sub", nearness, "norms"), weights


def blocked_count(count: int) -> int:
    """Scores that a scan of that many entries is to have, so that blocks of them are whole."""
    return count + -count % BLOCK if count >= BLOCKED_ENTRIES else count


def best_entries(g: NodeList, scores: str, candidates: int, count: int) -> str:
    """Append what finds the R entries with the best scores [T, N], in rising order: [T, R].

    Of equal ones the first. In blocks: the R best lie in the R blocks whose maxima are the best,
    since each of these has an entry as good as its maximum.
    """
    r = g.ints(candidates)
    if count < BLOCKED_ENTRIES or count % BLOCK:
        return _rising(g, _best(g, scores, r), r)
    table = g.constant("table", np.arange(count).reshape(-1, BLOCK))
    rows = g.op("Reshape", scores, g.ints(0, -1, BLOCK))
    maxima = g.op("ReduceMax", rows, g.ints(2), keepdims=0)
    b = g.ints(min(candidates, count // BLOCK))
    blocks = _rising(g, _best(g, maxima, b), b)
    flat = g.ints(0, -1)
    picked = g.op("GatherND", rows, g.op("Unsqueeze", blocks, g.ints(2)), batch_dims=1)
    entries = g.op("Reshape", g.op("Gather", table, blocks), flat)
    places = _rising(g, _best(g, g.op("Reshape", picked, flat), r), r)
    return g.op("GatherElements", entries, places, axis=1)


def _best(g: NodeList, scores: str, count: str) -> str:
    """Where the best of each row are, in no order."""
    number = len(g.nodes)
    return g.ops("TopK", scores, count, out=(f"best_{number}", f"at_{number}"), sorted=0)[1]


def _rising(g: NodeList, numbers: str, count: str) -> str:
    """Rows of numbers in rising order."""
    number = len(g.nodes)
    out = (f"rising_{number}", f"order_{number}")
    return g.ops("TopK", numbers, count, out=out, largest=0)[0]


@cache
def int8_is_cut_off() -> bool:
    """Whether this processor cuts off sums of large products of bytes, found out by trying."""
    size, count = 64, 16
    weights: dict[str, NDArray[Any]] = {
        "keys": np.full((size, count), 127, np.int8),
        "scales": np.ones(count, np.float32),
    }
    g = NodeList()
    step, middle = g.number(1), g.constant("middle", np.array(128, np.uint8))
    products = _times(g, ["bytes", "keys", step, "scales", middle])
    graph = graph_bytes(
        g.nodes,
        [Tensor("bytes", np.uint8, (1, size))],
        [Tensor(products, np.float32, (1, count))],
        g.constants,
        weights,
    )
    got = np.zeros((1, count), np.float32)
    queries = np.full((1, size), 255, np.uint8)
    OrtEngine(graph, threads=1, weights=weights).bind({"bytes": queries}, {products: got})()
    return bool((got != size * 127 * 127).any())


def _times(g: NodeList, inputs: list[str]) -> str:
    return g.op("MatMulIntegerToFloat", *inputs, domain="com.microsoft")


def _scan_weights(
    memory: GateMemory,
) -> tuple[NDArray[np.int8], NDArray[np.float32], NDArray[np.float32]]:
    """int8 keys [D, N], their multipliers and squared norms [N]; zeros from n_valid."""
    count, size = memory.keys.shape
    keys = np.zeros((size, count), np.int8)
    scales = np.zeros((count, 2), np.float32)
    rows = max(1, _QUANTIZED_AT_ONCE // size)
    for start in range(0, memory.n_valid, rows):
        piece = slice(start, min(start + rows, memory.n_valid))
        scan = quantize_keys(memory.keys[piece])
        keys[:, piece] = scan.keys.T
        scales[piece] = scan.scales
    return keys, np.ascontiguousarray(scales[:, 0]), scales[:, 1]


def _bits_product(g: NodeList, inputs: list[str], shape: tuple[int, int], bits: int) -> str:
    """A product of fp32 rows [T, K], rounded to int8, with weights [N, K] of some bits."""
    outer, inner = shape
    return g.op(
        "MatMulNBits", *inputs, K=inner, N=outer, bits=bits, block_size=block_size(inner),
        accuracy_level=4, domain="com.microsoft",
    )  # fmt: skip


def _in_blocks(codes: NDArray[np.uint8], width: int, a_byte: int) -> NDArray[np.uint8]:
    """Codes [N, K / codes a byte] as [N, blocks, bytes]."""
    blocks = width // block_size(width)
    return np.ascontiguousarray(codes).reshape(len(codes), blocks, block_size(width) // a_byte)


def _block_scales(scales: NDArray[np.float32], width: int) -> NDArray[np.float32]:
    """Scales of rows [N] as those of their blocks [N, blocks]."""
    blocks = width // block_size(width)
    return np.repeat(scales.astype(np.float32)[:, None], blocks, axis=1)
