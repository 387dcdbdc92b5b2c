"""Which kernels a call launches, in which grids, and their argument: plan.h for Python hosts."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

import numpy as np

KeyType = Literal["f32", "f16", "i8"]
KEY_TYPES: tuple[KeyType, ...] = get_args(KeyType)
KEY_DTYPES: dict[KeyType, type[np.generic]] = {"f32": np.float32, "f16": np.float16, "i8": np.int8}

KERNELS = Path(__file__).parent / "kernels"
SOURCE = KERNELS / "knn_blend.cu"


def sources_hash() -> str:
    """Of all kernel sources: what was compiled of them is of this state of them."""
    digest = hashlib.sha256()
    for file in sorted(KERNELS.iterdir()):
        digest.update(file.name.encode() + b"\0" + file.read_bytes())
    return digest.hexdigest()[:16]


# As in params.cuh.
MAX_NEIGHBORS = 64
MAX_DECODE_TOKENS = 16
MAX_TILES = 65535  # of a call, as in plan.h
WARPS, PREFILL_WARPS, FINISH_WARPS = 8, 4, 4
LANES = 32
# Tokens that one read of the keys can serve, beside one.
DECODE_TOKENS: dict[KeyType, tuple[int, ...]] = {
    "f32": (2, 4),
    "f16": (2, 4, 8, 16),
    "i8": (2, 8, 16),
}

POINTERS = (
    "x", "r", "keys", "key_scales", "scan_keys", "scan_scales", "values", "evidence_weights",
    "n_valid", "k", "center", "calibration", "state", "lengths", "rows", "state_out", "confidence",
    "neighbors", "similarities", "workspace", "ticket",
)  # fmt: skip
NUMBERS = (
    "tokens", "sequences", "hidden", "experts", "columns", "candidates", "splits", "rbf",
    "half_values",
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
    """The sizes of a call, named as in docs/design.md.

    `columns` is the most K may be. With `candidates`, which are `columns` to 64, the search has two
    stages: int8 keys are scanned for them, then they are scored again with the keys of `key_type`,
    fp32 or fp16.
    """

    key_type: KeyType
    tokens: int
    sequences: int
    hidden: int
    experts: int
    columns: int
    capacity: int
    candidates: int = 0

    @property
    def scan_type(self) -> KeyType:
        """Type of the keys that are scanned."""
        return "i8" if self.candidates else self.key_type

    @property
    def listed(self) -> int:
        """Length of the lists that a scan keeps."""
        return self.candidates or self.columns


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


def most_tokens(scan_type: KeyType) -> int:
    """The most that a call takes."""
    return MAX_TILES * _prefill_tokens(scan_type)


def make_plan(problem: Problem, device: Device) -> Plan:
    """The launches of a call of these sizes."""
    prefill = _prefill(problem, device)
    if problem.tokens > MAX_DECODE_TOKENS:
        return prefill
    decode = _decode(problem, device)
    # Decode keeps queries and lists in shared memory. Where that is too small for a wide tile, so
    # that it would read the keys more than twice, prefill's one read is worth its five launches.
    reads_more = problem.scan_type != "f32" and decode.launches[0].grid[1] > 2
    fits = prefill.launches[1].shared_bytes <= device.shared_bytes
    return prefill if reads_more and fits else decode


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


def _scan_shared(problem: Problem, tile: _Tile, lists: int) -> int:
    team = max(1, WARPS // tile.tokens)
    queries = _round_up(16 + 8 * tile.tokens + 8 * tile.tokens * team, 16)
    return queries + tile.query_bytes + 8 * lists * tile.tokens * problem.listed


def _finish_shared(problem: Problem) -> int:
    tokens, columns = problem.tokens, problem.columns
    team = 1 if tokens > 4 else 2 if tokens > 2 else 4 if tokens > 1 else 8
    return 16 + tokens * ((8 * team + 4) * columns + 8)


def _decode_shared(problem: Problem, tile: _Tile) -> int:
    finishing = _finish_shared(problem)
    if not problem.candidates:
        return max(_scan_shared(problem, tile, WARPS), finishing)
    # One token is scored again by a block that has scanned; more are by the next launch.
    if problem.tokens == 1:
        return max(_scan_shared(problem, tile, WARPS + 1), finishing)
    return _scan_shared(problem, tile, WARPS)


def _rescore_shared(problem: Problem) -> int:
    return _scan_shared(problem, _Tile.of(problem.key_type, 1, problem.hidden), WARPS + 1)


def _decode(problem: Problem, device: Device) -> Plan:
    # The most tokens a read of the keys can serve: what is asked for, what fits.
    tokens = 1
    for more in DECODE_TOKENS[problem.scan_type]:
        tile = _Tile.of(problem.scan_type, more, problem.hidden)
        if _decode_shared(problem, tile) > device.shared_bytes or tokens >= problem.tokens:
            break
        tokens = more
    tile = _Tile.of(problem.scan_type, tokens, problem.hidden)
    shared = _decode_shared(problem, tile)
    groups = -(-problem.tokens // tokens)
    resident = min(3 if tokens == 1 else 2, max(1, (device.shared_bytes + 1024) // (shared + 1024)))
    fill = max(1, device.multiprocessors * resident // groups)
    splits = min(fill, max(1, -(-problem.capacity // (WARPS * tile.keys))))
    alone = problem.candidates > 0 and problem.tokens == 1
    name = f"two_stage_{problem.key_type}" if alone else f"{problem.scan_type}_{tokens}"
    launches = [Launch(f"knnmoe_decode_{name}", (splits, groups), WARPS * LANES, shared)]
    if problem.candidates and not alone:
        launches.append(
            Launch(
                f"knnmoe_decode_rescore_{problem.key_type}", (problem.tokens, 1), WARPS * LANES,
                max(_rescore_shared(problem), _finish_shared(problem)),
            )
        )  # fmt: skip
    return Plan(tuple(launches), splits, _workspace_bytes(problem, splits, tokens, 0))


def _prefill(problem: Problem, device: Device) -> Plan:
    scan_type = problem.scan_type
    tile = _Tile.of(scan_type, _prefill_tokens(scan_type), problem.hidden)
    tiles = -(-problem.tokens // tile.tokens)
    fill = max(1, 4 * device.multiprocessors // tiles)
    splits = min(fill, max(1, -(-problem.capacity // (PREFILL_WARPS * tile.keys))))
    threads, columns = FINISH_WARPS * LANES, problem.columns
    if problem.candidates:
        merge = Launch(
            f"knnmoe_prefill_rescore_{problem.key_type}", (problem.tokens, 1), WARPS * LANES,
            _rescore_shared(problem),
        )  # fmt: skip
    else:
        blocks = -(-problem.tokens // FINISH_WARPS)
        merge = Launch("knnmoe_prefill_merge", (blocks, 1), threads, 0)
    launches = (
        Launch(f"knnmoe_prefill_prepare_{scan_type}", (tiles, 1), threads, 8 * tile.tokens),
        Launch(
            f"knnmoe_prefill_scan_{scan_type}", (splits, tiles), PREFILL_WARPS * LANES,
            8 * PREFILL_WARPS * tile.tokens * problem.listed,
        ),
        merge,
        Launch("knnmoe_prefill_gate", (-(-problem.sequences // FINISH_WARPS), 1), threads, 0),
        Launch("knnmoe_prefill_finish", (problem.tokens, 1), threads, 12 * columns),
    )  # fmt: skip
    bytes_ = _workspace_bytes(problem, splits, tile.tokens, tile.query_bytes)
    return Plan(launches, splits, bytes_)


def _prefill_tokens(scan_type: KeyType) -> int:
    return 8 if scan_type == "f32" else 32


def _workspace_bytes(problem: Problem, splits: int, tile_tokens: int, query_bytes: int) -> int:
    tokens, columns = problem.tokens, problem.columns
    end = _round_up(8 * tokens * problem.listed * splits, 256)
    end = _round_up(end + 8 * tokens * columns, 256)
    if query_bytes == 0:
        return end
    tiles = -(-tokens // tile_tokens)
    for part in (4 * tokens, 4 * tokens, 8 * tiles * tile_tokens):
        end = _round_up(end + part, 256)
    return _round_up(end + tiles * query_bytes, 256)


def _round_up(n: int, multiple: int) -> int:
    return -(-n // multiple) * multiple
