"""Hugging Face checkpoints: config, tensor index and fingerprint, with nothing but NumPy.

A checkpoint is a directory with `config.json` and either `model.safetensors` or
`model.safetensors.index.json` and its shards. Headers are checked whole on opening, tensor data is
read on demand, one tensor at a time.
"""

from __future__ import annotations

import hashlib
import json
import math
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .errors import CheckpointError
from .manifest import parse_object, read_object

CONFIG = "config.json"
SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
BUNDLE = "manifest.json"

MAX_JSON_BYTES = 64 << 20
MAX_HEADER_BYTES = 100_000_000  # the limit of the safetensors library itself
MAX_RANK = 8
_BLOCK = 4 << 20

# safetensors dtype → bytes an element. Other dtypes are refused: nothing here can use them. 8-bit
# floats are hashed, but not read: the config of a quantised checkpoint says best what they are.
ELEMENT_BYTES = {
    "F32": 4, "F16": 2, "BF16": 2, "F64": 8, "I64": 8, "I32": 4, "U8": 1, "BOOL": 1,
    "F8_E4M3": 1, "F8_E5M2": 1,
}  # fmt: skip
_NUMPY = {"F32": "<f4", "F16": "<f2", "F64": "<f8", "I64": "<i8", "I32": "<i4", "U8": "u1"}

DOWNLOAD_AGAIN = "Download the checkpoint again."

Progress = Callable[[int], None]


