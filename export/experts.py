"""The experts of a layer as the lowerings have them, read from however a checkpoint does.

Read piece by piece of one expert: neither a layer nor, where it is large, an expert is ever whole
in memory.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from knnmoe.runtime.checkpoint import Checkpoint
from knnmoe.runtime.errors import CheckpointError

from .architecture import Architecture
from .mxfp4 import BLOCKS, SCALES, dequantized
from .weights import CHUNK_BYTES, row_chunks

Floats = NDArray[np.float32]


def gate_up_rows(
    architecture: Architecture, checkpoint: Checkpoint, layer: int
) -> Iterator[Floats]:
    """Gate and up of all experts, [E · 2F, D]: a row of gate, then the one of up, and so on.

    Raises:
        CheckpointError: If a weight cannot be read.
    """
    names, width = architecture.family.tensors, architecture.expert_width
    if names.stacked_gate_up is not None:
        yield from _stacked(architecture, checkpoint, names.stacked_gate_up.format(layer=layer))
        return
    assert names.expert_gate is not None
    assert names.expert_up is not None
    for expert in range(architecture.shape.num_experts):
        pair = np.empty((width, 2, architecture.shape.hidden_size), np.float32)
        pair[:, 0] = checkpoint.tensor(names.expert_gate.format(layer=layer, expert=expert))
        pair[:, 1] = checkpoint.tensor(names.expert_up.format(layer=layer, expert=expert))
        yield pair.reshape(2 * width, -1)


def down_rows(architecture: Architecture, checkpoint: Checkpoint, layer: int) -> Iterator[Floats]:
    """Down of all experts, [E · D, F].

    Raises:
        CheckpointError: If a weight cannot be read.
    """
    names = architecture.family.tensors
    if names.stacked_down is not None:
        yield from _stacked(architecture, checkpoint, names.stacked_down.format(layer=layer))
        return
    assert names.expert_down is not None
    for expert in range(architecture.shape.num_experts):
        yield from row_chunks(
            checkpoint.tensor(names.expert_down.format(layer=layer, expert=expert))
        )


def _stacked(architecture: Architecture, checkpoint: Checkpoint, name: str) -> Iterator[Floats]:
    """The rows of the linear layers in a stack."""
    if not architecture.mxfp4:
        for matrix in checkpoint.tensor(name):
            for rows in row_chunks(matrix.T):
                yield np.ascontiguousarray(rows)
        return
    blocks, scales = checkpoint.tensor(name + BLOCKS), checkpoint.tensor(name + SCALES)
    step = max(1, CHUNK_BYTES // (4 * 2 * int(np.prod(blocks.shape[2:]))))
    for expert in range(len(blocks)):
        for start in range(0, blocks.shape[1], step):
            piece = (expert, slice(start, start + step))
            try:
                yield dequantized(blocks[piece], scales[piece])
            except ValueError as error:
                raise CheckpointError(
                    f"{checkpoint.path / checkpoint.entry(name + SCALES).shard}: {name + SCALES}",
                    f"expert {expert}: {error}",
                    fix="Download the checkpoint again.",
                ) from error
