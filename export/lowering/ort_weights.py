"""How the `ort` lowering lays a checkpoint's weights out, segment by segment.

Linear layers stay [out, in], as the checkpoint has them: Gemm multiplies by the transpose, which is
as fast, needs no transposed copy, and lets a tied head share the embedding's bytes.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import numpy as np
from numpy.typing import NDArray

from knnmoe.export.architecture import Architecture
from knnmoe.export.experts import down_rows, gate_up_rows
from knnmoe.export.family import TensorNames
from knnmoe.export.latent import Latent
from knnmoe.export.tensors import layer_tensors
from knnmoe.export.weights import PlannedTensor, row_chunks
from knnmoe.runtime.checkpoint import Checkpoint

EMBEDDING, HEAD, FINAL_NORM = "embedding", "head", "final_norm"
ROPE_COS, ROPE_SIN = "rope.cos", "rope.sin"


def layer_name(layer: int, part: str) -> str:
    """Name of a layer's weight: in the file, and as an initializer."""
    return f"layers.{layer}.{part}"


def segment_weights(
    architecture: Architecture, checkpoint: Checkpoint, segment: int
) -> list[PlannedTensor]:
    """What the weights file of one segment holds, in order."""
    shape, names = architecture.shape, architecture.family.tensors
    hidden = shape.hidden_size
    planned: list[PlannedTensor] = []

    def copied(name: str, *sources: str, size: tuple[int, ...]) -> None:
        rows = partial(_rows, checkpoint, sources)
        planned.append(PlannedTensor(name, size, rows, sources=sources))

    if segment == 0:
        copied(EMBEDDING, names.embedding, size=(shape.vocab_size, hidden))
        planned.extend(_rope(architecture))
    else:
        layer = architecture.gate_layers[segment - 1]
        planned.extend(_experts(architecture, checkpoint, layer))
        planned.extend(_copies(architecture, checkpoint, layer, _shared(names)))
    for layer in architecture.segment_layers(segment):
        dense = architecture.layers[layer].gate is None
        parts = _attention(names) | (_dense(names) if dense else _router(names))
        planned.extend(_copies(architecture, checkpoint, layer, parts))
        if architecture.latent is not None:
            planned.extend(_latent(architecture, architecture.latent, checkpoint, layer))
    if segment == shape.num_gates:
        copied(FINAL_NORM, names.final_norm, size=(hidden,))
        if not architecture.tied_head:
            copied(HEAD, names.head, size=(shape.vocab_size, hidden))
    return planned


Parts = dict[str, tuple[str | None, ...]]  # a weight → the tensors it consists of, one on another


def _attention(names: TensorNames) -> Parts:
    return {
        "input_norm": (names.input_norm,),
        "qkv": (names.query, names.query_down, names.key, names.value, names.latent_down),
        "qkv_bias": (names.query_bias, names.key_bias, names.value_bias),
        "query_norm": (names.query_norm,),
        "query_up": (names.query_up,),
        "latent_norm": (names.latent_norm,),
        "key_norm": (names.key_norm,),
        "output": (names.output,),
        "output_bias": (names.output_bias,),
        "sinks": (names.sinks,),
        "router_norm": (names.router_norm,),
    }


def _router(names: TensorNames) -> Parts:
    return {"router": (names.router,), "router_bias": (names.router_bias,)}


def _dense(names: TensorNames) -> Parts:
    return {
        "dense_gate_up": (names.dense_gate, names.dense_up),
        "dense_down": (names.dense_down,),
    }


def _shared(names: TensorNames) -> Parts:
    return {
        "shared_gate_up": (names.shared_gate, names.shared_up),
        "shared_down": (names.shared_down,),
        "shared_router": (names.shared_router,),
    }


def _copies(
    architecture: Architecture, checkpoint: Checkpoint, layer: int, parts: Parts
) -> Iterator[PlannedTensor]:
    """Those of the parts that the layer has."""
    sizes = layer_tensors(architecture, layer)
    for part, templates in parts.items():
        named = (name.format(layer=layer) for name in templates if name is not None)
        sources = tuple(name for name in named if name in sizes)
        if sources:
            rows = sum(sizes[name][0] for name in sources)
            size = (rows, *sizes[sources[0]][1:])
            chunks = partial(_rows, checkpoint, sources)
            yield PlannedTensor(layer_name(layer, part), size, chunks, sources=sources)


def _rows(checkpoint: Checkpoint, names: tuple[str, ...]) -> Iterator[NDArray[np.float32]]:
    for name in names:
        yield from row_chunks(checkpoint.tensor(name))


def _experts(architecture: Architecture, checkpoint: Checkpoint, layer: int) -> list[PlannedTensor]:
    """The stacks that com.microsoft.MoE reads: gate and up rows interleaved, and down; biases."""
    names, shape = architecture.family.tensors, architecture.shape
    hidden, width, count = shape.hidden_size, architecture.expert_width, shape.num_experts
    read = (architecture, checkpoint, layer)
    gate_up, down = partial(gate_up_rows, *read), partial(down_rows, *read)
    planned = [
        PlannedTensor(layer_name(layer, "gate_up"), (count, 2 * width, hidden), gate_up),
        PlannedTensor(layer_name(layer, "down"), (count, hidden, width), down),
    ]
    for part, template, out in (
        ("gate_up_bias", names.stacked_gate_up_bias, 2 * width),
        ("down_bias", names.stacked_down_bias, hidden),
    ):
        if template is not None:
            sources = (template.format(layer=layer),)
            rows, size = partial(_rows, checkpoint, sources), (count, out)
            planned.append(PlannedTensor(layer_name(layer, part), size, rows, sources=sources))
    return planned


def _latent(
    architecture: Architecture, latent: Latent, checkpoint: Checkpoint, layer: int
) -> list[PlannedTensor]:
    """Each head's map of the latent to its key, and to its value the other way round, so that both
    are multiplied from the right: [heads, plain, rank] and [heads, rank, value].
    """
    template, heads = architecture.family.tensors.latent_up, architecture.shape.num_heads
    assert template is not None
    name, plain, rank, value = template.format(layer=layer), latent.plain, latent.rank, latent.value

    def by_head(*, values: bool) -> Iterator[NDArray[np.float32]]:
        of_heads = checkpoint.tensor(name).reshape(heads, plain + value, rank)
        for rows in of_heads:
            part = rows[plain:].T if values else rows[:plain]
            yield part.astype(np.float32)

    return [
        PlannedTensor(
            layer_name(layer, "key_up"), (heads, plain, rank), partial(by_head, values=False)
        ),
        PlannedTensor(
            layer_name(layer, "value_up"), (heads, rank, value), partial(by_head, values=True)
        ),
    ]


def _rope(architecture: Architecture) -> list[PlannedTensor]:
    """Cosines and sines [positions, rotary size / 2], computed as transformers does, in fp32."""
    size, positions = architecture.rotary_size, architecture.shape.max_positions
    frequencies = architecture.rope.frequencies(size)
    magnitude = np.float32(architecture.rope.magnitude)
    rows = 4096

    def table(function: np.ufunc) -> Iterator[NDArray[np.float32]]:
        for start in range(0, positions, rows):
            steps = np.arange(start, min(start + rows, positions), dtype=np.float32)
            yield magnitude * function(np.outer(steps, frequencies)).astype(np.float32)

    return [
        PlannedTensor(ROPE_COS, (positions, size // 2), lambda: table(np.cos)),
        PlannedTensor(ROPE_SIN, (positions, size // 2), lambda: table(np.sin)),
    ]
