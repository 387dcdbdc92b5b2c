"""Timing steps of a model with its memory against the frozen model, turn by turn.

Both run the same tokens in the same process, one step each in turn, so that whatever else the
machine does hits both alike.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from time import perf_counter_ns
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from ..errors import SettingError
from ..session import Steps

DEFAULT_CONTEXT = 128
DEFAULT_PROMPTS = (32, 128)
FUSED = "fused"  # the one part of a step in the fused layout
DISTURBED = 1.5

Milliseconds = list[float]
Tick = Callable[[], None]


class TimedSteps(Steps, Protocol):
    """What profiling asks of a pipeline, whose caches' `lengths` [B] can be set back."""

    def timed_step(self, cache: Any, input_ids: NDArray[np.int64]) -> dict[str, float]:
        """A step that returns the milliseconds of each part by name, in order."""


@dataclass(frozen=True)
class ProfileSettings:
    """What to measure.

    Attributes:
        context: Tokens already in the cache at each decode step.
        prompts: Prompt lengths to measure prefill at.
        steps: Decode steps measured.
        prefills: Prefills measured at each prompt length.
        warmup: Steps before the first that counts, at each shape.
        seed: Of the random tokens that are run.
    """

    context: int
    prompts: tuple[int, ...]
    steps: int = 100
    prefills: int = 10
    warmup: int = 5
    seed: int = 0

    @staticmethod
    def fitting(
        max_positions: int,
        *,
        context: int | None = None,
        prompts: tuple[int, ...] = (),
        **counts: int,
    ) -> ProfileSettings:
        """Settings for a model of that many positions; what is not given is made to fit.

        Raises:
            SettingError: If what is given is out of its range.
        """
        largest = max_positions - 1  # a decode step takes one position more
        settings = ProfileSettings(
            context=min(DEFAULT_CONTEXT, largest) if context is None else context,
            prompts=prompts or tuple(sorted({min(n, max_positions) for n in DEFAULT_PROMPTS})),
            **counts,
        )
        _check("context", settings.context, 1, largest)
        for length in settings.prompts:
            _check("prompt length", length, 1, max_positions)
        for name in ("steps", "prefills"):
            _check(name, getattr(settings, name), 1, 1_000_000)
        _check("warmup", settings.warmup, 0, 1_000_000)
        return settings

    @property
    def ticks(self) -> int:
        """How often `measure` reports progress."""
        return self.warmup + self.steps + len(self.prompts) * (self.warmup + self.prefills)


def _check(name: str, number: int, low: int, high: int) -> None:
    if not low <= number <= high:
        raise SettingError(name, "out of range", expected=f"{low} to {high}", found=number)


@dataclass(frozen=True)
class Samples:
    """Milliseconds of one kind of step of one model, one entry a step.

    Attributes:
        whole: The step as a caller sees it, with what the pipeline does around its parts.
        parts: Of the same steps, by name, in the order they run.
    """

    whole: Milliseconds = field(default_factory=list)
    parts: dict[str, Milliseconds] = field(default_factory=dict)

    def typical(self, prefix: str = "") -> float:
        """Sum of the medians of the parts whose names begin so.

        Unlike the median of whole steps it hardly moves when a busy machine makes every step wait
        once, but each time in another part.
        """
        times = [times for name, times in self.parts.items() if name.startswith(prefix)]
        return sum(float(np.median(each)) for each in times)


@dataclass(frozen=True)
class Measured:
    """Steps of one shape: of the model as loaded, and of the frozen model if that is another."""

    tokens: int  # of a step: 1 for decoding, the prompt length for prefill
    past: int  # tokens in the cache before it
    loaded: Samples
    frozen: Samples | None

    @property
    def gate_share(self) -> float:
        """Share of a step that retrieval takes: what the gates take beyond routing alone.

        (gates with the memory - gates frozen) / all parts with the memory, sums of medians. In the
        fused layout, where gates cannot be seen and the frozen model is the same graph over an
        empty memory, the numerator is that of all parts. 0 without a memory.
        """
        if self.frozen is None:
            return 0.0
        kind = "" if FUSED in self.loaded.parts else "gate "
        added = self.loaded.typical(kind) - self.frozen.typical(kind)
        return added / self.loaded.typical()

    @property
    def disturbed(self) -> bool:
        """Whether whole steps took much longer than their parts typically do: a busy machine."""
        return float(np.median(self.loaded.whole)) > DISTURBED * self.loaded.typical()


@dataclass(frozen=True)
class Profile:
    """All that was measured."""

    settings: ProfileSettings
    decode: Measured
    prefill: tuple[Measured, ...]


def measure(
    loaded: TimedSteps,
    frozen: TimedSteps | None,
    settings: ProfileSettings,
    tick: Tick = lambda: None,
) -> Profile:
    """Time decode steps and prefills.

    Args:
        loaded: The model as the user runs it.
        frozen: The same without its memory, or None if it has none.
        settings: What to measure.
        tick: Called after each round of steps.
    """
    pipelines = {"loaded": loaded} | ({"frozen": frozen} if frozen is not None else {})
    decode = _measure(pipelines, 1, settings.context, settings.steps, settings, tick)
    prefill = tuple(
        _measure(pipelines, length, 0, settings.prefills, settings, tick)
        for length in settings.prompts
    )
    return Profile(settings, decode, prefill)


def _measure(
    pipelines: Mapping[str, TimedSteps],
    tokens: int,
    past: int,
    rounds: int,
    settings: ProfileSettings,
    tick: Tick,
) -> Measured:
    random = np.random.default_rng(settings.seed)
    caches = {name: p.new_cache(1, past + tokens) for name, p in pipelines.items()}
    vocab_size = next(iter(pipelines.values())).vocab_size
    if past:
        ids = random.integers(vocab_size, size=(1, past))
        for name, pipeline in pipelines.items():
            pipeline.step(caches[name], ids)
    samples = {name: Samples() for name in pipelines}
    order = list(pipelines)
    for index in range(settings.warmup + rounds):
        ids = random.integers(vocab_size, size=(1, tokens))
        for name in order:
            kept = samples[name] if index >= settings.warmup else Samples()
            _time_step(pipelines[name], caches[name], past, ids, kept)
        order.reverse()  # neither always follows the other
        tick()
    return Measured(tokens, past, samples["loaded"], samples.get("frozen"))


def _time_step(
    pipeline: TimedSteps, cache: Any, past: int, ids: NDArray[np.int64], samples: Samples
) -> None:
    cache.lengths[:] = past
    start = perf_counter_ns()
    parts = pipeline.timed_step(cache, ids)
    samples.whole.append((perf_counter_ns() - start) / 1e6)
    for name, milliseconds in parts.items():
        samples.parts.setdefault(name, []).append(milliseconds)
