"""What a generated text is made of, token by token, and where it ends."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from time import perf_counter
from typing import Any, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from .errors import BackendError, InputError
from .sampling import GenerationConfig, Sampler, likeliest_tokens
from .text_stream import TextStream

FinishReason = Literal["eos", "stop", "length", "cancelled", "deadline"]
Interruption = Literal["cancelled", "deadline"]


class Decoder(Protocol):
    """What the loop asks of a tokenizer."""

    def stream(self) -> TextStream:
        """A decoder for tokens that arrive one at a time."""


@dataclass(frozen=True, slots=True)
class Event:
    """One generated token.

    A text that is interrupted (cancelled, out of time) ends with an event without a token, which
    carries what of the text was held back.

    Attributes:
        index: 0 for the first new token.
        token_id: The token; None where the text was interrupted.
        text: What of the text is now certain: whole characters, and nothing that may yet turn out
            to be a stop string. Often empty; the pieces joined are the text.
        logprob: Natural log of the token's probability in the model's own distribution, before
            temperature and all else; NaN without a token.
        finish_reason: None until the last event.
        alternatives: The likeliest tokens with their log-probabilities, as many as
            `GenerationConfig.top_logprobs` asks for, the likeliest first.
    """

    index: int
    token_id: int | None
    text: str
    logprob: float
    finish_reason: FinishReason | None = None
    alternatives: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True)
class Timings:
    """How long it took: the first token (prefill included) and all, ms; tokens a second after it.

    `tokens_per_s` is None for a single token.
    """

    first_token_ms: float
    total_ms: float
    tokens_per_s: float | None


@dataclass(frozen=True)
class Completion:
    """A generated text.

    Attributes:
        text: Without special tokens, up to the stop string.
        token_ids: All tokens generated, also the one that ended the text.
        logprobs: One a token.
        finish_reason: `eos`: the model ended the text; `stop`: a stop string did; `length`:
            `max_new_tokens` or the model's context ran out; `cancelled`, `deadline`: it was
            interrupted, perhaps before the first token.
        prompt_tokens: Tokens of the prompt.
        timings: How long it took.
        alternatives: By token, see `Event.alternatives`.
    """

    text: str
    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    finish_reason: FinishReason
    prompt_tokens: int
    timings: Timings
    alternatives: tuple[tuple[tuple[int, float], ...], ...] = ()


class Writer:
    """Turns the logits of one sequence into its events.

    Args:
        config: How tokens are chosen and when to stop.
        text: Decodes the tokens.
        vocab_size: Width V of the logits.
        prompt_ids: What the repetition penalty counts as said.
        budget: Tokens at most.
    """

    def __init__(
        self,
        config: GenerationConfig,
        text: TextStream,
        vocab_size: int,
        prompt_ids: Sequence[int],
        budget: int,
    ) -> None:
        self._sampler = Sampler(config, vocab_size, prompt_ids)
        self._stops = StopStrings(config.stop)
        self._eos = frozenset(config.eos_token_ids)
        self._alternatives = config.top_logprobs
        self._text = text
        self._budget = budget
        self._index = 0

    def next(self, logits: NDArray[np.float32]) -> Event:
        """Choose a token by its logits [V] fp32.

        Raises:
            BackendError: If the logits are not numbers.
        """
        token_id, logprob = self._sampler.choose(logits)
        reason: FinishReason | None = None
        piece = ""
        if token_id in self._eos:
            reason = "eos"
        else:
            piece = self._text.push(token_id)
            if self._index + 1 == self._budget:
                reason = "length"
        if reason is not None:
            piece += self._text.finish()
        piece, stopped = self._stops.push(piece)
        if stopped:
            reason = "stop"
        elif reason is not None:
            piece += self._stops.finish()
        likeliest = likeliest_tokens(logits, self._alternatives) if self._alternatives else ()
        event = Event(self._index, token_id, piece, logprob, reason, likeliest)
        self._index += 1
        return event

    def interrupted(self, reason: Interruption) -> Event:
        """The last event of a text that is given up."""
        piece, stopped = self._stops.push(self._text.finish())
        if not stopped:
            piece += self._stops.finish()
        return Event(self._index, None, piece, float("nan"), reason)


def collect(events: Iterable[Event], prompt_tokens: int) -> Completion:
    """Run a stream to its end; the clock starts here."""
    watch = Stopwatch()
    seen: list[Event] = []
    for event in events:
        watch.tick()
        seen.append(event)
    return completion(seen, prompt_tokens, watch.timings())


class Stopwatch:
    """Times a text: starts when it is made, ticks at each event."""

    def __init__(self) -> None:
        self._start = self._first = self._last = perf_counter()
        self._ticks = 0

    def tick(self) -> None:
        """An event came."""
        self._last = perf_counter()
        if not self._ticks:
            self._first = self._last
        self._ticks += 1

    def timings(self) -> Timings:
        """Of what came so far."""
        after = self._last - self._first
        return Timings(
            first_token_ms=(self._first - self._start) * 1e3,
            total_ms=(self._last - self._start) * 1e3,
            tokens_per_s=(self._ticks - 1) / after if self._ticks > 1 else None,
        )


def completion(events: Sequence[Event], prompt_tokens: int, timings: Timings) -> Completion:
    """All events of a text as one."""
    reason = events[-1].finish_reason
    assert reason is not None  # every text ends with one
    tokens = [event for event in events if event.token_id is not None]
    return Completion(
        text="".join(event.text for event in events),
        token_ids=tuple(event.token_id for event in tokens if event.token_id is not None),
        logprobs=tuple(event.logprob for event in tokens),
        finish_reason=reason,
        prompt_tokens=prompt_tokens,
        timings=timings,
        alternatives=tuple(event.alternatives for event in tokens),
    )


def check_prompt(
    prompt_ids: Sequence[int], vocab_size: int, max_positions: int
) -> NDArray[np.int64]:
    """The prompt as [1, S] int64, or `InputError` if it cannot be continued."""
    ids = check_tokens(prompt_ids, vocab_size)
    if len(ids) >= max_positions:
        raise InputError(
            "prompt",
            "too long for this model's context",
            expected=f"at most {max_positions - 1} tokens (context {max_positions}, "
            "one of them for the answer)",
            found=f"{len(ids)} tokens",
            fix=f"Shorten the prompt by {len(ids) - max_positions + 1} tokens or more.",
        )
    return ids[None, :]


def check_tokens(
    token_ids: Sequence[int] | NDArray[Any], vocab_size: int, *, where: str = "prompt"
) -> NDArray[np.int64]:
    """Token ids as [S] int64, or `InputError` if they are none of this vocabulary."""
    try:
        ids = np.asarray(token_ids)
    except ValueError:  # sequences of several lengths
        ids = np.empty((), object)
    if ids.size == 0:
        raise InputError(where, "empty", expected="at least one token")
    if ids.ndim != 1 or ids.dtype.kind not in "iu":
        raise InputError(
            where,
            "not a sequence of token ids",
            expected="text, or a sequence of whole numbers",
            found=repr(token_ids)[:60],
        )
    if ids.min() < 0 or ids.max() >= vocab_size:
        wrong = ids.min() if ids.min() < 0 else ids.max()
        raise InputError(
            where,
            "token id outside the vocabulary",
            expected=f"0 to {vocab_size - 1}",
            found=int(wrong),
        )
    return ids.astype(np.int64)


def not_finite(step: str, part: str | None) -> BackendError:
    """The error of a step whose logits are not numbers.

    Args:
        step: Which one.
        part: The first segment or gate that left such numbers; None if only the logits are.
    """
    return BackendError(
        f"{step}: {part or 'logits'}",
        "leaves numbers that are not finite",
        expected="finite numbers",
        fix="Check the bundle with `knnmoe-export --verify`, and the memory with "
        "`knnmoe memory inspect`.",
    )


class StopStrings:
    """Finds the first stop string that a text completes, however the text is cut into pieces.

    Text that may be the start of a stop string is held back until it is known.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(stops)
        self._held = ""

    def push(self, piece: str) -> tuple[str, bool]:
        """Take a piece; return the text that is now certain and whether a stop string ended it."""
        if not self._stops:
            return piece, False
        text = self._held + piece
        found = [(at + len(stop), at) for stop in self._stops if (at := text.find(stop)) >= 0]
        if found:  # the one complete first; of several, the one that began first
            self._held = ""
            return text[: min(found)[1]], True
        held = max(_overlap(text, stop) for stop in self._stops)
        self._held = text[len(text) - held :]
        return text[: len(text) - held], False

    def finish(self) -> str:
        """What is held back: no stop string came of it."""
        held, self._held = self._held, ""
        return held


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that is the beginning of `stop`, not all of it."""
    for length in range(min(len(stop) - 1, len(text)), 0, -1):
        if text.endswith(stop[:length]):
            return length
    return 0
