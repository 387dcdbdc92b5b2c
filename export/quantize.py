"""Blocks of weights as 4- or 8-bit integers: round to nearest, with a small search for the scale.

A row [K] is cut into blocks along K. A block keeps a scale s and, where asked for, a zero point z;
a weight becomes the code c = round(w / s) + z in 0 .. 2^bits - 1, and comes back as (c - z) · s.
Without zero points z is 2^(bits-1). No calibration data is involved: the search minimises the
squared error of the weights themselves. NumPy only; works on all blocks of a matrix at once.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]
Codes = NDArray[np.uint8]

# A block whose largest magnitude is below this becomes zeros: its scale would be a number that
# processors flush to zero.
TINY = 1e-30
# Fractions of the full range that the search tries: a smaller range clips the largest weights and
# renders all others more finely.
_FRACTIONS = (1.0, 0.96, 0.92, 0.88, 0.84, 0.80, 0.76)


@dataclass(frozen=True)
class Scheme:
    """How blocks are quantised.

    Attributes:
        bits: 4 or 8.
        block: Weights of a block, along the last axis; even.
        zero_points: Whether a block has a zero point of its own.
        search: Whether scales are searched for; otherwise they span the block's range.
    """

    bits: int
    block: int
    zero_points: bool = False
    search: bool = True

    @property
    def levels(self) -> int:
        """The largest code."""
        return (1 << self.bits) - 1

    @property
    def middle(self) -> int:
        """The zero point of blocks that have none of their own."""
        return 1 << (self.bits - 1)


@dataclass(frozen=True)
class Quantized:
    """Rows [N, K] in B = K / block blocks.

    Attributes:
        scheme: How they were made.
        codes: [N, B, block] uint8, one code a byte.
        scales: [N, B] fp32; may be negative, so that both ends of the range are used.
        zero_points: [N, B] uint8, or None.
    """

    scheme: Scheme
    codes: Codes
    scales: Floats
    zero_points: Codes | None

    def dequantized(self) -> Floats:
        """The weights that the codes stand for, [N, K] fp32."""
        rows, blocks, _ = self.codes.shape
        shift: NDArray[np.float32] | np.float32 = np.float32(self.scheme.middle)
        if self.zero_points is not None:
            shift = self.zero_points[..., None].astype(np.float32)
        values = (self.codes.astype(np.float32) - shift) * self.scales[..., None]
        return values.reshape(rows, blocks * self.scheme.block)

    def packed_codes(self) -> Codes:
        """The codes [N, K · bits / 8]: at 4 bits two a byte, the first in the lower half."""
        return pack(self.codes.reshape(len(self.codes), -1), self.scheme.bits)

    def packed_zero_points(self) -> Codes:
        """The zero points [N, ceil(B · bits / 8)], packed as the codes are."""
        if self.zero_points is None:
            raise ValueError("these blocks have no zero points")
        return pack(self.zero_points, self.scheme.bits)


def quantize(rows: Floats, scheme: Scheme) -> Quantized:
    """Quantise rows [N, K] fp32, K a multiple of the block.

    Without the search the error of a weight is at most |s| / 2; without zero points at most |s| for
    a weight as large as the block's largest but of the other sign. The search never has a larger
    squared error over a block.

    Raises:
        ValueError: If K is no multiple of the block, or a weight is not a finite number.
    """
    count, width = rows.shape
    if width % scheme.block:
        raise ValueError(f"{width} columns are no multiple of the block size {scheme.block}")
    blocks = np.asarray(rows, np.float32).reshape(-1, scheme.block)
    largest = np.abs(blocks).max(axis=1, initial=0)
    if not np.isfinite(largest).all():
        raise ValueError("a weight is infinite or not a number")
    # Everything below works in units of the block's largest magnitude: squares neither overflow nor
    # vanish, whatever the size of the weights.
    zero = largest < TINY
    unit = np.divide(blocks, np.where(zero, 1, largest)[:, None], dtype=np.float32)
    unit[zero] = 0
    find = _asymmetric if scheme.zero_points else _symmetric
    scale, zero_point = find(unit, scheme)
    codes = _codes(unit, scale, zero_point, scheme)
    if scheme.search:
        scale = _refitted(unit, codes, scale, zero_point)
    shape = (count, width // scheme.block)
    return Quantized(
        scheme,
        codes.astype(np.uint8).reshape(*shape, scheme.block),
        np.where(zero, 0, scale * largest).astype(np.float32).reshape(shape),
        zero_point.astype(np.uint8).reshape(shape) if scheme.zero_points else None,
    )


def pack(codes: Codes, bits: int) -> Codes:
    """Codes [N, M], one a byte, as bytes [N, ceil(M · bits / 8)]; the earlier in the lower bits."""
    if bits == 8:
        return codes
    if codes.shape[1] % 2:
        codes = np.pad(codes, ((0, 0), (0, 1)))
    packed: Codes = codes[:, 0::2] | np.left_shift(codes[:, 1::2], 4, dtype=np.uint8)
    return packed


def unpack(packed: Codes, bits: int, count: int) -> Codes:
    """The inverse of `pack`: bytes as codes [N, count]."""
    if bits == 8:
        return packed
    codes = np.stack((packed & 0x0F, packed >> 4), axis=-1).reshape(len(packed), -1)
    return codes[:, :count]


@dataclass(frozen=True)
class TensorError:
    """What storing a tensor changed.

    Attributes:
        name: Of the tensor.
        stored: How, for a reader: `int4/128`, `fp16`.
        values: Number of its weights.
        relative_rms: Root of the summed squared changes over the summed squares.
        max_abs: The largest change.
    """

    name: str
    stored: str
    values: int
    relative_rms: float
    max_abs: float


class ErrorMeter:
    """Sums up over the pieces of a tensor how far it is from what is stored."""

    def __init__(self) -> None:
        self._values = 0
        self._squares = self._errors = self._worst = 0.0

    def add(self, wanted: Floats, stored: Floats) -> None:
        """Count a piece: weights as they were and as they come back, of one shape."""
        if not wanted.size:
            return
        error = (stored - wanted).ravel()
        flat = wanted.ravel()
        largest = float(np.abs(flat).max()) or 1.0
        # In units of the largest weight, whose square may not be a number in fp32.
        self._values += wanted.size
        self._squares += float(np.square(flat / largest, dtype=np.float64).sum()) * largest**2
        self._errors += float(np.square(error / largest, dtype=np.float64).sum()) * largest**2
        self._worst = max(self._worst, float(np.abs(error).max()))

    def result(self, name: str, stored: str) -> TensorError:
        """The errors of all pieces so far."""
        relative = (self._errors / self._squares) ** 0.5 if self._squares else 0.0
        return TensorError(name, stored, self._values, relative, self._worst)


def _symmetric(unit: Floats, scheme: Scheme) -> tuple[Floats, Floats]:
    """Scale and the middle zero point of blocks [M, block]: the code 0 is the largest weight."""
    middle = np.full(len(unit), scheme.middle, np.float32)
    extreme = np.take_along_axis(unit, np.abs(unit).argmax(axis=1)[:, None], axis=1)[:, 0]
    full = (extreme / np.float32(-scheme.middle)).astype(np.float32)
    if not scheme.search:
        return full, middle
    # The last candidate has the largest weight at the other, shorter end.
    candidates = [full * np.float32(f) for f in _FRACTIONS]
    candidates.append(extreme / np.float32(scheme.middle - 1))
    return _best(unit, [(scale, middle) for scale in candidates], scheme)


def _asymmetric(unit: Floats, scheme: Scheme) -> tuple[Floats, Floats]:
    """Scale and zero point of blocks [M, block]: the codes span from the least to the largest."""
    low = np.minimum(unit.min(axis=1), 0)
    high = np.maximum(unit.max(axis=1), 0)
    span = ((high - low) / np.float32(scheme.levels)).astype(np.float32)

    def candidate(fraction: float) -> tuple[Floats, Floats]:
        scale = span * np.float32(fraction)
        point = np.rint(_divided(-low * np.float32(fraction), scale))
        return scale, np.clip(point, 0, scheme.levels).astype(np.float32)

    fractions = _FRACTIONS if scheme.search else _FRACTIONS[:1]
    return _best(unit, [candidate(f) for f in fractions], scheme)


def _best(
    unit: Floats, candidates: list[tuple[Floats, Floats]], scheme: Scheme
) -> tuple[Floats, Floats]:
    """Of candidates (scale, zero point), for each block the first with the least squared error."""
    scale, point = (part.copy() for part in candidates[0])
    if len(candidates) == 1:
        return scale, point
    least = _squared_error(unit, _codes(unit, scale, point, scheme), scale, point)
    for other, other_point in candidates[1:]:
        error = _squared_error(unit, _codes(unit, other, other_point, scheme), other, other_point)
        better = error < least
        scale[better], point[better] = other[better], other_point[better]
        least[better] = error[better]
    return scale, point


def _codes(unit: Floats, scale: Floats, point: Floats, scheme: Scheme) -> Floats:
    """Codes [M, block], as floats; the zero point where the scale is 0."""
    codes = np.rint(_divided(unit, scale[:, None]))
    np.add(codes, point[:, None], out=codes)
    return np.clip(codes, 0, scheme.levels, out=codes)


def _refitted(unit: Floats, codes: Floats, scale: Floats, point: Floats) -> Floats:
    """The scale that suits the codes chosen best: least squares; the old one if no better."""
    levels = codes - point[:, None]
    fitted = _divided((levels * unit).sum(axis=1), np.square(levels).sum(axis=1))
    better = _squared_error(unit, codes, fitted, point) < _squared_error(unit, codes, scale, point)
    return np.where(better, fitted, scale).astype(np.float32)


def _squared_error(unit: Floats, codes: Floats, scale: Floats, point: Floats) -> Floats:
    error = np.multiply(codes - point[:, None], scale[:, None], dtype=np.float32)
    error -= unit
    total: Floats = np.einsum("mb,mb->m", error, error)
    return total


def _divided(numbers: Floats, divisors: Floats) -> Floats:
    """Quotients, 0 where the divisor is 0."""
    some = divisors != 0
    quotients = np.divide(numbers, np.where(some, divisors, 1), dtype=np.float32)
    return np.where(some, quotients, np.float32(0))
