"""The memories of all gates in one block of device memory, uploaded once and swapped in place."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..blend import GateMemory
from ..engines.base import Array
from ..entries import size_class
from ..errors import SettingError
from ..gates.onnx import graph_name
from ..stored_values import dense
from ..two_stage import quantize_keys
from .cuda import ALIGNMENT, Cuda

# Of the keys that similarities are computed with; what follows `int8+` is scanned in int8 first.
KEY_DTYPES: dict[str, type[np.generic]] = {
    "float32": np.float32,
    "float16": np.float16,
    "int8": np.int8,
    "int8+float16": np.float16,
}
TWO_STAGES = "int8+float16"


def stored_keys(memory: GateMemory, dtype: str) -> tuple[NDArray[Any], NDArray[np.float32]]:
    """Keys [N, D] rounded to a dtype, with their scales [N, 2].

    int8 keys take a multiplier each, which goes into column 0 of the scales.

    Raises:
        SettingError: If the dtype is unknown.
    """
    if dtype not in KEY_DTYPES:
        raise SettingError("keys", "of an unknown type", expected=tuple(KEY_DTYPES), found=dtype)
    scales = np.array(memory.key_scales, np.float32)
    if dtype != "int8":
        return memory.keys.astype(KEY_DTYPES[dtype]), scales
    scan = quantize_keys(memory.keys)
    scales[:, 0] *= scan.scales[:, 0]
    return scan.keys, scales


@dataclass(frozen=True)
class _Place:
    """Where an array lies in the block."""

    offset: int
    shape: tuple[int, ...]
    dtype: np.dtype[Any]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


class ResidentMemory:
    """One memory a gate, on the device.

    Args:
        cuda: The device.
        memories: One a gate; None for a gate that routes frozen.
        key_dtype: `float32`, `float16`, `int8`, or `int8+float16`: scanned in int8, and the best
            scored again in fp16 (two stages).
        half_values: Keep values in fp16.
        limit: The most entries the engines take, if they limit them.

    Raises:
        DeviceError: If the device has too little memory.
        SettingError: If a dtype is unknown or a memory has more entries than the limit.
    """

    def __init__(
        self,
        cuda: Cuda,
        memories: Sequence[GateMemory | None],
        *,
        key_dtype: str = "float16",
        half_values: bool = False,
        limit: int | None = None,
    ) -> None:
        self._cuda = cuda
        self._key_dtype = key_dtype
        self._values = np.dtype(np.float16 if half_values else np.float32)
        self._limit = limit
        self.memories = tuple(memories)
        self._check_limit(self.memories)
        self._places = [
            None if memory is None else self._lay_out(size_class(len(memory.keys), limit), memory)
            for memory in self.memories
        ]
        self.nbytes = 0
        for place in self._every_place():
            self.nbytes = place.offset + _aligned(place.nbytes)
        self._block = cuda.bytes(self.nbytes + ALIGNMENT, stream=cuda.side)
        self._start = -int(self._block.data.ptr) % ALIGNMENT
        self._laid_out = self.memories  # what the places were chosen for
        self._fill(self._block, self.memories)

    def arrays(self, gate: int) -> Mapping[str, Array]:
        """A gate's memory as the inputs of the blend node, by name, on the device."""
        places = self._places[gate]
        assert places is not None, "a frozen gate has no memory"
        return {name: self._view(self._block, place) for name, place in places.items()}

    def fits(self, memories: Sequence[GateMemory | None]) -> bool:
        """Whether `swap` can put these memories in place."""
        return all(
            (new is None) == (old is None)
            and (
                new is None
                or old is None
                or (
                    graph_name(new) == graph_name(old)
                    and len(new.keys) <= self.capacity(gate)
                    and new.k <= self.columns(gate)
                )
            )
            for gate, (new, old) in enumerate(zip(memories, self.memories, strict=True))
        )

    def capacity(self, gate: int) -> int:
        """Entries a gate has room for."""
        places = self._places[gate]
        return 0 if places is None else places["keys"].shape[0]

    def columns(self, gate: int) -> int:
        """The most neighbours K a gate can be asked for: 8, 16, 32 or 64."""
        memory = self._laid_out[gate]
        most = 0 if memory is None else max(8, 1 << max(0, memory.k - 1).bit_length())
        return min(most, self.capacity(gate))

    def neighbors(self, gate: int) -> int:
        """K of a gate now, 0 without a memory; entries beyond n_valid have similarity 0."""
        memory = self.memories[gate]
        return 0 if memory is None else min(memory.k, self.capacity(gate))

    def swap(self, memories: Sequence[GateMemory | None]) -> None:
        """Put other memories in place of these, between two steps.

        They are written to a second block first, on a stream of its own, while steps go on; then
        one copy on the device replaces the old ones at once. What is bound to the arrays, captured
        graphs too, goes on with the new ones. Whatever fails before leaves the old ones in place.

        Raises:
            DeviceError: If the device has no room for the second block.
        """
        if not self.fits(memories):
            raise ValueError("memories of another size class are bound anew, not swapped")
        self._check_limit(memories)
        staging = self._cuda.bytes(self.nbytes + ALIGNMENT, stream=self._cuda.side)
        start = -int(staging.data.ptr) % ALIGNMENT
        self._fill(staging, memories)
        with self._cuda.lock:
            self._cuda.copy(
                staging[start : start + self.nbytes],
                self._block[self._start : self._start + self.nbytes],
            )
            self._cuda.synchronize()
            self.memories = tuple(memories)

    def append(self, memories: Sequence[GateMemory | None]) -> None:
        """Put the same memories with more entries in the place of these, between two steps.

        Only what is new is uploaded, to where no step reads before `n_valid` says so.
        """
        if not self.fits(memories):
            raise ValueError("memories that have no room are bound anew, not appended to")
        self._check_limit(memories)
        changed: list[tuple[Array, NDArray[np.int64]]] = []
        for gate, (new, old) in enumerate(zip(memories, self.memories, strict=True)):
            places = self._places[gate]
            if new is None or old is None or places is None or new.n_valid == old.n_valid:
                continue
            rows = slice(old.n_valid, new.n_valid)
            added = self._rows(new, rows)
            for name, content in added.items():
                view = self._view(self._block, places[name])[rows]
                self._cuda.upload(content, view, stream=self._cuda.side)
                self._cuda.side.synchronize()
            n_valid = np.array([new.n_valid], np.int64)
            changed.append((self._view(self._block, places["n_valid"]), n_valid))
        with self._cuda.lock:
            for there, count in changed:
                self._cuda.upload(count, there)
            self._cuda.synchronize()
            self.memories = tuple(memories)

    def _check_limit(self, memories: Sequence[GateMemory | None]) -> None:
        most = max((len(memory.keys) for memory in memories if memory is not None), default=0)
        if self._limit is not None and most > self._limit:
            raise SettingError(
                "memory", "has more entries than the engines were built for",
                expected=f"at most {self._limit} a gate", found=most,
                fix=f"Build the engines again with --max-entries {most}, or use a smaller memory.",
            )  # fmt: skip

    def _lay_out(self, capacity: int, memory: GateMemory) -> dict[str, _Place]:
        if self._key_dtype not in KEY_DTYPES:
            stored_keys(memory, self._key_dtype)  # says what is wrong
        hidden, experts = memory.keys.shape[1], memory.values.shape[1]
        shapes: dict[str, tuple[tuple[int, ...], Any]] = {
            "keys": ((capacity, hidden), KEY_DTYPES[self._key_dtype]),
            "key_scales": ((capacity, 2), np.float32),
            "values": ((capacity, experts), self._values),
            "evidence_weights": ((capacity,), np.float32),
            "n_valid": ((1,), np.int64),
            "k": ((1,), np.int64),
            "center": ((hidden,), np.float32),
            "calibration": (memory.calibration.vector().shape, np.float32),
        }
        if self._key_dtype == TWO_STAGES:
            shapes |= {
                "scan_keys": ((capacity, hidden), np.int8),
                "scan_scales": ((capacity, 2), np.float32),
            }
        places = {}
        offset = getattr(self, "_end", 0)
        for name, (shape, dtype) in shapes.items():
            places[name] = _Place(offset, shape, np.dtype(dtype))
            offset += _aligned(places[name].nbytes)
        self._end = offset
        return places

    def _every_place(self) -> Iterator[_Place]:
        for places in self._places:
            if places is not None:
                yield from places.values()

    def _fill(self, block: Array, memories: Sequence[GateMemory | None]) -> None:
        """Write memories to a block; one gate's at a time is on the host twice."""
        for memory, places in zip(memories, self._places, strict=True):
            if memory is None or places is None:
                continue
            content = self._rows(memory, slice(None)) | {
                "n_valid": np.array([memory.n_valid], np.int64),
                "k": np.array([memory.k], np.int64),
                "center": memory.center,
                "calibration": memory.calibration.vector(),
            }
            for name, place in places.items():
                host = np.zeros(place.shape, place.dtype)
                host[: len(content[name])] = content[name]
                self._cuda.upload(host, self._view(block, place), stream=self._cuda.side)
                self._cuda.side.synchronize()  # the host array goes now

    def _rows(self, memory: GateMemory, rows: slice) -> dict[str, NDArray[Any]]:
        """Some entries of a memory as they are stored."""
        part = replace(memory, keys=memory.keys[rows], key_scales=memory.key_scales[rows])
        keys, scales = stored_keys(part, self._key_dtype)
        content: dict[str, NDArray[Any]] = {
            "keys": keys,
            "key_scales": scales,
            "values": dense(memory.values)[rows].astype(self._values),
            "evidence_weights": memory.entry_evidence()[rows],
        }
        if self._key_dtype == TWO_STAGES:
            scan = quantize_keys(part.keys)
            content |= {"scan_keys": scan.keys, "scan_scales": scan.scales}
        return {name: np.ascontiguousarray(array) for name, array in content.items()}

    def _view(self, block: Array, place: _Place) -> Array:
        start = -int(block.data.ptr) % ALIGNMENT + place.offset
        return block[start : start + place.nbytes].view(place.dtype).reshape(place.shape)


def _aligned(count: int) -> int:
    return -(-count // ALIGNMENT) * ALIGNMENT
