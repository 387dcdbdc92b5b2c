"""MXFP4, the format that some checkpoints have their experts in: 4-bit floats in blocks of 32.

As the OCP Microscaling Formats specification (MX) 1.0 has it: a block is 32 elements E2M1, whose
values are ±{0, 0.5, 1, 1.5, 2, 3, 4, 6}, and one scale E8M0, which is 2^(byte - 127), or not a
number where the byte is 255. Two elements lie in a byte, the earlier one in the lower half. A stack
of matrices `name` [E, in, out] is stored as `name_blocks` [E, out, in / 32, 16] and `name_scales`
[E, out, in / 32], both uint8; so its rows are those of a linear layer, not of the stack.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from knnmoe.runtime.errors import CheckpointError

from .config import Config

Floats = NDArray[np.float32]
Bytes = NDArray[np.uint8]

BLOCK = 32
BLOCKS, SCALES = "_blocks", "_scales"
METHOD = "mxfp4"
ENTRY = "quantization_config"
# Entries beside the method that change nothing here: which modules are not in the format is seen
# from their tensors.
_HARMLESS = ("modules_to_not_convert", "dequantize")

_NOT_A_NUMBER = 255
_SURE = 252  # up to this scale byte no element is beyond fp32: 6 · 2^125
_MAGNITUDES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
_ELEMENTS = np.array([*_MAGNITUDES, *(-m for m in _MAGNITUDES)], np.float32)
# byte → its two elements
_PAIRS = np.stack((np.tile(_ELEMENTS, 16), np.repeat(_ELEMENTS, 16)), axis=1)


def is_mxfp4(config: Config, *, known: bool) -> bool:
    """Whether a checkpoint's experts are in MXFP4.

    Args:
        config: Of the checkpoint.
        known: Whether its family keeps experts in a way that this format has tensors for.

    Raises:
        CheckpointError: If the checkpoint is quantised in any other way: only weights as they were
            trained can be exported, those of others mean something else.
    """
    found = config.raw(ENTRY)
    if found is None:
        return False
    stated = found if isinstance(found, dict) else {"quant_method": f"{found!r}"}
    method = stated.get("quant_method", "an unnamed method")
    more = sorted(set(stated) - {"quant_method", *_HARMLESS})
    if known and method == METHOD and not more:
        return True
    readable = f"weights in float32, float16 or bfloat16{', or experts in mxfp4' if known else ''}"
    of_method = f"{method} with {', '.join(more)}" if known and method == METHOD else str(method)
    raise CheckpointError(
        f"{config.where}: {ENTRY}",
        "the checkpoint is quantised already, and its weights cannot be read as they are",
        expected=readable,
        found=of_method[:100],
        fix="Export the checkpoint it was made from, with --precision int8 or int4.",
    )


def is_packed(name: str) -> bool:
    """Whether a tensor of this name is blocks or scales."""
    return name.endswith((BLOCKS, SCALES))


def packed_shapes(
    name: str, rows: tuple[int, ...], width: int
) -> Iterator[tuple[str, tuple[int, ...]]]:
    """The tensors that hold rows of `width` elements, a multiple of `BLOCK`, and their shapes."""
    blocks = width // BLOCK
    yield name + BLOCKS, (*rows, blocks, BLOCK // 2)
    yield name + SCALES, (*rows, blocks)


def dequantized(blocks: Bytes, scales: Bytes) -> Floats:
    """The numbers that blocks stand for, exactly.

    Args:
        blocks: [..., B, 16].
        scales: [..., B].

    Returns:
        [..., B · 32] fp32.

    Raises:
        ValueError: If a scale is not a number, or an element is too large for fp32.
    """
    largest = scales.max(initial=0)
    if largest == _NOT_A_NUMBER:
        raise ValueError("a block's scale is not a number")
    values: Floats = _PAIRS[blocks].reshape(*scales.shape, BLOCK)
    with np.errstate(over="ignore"):
        values *= np.ldexp(np.float32(1), scales.astype(np.int32) - 127)[..., None]
    if largest > _SURE and not np.isfinite(values).all():
        raise ValueError("an element is too large for fp32")
    return values.reshape(*scales.shape[:-1], -1)
