"""The files of a memory pack: written with their hashes, checked before they are read."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from .atomic import write_file
from .bundle import describe_file
from .errors import MemoryPackError

MANIFEST = "memory.json"
ENTRIES = "entries.safetensors"
REBUILD = "Build the memory again with `knnmoe memory build`."


@dataclass(frozen=True)
class PackFile:
    """A file of the pack as its manifest states it."""

    file: str
    sha256: str
    size: int


def write_manifest(directory: Path, manifest: Mapping[str, Any]) -> None:
    """Write `memory.json`, over an old one only when the new one is whole and on disk."""
    text = json.dumps(manifest, indent=2, allow_nan=False) + "\n"
    write_file(directory / MANIFEST, text.encode("utf-8"))


def write_tensors(directory: Path, name: str, tensors: Mapping[str, NDArray[Any]]) -> PackFile:
    """Write tensors as one safetensors file of a directory and state it."""
    path = directory / name
    save_file({key: np.ascontiguousarray(value) for key, value in tensors.items()}, path)
    stated = describe_file(path)
    return PackFile(name, stated.sha256, stated.size)


def link_tensors(directory: Path, name: str, source: Path) -> PackFile:
    """Link (or copy) a finished safetensors file into a directory and state it."""
    path = directory / name
    try:
        os.link(source, path)
    except OSError:  # another file system, or one without links
        shutil.copyfile(source, path)
    stated = describe_file(path)
    return PackFile(name, stated.sha256, stated.size)


Seen = tuple[int, int, int, int]


def seen_as(path: Path) -> Seen | None:
    """What tells a file from another put in its place, or from itself written to; None if gone."""
    try:
        stated = path.stat()
    except OSError:
        return None
    return stated.st_dev, stated.st_ino, stated.st_size, stated.st_mtime_ns


def check_file(root: Path, stored: PackFile, verify: bool) -> None:
    """Raise `MemoryPackError` unless the file is there as stated; `verify` compares its hash."""
    path = root / stored.file
    if path.is_symlink():
        raise MemoryPackError(
            path,
            "is a symbolic link",
            expected="a regular file",
            fix="Copy the pack with its files, not links to them.",
        )
    if not path.is_file():
        raise MemoryPackError(path, "missing", fix="Copy the pack again, or build it again.")
    size = path.stat().st_size
    if size != stored.size:
        raise MemoryPackError(
            path,
            "has another size than memory.json states",
            expected=stored.size,
            found=size,
            fix="Copy the pack again, or build it again.",
        )
    if verify and (digest := describe_file(path).sha256) != stored.sha256:
        raise MemoryPackError(
            path,
            "was changed (sha256 differs)",
            expected=stored.sha256,
            found=digest,
            fix="Copy the pack again, or build it again.",
        )


TensorSpecs = Mapping[str, tuple[tuple[int, ...], tuple[str, ...]]]


def read_tensors(path: Path, specs: TensorSpecs, *, leave: Collection[str] = ()) -> dict[str, Any]:
    """Read exactly the tensors of these shapes and dtypes, all of them finite.

    Shapes and dtypes are checked before anything is allocated.

    Args:
        path: A safetensors file.
        specs: By name: shape, and which dtypes are right.
        leave: Names of tensors that are checked so far, and not read.

    Raises:
        MemoryPackError: If the file holds anything else.
    """
    try:
        with safe_open(path, framework="numpy") as file:
            names = set(file.keys())
            if names != set(specs):
                raise MemoryPackError(
                    path,
                    "holds other tensors",
                    expected=sorted(specs),
                    found=sorted(names),
                    fix=REBUILD,
                )
            for name, (shape, dtypes) in specs.items():
                view = file.get_slice(name)
                found = (tuple(view.get_shape()), view.get_dtype())
                if found[0] != shape or found[1] not in dtypes:
                    raise MemoryPackError(
                        path,
                        f"tensor {name} has another shape or dtype",
                        expected=f"{list(shape)} {'/'.join(dtypes)}",
                        found=f"{list(found[0])} {found[1]}",
                        fix=REBUILD,
                    )
            tensors = {name: file.get_tensor(name) for name in specs if name not in leave}
    except (SafetensorError, OSError) as error:
        raise MemoryPackError(
            path, "not a readable safetensors file", found=error, fix=REBUILD
        ) from error
    for name, tensor in tensors.items():
        if tensor.dtype.kind == "f" and not np.isfinite(tensor).all():
            raise MemoryPackError(path, f"tensor {name} has NaN or infinite numbers", fix=REBUILD)
    if "center" in tensors:
        tensors["center"] = tensors["center"].astype(np.float32)
    return tensors
