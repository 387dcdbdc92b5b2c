"""Which kernels a call launches, in which grids, and their argument: plan.h for Python hosts."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

import numpy as np

KeyType = Literal["f32", "f16", "i8"]
KEY_TYPES: tuple[KeyType, ...] = get_args(KeyType)
KEY_DTYPES: dict[KeyType, type[np.generic]] = {"f32": np.float32, "f16": np.float16, "i8": np.int8}

KERNELS = Path(__file__).parent / "kernels"
SOURCE = KERNELS / "knn_blend.cu"

# As in params.cuh.
MAX_NEIGHBORS = 64
MAX_DECODE_TOKENS = 16
WARPS, PREFILL_WARPS, FINISH_WARPS = 8, 4, 4
LANES = 32
# Tokens that one read of the keys can serve, beside one.
DECODE_TOKENS: dict[KeyType, tuple[int, ...]] = {
    "f32": (2, 4),
    "f16": (2, 4, 8, 16),
    "i8": (2, 8, 16),
}

POINTERS = (
    "x", "r", "keys", "key_scales", "values", "n_valid", "k", "center", "calibration", "state",
    "lengths", "rows", "state_out", "confidence", "neighbors", "similarities", "workspace",
    "ticket",
)  # fmt: skip
NUMBERS = (
    "tokens", "sequences", "hidden", "experts", "columns", "splits", "rbf", "half_values",
)  # fmt: skip

# BlendParams, the kernels' only argument.
PARAMS = np.dtype(
    [(name, np.uint64) for name in POINTERS]
    + [("capacity", np.int64)]
    + [(name, np.int32) for name in NUMBERS],
    align=True,
)


@dataclass(frozen=True)
class Device:
    """What a plan needs to know of a device."""

    multiprocessors: int
    shared_bytes: int  # the most a block may ask for


@dataclass(frozen=True)
class Problem:
    """The sizes of a call, named as in docs/design.md; `columns` is the most K may be."""

    key_type: KeyType
    tokens: int
    sequences: int
    hidden: int
    experts: int
    columns: int
    capacity: int


@dataclass(frozen=True)
class Launch:
    """One kernel launch."""

    kernel: str
    grid: tuple[int, int]
    threads: int
    shared_bytes: int


@dataclass(frozen=True)
class Plan:
    """The launches of a call, in order, and the scratch memory they share."""

    launches: tuple[Launch, ...]
    splits: int
    workspace_bytes: int


def make_plan(problem: Problem, device: Device) -> Plan:
    """The launches of a call of these sizes."""
    decode = problem.tokens <= MAX_DECODE_TOKENS
    return _decode(problem, device) if decode else _prefill(problem, device)


@dataclass(frozen=True)
class _Tile:
    tokens: int
    keys: int
    query_bytes: int

    @staticmethod
    def of(key_type: KeyType, tokens: int, hidden: int) -> _Tile:
        width = 16 // np.dtype(KEY_DTYPES[key_type]).itemsize
        tensor = key_type != "f32" and tokens >= 8
        padded = _round_up(hidden, 4 * width if tensor else width)
        keys = 4 if not tensor else 32 if tokens == 32 else 16
        return _Tile(tokens, keys, 4 * tokens * padded)


def _decode_shared(problem: Problem, tile: _Tile) -> int:
    team = max(1, WARPS // tile.tokens)
    queries = _round_up(16 + 8 * tile.tokens + 8 * tile.tokens * team, 16)
    scanning = queries + tile.query_bytes + 8 * WARPS * tile.tokens * problem.columns
    finishing = 16 + problem.tokens * (12 * problem.columns + 8)
    return max(scanning, finishing)


def _decode(problem: Problem, device: Device) -> Plan:
    # The most tokens a read of the keys can serve: what is asked for, what fits.
    tokens = 1
    for more in DECODE_TOKENS[problem.key_type]:
        tile = _Tile.of(problem.key_type, more, problem.hidden)
        if _decode_shared(problem, tile) > device.shared_bytes or tokens >= problem.tokens:
            break
        tokens = more
    tile = _Tile.of(problem.key_type, tokens, problem.hidden)
    shared = _decode_shared(problem, tile)
    groups = -(-problem.tokens // tokens)
    resident = min(3 if tokens == 1 else 2, max(1, (device.shared_bytes + 1024) // (shared + 1024)))
    fill = max(1, device.multiprocessors * resident // groups)
    splits = min(fill, max(1, -(-problem.capacity // (WARPS * tile.keys))))
    return Plan(
        (
            Launch(
                f"knnmoe_decode_{problem.key_type}_{tokens}", (splits, groups), WARPS * LANES,
                shared,
            ),
        ),
        splits,
        _workspace_bytes(problem, splits, tokens, 0),
    )  # fmt: skip


def _prefill(problem: Problem, device: Device) -> Plan:
    tile = _Tile.of(problem.key_type, 8 if problem.key_type == "f32" else 32, problem.hidden)
    tiles = -(-problem.tokens // tile.tokens)
    fill = max(1, 4 * device.multiprocessors // tiles)
    splits = min(fill, max(1, -(-problem.capacity // (PREFILL_WARPS * tile.keys))))
    threads, columns = FINISH_WARPS * LANES, problem.columns
    launches = (
        Launch(
            f"knnmoe_prefill_prepare_{problem.key_type}", (tiles, 1), threads, 8 * tile.tokens
        ),
        Launch(
            f"knnmoe_prefill_scan_{problem.key_type}", (splits, tiles), PREFILL_WARPS * LANES,
            8 * PREFILL_WARPS * tile.tokens * columns,
        ),
        Launch(
            "knnmoe_prefill_merge", (-(-problem.tokens // FINISH_WARPS), 1), threads,
            8 * FINISH_WARPS * columns,
        ),
        Launch("knnmoe_prefill_gate", (-(-problem.sequences // FINISH_WARPS), 1), threads, 0),
        Launch("knnmoe_prefill_finish", (problem.tokens, 1), threads, 12 * columns),
    )  # fmt: skip
    bytes_ = _workspace_bytes(problem, splits, tile.tokens, tile.query_bytes)
    return Plan(launches, splits, bytes_)


def _workspace_bytes(problem: Problem, splits: int, tile_tokens: int, query_bytes: int) -> int:
    tokens, columns = problem.tokens, problem.columns
    end = _round_up(8 * tokens * columns * splits, 256)
    if query_bytes == 0:
        return end
    tiles = -(-tokens // tile_tokens)
    for part in (8 * tokens * columns, 4 * tokens, 4 * tokens, 8 * tiles * tile_tokens):
        end = _round_up(end + part, 256)
    return _round_up(end + tiles * query_bytes, 256)


def _round_up(n: int, multiple: int) -> int:
    return -(-n // multiple) * multiple
