"""Where a bundle's weights lie, read from the headers of its safetensors files."""

from __future__ import annotations

import math
import struct
from pathlib import Path

from knnmoe.export.graph import StoredTensor
from knnmoe.runtime.bundle import EXPORT_AGAIN, Bundle
from knnmoe.runtime.checkpoint import MAX_HEADER_BYTES
from knnmoe.runtime.errors import BundleError
from knnmoe.runtime.manifest import Fields, parse_object

FOLDER, SUFFIX = "segments/", ".safetensors"
_LENGTH = struct.Struct("<Q")
_DTYPES = {"F32": ("float32", 4), "F16": ("float16", 2)}


class StoredWeights(dict[str, StoredTensor]):
    """Weights by name, of which a missing one is the bundle's fault."""

    def __init__(self, bundle: Bundle) -> None:
        super().__init__()
        self._path = bundle.path / FOLDER

    def __missing__(self, name: str) -> StoredTensor:
        raise BundleError(self._path, f"no weight named {name}", fix=EXPORT_AGAIN)


def stored_weights(bundle: Bundle) -> StoredWeights:
    """Every weight of a bundle by name; locations are relative to its `segments` folder.

    Raises:
        BundleError: If a header is malformed, or a tensor is not float32 or float16, or outside its
            file.
    """
    stored = StoredWeights(bundle)
    for name in bundle.manifest.files:
        if name.startswith(FOLDER) and name.endswith(SUFFIX):
            stored.update(_read(bundle.file(name), name.removeprefix(FOLDER)))
    return stored


def _read(path: Path, location: str) -> dict[str, StoredTensor]:
    size = path.stat().st_size
    with path.open("rb") as stream:
        start = stream.read(_LENGTH.size)
        (length,) = _LENGTH.unpack(start) if len(start) == _LENGTH.size else (size,)
        # Before anything of that length is read: the number comes from the file.
        if length > min(MAX_HEADER_BYTES, size - _LENGTH.size):
            raise BundleError(path, "has a malformed header", fix=EXPORT_AGAIN)
        try:
            header = parse_object(stream.read(length))
        except ValueError as error:
            problem = f"has a malformed header ({error})"
            raise BundleError(path, problem, fix=EXPORT_AGAIN) from error
    header.pop("__metadata__", None)
    top = Fields(str(path), header, BundleError, EXPORT_AGAIN)
    data = _LENGTH.size + length
    return {name: _entry(top.object(name), location, data, size) for name in header}


def _entry(entry: Fields, location: str, data: int, size: int) -> StoredTensor:
    entry.only("dtype", "shape", "data_offsets")
    dtype, width = _DTYPES[entry.text("dtype", choices=tuple(_DTYPES))]
    shape = tuple(entry.integers("shape", 0, size))
    offsets = entry.integers("data_offsets", 0, size - data)
    length = math.prod(shape) * width
    if len(offsets) != 2 or offsets[1] - offsets[0] != length:
        raise entry.wrong("data_offsets", "malformed", expected=f"{length} bytes", found=offsets)
    return StoredTensor(location, data + offsets[0], length, shape, dtype)
