"""A safetensors file whose tensors are written row by row, in any order.

Shapes are known before the numbers are: the header is written first, and the file has its full size
from then on. What was not written yet is zero.
"""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from knnmoe.runtime.atomic import output_error
from knnmoe.runtime.errors import OutputError

CHUNK_BYTES = 4 << 20
_MAX_HEADER = 1 << 20
_DTYPES = {"F16": np.float16, "F32": np.float32, "I32": np.int32}
_NAMES = {np.dtype(dtype): name for name, dtype in _DTYPES.items()}
DAMAGED = "Pass --restart to start afresh."

Shapes = Mapping[str, tuple[Any, tuple[int, ...]]]


@dataclass(frozen=True)
class _Place:
    offset: int
    dtype: np.dtype[Any]
    shape: tuple[int, ...]

    @property
    def row_bytes(self) -> int:
        return self.dtype.itemsize * int(np.prod(self.shape[1:], dtype=np.int64))


@dataclass(frozen=True)
class TensorFile:
    """An open file; use `TensorFile.create` or `TensorFile.open`, and `close` it."""

    path: Path
    handle: int
    places: Mapping[str, _Place]

    @staticmethod
    def create(path: Path, tensors: Shapes) -> TensorFile:
        """Make a file of zeros.

        Args:
            path: Replaced if it is there.
            tensors: Name → (dtype, shape), the first dimension being rows.
        """
        header: dict[str, Any] = {}
        end = 0
        # The widest numbers first keeps all of them aligned.
        for name in sorted(tensors, key=lambda name: -np.dtype(tensors[name][0]).itemsize):
            dtype, shape = np.dtype(tensors[name][0]), tensors[name][1]
            begin, end = end, end + dtype.itemsize * int(np.prod(shape, dtype=np.int64))
            header[name] = {
                "dtype": _NAMES[dtype], "shape": list(shape), "data_offsets": [begin, end],
            }  # fmt: skip
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        try:
            with path.open("wb") as stream:
                stream.write(struct.pack("<Q", len(text)) + text)
                stream.truncate(8 + len(text) + end)
                stream.flush()
                os.fsync(stream.fileno())
        except OSError as error:
            raise _unwritable(path, error) from error
        return TensorFile.open(path)

    @staticmethod
    def open(path: Path) -> TensorFile:
        """Open a file that `create` made.

        Raises:
            OutputError: If it is not such a file any more.
        """
        try:
            with path.open("rb") as stream:
                (length,) = struct.unpack("<Q", stream.read(8))
                header = json.loads(stream.read(min(length, _MAX_HEADER)))
            places = {
                name: _Place(
                    8 + length + stated["data_offsets"][0],
                    np.dtype(_DTYPES[stated["dtype"]]),
                    tuple(stated["shape"]),
                )
                for name, stated in header.items()
            }
            size = 8 + length + max(stated["data_offsets"][1] for stated in header.values())
            if path.stat().st_size != size:
                raise ValueError(f"{path.stat().st_size} bytes instead of {size}")
            return TensorFile(path, os.open(path, os.O_RDWR), places)
        except (OSError, ValueError, KeyError, TypeError, struct.error) as error:
            raise OutputError(path, "damaged", found=error, fix=DAMAGED) from error

    def write(self, name: str, first: int, rows: NDArray[Any]) -> None:
        """Write rows from number `first` on."""
        place = self.places[name]
        data = memoryview(np.ascontiguousarray(rows, place.dtype).tobytes())
        offset = place.offset + first * place.row_bytes
        try:
            while data:
                done = os.pwrite(self.handle, data, offset)
                data, offset = data[done:], offset + done
        except OSError as error:
            raise _unwritable(self.path, error) from error

    def read(self, name: str, first: int, count: int) -> NDArray[Any]:
        """Rows from number `first` on."""
        place = self.places[name]
        wanted = count * place.row_bytes
        data = os.pread(self.handle, wanted, place.offset + first * place.row_bytes)
        if len(data) != wanted:
            raise OutputError(self.path, "was cut off", fix=DAMAGED)
        return np.frombuffer(data, place.dtype).reshape(count, *place.shape[1:])

    def row(self, name: str) -> Callable[[int], NDArray[Any]]:
        """A function that reads one row of a tensor."""
        return lambda number: self.read(name, number, 1)[0]

    def rows(self, name: str) -> int:
        """Rows of a tensor."""
        return self.places[name].shape[0]

    def chunks(self, name: str) -> Iterator[tuple[int, NDArray[Any]]]:
        """All rows in order, some megabytes at a time, each with the number of its first."""
        step = max(1, CHUNK_BYTES // max(1, self.places[name].row_bytes))
        for first in range(0, self.rows(name), step):
            yield first, self.read(name, first, min(step, self.rows(name) - first))

    def close(self) -> None:
        """Close it; what was written is the system's to keep."""
        os.close(self.handle)


def _unwritable(path: Path, error: OSError) -> OutputError:
    return output_error(path.parent, error, left="the same command goes on from here")
