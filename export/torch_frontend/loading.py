"""A checkpoint as a model of transformers, in fp32 and without running any code of its own."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from knnmoe.runtime.checkpoint import CONFIG, Checkpoint
from knnmoe.runtime.errors import CheckpointError
from knnmoe.runtime.shortage import is_shortage, shortage

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


def load_fp32(path: Path, quantization: Any = None) -> Any:
    """The model in a directory, in fp32 and for inference.

    Args:
        path: Of the checkpoint.
        quantization: What transformers is to do with quantised weights, if there are any.

    Raises:
        CheckpointError: If transformers cannot load it, or weights are missing.
        DeviceError: If there is not enough memory for it.
    """
    import transformers

    loader: Any = transformers.AutoModelForCausalLM
    try:
        with quiet_transformers():
            model, report = loader.from_pretrained(
                path,
                dtype=torch.float32,
                attn_implementation="eager",
                local_files_only=True,
                trust_remote_code=False,
                output_loading_info=True,
                quantization_config=quantization,
            )
    except Exception as error:  # many kinds are raised for a broken directory
        if is_shortage(error):
            fix = "Close what else uses the memory, or use a machine that has more."
            raise shortage(error, f"the model of {path}", None, fix) from error
        raise CheckpointError(
            path,
            f"transformers cannot load it ({first_line(error)})",
            fix="Download the checkpoint again, or use a version of transformers that knows it.",
        ) from error
    absent = sorted(report["missing_keys"]) + sorted(str(key) for key in report["mismatched_keys"])
    if absent:
        raise CheckpointError(
            path,
            "weights are missing or of another shape",
            expected="all weights of the architecture in config.json",
            found=", ".join(absent[:5]),
            fix="Download the checkpoint again.",
        )
    return model.eval().requires_grad_(False)


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Keep the bars and the advice of transformers out of what a command says."""
    import transformers

    logging: Any = transformers.utils.logging
    bars, level = logging.is_progress_bar_enabled(), logging.get_verbosity()
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


def causal_class(model_type: str) -> str | None:
    """The name of the class that transformers has for a model type; None if it has none."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    known: Any = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    found: str | None = known.get(model_type)
    return found


def first_line(error: BaseException) -> str:
    """What an error says first."""
    lines = str(error).strip().splitlines()
    return lines[0][:300] if lines else type(error).__name__
