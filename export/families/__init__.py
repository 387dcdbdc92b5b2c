"""The families that can be exported, one declarative file each."""

from __future__ import annotations

from knnmoe.export.architecture import NOT_DESCRIBED, Family
from knnmoe.runtime.checkpoint import CONFIG, Checkpoint
from knnmoe.runtime.errors import CheckpointError

from .olmoe import OLMOE

FAMILIES: dict[str, Family] = {family.model_type: family for family in (OLMOE,)}


def family_of(checkpoint: Checkpoint) -> Family:
    """The family of a checkpoint; `CheckpointError` names those known if there is none."""
    model_type = checkpoint.model_type
    if model_type not in FAMILIES:
        raise CheckpointError(
            f"{checkpoint.path / CONFIG}: model_type",
            "unknown architecture",
            expected=" or ".join(sorted(FAMILIES)),
            found=model_type[:100],
            fix=NOT_DESCRIBED,
        )
    return FAMILIES[model_type]