@dataclass(frozen=True)
class TensorEntry:
    """Where a tensor lies: `size` bytes from `offset`, counted from the start of file `shard`."""

    name: str
    shard: str
    dtype: str
    shape: tuple[int, ...]
    offset: int
    size: int


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint directory, opened: `config` as read, `tensors` by name."""

    path: Path
    config: Mapping[str, Any]
    tensors: Mapping[str, TensorEntry]

    @staticmethod
    def open(path: str | Path) -> Checkpoint:
        """Read the config and every shard's header.

        Raises:
            CheckpointError: If the directory is not a checkpoint, a shard is missing, truncated or
                malformed, shards and index disagree, or a dtype is not supported.
        """
        root = Path(path)
        if not root.is_dir():
            raise CheckpointError(
                root,
                "not a checkpoint directory",
                expected=f"a directory with {CONFIG} and {SINGLE} or {INDEX}",
                found="no such directory" if not root.exists() else "a file",
                fix="Name the directory of a Hugging Face checkpoint.",
            )
        if (root / BUNDLE).exists() and not ((root / SINGLE).exists() or (root / INDEX).exists()):
            raise CheckpointError(
                root,
                "is a bundle, not a checkpoint",
                fix="Name the Hugging Face checkpoint that it was exported from.",
            )
        config = _read_json(root / CONFIG)
        if (root / INDEX).exists():
            tensors = _open_shards(root, _weight_map(root / INDEX))
        else:
            tensors = _open_header(root, SINGLE)
        if not tensors:
            raise CheckpointError(root, "holds no tensors", fix=DOWNLOAD_AGAIN)
        return Checkpoint(root, MappingProxyType(config), MappingProxyType(tensors))

    @property
    def model_type(self) -> str:
        """The `model_type` of the config."""
        found = self.config.get("model_type")
        if not isinstance(found, str):
            raise CheckpointError(
                self.path / CONFIG,
                "model_type is missing",
                expected="a string",
                found=found,
                fix="Name the directory of a Hugging Face checkpoint.",
            )
        return found

    @property
    def total_bytes(self) -> int:
        """Bytes of all tensors."""
        return sum(entry.size for entry in self.tensors.values())

    def entry(self, name: str) -> TensorEntry:
        """The entry of one tensor, or `CheckpointError` if there is none of that name."""
        if name not in self.tensors:
            raise CheckpointError(
                self.path,
                f"tensor {name} is missing",
                fix="The checkpoint is incomplete, or not of the kind its config states.",
            )
        return self.tensors[name]

    def tensor(self, name: str) -> NDArray[Any]:
        """One tensor, read-only and mapped from its file: nothing is read before it is used.

        bfloat16 needs the package ml_dtypes, whose dtype the array then has.

        Raises:
            CheckpointError: If there is no such tensor, it is of 8-bit floats, or its file has
                changed since opening.
        """
        entry = self.entry(name)
        if math.prod(entry.shape) == 0:
            return np.empty(entry.shape, _numpy_dtype(entry))
        try:
            data = np.memmap(
                self.path / entry.shard, np.uint8, "r", entry.offset, shape=(entry.size,)
            )
        except (OSError, ValueError) as error:
            raise _unreadable(self.path / entry.shard, error) from error
        return np.asarray(data).view(_numpy_dtype(entry)).reshape(entry.shape)

    def fingerprint(self, progress: Progress | None = None) -> str:
        """`sha256:` and a hash over every tensor's name, dtype, shape and bytes, in order of name.

        It does not depend on how the tensors are spread over shards.

        Args:
            progress: Called with the number of bytes just hashed.
        """
        total = hashlib.sha256()
        for name, entry in sorted(self.tensors.items()):
            content = self._hash(entry, progress)
            line = json.dumps([name, entry.dtype, list(entry.shape), content])
            total.update(line.encode() + b"\n")
        return f"sha256:{total.hexdigest()}"

    def _hash(self, entry: TensorEntry, progress: Progress | None) -> str:
        digest = hashlib.sha256()
        path = self.path / entry.shard
        try:
            with path.open("rb") as stream:
                stream.seek(entry.offset)
                left = entry.size
                while left:
                    block = stream.read(min(left, _BLOCK))
                    if not block:
                        raise CheckpointError(path, "ends early", fix=DOWNLOAD_AGAIN)
                    digest.update(block)
                    left -= len(block)
                    if progress is not None:
                        progress(len(block))
        except OSError as error:
            raise _unreadable(path, error) from error
        return digest.hexdigest()


def _numpy_dtype(entry: TensorEntry) -> np.dtype[Any]:
    if entry.dtype == "BF16":
        import ml_dtypes  # here, because a device without bfloat16 checkpoints does not have it

        bfloat16: np.dtype[Any] = np.dtype(ml_dtypes.bfloat16)
        return bfloat16
    if entry.dtype == "BOOL":
        return np.dtype(np.bool_)
    if entry.dtype not in _NUMPY:
        raise CheckpointError(
            entry.shard,
            f"tensor {entry.name} cannot be read",
            expected="float32, float16 or bfloat16",
            found=entry.dtype,
            fix="Convert the checkpoint to bfloat16.",
        )
    return np.dtype(_NUMPY[entry.dtype])


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise CheckpointError(
            path.parent,
            "not a checkpoint directory",
            expected=f"a file {path.name}",
            fix="Name the directory of a Hugging Face checkpoint.",
        )
    return read_object(path, CheckpointError, DOWNLOAD_AGAIN, most_bytes=MAX_JSON_BYTES)


def _weight_map(path: Path) -> dict[str, str]:
    content = _read_json(path).get("weight_map")
    if not isinstance(content, dict) or not all(isinstance(v, str) for v in content.values()):
        raise CheckpointError(
            path, "weight_map is malformed", expected="an object, tensor name → file name"
        )
    for file in content.values():
        if Path(file).name != file or file in ("", ".", ".."):
            raise CheckpointError(
                path, f"weight_map names {file!r}", expected="a file in the same directory"
            )
    return content


def _open_shards(root: Path, weight_map: dict[str, str]) -> dict[str, TensorEntry]:
    tensors: dict[str, TensorEntry] = {}
    for shard in sorted(set(weight_map.values())):
        for name, entry in _open_header(root, shard).items():
            if name in tensors:
                raise CheckpointError(
                    root / shard,
                    f"tensor {name} is also in {tensors[name].shard}",
                    fix=DOWNLOAD_AGAIN,
                )
            tensors[name] = entry
    for name in sorted(set(weight_map) | set(tensors)):
        stated = weight_map.get(name)
        found = tensors[name].shard if name in tensors else None
        if stated != found:
            raise CheckpointError(
                root / INDEX,
                f"the index and the shards disagree about tensor {name}",
                expected=stated or "no such tensor",
                found=found or "no such tensor",
                fix=DOWNLOAD_AGAIN,
            )
    return tensors


def _open_header(root: Path, shard: str) -> dict[str, TensorEntry]:
    path = root / shard
    if not path.is_file():
        missing = "a shard is missing" if shard != SINGLE else "not a checkpoint directory"
        raise CheckpointError(root, missing, expected=f"a file {shard}", fix=DOWNLOAD_AGAIN)
    try:
        size = path.stat().st_size
        with path.open("rb") as stream:
            start = stream.read(8)
            if len(start) < 8:
                raise CheckpointError(
                    path, "is truncated", expected="a safetensors file", fix=DOWNLOAD_AGAIN
                )
            (length,) = struct.unpack("<Q", start)
            # Before anything of that length is read: the number comes from the file.
            if length > min(MAX_HEADER_BYTES, size - 8):
                raise CheckpointError(
                    path,
                    "has a malformed header or is truncated",
                    expected=f"a header of at most {min(MAX_HEADER_BYTES, size - 8)} bytes",
                    found=f"{length} bytes",
                    fix=DOWNLOAD_AGAIN,
                )
            header = parse_object(stream.read(length))
    except OSError as error:
        raise _unreadable(path, error) from error
    except ValueError as error:
        raise CheckpointError(
            path, f"has a malformed header ({error})", fix=DOWNLOAD_AGAIN
        ) from error
    header.pop("__metadata__", None)
    data_start = 8 + length
    entries = {
        name: _entry(path, shard, name, stated, data_start) for name, stated in header.items()
    }
    _check_extent(path, entries, data_start, size)
    return entries


def _entry(path: Path, shard: str, name: str, stated: Any, data_start: int) -> TensorEntry:
    malformed = CheckpointError(
        path,
        f"has a malformed header entry {name}",
        expected="dtype, shape and data_offsets",
        found=str(stated)[:200],
        fix=DOWNLOAD_AGAIN,
    )
    if not isinstance(stated, dict) or set(stated) != {"dtype", "shape", "data_offsets"}:
        raise malformed
    dtype, shape, offsets = stated["dtype"], stated["shape"], stated["data_offsets"]
    if not isinstance(dtype, str) or dtype not in ELEMENT_BYTES:
        raise CheckpointError(
            path,
            f"tensor {name} has an unsupported dtype",
            expected=f"one of {', '.join(ELEMENT_BYTES)}",
            found=dtype,
            fix="Convert the checkpoint to float32, float16 or bfloat16; if it is quantised, take "
            "the one it was made from.",
        )
    if not (_counts(shape) and _counts(offsets) and len(shape) <= MAX_RANK and len(offsets) == 2):
        raise malformed
    begin, end = offsets
    if end - begin != math.prod(shape) * ELEMENT_BYTES[dtype]:
        raise malformed
    return TensorEntry(name, shard, dtype, tuple(shape), data_start + begin, end - begin)


def _counts(numbers: Any) -> bool:
    return isinstance(numbers, list) and all(type(n) is int and n >= 0 for n in numbers)


def _check_extent(path: Path, entries: dict[str, TensorEntry], data_start: int, size: int) -> None:
    """The tensors must cover the data without holes or overlaps, and the file must end there."""
    position = data_start
    for entry in sorted(entries.values(), key=lambda entry: (entry.offset, entry.size)):
        if entry.offset != position:
            raise CheckpointError(
                path, f"tensor {entry.name} overlaps another or leaves a hole", fix=DOWNLOAD_AGAIN
            )
        position += entry.size
    if position != size:
        problem = "is truncated" if size < position else "is longer than its header states"
        raise CheckpointError(
            path,
            problem,
            expected=f"{position} bytes",
            found=f"{size} bytes",
            fix=DOWNLOAD_AGAIN,
        )


def _unreadable(path: Path, error: Exception) -> CheckpointError:
    reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return CheckpointError(path, f"cannot be read ({reason})", fix=DOWNLOAD_AGAIN)
