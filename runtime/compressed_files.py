"""What a compressed memory pack adds to a gate's file: its tensors, read and checked.

The full keys are mapped, not read: a step needs some dozen of them. Their lengths are stored beside
them, computed when they were written; that these are finite is what says that the keys are. Where a
pack was written before lengths were stored, all keys are looked through, a piece at a time.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from .calibration import Similarity, Variant
from .errors import MemoryPackError
from .projection import WIDTH_STEP, ProjectedKeys, decode
from .stored_values import BITS, StoredValues, ValueType, groups_of

COMPRESS_AGAIN = "Compress the memory again with `knnmoe memory compress`."
VALUE_TENSORS = ("values", "value_steps", "value_lows")
# What stands for an entry's key in the exact stage; `full`: fp16 or fp32, as it was built.
KeyKind = Literal["full", "int8", "projected", "graded"]
KEY_KINDS: tuple[KeyKind, ...] = get_args(KeyKind)
RESTORED: tuple[KeyKind, ...] = ("projected", "graded")  # of which no full keys are stored
PARTS = {"fine": 8, "coarse": 4}  # of graded keys, and their bits
# What is stored of the values: one of these instead of router logits and residuals.
ValuesOf = Literal["learned", "residuals"]
VALUES_OF: tuple[ValuesOf, ...] = get_args(ValuesOf)
KEY_LENGTHS = "key_lengths"
_AT_ONCE = 1 << 22  # elements
_SAMPLE = 64  # entries
_DTYPES = {"F16": np.float16, "F32": np.float32, "I8": np.int8}
_SKEW = 0.05  # of products of unit rows that should be orthogonal; rounding to int8 leaves 0.01
_OFF = 0.5  # relative error of a projected key; 4 bits leave 0.15
_LONGER = 1e-3  # relative error of a stored length


@dataclass(frozen=True)
class ScanStatement:
    """What a pack says of a gate's projection.

    Attributes:
        width: W, dimensions.
        bits: Of each of them, 4 or 8.
        candidates: R, which it was made for.
        neighbors: K, at which recall was measured.
        similarity: The similarity it was measured for.
        recall: Share of the K nearest of held-back keys that are among the R candidates.
        lengths: Whether the file holds the lengths of its keys.
    """

    width: int
    bits: int
    candidates: int
    neighbors: int
    similarity: Similarity
    recall: float
    lengths: bool = False

    def serves(self, similarity: Similarity, neighbors: int) -> bool:
        """Whether what was measured covers this use."""
        return similarity == self.similarity and neighbors <= self.neighbors


def scan_specs(
    statement: ScanStatement, entries: int, size: int
) -> Mapping[str, tuple[tuple[int, ...], tuple[str, ...]]]:
    """Shapes and dtypes of the tensors of a projection, and of what is stored for its sake."""
    lengths = {KEY_LENGTHS: ((entries,), ("F32",))} if statement.lengths else {}
    return lengths | projection_specs("scan", entries, size, statement.width, statement.bits)


def projection_specs(
    name: str, entries: int, size: int, width: int, bits: int
) -> dict[str, tuple[tuple[int, ...], tuple[str, ...]]]:
    """Shapes and dtypes of the tensors of projected keys."""
    shapes = ((width, size), (width,), (entries, width * bits // 8), (entries,))
    return {
        tensor: (shape, (dtype,))
        for tensor, shape, dtype in zip(
            projection_tensors(name), shapes, ("I8", "F32", "U8", "F32"), strict=True
        )
    }


def projection_tensors(name: str) -> tuple[str, ...]:
    """Names of the tensors of projected keys, in the order of `ProjectedKeys`."""
    return tuple(
        f"{name}_{part}" for part in ("projection", "projection_scales", "codes", "scales")
    )


def taken_projection(tensors: dict[str, Any], name: str) -> ProjectedKeys:
    """Takes the tensors of projected keys out of those of a gate's file."""
    return ProjectedKeys(*(tensors.pop(tensor) for tensor in projection_tensors(name)))


@dataclass(frozen=True)
class ValuesStatement:
    """What a pack says of a gate's values, where they are not router logits and residuals.

    Attributes:
        dtype: How they are stored (stored_values.py).
        of: The `learned` logits or the `residuals`, the values of one variant or another.
    """

    dtype: ValueType
    of: ValuesOf

    def serve(self, variant: Variant) -> bool:
        """Whether the values of a variant can be made of these."""
        return (variant == "residual") == (self.of == "residuals")


