"""Weights in blocks as TensorRT takes them: signed codes, and no zero point but 0.

A bundle's codes are unsigned, with their zero point in the middle, as ONNX Runtime's operators want
them. With its highest bit flipped a code is the same number, signed. While engines are built, such
codes lie in files of their own: each has what graphs refer to at the places where the bundle's file
has it, and nothing between.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import onnx
from numpy.typing import NDArray

from .graph import StoredTensor

SIGNED, COLUMNS = ".signed", ".columns"  # suffixes of the files
_HIGHEST = {4: 0x88, 8: 0x80}  # the highest bit of every code in a byte
_BITS = {onnx.TensorProto.INT4: 4, onnx.TensorProto.INT8: 8}
_CHUNK_BYTES = 16 << 20


@dataclass(frozen=True, order=True)
class SignedCodes:
    """Codes that a graph refers to.

    Attributes:
        name: Of the tensor in the bundle.
        bits: Of a code.
        columns: Whether the matrices [E, N, K] lie side by side, [N, E · K].
    """

    name: str
    bits: int
    columns: bool


def signed(
    stored: StoredTensor, shape: tuple[int, int], bits: int, *, columns: bool
) -> StoredTensor:
    """Codes of a bundle as a matrix of signed ones, in the file that `write_signed` makes.

    Args:
        stored: Codes as they lie in the bundle.
        shape: Of the matrix.
        bits: Of a code.
        columns: Whether they are [E, N, bytes] and the matrices lie side by side.
    """
    location = Path(stored.location).with_suffix(COLUMNS if columns else SIGNED).name
    return replace(stored, location=location, shape=shape, dtype=f"int{bits}")


def signed_codes(graphs: Iterable[bytes]) -> list[SignedCodes]:
    """What graphs refer to of the files that `write_signed` makes."""
    found = set()
    for graph in graphs:
        for tensor in onnx.load_model_from_string(graph).graph.initializer:
            place = {entry.key: entry.value for entry in tensor.external_data}
            suffix = Path(place.get("location", "")).suffix
            if suffix in (SIGNED, COLUMNS):
                bits, columns = _BITS[tensor.data_type], suffix == COLUMNS
                found.add(SignedCodes(tensor.name, bits, columns))
    return sorted(found)


def write_signed(
    wanted: Iterable[SignedCodes],
    stored: Mapping[str, StoredTensor],
    source: Path,
    folder: Path,
    progress: Callable[[int], None] = lambda _: None,
) -> None:
    """Write signed codes, some megabytes at a time.

    Args:
        wanted: Which.
        stored: Where a bundle's tensors lie.
        source: The folder of its weights.
        folder: Where to write.
        progress: Called with the number of bytes just written.
    """
    for codes in wanted:
        tensor = stored[codes.name]
        place = signed(tensor, (0, 0), codes.bits, columns=codes.columns)
        content = np.memmap(
            source / tensor.location, np.uint8, "r", offset=tensor.offset, shape=tensor.shape
        )
        with (folder / place.location).open("r+b" if _there(folder, place) else "wb") as stream:
            stream.seek(place.offset)
            for chunk in _columns(content) if codes.columns else _rows(content):
                stream.write((chunk ^ np.uint8(_HIGHEST[codes.bits])).data)
                progress(chunk.nbytes)


def _there(folder: Path, place: StoredTensor) -> bool:
    return (folder / place.location).is_file()


def _rows(content: NDArray[np.uint8]) -> Iterator[NDArray[np.uint8]]:
    flat = content.reshape(-1)
    for start in range(0, flat.size, _CHUNK_BYTES):
        yield flat[start : start + _CHUNK_BYTES]


def _columns(content: NDArray[np.uint8]) -> Iterator[NDArray[np.uint8]]:
    """[E, N, bytes] as [N, E, bytes], some of the N at a time."""
    step = max(1, _CHUNK_BYTES // (content.nbytes // content.shape[1]))
    for start in range(0, content.shape[1], step):
        yield np.ascontiguousarray(content[:, start : start + step].transpose(1, 0, 2))
