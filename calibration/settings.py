"""What a person chooses when building a memory; cheap to import."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from knnmoe.runtime.calibration import (
    SIMILARITIES,
    Confidence,
    Similarity,
    Variant,
    Weighting,
    check_neighbors,
    preset,
)
from knnmoe.runtime.errors import SettingError

Rate = Literal["relative", "absolute"]
Precision = Literal["fp16", "fp32"]
RATES: tuple[Rate, ...] = get_args(Rate)
PRECISIONS: tuple[Precision, ...] = get_args(Precision)


@dataclass(frozen=True)
class BuildSettings:
    """How the entries are learned; the result depends on every field.

    Attributes:
        steps: Gradient steps; 0 stores the frozen router's logits.
        learning_rate: Of plain gradient descent on the loss summed over tokens.
        rate: `relative`: a first step moves each gate's logits by that share of their root mean
            square; `absolute`: the same rate for all gates, as in the paper.
        gates: Which gates: `all`, `last:N`, or numbers such as `0,3`.
        max_length: Tokens a sequence is cut to.
        max_tokens: Entries from the reference text at most, or None.
        batch_tokens: Padded tokens a batch has room for.
        precision: Of the stored tensors.
        background_ratio: Entries of background text for each entry of reference text, at most.

    Raises:
        SettingError: If a field is out of its range.
    """

    steps: int = 3
    learning_rate: float = 0.1
    rate: Rate = "relative"
    gates: str = "all"
    max_length: int = 256
    max_tokens: int | None = None
    batch_tokens: int = 1024
    precision: Precision = "fp16"
    background_ratio: float = 1.0

    def __post_init__(self) -> None:
        _check("steps", self.steps, 0, 1000)
        _check("learning rate", self.learning_rate, 0, 1e6)
        _check("max length", self.max_length, 2, 1 << 20)
        _check("batch tokens", self.batch_tokens, 2, 1 << 24)
        _check("background ratio", self.background_ratio, 0, 1e3)
        if self.max_tokens is not None:
            _check("max tokens", self.max_tokens, 1, 1 << 40)
        if self.rate not in RATES:
            raise SettingError("rate", "unknown", expected=RATES, found=self.rate)
        if self.precision not in PRECISIONS:
            raise SettingError("precision", "unknown", expected=PRECISIONS, found=self.precision)


@dataclass(frozen=True)
class UseSettings:
    """How the runtime uses the entries; can be changed later without building again.

    The names are those of docs/method.md.

    Raises:
        SettingError: If a field is out of its range.
    """

    variant: Variant = "residual"
    neighbors: int = 8
    similarity: Similarity = "cosine"
    confidence: Confidence = "mean"
    weighting: Weighting = "softmax"
    temperature: float = 0.05
    scale: float = 0.4
    power: float = 2.0

    def __post_init__(self) -> None:
        check_neighbors(self.neighbors)
        if self.similarity not in SIMILARITIES:
            raise SettingError(
                "similarity", "unknown", expected=SIMILARITIES, found=self.similarity
            )
        if self.confidence == "calibrated":
            raise SettingError(
                "confidence",
                "has to be measured",
                expected="mean or sum",
                found="calibrated",
                fix="Build with `mean`, then run `knnmoe memory calibrate`.",
            )
        preset(
            self.variant,
            confidence=self.confidence,
            weighting=self.weighting,
            temperature=self.temperature,
            scale=self.scale,
            power=self.power,
        )


def parse_gates(text: str, num_gates: int) -> tuple[int, ...]:
    """`all`, `last:N` or a comma-separated list as gate numbers in order.

    Raises:
        SettingError: If it is none of these, or names a gate that the model does not have.
    """
    every = tuple(range(num_gates))
    if text == "all":
        return every
    wrong = SettingError(
        "gates",
        "cannot be used",
        expected=f"all, last:N, or numbers from 0 to {num_gates - 1} with commas",
        found=text,
    )
    try:
        if text.startswith("last:"):
            count = int(text.removeprefix("last:"))
            chosen = every[-count:] if 1 <= count <= num_gates else ()
        else:
            chosen = tuple(sorted({int(part) for part in text.split(",")}))
    except ValueError:
        raise wrong from None
    if not chosen or not all(gate in every for gate in chosen):
        raise wrong
    return chosen


def _check(name: str, number: float, low: float, high: float) -> None:
    if isinstance(number, bool) or not low <= number <= high:
        raise SettingError(
            name, "out of range", expected=f"a number from {low:g} to {high:g}", found=number
        )
