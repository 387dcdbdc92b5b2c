"""The numbers that turn similarities into a correction, and their names."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from .errors import SettingError

Variant = Literal["logits", "assignment", "residual"]
Similarity = Literal["cosine", "rbf"]
Confidence = Literal["mean", "sum", "calibrated"]
Weighting = Literal["similarity", "softmax"]
EvidenceFrom = Literal["all", "reference"]  # which entries of a memory are evidence

VARIANTS: tuple[Variant, ...] = get_args(Variant)
SIMILARITIES: tuple[Similarity, ...] = get_args(Similarity)
EVIDENCE: tuple[EvidenceFrom, ...] = get_args(EvidenceFrom)

MAX_NEIGHBORS = 64  # the device kernel keeps its candidates in registers up to here


@dataclass(frozen=True)
class Calibration:
    """One gate's calibration, field by field as in the vector of docs/design.md.

    The defaults are the paper's (v2): interpolation, similarity weights, λ = mean similarity.

    Raises:
        SettingError: If a number is not finite or out of its range.
    """

    interpolate: float = 1.0
    weight_power: float = 1.0
    inverse_temperature: float = 0.0
    mean: float = 1.0
    scale: float = 1.0
    power: float = 1.0
    midpoint: float = 0.0
    sharpness: float = 0.0
    cap: float = 12.0
    sequence: float = 0.0
    gamma: float = 1.0
    decay: float = 1.0

    def __post_init__(self) -> None:
        for field in fields(self):
            low, high = _RANGES[field.name]
            number = getattr(self, field.name)
            if isinstance(number, bool) or not isinstance(number, int | float):
                raise SettingError(f"calibration.{field.name}", "not a number", found=repr(number))
            flag = field.name in ("mean", "sequence")
            if flag and number not in (0, 1):
                raise SettingError(
                    f"calibration.{field.name}", "out of range", expected="0 or 1", found=number
                )
            if not low <= number <= high:
                raise SettingError(
                    f"calibration.{field.name}",
                    "out of range",
                    expected=f"a number from {low:g} to {high:g}",
                    found=number,
                )

    def vector(self) -> NDArray[np.float32]:
        """The numbers as the blend node takes them: [12] fp32."""
        return np.array([getattr(self, f.name) for f in fields(self)], dtype=np.float32)

    def to_json(self) -> dict[str, float]:
        """The numbers by name."""
        return asdict(self)

    @staticmethod
    def from_json(numbers: Mapping[str, Any]) -> Calibration:
        """Read the numbers by name; every name must be there and no other.

        Only `decay` may be missing, which packs written before there was one do not have: 1.
        """
        names = {f.name for f in fields(Calibration)}
        if set(numbers) | {"decay"} != names:
            raise SettingError(
                "calibration",
                "malformed",
                expected=f"the numbers {sorted(names)}",
                found=sorted(numbers),
            )
        return Calibration(**numbers)

    def with_variant(self, variant: Variant) -> Calibration:
        """The same numbers for values of another variant."""
        return replace(self, interpolate=0.0 if variant == "residual" else 1.0)


_ANY = (-1e6, 1e6)
_FLAG = (0.0, 1.0)
_RANGES: dict[str, tuple[float, float]] = {
    "interpolate": _FLAG,
    "weight_power": (0.0, 16.0),
    "inverse_temperature": (0.0, 1e4),
    "mean": _FLAG,
    "scale": (0.0, 1.0),
    "power": (0.01, 64.0),  # at 0 an empty memory would count as certain
    "midpoint": _ANY,
    "sharpness": (0.0, 1e6),
    "cap": (0.0, 1e4),
    "sequence": _FLAG,
    "gamma": (0.0, 1e6),
    "decay": (0.5, 1.0),
}


def preset(
    variant: Variant,
    *,
    confidence: Confidence = "mean",
    weighting: Weighting = "similarity",
    temperature: float = 0.05,
    **numbers: Any,
) -> Calibration:
    """A calibration by the names of docs/method.md; `numbers` override single fields.

    `calibrated` has no numbers of its own: they come from `knnmoe memory calibrate`.
    """
    if variant not in VARIANTS:
        raise SettingError("variant", "unknown", expected=VARIANTS, found=variant)
    if not temperature > 0:
        raise SettingError("temperature", "out of range", expected="> 0", found=temperature)
    softmax = weighting == "softmax"
    base = Calibration(
        interpolate=0.0 if variant == "residual" else 1.0,
        weight_power=0.0 if softmax else 1.0,
        inverse_temperature=1.0 / temperature if softmax else 0.0,
        mean=0.0 if confidence == "sum" else 1.0,
    )
    return replace(base, **numbers)


def check_neighbors(k: int) -> int:
    """K within 1..64, or `SettingError`."""
    if isinstance(k, bool) or not isinstance(k, int) or not 1 <= k <= MAX_NEIGHBORS:
        raise SettingError(
            "neighbors",
            "K out of range",
            expected=f"a whole number from 1 to {MAX_NEIGHBORS}",
            found=k,
        )
    return k
