"""Where a bundle's weights lie, read from the headers of its safetensors files.

A file that is linked holds the checkpoint's tensors by their own names; which of them are weights
of the bundle, its graphs say.
"""

from __future__ import annotations

import math
import struct
from pathlib import Path

import onnx_ir as ir

from knnmoe.export.graph import StoredTensor
from knnmoe.runtime.bundle import EXPORT_AGAIN, Bundle
from knnmoe.runtime.checkpoint import MAX_HEADER_BYTES
from knnmoe.runtime.errors import BundleError
from knnmoe.runtime.manifest import Fields, parse_object

FOLDER, SUFFIX = "segments/", ".safetensors"
_LENGTH = struct.Struct("<Q")
_DTYPES = {"F32": ("float32", 4), "F16": ("float16", 2), "U8": ("uint8", 1)}
_IR_DTYPES = {ir.DataType.FLOAT: "float32", ir.DataType.FLOAT16: "float16"}


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
        BundleError: If a header is malformed, or a tensor is of a dtype that no weight has, or
            outside its file.
    """
    stored = StoredWeights(bundle)
    linked = bundle.manifest.linked or ()
    for name in bundle.manifest.files:
        if name.startswith(FOLDER) and name.endswith(SUFFIX) and name not in linked:
            stored.update(_read(bundle.file(name), name.removeprefix(FOLDER)))
    if linked:
        for segment in bundle.manifest.segments:
            stored.update(_linked(bundle, segment.file))
    return stored


def _linked(bundle: Bundle, graph: str) -> dict[str, StoredTensor]:
    """Weights of a graph that lie in linked files."""
    stored = {}
    for name, value in ir.load(bundle.file(graph)).graph.initializers.items():
        tensor = value.const_value
        if not isinstance(tensor, ir.ExternalTensor):
            continue
        file = FOLDER + str(tensor.location)
        if file not in (bundle.manifest.linked or ()):
            continue
        offset, shape = tensor.offset or 0, tuple(tensor.shape.numpy())
        dtype, length = _IR_DTYPES.get(tensor.dtype), int(tensor.nbytes)
        if dtype is None or not 0 <= offset <= bundle.manifest.files[file].size - length:
            raise BundleError(
                bundle.file(graph), f"refers to a weight {name} that {file} does not hold",
                fix=EXPORT_AGAIN,
            )  # fmt: skip
        stored[name] = StoredTensor(str(tensor.location), offset, length, shape, dtype)
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
