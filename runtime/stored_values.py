"""Values of a compressed memory: fp16, or 8 or 4 bits, of which only what is blended is widened.

A row is rounded in groups of `GROUP` experts or fewer, each with its smallest number and a step
(affine rounding): values such as learned logits are not spread about zero.

    value ≈ low + step · code,      code from 0 to 2^bits - 1
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

ValueType = Literal["fp16", "int8", "int4"]
VALUE_TYPES: tuple[ValueType, ...] = get_args(ValueType)
BITS = {"int8": 8, "int4": 4}
GROUP = 64  # experts that share a step, at most
LARGEST = float(np.finfo(np.float16).max)

Floats = NDArray[np.floating[Any]]


@dataclass(frozen=True)
class StoredValues:
    """Values [N, E] as they are stored; `values[entries]` widens those entries alone.

    Attributes:
        codes: [N, E] fp16; or [N, E · bits / 8] uint8, at 4 bits two codes a byte, the first in
            the lower half.
        steps, lows: [N, G] fp16 of G equal groups of experts; None where codes are fp16.
        experts: E.
    """

    codes: NDArray[Any]
    steps: NDArray[np.float16] | None
    lows: NDArray[np.float16] | None
    experts: int

    @property
    def bits(self) -> int:
        """Of a code: 4, 8 or 16."""
        return 8 * self.codes.itemsize * int(self.codes.shape[1]) // self.experts

    @property
    def shape(self) -> tuple[int, int]:
        """N, E."""
        return len(self.codes), self.experts

    @property
    def nbytes(self) -> int:
        """Of all that is stored."""
        more = (
            0 if self.steps is None or self.lows is None else self.steps.nbytes + self.lows.nbytes
        )
        return self.codes.nbytes + more

    def __len__(self) -> int:
        return len(self.codes)

    def __getitem__(self, entries: Any) -> NDArray[np.float32]:
        """Values [..., E] fp32 of some entries, given by an array of their numbers or a slice."""
        codes = self.codes[entries]
        if self.steps is None or self.lows is None:
            widened: NDArray[np.float32] = codes.astype(np.float32)
            return widened
        if self.bits == 4:
            codes = np.stack([codes & 15, codes >> 4], axis=-1).reshape(*codes.shape[:-1], -1)
        steps, lows = (part[entries].astype(np.float32) for part in (self.steps, self.lows))
        grouped = codes.reshape(*steps.shape, -1).astype(np.float32)
        rows: NDArray[np.float32] = grouped * steps[..., None] + lows[..., None]
        return rows.reshape(*codes.shape[:-1], self.experts)

    def widened(self) -> NDArray[np.float32]:
        """All of them, [N, E] fp32."""
        return self[:]


Values = NDArray[np.float32] | StoredValues


def dense(values: Values) -> NDArray[np.float32]:
    """Values [N, E] fp32, widened if they are stored smaller."""
    return values.widened() if isinstance(values, StoredValues) else values


def groups_of(experts: int) -> int:
    """G: equal groups of a row of E values, of at most `GROUP`."""
    return next(g for g in range(1, experts + 1) if experts % g == 0 and experts // g <= GROUP)


def value_types(experts: int) -> tuple[ValueType, ...]:
    """What values of so many experts can be stored as: 4 bits need pairs."""
    return tuple(kind for kind in VALUE_TYPES if kind != "int4" or experts % 2 == 0)


def store_values(values: Floats, kind: ValueType) -> StoredValues:
    """Values [N, E], finite and within fp16, rounded."""
    count, experts = values.shape
    if kind == "fp16":
        return StoredValues(values.astype(np.float16), None, None, experts)
    most = (1 << BITS[kind]) - 1
    grouped = values.astype(np.float32).reshape(count, groups_of(experts), -1)
    lows = grouped.min(axis=2).astype(np.float16)
    spread = grouped.max(axis=2) - lows.astype(np.float32)
    steps = (np.maximum(spread, 0) / most).astype(np.float16)
    # Codes are those of the rounded low and step, so that what these lose is not lost twice.
    wide = steps.astype(np.float32)[:, :, None]
    codes = (grouped - lows.astype(np.float32)[:, :, None]) / np.where(wide > 0, wide, 1)
    packed = np.clip(np.rint(codes), 0, most).astype(np.uint8).reshape(count, experts)
    if kind == "int4":
        packed = packed[:, 0::2] | packed[:, 1::2] << np.uint8(4)
    return StoredValues(packed, steps, lows, experts)
