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
Objective = Literal["future", "next"]
Gradient = Literal["plain", "straight-through"]
Compute = Literal["fp32", "bf16", "fp16"]
RATES: tuple[Rate, ...] = get_args(Rate)
PRECISIONS: tuple[Precision, ...] = get_args(Precision)
OBJECTIVES: tuple[Objective, ...] = get_args(Objective)
GRADIENTS: tuple[Gradient, ...] = get_args(Gradient)
DTYPES: tuple[str, ...] = ("auto", *get_args(Compute))


@dataclass(frozen=True)
class BuildSettings:
    """How the entries are learned; the result depends on every field.

    Attributes:
        steps: Gradient steps; 0 stores the frozen router's logits.
        learning_rate: Of plain gradient descent on the loss summed over tokens.
        rate: `relative`: a first step moves each gate's logits by that share of their root mean
            square; `absolute`: the same rate for all gates, as in the paper.
        gates: Which gates: `all`, `last:N`, or numbers such as `0,3`.
        max_length: Tokens a sequence is cut to; a model of fewer positions has that many.
        max_tokens: Entries from the reference text at most, or None.
        batch_tokens: Padded tokens a batch has room for.
        precision: Of the stored tensors.
        background_ratio: Entries of background text for each entry of reference text, at most.
        objective: `future`: a token's vector is moved for all that follows; `next`: for the token
            that follows it alone.
        gradient: `plain` backpropagation, or `straight-through` the choice of experts.
        deduplicate: Entries of one token whose keys have at least this cosine become one; None
            keeps all.
        device: To compute on: `auto` is a CUDA device if there is one, else the CPU; or as torch
            names it.
        dtype: To compute in: `auto` is fp32 on a CPU and bf16 elsewhere.

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
    objective: Objective = "future"
    gradient: Gradient = "plain"
    deduplicate: float | None = None
    device: str = "auto"
    dtype: str = "auto"

    def __post_init__(self) -> None:
        _check("steps", self.steps, 0, 1000)
        _check("learning rate", self.learning_rate, 0, 1e6)
        _check("max length", self.max_length, 2, 1 << 20)
        _check("batch tokens", self.batch_tokens, 2, 1 << 24)
        _check("background ratio", self.background_ratio, 0, 1e3)
        if self.max_tokens is not None:
            _check("max tokens", self.max_tokens, 1, 1 << 40)
        if self.deduplicate is not None:
            _check("deduplicate", self.deduplicate, 0.5, 1)
        for name, choices in (
            ("rate", RATES),
            ("precision", PRECISIONS),
            ("objective", OBJECTIVES),
            ("gradient", GRADIENTS),
            ("dtype", DTYPES),
        ):
            if (found := getattr(self, name)) not in choices:
                raise SettingError(name, "unknown", expected=choices, found=found)


@dataclass(frozen=True)
class Workers:
    """Who learns the batches; the result depends on `threads` at most.

    Attributes:
        count: Processes, each with the model in it; None learns in this process.
        threads: Of each of them; None leaves torch its own.
        ray: Whether they are Ray actors, on whatever machines Ray has, instead of processes.

    Raises:
        SettingError: If a number is out of its range.
    """

    count: int | None = None
    threads: int | None = None
    ray: bool = False

    @staticmethod
    def of(count: int | None, threads: int | None, *, ray: bool) -> Workers:
        """As the command takes them: workers have one thread each if nothing else is said."""
        if threads is None and (ray or count is not None):
            threads = 1
        return Workers(count, threads, ray)

    def __post_init__(self) -> None:
        if self.count is not None:
            _check("workers", self.count, 1, 1 << 14)
        if self.threads is not None:
            _check("threads", self.threads, 1, 1 << 12)


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
    scale: float = 0.25
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
        whole = "whole " if isinstance(low, int) and isinstance(high, int) else ""
        least, most = (f"{int(end):,}" if end == int(end) else f"{end:g}" for end in (low, high))
        raise SettingError(
            name, "out of range", expected=f"a {whole}number from {least} to {most}", found=number
        )
