"""What a decode step needs on the device between two engines: routing, and filling caches.

Each method fixes its arrays and returns a `run` that launches one kernel on CuPy's current stream
and does nothing else, so it can be captured in a CUDA graph. The kernels are in kernels/step.cuh,
where their memory traffic is stated.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
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
MOST_EXPERTS, MOST_SELECTED, MOST_CACHES, MOST_GROUPS = 1024, 64, 32, 32
SCORES = {"softmax": 0, "softmax-topk": 1, "sigmoid": 2}
GROUP_SCORES = {"max": 0, "top2": 1}
SIZES = (64, 128, 256, 1024)  # most experts of each kernel

ROUTE_PARAMS = np.dtype(
    [(name, np.uint64) for name in ("rows", "expert_ids", "expert_weights", "assignments")]
    + [("selection_bias", np.uint64)]
    + [(name, np.int32) for name in ("tokens", "experts", "columns", "top_k", "renormalize")]
    + [(name, np.int32) for name in ("score", "groups", "top_groups", "group_sum")]
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


@dataclass(frozen=True)
class KernelRule:
    """A routing rule as the kernels take it; `RoutingRule` of the runtime says what it means.

    Attributes:
        top_k, renormalize, scale: How many experts are selected, and how they are weighed.
        score: A key of `SCORES`.
        groups, top_groups, group_score: Groups of experts, at most 32; a key of `GROUP_SCORES`.
        selection_bias: fp32 [E] on the device, or None.
    """

    top_k: int
    renormalize: bool = False
    scale: float = 1.0
    score: str = "softmax"
    groups: int = 1
    top_groups: int = 1
    group_score: str = "max"
    selection_bias: Array | None = None

    def check(self, columns: int, experts: int) -> None:
        """Raise `SettingError` unless the kernels can run it over that many experts."""
        _expect_rule(self.top_k, self.scale, columns, experts)
        for name, choices in (("score", SCORES), ("group_score", GROUP_SCORES)):
            found = getattr(self, name)
            if found not in choices:
                raise SettingError(name, "unknown", expected=tuple(choices), found=found)
        most = min(experts, MOST_GROUPS)
        if not 1 <= self.groups <= most or experts % self.groups:
            raise SettingError(
                "groups", "do not divide the experts, or are too many",
                expected=f"a divisor of {experts}, at most {most}", found=self.groups,
            )  # fmt: skip
        if not 1 <= self.top_groups <= self.groups:
            raise SettingError(
                "top_groups", "out of range", expected=f"1 to {self.groups}", found=self.top_groups
            )
        size = experts // self.groups
        if self.groups > 1 and size == 1 and self.group_score == "top2":
            raise SettingError("group_score", "sums two experts of groups of one", found="top2")
        selectable = size * self.top_groups
        if self.top_k > selectable:
            raise SettingError(
                "top_k", "more than can be selected", expected=f"1 to {selectable}",
                found=self.top_k,
            )  # fmt: skip

    @property
    def numbers(self) -> dict[str, Any]:
        """The fields of `ROUTE_PARAMS` that state it."""
        return {
            "top_k": self.top_k,
            "renormalize": bool(self.renormalize),
            "scale": self.scale,
            "score": SCORES[self.score],
            "groups": self.groups,
            "top_groups": self.top_groups,
            "group_sum": GROUP_SCORES[self.group_score],
        }


class StepKernels:
    """The small kernels of a decode step, compiled for the current device when first used.

    A row of logits that has no softmax (NaN or +inf in it, or -inf alone) gives experts 0..k-1 with
    weight NaN: in bounds, and seen in the output. NaN among assignments, sigmoids or logits that
    select by themselves comes after every number.

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
        **rule: Any,
    ) -> Run:
        """The routing rule: logits [T, E] → ids int32 [T, k], weights fp32 [T, k].

        The scores of all experts, the best of them with ties to the lower index, weighed. If k is
        larger than `top_k`, the further experts are the next best with weight 0.

        Args:
            rows, expert_ids, expert_weights: On the device.
            rule: The fields of `KernelRule`.

        Raises:
            SettingError: If an array or a number does not fit.
        """
        experts = self._rows("rows", rows)
        columns = self._selection(expert_ids, expert_weights, rows)
        arrays = {"rows": rows, "expert_ids": expert_ids, "expert_weights": expert_weights}
        return self._ruled("route", arrays, KernelRule(**rule), columns, experts)

    def assign(self, rows: Array, assignments: Array, **rule: Any) -> Run:
        """The rule as dense rows: logits [T, E] → weights [T, E], 0 where not selected.

        `assignments` may be `rows` itself; `rule` is as of `route`.

        Raises:
            SettingError: If an array or a number does not fit.
        """
        experts = self._rows("rows", rows)
        self._rows("assignments", assignments)
        _expect_shape("assignments", assignments, rows.shape)
        arrays = {"rows": rows, "assignments": assignments}
        columns = min(experts, MOST_SELECTED)
        return self._ruled("assign", arrays, KernelRule(**rule), columns, experts)

    def heaviest(self, assignments: Array, expert_ids: Array, expert_weights: Array) -> Run:
        """Cut assignments [T, E] to the k heaviest; where more are not 0, they take their mass.

        Raises:
            SettingError: If an array does not fit.
        """
        experts = self._rows("assignments", assignments)
        columns = self._selection(expert_ids, expert_weights, assignments)
        arrays = {"rows": assignments, "expert_ids": expert_ids, "expert_weights": expert_weights}
        return self._ruled("heaviest", arrays, KernelRule(columns), columns, experts)

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

    def _ruled(
        self, kind: str, arrays: dict[str, Array], rule: KernelRule, columns: int, experts: int
    ) -> Run:
        rule.check(columns, experts)
        if rule.selection_bias is not None:
            self._on_device("selection_bias", rule.selection_bias, (np.float32,), 1)
            _expect_shape("selection_bias", rule.selection_bias, (experts,))
            arrays = arrays | {"selection_bias": rule.selection_bias}
        return self._routing(kind, arrays, columns=columns, **rule.numbers)

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
