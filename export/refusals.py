"""Checkpoints that look as if they could be exported, and would come out as something else."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from knnmoe.runtime.checkpoint import CONFIG, Checkpoint
from knnmoe.runtime.errors import CheckpointError

from .architecture import Architecture
from .families import FAMILIES
from .weights import row_chunks

_MODELS = ("AutoModelForCausalLM", "AutoModel")  # the entries of auto_map that name a model

# Endings of tensors that only quantised checkpoints have → the methods that write them.
_PACKED = {
    ".qweight": "GPTQ or AWQ",
    ".qzeros": "GPTQ or AWQ",
    ".weight_packed": "compressed-tensors",
    ".weight_scale": "compressed-tensors or fp8",
    ".weight_scale_inv": "fp8",
    ".weight.absmax": "bitsandbytes",
    ".SCB": "bitsandbytes",
}


def refuse_remote_code(source: Checkpoint, *, traced: bool = False) -> None:
    """Refuse a checkpoint whose model is code of its own.

    Many checkpoints still name the code that they had before their model became part of
    transformers. Its class has the name that transformers gives it, and is not meant here.

    Args:
        source: The checkpoint.
        traced: Whether its class is transformers' own, whatever family it is of.

    Raises:
        CheckpointError: With the class's name.
    """
    stated = source.config.get("auto_map")
    if stated is None:
        return
    if traced:
        from .torch_frontend.loading import causal_class

        known, described = causal_class(source.model_type), True
    else:
        known = "".join(part.capitalize() for part in source.model_type.split("_")) + "ForCausalLM"
        described = source.model_type in FAMILIES
    for name in _model_classes(stated):
        if described and name.rsplit(".", 1)[-1] == known:
            continue
        raise CheckpointError(
            f"{source.path / CONFIG}: auto_map",
            "the checkpoint's model is code of its own, and no code of a checkpoint is run",
            expected=f"{known} of transformers" if described else " or ".join(sorted(FAMILIES)),
            found=name[:200],
            fix=f"If the model is nothing but {source.model_type}, remove auto_map from its config "
            "and export with --verify."
            if described
            else "If the model is one of these families, convert it with transformers to the class "
            "of that family, save it, and export that.",
        )


def refuse_packed(source: Checkpoint) -> None:
    """Refuse weights in a quantised form that the config says nothing of.

    Raises:
        CheckpointError: With the name of a tensor, and the method that writes such tensors.
    """
    for name, entry in source.tensors.items():
        method = next((m for ending, m in _PACKED.items() if name.endswith(ending)), None)
        if method is not None:
            raise CheckpointError(
                f"{source.path / entry.shard}: {name}",
                "is a part of a quantised weight",
                expected="weights in float32, float16 or bfloat16",
                found=f"what {method} writes",
                fix="Export the checkpoint it was made from, with --precision int8 or int4.",
            )


def check_tied_head(source: Checkpoint, architecture: Architecture) -> None:
    """Compare a head that is stored, though the config ties it to the embedding, with that.

    Raises:
        CheckpointError: If they differ: nothing says which of them is meant.
    """
    names = architecture.family.tensors
    if not architecture.tied_head or names.head not in source.tensors:
        return
    shape = source.entry(names.embedding).shape
    where = f"{source.path / source.entry(names.head).shard}: {names.head}"
    if source.entry(names.head).shape != shape:
        raise CheckpointError(
            where,
            "has another shape than the embedding, to which the config ties it",
            expected=list(shape),
            found=list(source.entry(names.head).shape),
            fix="Use the config.json that belongs to these weights.",
        )
    head, embedding = (row_chunks(source.tensor(n)) for n in (names.head, names.embedding))
    if all(np.array_equal(a, b) for a, b in zip(head, embedding, strict=True)):
        return
    raise CheckpointError(
        where,
        "differs from the embedding, to which the config ties it",
        expected=f"the values of {names.embedding}, or no such tensor",
        found="other values",
        fix="If the head is meant, set tie_word_embeddings to false in config.json; if not, remove "
        "the tensor.",
    )


def _model_classes(stated: Any) -> Iterator[str]:
    """The classes that an auto_map names for its model; all it names if it is no object."""
    if not isinstance(stated, dict):
        yield str(stated)
        return
    for entry in _MODELS:
        if entry in stated:
            yield str(stated[entry])
