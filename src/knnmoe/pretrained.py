"""Checkpoints as models of transformers, from disk only and without running code of theirs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from knnmoe.runtime.errors import CheckpointError
from knnmoe.runtime.shortage import is_shortage, shortage

_LONGEST_LINE = 300


def load_pretrained(path: Path, dtype: torch.dtype, **options: Any) -> Any:
    """The model in a directory, on the CPU and with all of its weights.

    Experts in MXFP4 are dequantised.

    Args:
        path: Of the checkpoint.
        dtype: Of the weights, and to compute in.
        options: More for transformers' `from_pretrained`.

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
                dtype=dtype,
                local_files_only=True,
                trust_remote_code=False,
                output_loading_info=True,
                quantization_config=_quantization(path),
                **options,
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
    return model


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


def first_line(error: BaseException) -> str:
    """What an error says first."""
    lines = str(error).strip().splitlines()
    return lines[0][:_LONGEST_LINE] if lines else type(error).__name__


def _quantization(path: Path) -> Any:
    """What has transformers dequantise experts in MXFP4 as it loads them; None for others."""
    import transformers

    library: Any = transformers  # whose types do not say what it exports
    config, _ = library.PretrainedConfig.get_config_dict(path, local_files_only=True)
    stated = config.get("quantization_config")
    if not isinstance(stated, dict) or stated.get("quant_method") != "mxfp4":
        return None
    return library.Mxfp4Config(dequantize=True)
