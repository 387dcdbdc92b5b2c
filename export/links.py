"""Weights used where they lie in the checkpoint: its files, hard-linked into the bundle.

Only bytes that would be written as they are can stay where they are: a weight that is one tensor of
the checkpoint (or several that lie one behind the other in one file), in the dtype that the bundle
stores it in. Hard links, because ONNX Runtime refuses a path that leaves the bundle, be it by a
symbolic link.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from knnmoe.runtime.checkpoint import Checkpoint, TensorEntry
from knnmoe.runtime.errors import CheckpointError, OutputError, SettingError

from .graph import StoredTensor
from .weights import DTYPES, PlannedTensor

FOLDER = "checkpoint"  # in the bundle's `segments`
_WITHOUT = "or export without --link"


@dataclass(frozen=True)
class Links:
    """What a bundle uses of the checkpoint's own files.

    Attributes:
        tensors: The weights concerned; what they are planned as.
        stored: Where each of them lies.
        shards: The files, by their names in the checkpoint.
    """

    tensors: tuple[PlannedTensor, ...] = ()
    stored: Mapping[str, StoredTensor] = field(default_factory=dict)
    shards: tuple[str, ...] = ()

    @property
    def nbytes(self) -> int:
        """Bytes that need not be written."""
        return sum(tensor.nbytes for tensor in self.tensors)


def plan_links(source: Checkpoint, planned: Iterable[PlannedTensor]) -> Links:
    """Find the weights that can be used where they are.

    Raises:
        SettingError: If there are none.
        CheckpointError: If a file has a name that a bundle cannot have.
    """
    found = [(t, place) for t in planned if (place := _place(source, t)) is not None]
    if not found:
        dtypes = {entry.dtype for entry in source.tensors.values()}
        raise SettingError(
            "link",
            "nothing of this checkpoint is used as it is stored",
            expected="weights in float32, for a --precision other than fp32 in float16",
            found=" and ".join(sorted(dtypes)),
            fix="Leave --link out.",
        )
    shards = sorted({source.entry(tensor.sources[0]).shard for tensor, _ in found})
    for shard in shards:
        if not shard.isprintable() or set(shard) & set("\\:") or len(shard) > 200:
            raise CheckpointError(
                source.path / shard,
                "has a name that a file of a bundle cannot have",
                fix=f"Rename it, {_WITHOUT}.",
            )
    stored = {tensor.name: place for tensor, place in found}
    return Links(tuple(tensor for tensor, _ in found), stored, tuple(shards))


def make_links(source: Checkpoint, shards: Iterable[str], segments: Path) -> list[Path]:
    """Hard-link files of a checkpoint into a bundle's `segments`; symbolic links are resolved.

    Raises:
        OutputError: If the file system does not link them.
    """
    (segments / FOLDER).mkdir(exist_ok=True)
    made = []
    for shard in shards:
        origin, link = (source.path / shard).resolve(), segments / FOLDER / shard
        try:
            os.link(origin, link)
        except OSError as error:
            raise _no_link(origin, segments, error) from error
        made.append(link)
    return made


def _place(source: Checkpoint, tensor: PlannedTensor) -> StoredTensor | None:
    """Where a checkpoint has the bytes that would be written for a tensor, if it has."""
    if not tensor.sources:
        return None
    entries = [source.entry(name) for name in tensor.sources]
    first = entries[0]
    position = first.offset
    for entry in entries:
        if not _continues(entry, first.shard, position, DTYPES[tensor.dtype][0]):
            return None
        position += entry.size
    # Processors read a number from a multiple of its size; older files may have it elsewhere.
    if first.offset % tensor.layout.itemsize:
        return None
    location = f"{FOLDER}/{first.shard}"
    return StoredTensor(location, first.offset, tensor.nbytes, tensor.shape, tensor.dtype)


def _continues(entry: TensorEntry, shard: str, position: int, dtype: str) -> bool:
    return (entry.shard, entry.offset, entry.dtype) == (shard, position, dtype)


def _no_link(origin: Path, segments: Path, error: OSError) -> OutputError:
    if error.errno == errno.EXDEV:
        problem = "cannot be hard-linked into the bundle, which is on another file system"
        fix = f"Choose a bundle on the file system of {origin.parent}, {_WITHOUT}."
    else:
        problem = f"cannot be hard-linked into the bundle ({error.strerror})"
        fix = (
            "Choose a file system that has hard links, and be the owner of the file or allowed to "
            f"write to it, {_WITHOUT}."
        )
    return OutputError(origin, problem, expected=f"a link in {segments.parent.parent}", fix=fix)
