"""The families that can be exported, one declarative file each."""

from __future__ import annotations

from knnmoe.export.config import NOT_DESCRIBED
from knnmoe.export.family import Family
from knnmoe.runtime.checkpoint import CONFIG, Checkpoint
from knnmoe.runtime.errors import CheckpointError

from .deepseek_v2 import DEEPSEEK_V2
from .deepseek_v3 import DEEPSEEK_V3
from .glm4_moe import GLM4_MOE
from .gpt_oss import GPT_OSS
from .mixtral import MIXTRAL
from .olmoe import OLMOE
from .qwen2_moe import QWEN2_MOE
from .qwen3_moe import QWEN3_MOE

FAMILIES: dict[str, Family] = {
    family.model_type: family
    for family in (
        DEEPSEEK_V2,
        DEEPSEEK_V3,
        GLM4_MOE,
        GPT_OSS,
        MIXTRAL,
        OLMOE,
        QWEN2_MOE,
        QWEN3_MOE,
    )
}


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
