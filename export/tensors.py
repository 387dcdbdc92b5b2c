"""The tensors that a checkpoint of a described family has, and whether one has them."""

from __future__ import annotations

from collections.abc import Iterator

from knnmoe.runtime.checkpoint import Checkpoint
from knnmoe.runtime.errors import CheckpointError

from .architecture import Architecture
from .config import NOT_DESCRIBED
from .latent import Latent
from .mxfp4 import is_packed, packed_shapes

WEIGHT_DTYPES = ("F32", "F16", "BF16")
PACKED_DTYPES = ("U8",)  # of MXFP4's blocks and scales


def layer_tensors(architecture: Architecture, layer: int) -> dict[str, tuple[int, ...]]:
    """The tensors of one layer by their names, with their shapes; without those of its experts."""
    names, hidden = architecture.family.tensors, architecture.shape.hidden_size
    query, kv = architecture.query_width, architecture.kv_width
    head, experts = architecture.shape.head_size, architecture.shape.num_experts
    normed = (head, head) if architecture.family.head_norms else (query, kv)
    found: dict[str | None, tuple[int, ...]] = {
        names.input_norm: (hidden,),
    }
    if architecture.latent is None:
        found |= {names.query: (query, hidden), names.key: (kv, hidden), names.value: (kv, hidden)}
    else:
        found |= _latent_tensors(architecture, architecture.latent)
    found |= {
        names.output: (hidden, architecture.attended_width),
        names.sinks: (architecture.shape.num_heads,),
        names.router_norm: (hidden,),
    }
    if architecture.head_norms:
        found |= {names.query_norm: (normed[0],), names.key_norm: (normed[1],)}
    if architecture.attention_bias:
        found |= {names.query_bias: (query,), names.key_bias: (kv,), names.value_bias: (kv,)}
        found |= {names.output_bias: (hidden,)}
    if architecture.layers[layer].gate is None:
        width = architecture.dense_width
        gate, up, down = names.dense_gate, names.dense_up, names.dense_down
    else:
        found |= {names.router: (experts, hidden), names.shared_router: (1, hidden)}
        found |= {names.router_bias: (experts,)}
        found |= {names.selection_bias: (experts,)}
        width = architecture.shared_width
        gate, up, down = names.shared_gate, names.shared_up, names.shared_down
    if width is not None:
        found |= {gate: (width, hidden), up: (width, hidden), down: (hidden, width)}
    return {name.format(layer=layer): size for name, size in found.items() if name is not None}


def _latent_tensors(a: Architecture, latent: Latent) -> dict[str | None, tuple[int, ...]]:
    names, hidden, heads = a.family.tensors, a.shape.hidden_size, a.shape.num_heads
    found: dict[str | None, tuple[int, ...]] = {
        names.latent_down: (latent.cached, hidden),
        names.latent_norm: (latent.rank,),
        names.latent_up: (heads * (latent.plain + latent.value), latent.rank),
    }
    if latent.query_rank is None:
        return found | {names.query: (a.query_width, hidden)}
    return found | {
        names.query_down: (latent.query_rank, hidden),
        names.query_norm: (latent.query_rank,),
        names.query_up: (a.query_width, latent.query_rank),
    }


def expected_tensors(architecture: Architecture) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Every tensor that a checkpoint of this architecture has, with its shape."""
    names, shape = architecture.family.tensors, architecture.shape
    hidden = shape.hidden_size
    yield names.embedding, (shape.vocab_size, hidden)
    yield names.final_norm, (hidden,)
    if not architecture.tied_head:
        yield names.head, (shape.vocab_size, hidden)
    for index, layer in enumerate(architecture.layers):
        yield from layer_tensors(architecture, index).items()
        if layer.gate is not None:
            yield from _expert_tensors(architecture, index)


def _expert_tensors(
    architecture: Architecture, layer: int
) -> Iterator[tuple[str, tuple[int, ...]]]:
    """The tensors of the experts of one layer, with their shapes."""
    names, count = architecture.family.tensors, architecture.shape.num_experts
    hidden, width = architecture.shape.hidden_size, architecture.expert_width
    for expert in range(count):
        for template, size in (
            (names.expert_gate, (width, hidden)),
            (names.expert_up, (width, hidden)),
            (names.expert_down, (hidden, width)),
        ):
            if template is not None:
                yield template.format(layer=layer, expert=expert), size
    for template, inside, out in (
        (names.stacked_gate_up, hidden, 2 * width),
        (names.stacked_down, width, hidden),
    ):
        if template is not None and architecture.mxfp4:
            yield from packed_shapes(template.format(layer=layer), (count, out), inside)
        elif template is not None:
            yield template.format(layer=layer), (count, inside, out)
    for template, out in (
        (names.stacked_gate_up_bias, 2 * width),
        (names.stacked_down_bias, hidden),
    ):
        if template is not None:
            yield template.format(layer=layer), (count, out)


def check_tensors(checkpoint: Checkpoint, architecture: Architecture) -> None:
    """Compare a checkpoint's tensors with those that its config states.

    Raises:
        CheckpointError: If one is missing, unknown, or of an unexpected shape or dtype.
    """
    expected = set()
    for name, shape in expected_tensors(architecture):
        if name == architecture.family.tensors.head and name not in checkpoint.tensors:
            raise CheckpointError(
                checkpoint.path,
                f"tensor {name} is missing, and the config does not tie the head to the embedding",
                fix="If it is tied, set tie_word_embeddings to true in config.json; if not, the "
                "checkpoint is incomplete.",
            )
        entry = checkpoint.entry(name)
        expected.add(name)
        where = f"{checkpoint.path / entry.shard}: {name}"
        if entry.shape != shape:
            raise CheckpointError(
                where,
                "has another shape than the config states",
                expected=list(shape),
                found=list(entry.shape),
                fix="Use the config.json that belongs to these weights.",
            )
        dtypes = PACKED_DTYPES if architecture.mxfp4 and is_packed(name) else WEIGHT_DTYPES
        if entry.dtype not in dtypes:
            raise CheckpointError(
                where,
                "has a dtype that cannot be exported",
                expected=" or ".join(dtypes),
                found=entry.dtype,
                fix="Convert the checkpoint to float32, float16 or bfloat16.",
            )
    names, further = architecture.family.tensors, set(further_tensors(checkpoint, architecture))
    for name in checkpoint.tensors:
        tied = architecture.tied_head and name == names.head
        known = name in expected or name in further or tied or name.endswith(names.ignored)
        if not known:
            raise CheckpointError(
                f"{checkpoint.path}: {name}",
                f"is not a tensor of the family {architecture.family.name}",
                fix=NOT_DESCRIBED,
            )


def further_tensors(checkpoint: Checkpoint, architecture: Architecture) -> tuple[str, ...]:
    """Those of layers behind the last one, which predict more tokens and are left out."""
    mark, count = architecture.family.tensors.further, architecture.shape.num_layers
    if mark is None:
        return ()
    layers = range(count, count + architecture.further_layers)
    # A layer like the others is none of them, whatever the config says of their number.
    found = [layer for layer in layers if mark.format(layer=layer) in checkpoint.tensors]
    prefixes = tuple(f"{mark.partition('{layer}')[0]}{layer}." for layer in found)
    return tuple(name for name in checkpoint.tensors if name.startswith(prefixes))
