"""Streaming writer of the weights: safetensors files that the graphs use as external data.

A file is planned first (names, shapes, who produces them), so that every offset is known before a
byte is written; then tensors go out chunk by chunk, hashed on the way. The peak of memory is a
chunk of a tensor, never a model.
"""

from __future__ import annotations

import hashlib
import json
import math
import struct
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from knnmoe.runtime.bundle import FileSpec

from .graph import StoredTensor

ALIGNMENT = 64  # of the data's start
CHUNK_BYTES = 16 << 20

# dtype of a stored tensor → its name in a safetensors header, and the layout of an element
DTYPES = {"float32": ("F32", "<f4"), "float16": ("F16", "<f2"), "uint8": ("U8", "u1")}

Chunks = Callable[[], Iterator[NDArray[Any]]]
Progress = Callable[[int], None]


@dataclass(frozen=True)
class PlannedTensor:
    """A tensor to be written: `chunks` yields its elements in order, piece by piece.

    Attributes:
        name: In the file, and as an initializer.
        shape: Of the tensor.
        chunks: Makes its elements, converted to `dtype`.
        dtype: A key of `DTYPES`.
        sources: The checkpoint's tensors that it is, one after another; empty for what has another
            order than theirs.
    """

    name: str
    shape: tuple[int, ...]
    chunks: Chunks
    dtype: str = "float32"
    sources: tuple[str, ...] = ()

    @property
    def layout(self) -> np.dtype[Any]:
        """Of an element in the file."""
        return np.dtype(DTYPES[self.dtype][1])

    @property
    def nbytes(self) -> int:
        """Bytes of the tensor as it is written."""
        return math.prod(self.shape) * self.layout.itemsize


@dataclass(frozen=True)
class PlannedFile:
    """A weights file before it is written: its header, and where each tensor will lie."""

    name: str
    header: bytes
    tensors: tuple[PlannedTensor, ...]
    stored: dict[str, StoredTensor]

    @property
    def nbytes(self) -> int:
        """Bytes of the file."""
        return len(self.header) + sum(tensor.nbytes for tensor in self.tensors)


def plan_file(name: str, tensors: Sequence[PlannedTensor]) -> PlannedFile:
    """Lay the tensors out one after the other, in the order given."""
    entries: dict[str, object] = {}
    position = 0
    for tensor in tensors:
        entries[tensor.name] = {
            "dtype": DTYPES[tensor.dtype][0],
            "shape": list(tensor.shape),
            "data_offsets": [position, position + tensor.nbytes],
        }
        position += tensor.nbytes
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % ALIGNMENT)
    header = struct.pack("<Q", len(text)) + text
    stored: dict[str, StoredTensor] = {}
    offset = len(header)
    for tensor in tensors:
        stored[tensor.name] = StoredTensor(name, offset, tensor.nbytes, tensor.shape, tensor.dtype)
        offset += tensor.nbytes
    return PlannedFile(name, header, tuple(tensors), stored)


def write_file(plan: PlannedFile, directory: Path, progress: Progress) -> FileSpec:
    """Write a planned file and return its hash and size.

    Args:
        progress: Called with the number of bytes just written.
    """
    digest = hashlib.sha256()
    with (directory / plan.name).open("wb") as stream:
        stream.write(plan.header)
        digest.update(plan.header)
        for tensor in plan.tensors:
            written = 0
            for chunk in tensor.chunks():
                data = np.ascontiguousarray(chunk, dtype=tensor.layout)
                stream.write(data.data)
                digest.update(data.data)
                written += data.nbytes
                progress(data.nbytes)
            if written != tensor.nbytes:
                raise AssertionError(f"{tensor.name}: {written} bytes instead of {tensor.nbytes}")
    return FileSpec(digest.hexdigest(), plan.nbytes)


def row_chunks(matrix: NDArray[np.generic]) -> Iterator[NDArray[np.float32]]:
    """A tensor as fp32, some rows at a time."""
    if matrix.ndim == 0 or matrix.size == 0:
        yield np.asarray(matrix, dtype=np.float32)
        return
    rows = max(1, CHUNK_BYTES // (4 * math.prod(matrix.shape[1:])))
    for start in range(0, len(matrix), rows):
        yield matrix[start : start + rows].astype(np.float32)
