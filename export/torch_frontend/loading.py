"""A checkpoint as a model of transformers, in fp32 and without running any code of its own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from knnmoe.pretrained import load_pretrained
from knnmoe.runtime.checkpoint import CONFIG, Checkpoint
from knnmoe.runtime.errors import CheckpointError

OTHER_FAMILY = (
    "Tracing cannot express this; a description of the family, in knnmoe's export/families, might."
)


def load_model(source: Checkpoint) -> Any:
    """The model of a checkpoint, ready to be traced: the whole of it in memory, in fp32.

    Raises:
        CheckpointError: If transformers does not know the architecture or cannot load it, weights
            are missing, or the checkpoint is quantised.
    """
    import transformers

    if causal_class(source.model_type) is None:
        raise CheckpointError(
            f"{source.path / CONFIG}: model_type",
            "is no causal language model of the transformers that is installed",
            expected=f"a model that transformers {transformers.__version__} has",
            found=source.model_type[:100],
            fix="Install a version of transformers that has it.",
        )
    if source.config.get("quantization_config") is not None:
        raise CheckpointError(
            f"{source.path / CONFIG}: quantization_config",
            "quantised checkpoints are not traced",
            expected="weights in float32, float16 or bfloat16",
            fix="Export the checkpoint it was made from.",
        )
    return load_fp32(source.path)


def load_fp32(path: Path) -> Any:
    """The model in a directory, in fp32 and for inference.

    Args:
        path: Of the checkpoint.

    Raises:
        CheckpointError: If transformers cannot load it, or weights are missing.
        DeviceError: If there is not enough memory for it.
    """
    model = load_pretrained(path, torch.float32, attn_implementation="eager")
    return model.eval().requires_grad_(False)


def causal_class(model_type: str) -> str | None:
    """The name of the class that transformers has for a model type; None if it has none."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    known: Any = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    found: str | None = known.get(model_type)
    return found
