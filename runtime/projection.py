"""Keys for the first stage of the search: projected to few dimensions and stored in 4 or 8 bits.

A scan costs the bytes of what it reads. Router inputs vary mostly in few directions, so W of them
(the principal ones of the memory's own keys) tell candidates apart; which candidate is nearest is
decided by the full keys. The W directions are turned at random among themselves: then every
coordinate varies as much as the next, and steps of one width a key suit all of them, where the
first principal component alone would take the 4 bits from the rest.

    q · key ≈ (P q) · (P key),        P [W, D] with orthonormal rows
    ‖q - key‖² = ‖q‖² - 2 q · key + ‖key‖²

Of the second line only the inner product is estimated: ‖key‖² is the full key's, so what lies
outside of the W directions is counted in it. docs/formats.md has the tensors.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.floating[Any]]

WIDTH_STEP = 32  # widths are multiples of it
MAX_BLOCK = 256  # elements of a row that are rounded together
SCAN_BITS = (4, 8)


@dataclass(frozen=True)
class ProjectedKeys:
    """A projection and a memory's keys projected by it.

    Attributes:
        projection: [W, D] int8; times its scales, rows are orthonormal but for rounding.
        projection_scales: [W] fp32.
        codes: [N, W · bits / 8] uint8; at 4 bits two a byte, the first in the lower half. Zero is
            2^(bits - 1).
        scales: [N] fp32: what makes a row of codes as long as the projected centred key.
    """

    projection: NDArray[np.int8]
    projection_scales: NDArray[np.float32]
    codes: NDArray[np.uint8]
    scales: NDArray[np.float32]

    @property
    def width(self) -> int:
        """W."""
        return len(self.projection)

    @property
    def bits(self) -> int:
        """Of a code: 4 or 8."""
        return 8 * int(self.codes.shape[1]) // self.width

    def matrix(self) -> NDArray[np.float32]:
        """P [W, D] fp32."""
        return self.projection * self.projection_scales[:, None]

    def of(self, entries: Any) -> ProjectedKeys:
        """Of some entries, given by an array of their numbers or a slice."""
        return replace(self, codes=self.codes[entries], scales=self.scales[entries])

    def restored(self, entries: Any = slice(None)) -> NDArray[np.float32]:
        """Pᵀ · code · scale [..., D] of some entries."""
        codes = self.codes[entries]
        steps = decode(codes.reshape(-1, codes.shape[-1]), self.bits).astype(np.float32)
        steps *= self.scales[entries].reshape(-1, 1)
        rows: NDArray[np.float32] = steps @ self.matrix()
        return rows.reshape(*codes.shape[:-1], self.projection.shape[1])


def round_projection(matrix: Floats) -> tuple[NDArray[np.int8], NDArray[np.float32]]:
    """P [W, D] as int8 and scales [W], each row of the length it had."""
    largest = np.abs(matrix).max(axis=1, keepdims=True)
    steps = np.rint(matrix / largest * 127)
    scales = np.linalg.norm(matrix, axis=1) / np.linalg.norm(steps, axis=1)
    return steps.astype(np.int8), scales.astype(np.float32)


def encode(projected: Floats, bits: int) -> tuple[NDArray[np.uint8], NDArray[np.float32]]:
    """Projected keys [N, W] as codes [N, W · bits / 8] and scales [N]."""
    zero = 1 << bits - 1
    largest = np.abs(projected).max(axis=1, keepdims=True)
    steps = np.rint(projected / np.where(largest > 0, largest, 1) * (zero - 1))
    lengths = np.linalg.norm(steps, axis=1)
    scales = np.linalg.norm(projected, axis=1) / np.where(lengths > 0, lengths, 1)
    codes: NDArray[np.uint8] = (steps + zero).astype(np.uint8)
    if bits == 4:
        codes = codes[:, 0::2] | codes[:, 1::2] << np.uint8(4)
    return codes, scales.astype(np.float32)


def decode(codes: NDArray[np.uint8], bits: int) -> NDArray[np.int8]:
    """Codes [N, W · bits / 8] as steps [N, W]."""
    if bits == 4:
        codes = np.stack([codes & 15, codes >> 4], axis=2).reshape(len(codes), -1)
    return (codes.astype(np.int16) - (1 << bits - 1)).astype(np.int8)


def block_size(width: int) -> int:
    """Elements rounded together of rows of a width: the largest power of two that divides it."""
    return min(width & -width, MAX_BLOCK)


def projected_products(queries: Floats, keys: ProjectedKeys, *, int8_queries: bool) -> Floats:
    """Estimates of q · key [T, N] for centred queries [T, D] and centred keys, true scale.

    With `int8_queries` as ONNX Runtime's `MatMulNBits` has it, which rounds what meets codes to
    int8, block by block.
    """
    dtype = queries.dtype
    matrix = keys.projection * keys.projection_scales.astype(dtype)[:, None]
    queries = _round_blocks(queries) if int8_queries else queries
    projected: Floats = queries @ matrix.T
    projected = _round_blocks(projected) if int8_queries else projected
    steps = decode(keys.codes, keys.bits).T.astype(dtype)
    products: Floats = projected @ steps * keys.scales.astype(dtype)
    return products


def _round_blocks(rows: Floats) -> Floats:
    """Rows [T, W] in steps of a 127th of the largest element of each block."""
    blocks = rows.reshape(len(rows), -1, block_size(rows.shape[1]))
    largest = np.abs(blocks).max(axis=2, keepdims=True)
    unit = blocks / np.where(largest > 0, largest, 1)
    rounded: Floats = (np.rint(unit * 127) * (largest / 127)).reshape(rows.shape)
    return rounded
