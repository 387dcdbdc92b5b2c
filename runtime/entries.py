"""Entries that are put into a memory while it serves.

A memory with room for more has rows behind its valid ones, which nothing reads: `n_valid` says how
many count. New entries are written there, and then a memory with a larger `n_valid` over the same
arrays takes the place of the old one. Steps that run meanwhile go on with the old number.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .blend import GateMemory
from .calibration import VARIANTS, Variant
from .compressed import CompressedMemory, Memory
from .errors import BackendError, InputError, SettingError
from .pack_tensors import prepare_keys
from .stored_values import dense

SMALLEST_CLASS = 256


@dataclass(frozen=True)
class NewEntries:
    """Entries for one gate.

    Attributes:
        keys: [M, D] router inputs as they are, neither centred nor scaled; M ≥ 1.
        values: [M, E] what the memory's variant blends: `residual`, learned minus router logits;
            `logits`, learned logits; `assignment`, what the routing rule makes of them.
        weights: [M] how much each counts as evidence, 0 to 1; None: each 1.
    """

    keys: NDArray[Any]
    values: NDArray[Any]
    weights: NDArray[Any] | None = None


def size_class(entries: int, limit: int | None = None) -> int:
    """Capacity for that many entries: 4, 5, 6 or 7 times a power of two, at most `limit`.

    A quarter of room at the most, so that most swaps and additions find it large enough.
    """
    step = 1 << max(0, math.ceil(math.log2(max(entries, SMALLEST_CLASS))) - 3)
    wanted = -(-max(entries, SMALLEST_CLASS) // step) * step
    return wanted if limit is None or entries > limit else min(wanted, limit)


def with_entries(
    memories: Sequence[Memory | None],
    entries: Mapping[int, NewEntries],
    *,
    variant: Variant,
    of_memory: Variant | None,
) -> tuple[Memory | None, ...]:
    """The memories of all gates with entries more; what is there already is not changed.

    Args:
        memories: One a gate.
        entries: By gate.
        variant: What the values are.
        of_memory: What the memory blends; None where there is none.

    Raises:
        SettingError: If there is no such gate, or the variant is unknown or another one.
        BackendError: If there is no memory, or none that takes entries.
        InputError: If an array has another shape, or numbers that cannot be used.
    """
    if variant not in VARIANTS:
        raise SettingError("variant", "unknown", expected=VARIANTS, found=variant)
    if of_memory is None:
        raise BackendError(
            "entries", "there is no memory that they could go into",
            fix="Put one in place with `Model.swap_memory`.",
        )  # fmt: skip
    if variant != of_memory:
        raise SettingError(
            "variant", "is not that of the memory", expected=of_memory, found=variant,
            fix="Give the values that the memory blends.",
        )  # fmt: skip
    if not entries:
        raise InputError("entries", "none given", expected="at least one gate's")
    checked = {gate: _checked(gate, new, memories) for gate, new in entries.items()}
    after = list(memories)
    for gate, (memory, new) in checked.items():
        after[gate] = _appended(memory, new)
    return tuple(after)


def trimmed(memory: GateMemory | None) -> GateMemory | None:
    """The memory without its room."""
    if memory is None or memory.n_valid == len(memory.keys):
        return memory
    rows, weights = slice(memory.n_valid), memory.evidence_weights
    return replace(
        memory,
        keys=memory.keys[rows],
        key_scales=memory.key_scales[rows],
        values=dense(memory.values)[rows],
        evidence_weights=None if weights is None else weights[rows],
    )


def _checked(
    gate: int, new: NewEntries, memories: Sequence[Memory | None]
) -> tuple[GateMemory, NewEntries]:
    where = f"gate {gate}"
    if not isinstance(gate, int) or not 0 <= gate < len(memories):
        raise SettingError(where, "no such gate", expected=f"0 to {len(memories) - 1}", found=gate)
    memory = memories[gate]
    if memory is None:
        covered = [index for index, one in enumerate(memories) if one is not None]
        raise SettingError(
            where, "is left to the frozen router", expected=f"one of {covered}", found=gate
        )
    if isinstance(memory, CompressedMemory):
        raise BackendError(
            where, "its memory is compressed, and takes no entries",
            fix="Load the pack that was compressed in its place.",
        )  # fmt: skip
    count = len(new.keys) if np.ndim(new.keys) else 0
    sizes = {"keys": (count, len(memory.center)), "values": (count, memory.values.shape[1])}
    arrays = {name: _numbers(where, name, getattr(new, name), sizes[name]) for name in sizes}
    weights = None
    if new.weights is not None:
        weights = _numbers(where, "weights", new.weights, (count,))
        if weights.min() < 0 or weights.max() > 1:
            raise InputError(
                f"{where}: weights", "out of range", expected="0 to 1",
                found=f"{weights.min()} to {weights.max()}",
            )  # fmt: skip
    return memory, NewEntries(**arrays, weights=weights)


def _numbers(where: str, name: str, given: Any, shape: tuple[int, ...]) -> NDArray[np.float32]:
    array = np.asarray(given)
    if array.shape != shape or not len(array) or array.dtype.kind not in "fiu":
        raise InputError(
            f"{where}: {name}", "wrong shape or type",
            expected=f"numbers of shape {[max(1, shape[0]), *shape[1:]]}",
            found=f"{array.dtype} of shape {list(array.shape)}",
        )  # fmt: skip
    with np.errstate(over="ignore"):
        numbers = array.astype(np.float32)
    if not np.isfinite(numbers).all():
        row = int(np.argwhere(~np.isfinite(numbers))[0][0])
        raise InputError(
            f"{where}: {name}", "has NaN or infinite numbers (in fp32)", found=f"in row {row}"
        )
    return numbers


def _appended(memory: GateMemory, new: NewEntries) -> GateMemory:
    """A memory with entries behind its own, over the same arrays if there is room."""
    keys, scales = prepare_keys(new.keys, memory.center, memory.similarity)
    start, end = memory.n_valid, memory.n_valid + len(keys)
    capacity = len(memory.keys) if end <= len(memory.keys) else size_class(end)
    weights = memory.evidence_weights
    if weights is None and new.weights is not None:
        weights = np.ones(len(memory.keys), np.float32)
    values = _with_room(dense(memory.values), start, capacity)
    grown = replace(
        memory,
        keys=_with_room(memory.keys, start, capacity),
        key_scales=_with_room(memory.key_scales, start, capacity),
        values=values,
        n_valid=end,
        evidence_weights=None if weights is None else _with_room(weights, start, capacity),
    )
    grown.keys[start:end], grown.key_scales[start:end] = keys, scales
    values[start:end] = new.values
    if grown.evidence_weights is not None:
        grown.evidence_weights[start:end] = 1 if new.weights is None else new.weights
    return grown


def _with_room(array: NDArray[Any], count: int, capacity: int) -> NDArray[Any]:
    """An array with so many rows, the first `count` of them kept: itself if it has them."""
    if len(array) == capacity:
        return array
    larger = np.zeros((capacity, *array.shape[1:]), array.dtype)
    larger[:count] = array[:count]
    return larger