def value_specs(
    statement: ValuesStatement, entries: int, experts: int
) -> Mapping[str, tuple[tuple[int, ...], tuple[str, ...]]]:
    """Shapes and dtypes of the tensors of stored values."""
    if statement.dtype == "fp16":
        return {"values": ((entries, experts), ("F16",))}
    steps = ((entries, groups_of(experts)), ("F16",))
    codes = ((entries, experts * BITS[statement.dtype] // 8), ("U8",))
    return {"values": codes, "value_steps": steps, "value_lows": steps}


def stored_values(tensors: dict[str, Any], experts: int) -> StoredValues:
    """Takes the tensors of stored values out of those of a gate's file."""
    values, steps, lows = (tensors.pop(name, None) for name in VALUE_TENSORS)
    return StoredValues(values, steps, lows, experts)


def width_is_possible(width: int, size: int) -> bool:
    """Whether keys of D elements can be projected to W."""
    return width % WIDTH_STEP == 0 and 0 < width <= size and size % WIDTH_STEP == 0


def widths_are_possible(widths: Sequence[int], size: int) -> bool:
    """Whether keys of D elements can be graded so: F directions in 8 bits, C in 4."""
    return (
        len(widths) == len(PARTS)
        and all(width_is_possible(width, size) for width in widths)
        and sum(widths) <= size
    )


def map_tensor(path: Path, name: str) -> NDArray[Any]:
    """A tensor of a safetensors file that was checked, read-only and mapped."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        stated = json.loads(file.read(length))[name]
    dtype, shape = _DTYPES[stated["dtype"]], tuple(stated["shape"])
    offset = 8 + length + stated["data_offsets"][0]
    return np.asarray(np.memmap(path, dtype, "r", offset, shape))


def key_lengths(
    path: Path, center: NDArray[np.float32], steps: NDArray[np.float32] | None
) -> NDArray[np.float32]:
    """Lengths [N] of the centred keys of a gate's file.

    Args:
        path: The gate's file, checked.
        center: [D] fp32.
        steps: [N] of int8 keys.

    Raises:
        MemoryPackError: If keys are not finite.
    """
    return centred_lengths(_pieces(path, "keys"), center, steps, path)


def centred_lengths(
    pieces: Iterable[NDArray[Any]],
    center: NDArray[np.float32],
    steps: NDArray[np.float32] | None,
    where: Path,
) -> NDArray[np.float32]:
    """Lengths [N] of centred keys that come in pieces [n, D]; otherwise as `key_lengths`."""
    parts = []
    for piece in pieces:
        rows = piece.astype(np.float32)
        if steps is None:
            rows -= center
        # Also finds what is not finite, without a pass of its own.
        parts.append(np.sqrt(np.einsum("nd,nd->n", rows, rows, dtype=np.float64)))
    lengths = np.concatenate(parts)
    if not np.isfinite(lengths).all():
        raise MemoryPackError(where, "tensor keys has NaN or infinite numbers", fix=COMPRESS_AGAIN)
    return (lengths if steps is None else lengths * steps).astype(np.float32)


def check_lengths(
    path: Path, lengths: NDArray[np.float32], centred: NDArray[np.float32] | None
) -> None:
    """Raise `MemoryPackError` unless stored lengths [N] are those of the keys, as far as sampled.

    Args:
        path: The gate's file.
        lengths: Finite.
        centred: [N', D] fp32: the keys of `sampled(N)`, minus the centre; None where the pack has
            none.
    """
    if lengths.min() < 0:
        raise MemoryPackError(
            f"{path}: {KEY_LENGTHS}", "has negative numbers", expected="lengths of keys",
            found=float(lengths.min()), fix=COMPRESS_AGAIN,
        )  # fmt: skip
    if centred is None:
        return
    right = np.linalg.norm(centred, axis=1)
    off = np.abs(lengths[sampled(len(lengths))] - right)
    if not (off <= _LONGER * right + 1e-30).all():  # nothing is near the length of a key with NaN
        raise MemoryPackError(
            f"{path}: {KEY_LENGTHS}", "not the lengths of the keys", fix=COMPRESS_AGAIN
        )


def _pieces(path: Path, name: str) -> Iterator[NDArray[Any]]:
    """Rows of a tensor of a file, some at a time, read and not mapped."""
    mapped = map_tensor(path, name)
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        stated = json.loads(file.read(length))[name]
        file.seek(8 + length + stated["data_offsets"][0])
        rows = max(1, _AT_ONCE // mapped.shape[1])
        for start in range(0, len(mapped), rows):
            shape = (min(rows, len(mapped) - start), mapped.shape[1])
            yield np.fromfile(file, mapped.dtype, shape[0] * shape[1]).reshape(shape)


def check_scan(
    path: Path, scan: ProjectedKeys, centred: NDArray[np.float32] | None, name: str = "scan"
) -> None:
    """Raise `MemoryPackError` unless the projection is one, and of these keys.

    Args:
        path: The gate's file.
        name: Of the projection in it.
        scan: Finite, of the right shapes.
        centred: [N', D] fp32: the keys of `sampled(N)`, minus the centre; None where the pack has
            no other keys than the projected ones.
    """
    matrix = scan.matrix()
    skew = float(np.abs(matrix @ matrix.T - np.eye(scan.width, dtype=np.float32)).max())
    if not skew <= _SKEW:
        raise MemoryPackError(
            f"{path}: {name}_projection", "its rows are not orthonormal",
            expected=f"products within {_SKEW:g} of 0 and 1", found=f"off by {skew:.3g}",
            fix=COMPRESS_AGAIN,
        )  # fmt: skip
    if centred is None:
        return
    drawn = sampled(len(scan.codes))
    right = centred @ matrix.T
    stored = decode(scan.codes[drawn], scan.bits) * scan.scales[drawn, None]
    off = float(np.linalg.norm(stored - right) / max(float(np.linalg.norm(right)), 1e-30))
    if not off <= _OFF:
        raise MemoryPackError(
            f"{path}: {name}_codes", "not the projection of the keys",
            expected=f"a relative error of at most {_OFF:g}", found=f"{off:.3g}",
            fix=COMPRESS_AGAIN,
        )  # fmt: skip


def sampled(entries: int) -> NDArray[np.int64]:
    """The entries that are compared: some from all over."""
    return np.unique(np.linspace(0, entries - 1, _SAMPLE).astype(np.int64))
