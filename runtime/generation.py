"""The decode loop: prefill, then one step a token, and where a text ends."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from time import perf_counter
from typing import Any, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from .errors import InputError
from .sampling import GenerationConfig, Sampler
from .tokenizer import TextStream

FinishReason = Literal["eos", "stop", "length"]


class Steps(Protocol):
    """What the loop asks of a pipeline."""

    @property
    def vocab_size(self) -> int:
        """Width V of the logits."""

    @property
    def max_positions(self) -> int:
        """Tokens a sequence can have, prompt and text together."""

    def new_cache(self, batch: int, capacity: int) -> Any:
        """An empty cache."""

    def step(self, cache: Any, input_ids: NDArray[np.int64]) -> NDArray[np.float32]:
        """Advance the cache by ids [B, S] and return the logits [B, V] after the last of each."""


class Decoder(Protocol):
    """What the loop asks of a tokenizer."""

    def stream(self) -> TextStream:
        """A decoder for tokens that arrive one at a time."""


@dataclass(frozen=True, slots=True)
class Event:
    """One generated token.

    Attributes:
        index: 0 for the first new token.
        token_id: The token.
        text: What of the text is now certain: whole characters, and nothing that may yet turn out
            to be a stop string. Often empty; the pieces joined are the text.
        logprob: Natural log of the token's probability in the model's own distribution.
        finish_reason: None until the last event.
    """

    index: int
    token_id: int
    text: str
    logprob: float
    finish_reason: FinishReason | None = None


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
            `max_new_tokens` or the model's context ran out.
        prompt_tokens: Tokens of the prompt.
        timings: How long it took.
    """

    text: str
    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    finish_reason: FinishReason
    prompt_tokens: int
    timings: Timings


def stream(
    pipeline: Steps, tokenizer: Decoder, prompt_ids: Sequence[int], config: GenerationConfig
) -> Iterator[Event]:
    """Generate: one event a token, the last with its finish reason.

    The prompt is checked now; the model runs as events are asked for.

    Raises:
        InputError: If the prompt is empty, fills the context, or has ids outside the vocabulary.
    """
    prompt = check_prompt(prompt_ids, pipeline.vocab_size, pipeline.max_positions)
    budget = min(config.max_new_tokens, pipeline.max_positions - prompt.shape[1])
    return _decode(pipeline, tokenizer.stream(), prompt, config, budget)


def _decode(
    pipeline: Steps,
    text: TextStream,
    prompt: NDArray[np.int64],
    config: GenerationConfig,
    budget: int,
) -> Iterator[Event]:
    cache = pipeline.new_cache(1, prompt.shape[1] + budget)
    sampler = Sampler(config, pipeline.vocab_size, prompt[0].tolist())
    stops = StopStrings(config.stop)
    eos = frozenset(config.eos_token_ids)
    token = np.empty((1, 1), np.int64)
    logits = pipeline.step(cache, prompt)
    for index in range(budget):
        token_id, logprob = sampler.choose(logits[0])
        reason: FinishReason | None = None
        piece = ""
        if token_id in eos:
            reason = "eos"
        else:
            piece = text.push(token_id)
            if index + 1 == budget:
                reason = "length"
        if reason is not None:
            piece += text.finish()
        piece, stopped = stops.push(piece)
        if stopped:
            reason = "stop"
        elif reason is not None:
            piece += stops.finish()
        yield Event(index, token_id, piece, logprob, reason)
        if reason is not None:
            return
        token[0, 0] = token_id
        logits = pipeline.step(cache, token)


def collect(events: Iterable[Event], prompt_tokens: int) -> Completion:
    """Run a stream to its end; the clock starts here."""
    start = first = perf_counter()
    seen: list[Event] = []
    for event in events:
        if not seen:
            first = perf_counter()
        seen.append(event)
    end = perf_counter()
    reason = seen[-1].finish_reason
    assert reason is not None  # every stream ends with one
    return Completion(
        text="".join(event.text for event in seen),
        token_ids=tuple(event.token_id for event in seen),
        logprobs=tuple(event.logprob for event in seen),
        finish_reason=reason,
        prompt_tokens=prompt_tokens,
        timings=Timings(
            first_token_ms=(first - start) * 1e3,
            total_ms=(end - start) * 1e3,
            tokens_per_s=(len(seen) - 1) / (end - first) if len(seen) > 1 else None,
        ),
    )


def check_prompt(
    prompt_ids: Sequence[int], vocab_size: int, max_positions: int
) -> NDArray[np.int64]:
    """The prompt as [1, S] int64, or `InputError` if it cannot be continued."""
    ids = np.asarray(prompt_ids)
    if ids.size == 0:
        raise InputError("prompt", "empty", expected="at least one token")
    if ids.ndim != 1 or ids.dtype.kind not in "iu":
        raise InputError(
            "prompt",
            "not a sequence of token ids",
            expected="whole numbers",
            found=f"{list(ids.shape)} {ids.dtype}",
        )
    if ids.min() < 0 or ids.max() >= vocab_size:
        wrong = ids.min() if ids.min() < 0 else ids.max()
        raise InputError(
            "prompt",
            "token id outside the vocabulary",
            expected=f"0 to {vocab_size - 1}",
            found=int(wrong),
        )
    if len(ids) >= max_positions:
        raise InputError(
            "prompt",
            "too long for this model's context",
            expected=f"at most {max_positions - 1} tokens (context {max_positions}, "
            "one of them for the answer)",
            found=f"{len(ids)} tokens",
            fix=f"Shorten the prompt by {len(ids) - max_positions + 1} tokens or more.",
        )
    return ids.astype(np.int64)[None, :]


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
