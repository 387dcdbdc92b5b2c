"""Several texts written side by side, one step for all of them."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from time import perf_counter

import numpy as np
from numpy.typing import NDArray

from .cache import Cache
from .errors import BackendError
from .generation import (
    Completion,
    Decoder,
    Event,
    Stopwatch,
    Writer,
    check_prompt,
    completion,
    not_finite,
)
from .metrics import Meter
from .pipeline import Pipeline
from .sampling import GenerationConfig
from .watch import Cancel


def generate_batch(
    pipeline: Pipeline,
    tokenizer: Decoder,
    prompts: Sequence[Sequence[int]],
    config: GenerationConfig,
    meter: Meter,
    closing: Cancel,
) -> list[Completion]:
    """Continue prompts of token ids; each gets the text that it would get alone.

    A step costs what it costs for all, until the last text has ended. Once `closing` is set, those
    that have not end as `cancelled`.

    Raises:
        InputError: If a prompt is empty, too long, or has ids outside the vocabulary.
    """
    positions = pipeline.max_positions
    checked = [check_prompt(prompt, pipeline.vocab_size, positions)[0] for prompt in prompts]
    lengths = np.array([len(ids) for ids in checked], np.int64)
    budgets = np.minimum(config.max_new_tokens, positions - lengths)
    writers = [
        Writer(config, tokenizer.stream(), pipeline.vocab_size, ids.tolist(), int(budget))
        for ids, budget in zip(checked, budgets, strict=True)
    ]
    cache = pipeline.new_cache(len(checked), int((lengths + budgets).max()))
    padded = np.zeros((len(checked), int(lengths.max())), np.int64)
    for row, ids in zip(padded, checked, strict=True):
        row[: len(ids)] = ids
    return _write(pipeline, cache, padded, lengths, writers, meter, closing)


def _write(
    pipeline: Pipeline,
    cache: Cache,
    ids: NDArray[np.int64],
    lengths: NDArray[np.int64],
    writers: list[Writer],
    meter: Meter,
    closing: Cancel,
) -> list[Completion]:
    stopwatches = [Stopwatch() for _ in writers]
    events: list[list[Event]] = [[] for _ in writers]
    running = np.ones(len(writers), np.int64)
    token = np.zeros((len(writers), 1), np.int64)
    with ExitStack() as stack:
        counts = [stack.enter_context(meter.text(int(length))) for length in lengths]
        tokens, real = ids, lengths
        while running.any():
            if closing.is_set():
                for row in np.flatnonzero(running):
                    stopwatches[row].tick()
                    events[row].append(writers[row].interrupted("cancelled"))
                break
            start = perf_counter()
            past = cache.lengths.copy()
            logits = pipeline.step(cache, tokens, real)
            counts[0].step(tokens.shape[1], perf_counter() - start)
            for row in np.flatnonzero(running):
                try:
                    event = writers[row].next(logits[row])
                except BackendError as error:  # rare, so that it may cost a step to say where
                    cache.lengths[:] = past
                    part = pipeline.first_nonfinite(cache, tokens, real)
                    last = past[row] + real[row] - 1
                    step = f"text {row}, step over tokens {past[row]} to {last}"
                    raise not_finite(step, part) from error
                stopwatches[row].tick()
                events[row].append(event)
                counts[row].token()
                assert event.token_id is not None  # of a token that was chosen
                token[row, 0] = event.token_id
                if event.finish_reason is not None:
                    running[row] = 0
                    counts[row].ended(event.finish_reason)
            tokens, real = token, running
    return [
        completion(of_one, int(length), stopwatch.timings())
        for of_one, length, stopwatch in zip(events, lengths, stopwatches, strict=True)
    ]
