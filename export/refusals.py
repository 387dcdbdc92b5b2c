"""Checkpoints that look as if they could be exported, and would come out as something else."""

from __future__ import annotations

from collections.abc import Iterator
from importlib.util import find_spec
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
    described = source.model_type in FAMILIES
    if described and not traced:
        known: str | None = _camel(source.model_type) + "ForCausalLM"
    else:
        known = _class_of_transformers(source.model_type)
    for name in _model_classes(stated):
        same = known is not None and name.rsplit(".", 1)[-1] == known
        if same and (described or traced):
            continue
        raise CheckpointError(
            f"{source.path / CONFIG}: auto_map",
            "the checkpoint's model is code of its own, and no code of a checkpoint is run",
            expected=" or ".join(sorted(FAMILIES)) if known is None else f"{known} of transformers",
            found=name[:200],
            fix=_instead_of_code(source.model_type, known, same, described, traced),
        )


def _instead_of_code(
    model_type: str, known: str | None, same: bool, described: bool, traced: bool
) -> str:
    """What else can be done with a checkpoint whose model is code of its own.

    Args:
        model_type: What the checkpoint says that it is.
        known: The class that transformers has for that; None if it has none, or is not there.
        same: Whether the checkpoint's class bears its name.
        described: Whether there is a description of the family.
        traced: Whether transformers' class was asked for.
    """
    if known is None:
        return (
            "If the model is one of these families, convert it with transformers to the class of "
            "that family, save it, and export that."
        )
    trace = "" if described or traced else " --frontend torch"
    if same:
        return f"Try{trace}, which traces that one: into fp32 or fp16, for the CPU."
    return (
        f"If the model is nothing but {model_type}, remove auto_map from its config and export "
        f"with{trace} --verify."
    )


def _class_of_transformers(model_type: str) -> str | None:
    """The class that transformers has for a model type; None if it has none, or is not there."""
    if find_spec("torch") is None or find_spec("transformers") is None:
        return None
    from .torch_frontend.loading import causal_class

    return causal_class(model_type)


def _camel(model_type: str) -> str:
    return "".join(part.capitalize() for part in model_type.split("_"))


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
