"""What a decode step needs on the device between two engines: routing, and filling caches.

Each method fixes its arrays and returns a `run` that launches one kernel on CuPy's current stream
and does nothing else, so it can be captured in a CUDA graph. The kernels are in kernels/step.cuh,
where their memory traffic is stated.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from knnmoe.runtime.errors import SettingError

from .cupy_prototype import NVRTC_OPTIONS, import_cupy
from .plan import KERNELS

Array = Any  # cupy.ndarray
Run = Callable[[], None]

SOURCE = KERNELS / "step.cu"
# As in step.cuh.
WARPS, LANES = 4, 32
MOST_EXPERTS, MOST_SELECTED, MOST_CACHES = 1024, 64, 32
SIZES = (64, 128, 256, 1024)  # most experts of each kernel

ROUTE_PARAMS = np.dtype(
    [(name, np.uint64) for name in ("rows", "expert_ids", "expert_weights", "assignments")]
    + [(name, np.int32) for name in ("tokens", "experts", "columns", "top_k", "renormalize")]
    + [("scale", np.float32)],
    align=True,
)
CACHE_PAIR = np.dtype(
    [("cache", np.uint64), ("fresh", np.uint64), ("capacity", np.int64)]
    + [(name, np.int32) for name in ("heads", "row_bytes", "unit", "reserved")],
    align=True,
)
APPEND_PARAMS = np.dtype(
    [
        ("past_lengths", np.uint64),
        ("sequences", np.int32),
        ("fresh_rows", np.int32),
        ("pairs", CACHE_PAIR, MOST_CACHES),
    ],
    align=True,
)


class StepKernels:
    """The small kernels of a decode step, compiled for the current device when first used.

    A row of logits that has no softmax (NaN or +inf in it, or -inf alone) gives experts 0..k-1 with
    weight NaN: in bounds, and seen in the output. NaN among assignments comes after every number.

    Args:
        cupy: The CuPy module; imported if not given.

    Raises:
        BackendError: If CuPy or a device is missing.
    """

    def __init__(self, *, cupy: Any = None) -> None:
        self._cupy = import_cupy() if cupy is None else cupy
        self._module = self._cupy.RawModule(code=SOURCE.read_text(), options=NVRTC_OPTIONS)

    def route(
        self,
        rows: Array,
        expert_ids: Array,
        expert_weights: Array,
        *,
        top_k: int,
        renormalize: bool,
        scale: float,
    ) -> Run:
        """The routing rule: logits [T, E] → ids int32 [T, k], weights fp32 [T, k].

        Softmax over all experts, the best of them with ties to the lower index, optionally divided
        by the sum of the selected `top_k`, times `scale`. If k is larger, the further experts are
        the next best with weight 0.

        Raises:
            SettingError: If an array or a number does not fit.
        """
        experts = self._rows("rows", rows)
        columns = self._selection(expert_ids, expert_weights, rows)
        _expect_rule(top_k, scale, columns, experts)
        return self._routing(
            "route",
            {"rows": rows, "expert_ids": expert_ids, "expert_weights": expert_weights},
            columns=columns, top_k=top_k, renormalize=bool(renormalize), scale=scale,
        )  # fmt: skip

    def assign(
        self, rows: Array, assignments: Array, *, top_k: int, renormalize: bool, scale: float
    ) -> Run:
        """The rule as dense rows: logits [T, E] → weights [T, E], 0 where not selected.

        `assignments` may be `rows` itself.

        Raises:
            SettingError: If an array or a number does not fit.
        """
        experts = self._rows("rows", rows)
        self._rows("assignments", assignments)
        _expect_shape("assignments", assignments, rows.shape)
        _expect_rule(top_k, scale, min(experts, MOST_SELECTED), experts)
        return self._routing(
            "assign",
            {"rows": rows, "assignments": assignments},
            columns=top_k, top_k=top_k, renormalize=bool(renormalize), scale=scale,
        )  # fmt: skip

    def heaviest(self, assignments: Array, expert_ids: Array, expert_weights: Array) -> Run:
        """Cut assignments [T, E] to the k heaviest; where more are not 0, they take their mass.

        Raises:
            SettingError: If an array does not fit.
        """
        experts = self._rows("assignments", assignments)
        columns = self._selection(expert_ids, expert_weights, assignments)
        _expect_rule(columns, 1.0, columns, experts)
        return self._routing(
            "heaviest",
            {"rows": assignments, "expert_ids": expert_ids, "expert_weights": expert_weights},
            columns=columns, top_k=columns, renormalize=False, scale=1.0,
        )  # fmt: skip

    def append(self, cache: Array, new: Array, past_lengths: Array) -> Run:
        """Write new rows behind what a cache holds; see `append_many`."""
        return self.append_many([(cache, new)], past_lengths)

    def append_many(self, pairs: Sequence[tuple[Array, Array]], past_lengths: Array) -> Run:
        """Write new rows into several caches with one launch (of up to 32 caches).

        cache[b, :, past_lengths[b] + s] = new[b, :, s] with caches [B, H, C, d], new [B, H, S, d],
        fp32 or fp16, and past_lengths int64 [B], which is read on the device. A position outside of
        the cache is not written. H, C, d and the type may differ from cache to cache.

        Raises:
            SettingError: If an array does not fit.
        """
        self._on_device("past_lengths", past_lengths, (np.int64,), 1)
        if not pairs:
            raise SettingError("pairs", "empty", expected="at least one cache", found=0)
        sequences, fresh_rows = past_lengths.shape[0], pairs[0][1].shape[-2]
        entries, rows = [], 0
        for number, (cache, new) in enumerate(pairs):
            entries.append(self._pair(number, cache, new, sequences, fresh_rows))
            rows = max(rows, new.shape[0] * new.shape[1] * new.shape[2])
        if rows >= 2**31:
            raise SettingError("new", "too many rows", expected="below 2^31", found=rows)
        launches = []
        kernel = self._module.get_function("knnmoe_step_append")
        for start in range(0, len(entries), MOST_CACHES):
            some = entries[start : start + MOST_CACHES]
            params = np.zeros((), APPEND_PARAMS)
            params["past_lengths"] = past_lengths.data.ptr
            params["sequences"], params["fresh_rows"] = sequences, fresh_rows
            params["pairs"][: len(some)] = some
            launches.append((params, (-(-rows // WARPS), len(some))))
        arrays = (tuple(pairs), past_lengths)

        def run(_keep_alive: Any = arrays) -> None:
            if rows:
                for params, grid in launches:
                    kernel(grid, (WARPS * LANES,), (params,), shared_mem=0)

        return run

    def _pair(
        self, number: int, cache: Array, new: Array, sequences: int, fresh_rows: int
    ) -> tuple[int, ...]:
        where = f"cache {number}"
        types = (np.float32, np.float16)
        self._on_device(where, cache, types, 4)
        self._on_device(f"new {number}", new, types, 4)
        _, heads, capacity, width = cache.shape
        _expect_shape(f"new {number}", new, (sequences, heads, fresh_rows, width))
        _expect_shape(where, cache, (sequences, heads, capacity, width))
        if cache.dtype != new.dtype:
            raise SettingError(
                f"new {number}", "of another type", expected=cache.dtype, found=new.dtype
            )
        row_bytes = width * cache.dtype.itemsize
        addresses = cache.data.ptr | new.data.ptr | row_bytes
        unit = next(unit for unit in (16, 4, 2) if addresses % unit == 0)
        return cache.data.ptr, new.data.ptr, capacity, heads, row_bytes, unit, 0

    def _routing(self, kind: str, arrays: dict[str, Array], **numbers: Any) -> Run:
        tokens, experts = arrays["rows"].shape
        params = np.zeros((), ROUTE_PARAMS)
        for name, array in arrays.items():
            params[name] = array.data.ptr
        params["tokens"], params["experts"] = tokens, experts
        for name, number in numbers.items():
            params[name] = number
        size = next(size for size in SIZES if experts <= size)
        kernel = self._module.get_function(f"knnmoe_step_{kind}_{size}")
        grid = (-(-tokens // WARPS), 1)

        def run(_keep_alive: Any = arrays) -> None:
            if tokens:
                kernel(grid, (WARPS * LANES,), (params,), shared_mem=0)

        return run

    def _rows(self, name: str, rows: Array) -> int:
        """Check rows [T, E]; returns E."""
        self._on_device(name, rows, (np.float32,), 2)
        tokens, experts = rows.shape
        if not 1 <= experts <= MOST_EXPERTS:
            raise SettingError(
                name, "too many experts", expected=f"1 to {MOST_EXPERTS}", found=experts
            )
        if tokens >= 2**31 - WARPS:
            raise SettingError(name, "too many tokens", expected="below 2^31 - 4", found=tokens)
        return int(experts)

    def _selection(self, expert_ids: Array, expert_weights: Array, rows: Array) -> int:
        """Check ids and weights [T, k]; returns k."""
        self._on_device("expert_ids", expert_ids, (np.int32,), 2)
        self._on_device("expert_weights", expert_weights, (np.float32,), 2)
        columns = int(expert_ids.shape[1])
        _expect_shape("expert_ids", expert_ids, (rows.shape[0], columns))
        _expect_shape("expert_weights", expert_weights, (rows.shape[0], columns))
        return columns

    def _on_device(
        self, name: str, array: Array, types: tuple[type[np.generic], ...], dimensions: int
    ) -> None:
        if not isinstance(array, self._cupy.ndarray):
            raise SettingError(
                name, "not on the device", expected="a CuPy array", found=type(array).__name__
            )
        if array.dtype not in types:
            expected = " or ".join(np.dtype(kind).name for kind in types)
            raise SettingError(name, "of another type", expected=expected, found=array.dtype)
        if array.ndim != dimensions:
            raise SettingError(
                name, "of another shape", expected=f"{dimensions} dimensions",
                found=list(array.shape),
            )  # fmt: skip
        if not array.flags.c_contiguous or array.data.ptr % array.dtype.itemsize:
            raise SettingError(name, "not contiguous", fix="Pass a contiguous array.")


def _expect_shape(name: str, array: Array, shape: tuple[int, ...]) -> None:
    if tuple(array.shape) != tuple(shape):
        raise SettingError(name, "of another shape", expected=list(shape), found=list(array.shape))


def _expect_rule(top_k: int, scale: float, columns: int, experts: int) -> None:
    if not 1 <= columns <= min(experts, MOST_SELECTED):
        raise SettingError(
            "expert_ids", "too many experts a token",
            expected=f"1 to {min(experts, MOST_SELECTED)}", found=columns,
        )  # fmt: skip
    if not 1 <= top_k <= columns:
        raise SettingError("top_k", "out of range", expected=f"1 to {columns}", found=top_k)
    if not math.isfinite(scale):
        raise SettingError("scale", "not a finite number", found=scale)
