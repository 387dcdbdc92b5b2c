"""Counts of what a model has done."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass


@dataclass(frozen=True)
class Metrics:
    """What a model has done since it was loaded.

    Attributes:
        texts: Texts begun.
        active: Of these, not yet ended.
        finished: Ended texts by their finish reason; `error` for those that an error ended.
        prompt_tokens: Tokens of their prompts.
        reused_tokens: Of these, not run again because a session's cache held them.
        new_tokens: Tokens generated.
        steps: Steps run, those over prompts included.
        prefill_s: Seconds in steps of more than one token.
        decode_s: Seconds in steps of one token.
        swaps: Memories put in place or taken away.
        added_entries: Entries put into memories while they served.
    """

    texts: int
    active: int
    finished: dict[str, int]
    prompt_tokens: int
    reused_tokens: int
    new_tokens: int
    steps: int
    prefill_s: float
    decode_s: float
    swaps: int
    added_entries: int


class Meter:
    """Counts from several threads; a text reports when it ends, not at each step."""

    def __init__(self) -> None:
        # Reentrant: a stream that nobody reads any more is ended by the garbage collector, on
        # whatever thread, which may be at work in here.
        self._lock = threading.RLock()
        self._sums: Counter[str] = Counter()
        self._finished: Counter[str] = Counter()
        self._seconds = {"prefill": 0.0, "decode": 0.0}

    def read(self) -> Metrics:
        """The counts now; texts that are being written count with what they began with."""
        with self._lock:
            sums = self._sums
            return Metrics(
                texts=sums["texts"],
                active=sums["texts"] - sum(self._finished.values()),
                finished=dict(self._finished),
                prompt_tokens=sums["prompt_tokens"],
                reused_tokens=sums["reused_tokens"],
                new_tokens=sums["new_tokens"],
                steps=sums["steps"],
                prefill_s=self._seconds["prefill"],
                decode_s=self._seconds["decode"],
                swaps=sums["swaps"],
                added_entries=sums["added_entries"],
            )

    def swapped(self) -> None:
        """A memory was put in place or taken away."""
        with self._lock:
            self._sums["swaps"] += 1

    def added(self, entries: int) -> None:
        """Entries were put into the memory."""
        with self._lock:
            self._sums["added_entries"] += entries

    @contextmanager
    def text(self, prompt_tokens: int) -> Iterator[TextCount]:
        """Count a text, from its first step to its end."""
        with self._lock:
            self._sums["texts"] += 1
            self._sums["prompt_tokens"] += prompt_tokens
        count = TextCount()
        try:
            yield count
        except Exception:
            count.ended("error")
            raise
        finally:
            with self._lock:
                self._sums["reused_tokens"] += count.reused_tokens
                self._sums["new_tokens"] += count.new_tokens
                self._sums["steps"] += count.steps
                self._finished[count.reason] += 1
                self._seconds["prefill"] += count.prefill_s
                self._seconds["decode"] += count.decode_s


class TextCount:
    """The counts of one text."""

    def __init__(self) -> None:
        self.reused_tokens = self.new_tokens = self.steps = 0
        self.prefill_s = self.decode_s = 0.0
        self.reason = "cancelled"

    def reused(self, tokens: int) -> None:
        """Tokens of the prompt that were not run again."""
        self.reused_tokens += tokens

    def step(self, tokens: int, seconds: float) -> None:
        """A step was run."""
        self.steps += 1
        if tokens == 1:
            self.decode_s += seconds
        else:
            self.prefill_s += seconds

    def token(self) -> None:
        """A token was chosen."""
        self.new_tokens += 1

    def ended(self, reason: str) -> None:
        """Why the text ended."""
        self.reason = reason
