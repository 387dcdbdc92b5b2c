"""A running text: the cache it keeps between calls, and the loop that writes."""

from __future__ import annotations

import threading
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from time import perf_counter
from typing import Any, Literal, Protocol, get_args

import numpy as np
from numpy.typing import NDArray

from .asynchronous import iterate
from .chat import ChatTemplate, Message, Turn, encode_turn
from .errors import BackendError, InputError, SettingError
from .generation import (
    Completion,
    Decoder,
    Event,
    Interruption,
    Stopwatch,
    Writer,
    check_prompt,
    check_tokens,
    collect,
    completion,
    not_finite,
)
from .layouts import GateRecord
from .metrics import Meter, TextCount
from .sampling import GenerationConfig
from .shortage import memory_for
from .watch import Cancel, Watch

Overflow = Literal["refuse", "slide"]
OVERFLOWS: tuple[Overflow, ...] = get_args(Overflow)
SNAPSHOTS_KEPT = 8


class Steps(Protocol):
    """What writing asks of a pipeline."""

    @property
    def vocab_size(self) -> int:
        """Width V of the logits."""

    @property
    def max_positions(self) -> int:
        """Tokens a sequence can have, prompt and text together."""

    @property
    def prefill_chunk(self) -> int:
        """Tokens a pass over one sequence takes at most."""

    @property
    def memory(self) -> object:
        """Which memory routes."""

    def new_cache(self, batch: int, capacity: int) -> Any:
        """An empty cache."""

    def step(self, cache: Any, input_ids: NDArray[np.int64]) -> NDArray[np.float32]:
        """Advance the cache by ids [B, S] and return the logits [B, V] after the last of each."""

    def next(self, cache: Any, token_id: int) -> NDArray[np.float32]:
        """`step` of one token over the cache of one sequence."""

    def traced_step(
        self, cache: Any, input_ids: NDArray[np.int64]
    ) -> tuple[NDArray[np.float32], tuple[GateRecord, ...]]:
        """As `step`, but logits [B·S, V], and what each gate decided."""

    def evidence(self, cache: Any) -> NDArray[np.float32]:
        """What the gates know of the sequences, [G, B, 2]; a copy."""

    def rewind(self, cache: Any, length: int, evidence: NDArray[np.float32] | None) -> None:
        """Set every sequence back to its first tokens and what the gates knew then."""

    def first_nonfinite(self, cache: Any, input_ids: NDArray[np.int64]) -> str | None:
        """Run a step part by part: the first that leaves numbers that are not finite."""


@dataclass(frozen=True)
class StepRecord:
    """One step, as `on_step` is told of it.

    Attributes:
        past: Tokens in the cache before it.
        tokens: Tokens it ran: more than one while a prompt is read.
        milliseconds: How long it took.
        memory: Which memory routed it: the same object from one swap to the next. It holds nothing.
    """

    past: int
    tokens: int
    milliseconds: float
    memory: object = None


@dataclass(frozen=True)
class Hooks:
    """Whom to tell of each step, on the thread that runs it; an exception of theirs ends the text.

    Attributes:
        on_step: Called after each step.
        on_route: Called after each step with its token ids [T] and what every gate decided; such
            steps copy what the gates decided out of the graphs, and compute all logits.
    """

    on_step: Callable[[StepRecord], None] | None = None
    on_route: Callable[[NDArray[np.int64], tuple[GateRecord, ...]], None] | None = None


@dataclass(frozen=True)
class _Snapshot:
    """What the gates knew after the first `length` tokens."""

    length: int
    evidence: NDArray[np.float32]


class Session:
    """One text on a model, continued call by call; make one with `Model.session`.

    Each call gives the whole text so far. What the cache already holds of it is not run again: of a
    conversation only what is new. After a swap of the memory the next call starts anew, so that
    the routing of a text is never that of two memories; a text that is being written goes on.

    Sessions of one model run side by side, each with a cache of its own. A session writes one text
    at a time: a call, of whatever thread, ends the stream of the call before.

    Args:
        pipeline: The model's.
        tokenizer: The model's.
        config: What holds where a call says nothing.
        capacity: Tokens of prompt and text together; None takes all positions of the model.
        overflow: What a text does that outgrows the capacity. `refuse`: a prompt that leaves no
            room is an error, and a text ends with `length`. `slide`: the first `keep` tokens and
            the last half of the capacity are read again, and the rest is forgotten.
        keep: Tokens at the start that sliding keeps: those of a system prompt.
        hooks: Whom to tell of each step.
        template: Renders conversations; None: there are none.
        meter: Counts.
        closing: Ends the text as `cancelled` once it is set.

    Raises:
        SettingError: If an argument is out of its range.
    """

    def __init__(
        self,
        pipeline: Steps,
        tokenizer: Any,
        config: GenerationConfig,
        *,
        capacity: int | None = None,
        overflow: Overflow = "refuse",
        keep: int = 0,
        hooks: Hooks | None = None,
        template: ChatTemplate | None = None,
        meter: Meter | None = None,
        closing: Cancel | None = None,
    ) -> None:
        self.capacity = pipeline.max_positions if capacity is None else capacity
        if not 2 <= self.capacity <= pipeline.max_positions:
            raise SettingError(
                "capacity", "out of range", expected=f"2 to {pipeline.max_positions} tokens",
                found=capacity,
            )  # fmt: skip
        if overflow not in OVERFLOWS:
            raise SettingError("overflow", "unknown", expected=OVERFLOWS, found=overflow)
        most = (self.capacity - 1) // 2
        if not 0 <= keep <= most:
            raise SettingError("keep", "out of range", expected=f"0 to {most} tokens", found=keep)
        self._pipeline, self._tokenizer, self._config = pipeline, tokenizer, config
        self._overflow, self._keep = overflow, keep
        self._hooks = Hooks() if hooks is None else hooks
        self._meter = Meter() if meter is None else meter
        self._closing = closing
        self._template = template
        self._chat: tuple[str, list[int]] | None = None  # text and ids of the last conversation
        self._text: tuple[list[int], list[int]] = ([], [])  # the last prompt, what was written
        self._cache: Any = None
        self._ids: list[int] = []
        self._snapshots: list[_Snapshot] = []
        self._memory: object = None  # that the whole cache was computed with
        # Reentrant: the garbage collector may end an old stream on the thread that holds the lock.
        self._lock = threading.RLock()
        self._call = 0

    @property
    def tokens(self) -> tuple[int, ...]:
        """The tokens that the cache holds; the last one of a text is not among them."""
        return tuple(self._ids)

    def reset(self) -> None:
        """Forget the text; an unfinished stream of this session ends."""
        with self._lock:
            self._call += 1
            self._chat, self._text = None, ([], [])
            self._forget()

    def stream(
        self,
        prompt: str | Sequence[int],
        config: GenerationConfig | None = None,
        *,
        cancel: Cancel | None = None,
        deadline_s: float | None = None,
        **overrides: object,
    ) -> Iterator[Event]:
        """Continue a text: one `Event` a token, the last with its finish reason.

        The prompt is checked now; the model runs as events are asked for. A stream that is left
        before its end costs nothing; the next call of the session ends it.

        Args:
            prompt: The whole text so far, or its token ids.
            config: Instead of the session's own.
            cancel: Looked at before each step; once set, the text ends as `cancelled`.
            deadline_s: Seconds from now after which no step begins: the text ends as `deadline`.
            overrides: Replace fields of the configuration.

        Raises:
            InputError: If the prompt is empty, has ids outside the vocabulary, or leaves no room.
            SettingError: If an option is unknown or out of its range.
        """
        ids = self._prompt(prompt)
        options = (config or self._config).with_overrides(**overrides)
        return self._write(ids, options, Watch.start(cancel, self._closing, deadline_s))

    def generate(
        self, prompt: str | Sequence[int], config: GenerationConfig | None = None, **options: Any
    ) -> Completion:
        """As `stream`, all at once."""
        ids = self._prompt(prompt)
        return collect(self.stream(ids, config, **options), len(ids))

    def chat_prompt(
        self,
        messages: Sequence[Message],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        variables: Mapping[str, Any] | None = None,
    ) -> list[int]:
        """A conversation as the prompt for its next message; for `stream`, `generate`, `astream`.

        Where it is the last conversation of this session with the reply and more, the reply's own
        tokens are taken, so that what the cache holds is not run again.

        Args:
            messages, tools, variables: As in `ChatTemplate.render`.

        Raises:
            InputError: If messages are malformed, or the template refuses them.
            BackendError: If the bundle has no chat template, or jinja2 is not installed.
        """
        if self._template is None:
            raise BackendError("session", "has no chat template", fix="Use `Model.session`.")
        text = self._template.render(messages, tools=tools, variables=variables)
        last = None
        prompt, written = self._text
        if self._chat is not None and self._chat[1] == prompt:
            last = Turn(self._chat[0], tuple(prompt), tuple(written))
        ids = encode_turn(text, last, self._tokenizer)
        self._chat = (text, ids)
        return ids

    def chat(
        self,
        messages: Sequence[Message],
        config: GenerationConfig | None = None,
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        variables: Mapping[str, Any] | None = None,
        **options: Any,
    ) -> Completion:
        """Reply to a conversation; give it again with the reply and more, and only that is run.

        Args:
            messages: `[{"role": "user", "content": "…"}, …]`, whole, as the chat template takes it.
            config, options: As in `generate`.
            tools: JSON schemas of functions.
            variables: Whatever else the template knows, such as `enable_thinking`.

        Raises:
            InputError: If messages are malformed, or the template refuses them, or they are longer
                than the context.
            SettingError: If an option is unknown or out of its range.
            BackendError: If the bundle has no chat template, or jinja2 is not installed.
        """
        ids = self.chat_prompt(messages, tools=tools, variables=variables)
        return self.generate(ids, config, **options)

    async def astream(
        self, prompt: str | Sequence[int], config: GenerationConfig | None = None, **options: Any
    ) -> AsyncIterator[Event]:
        """As `stream`, each step on a thread of its own, so that the event loop goes on.

        Cancelling the task ends the text once the step that runs is done.
        """
        events = self.stream(prompt, config, **options)
        async for event in iterate(events):
            yield event

    async def agenerate(
        self, prompt: str | Sequence[int], config: GenerationConfig | None = None, **options: Any
    ) -> Completion:
        """As `generate`, off the event loop."""
        ids = self._prompt(prompt)
        stopwatch = Stopwatch()
        events = []
        async for event in iterate(self.stream(ids, config, **options)):
            stopwatch.tick()
            events.append(event)
        return completion(events, len(ids), stopwatch.timings())

    def _prompt(self, prompt: str | Sequence[int]) -> list[int]:
        given = self._tokenizer.encode(prompt) if isinstance(prompt, str | bytes) else prompt
        if self._overflow == "slide":
            checked = check_tokens(given, self._pipeline.vocab_size)
        else:
            checked = check_prompt(given, self._pipeline.vocab_size, self.capacity)[0]
        ids: list[int] = checked.tolist()
        return ids

    def _write(self, ids: list[int], config: GenerationConfig, watch: Watch) -> Iterator[Event]:
        decoder: Decoder = self._tokenizer
        budget = config.max_new_tokens
        if self._overflow == "refuse":
            budget = min(budget, self.capacity - len(ids))
        writer = Writer(config, decoder.stream(), self._pipeline.vocab_size, ids, budget)
        reason: str = "cancelled"  # of a stream that nobody reads to its end
        call = self._begin()
        written: list[int] = []
        self._text = (ids, written)
        with self._meter.text(len(ids)) as count, memory_for("writing a text"):
            try:
                pending = self._resume(ids)
                count.reused(len(ids) - len(pending))
                while True:
                    logits = self._run(pending, watch, call, count)
                    if isinstance(logits, str):
                        reason = logits
                        yield writer.interrupted(logits)
                        return
                    event = self._choose(writer, logits, pending)
                    count.token()
                    if event.token_id is not None:
                        written.append(event.token_id)
                    if event.finish_reason is not None:
                        reason = event.finish_reason
                        yield event
                        return
                    yield event
                    assert event.token_id is not None
                    pending = self._room_for(event.token_id)
            finally:
                count.ended(reason)
                self._remember(call)

    def _choose(self, writer: Writer, logits: NDArray[np.float32], ran: list[int]) -> Event:
        try:
            return writer.next(logits)
        except BackendError as error:
            # Rare, so that it may cost a step to say where it began.
            width = self._pipeline.prefill_chunk
            tokens = ran[-(len(ran) % width or width) :]
            with self._lock:
                place = len(self._ids) - len(tokens)
                self._cache.lengths[:] = place
                part = self._pipeline.first_nonfinite(self._cache, np.array([tokens], np.int64))
                self._forget()
            step = f"step over tokens {place} to {place + len(tokens) - 1}"
            raise not_finite(step, part) from error

    def _begin(self) -> int:
        with self._lock:
            self._call += 1
            if self._cache is None:
                self._cache = self._pipeline.new_cache(1, self.capacity)
                self._snapshots = []
            return self._call

    def _resume(self, ids: list[int]) -> list[int]:
        """Set the cache back to what it shares with a text; the tokens still to be run.

        Evidence is known only where a call stopped, so the text is run again from there.
        """
        with self._lock:
            if len(ids) >= self.capacity:
                ids = self._slid(ids)
            memory = self._pipeline.memory  # once: it may be swapped meanwhile
            if self._memory is not memory:
                self._forget()
            common = min(_shared(self._ids, ids), len(ids) - 1)
            known = self._pipeline.evidence(self._cache)
            if not known.any():  # gates that know nothing have nothing to forget
                self._snapshots = [_Snapshot(common, known)]
            while self._snapshots and self._snapshots[-1].length > common:
                self._snapshots.pop()
            last = self._snapshots[-1] if self._snapshots else None
            start = last.length if last else 0
            self._pipeline.rewind(self._cache, start, last.evidence if last else None)
            del self._ids[start:]
            self._memory = memory
            return ids[start:]

    def _run(
        self, pending: list[int], watch: Watch, call: int, count: TextCount
    ) -> NDArray[np.float32] | Interruption:
        """Run tokens chunk by chunk; logits [V] after the last, or why they were not run."""
        width = self._pipeline.prefill_chunk
        reading = len(pending) > 1
        logits: NDArray[np.float32] | None = None
        for start in range(0, len(pending), width):
            reason = watch.reason()
            if reason is not None:
                return reason
            logits = self._step(pending[start : start + width], call, count)
        assert logits is not None
        if reading:
            self._remember(call)
        return logits

    def _step(self, ids: list[int], call: int, count: TextCount) -> NDArray[np.float32]:
        hooks, pipeline = self._hooks, self._pipeline
        with self._lock:
            if call != self._call:
                raise InputError(
                    "session",
                    "went on with another call",
                    fix="Read a stream to its end before the next, or use two sessions.",
                )
            past = len(self._ids)
            start = perf_counter()
            records: tuple[GateRecord, ...] = ()
            if hooks.on_route is not None:
                rows, records = pipeline.traced_step(self._cache, np.array([ids], np.int64))
            elif len(ids) == 1:
                rows = pipeline.next(self._cache, ids[0])
            else:
                rows = pipeline.step(self._cache, np.array([ids], np.int64))
            logits: NDArray[np.float32] = rows[-1]
            seconds = perf_counter() - start
            memory = self._cache.memory
            self._ids.extend(ids)
        count.step(len(ids), seconds)
        if hooks.on_step is not None:
            hooks.on_step(StepRecord(past, len(ids), seconds * 1e3, memory))
        if hooks.on_route is not None:
            hooks.on_route(np.array(ids, np.int64), records)
        return logits

    def _room_for(self, token_id: int) -> list[int]:
        """What to run next: the token, or, where there is no room, what is left of the text."""
        if len(self._ids) < self.capacity:
            return [token_id]
        with self._lock:
            ids = self._slid([*self._ids, token_id])
            self._forget()
            self._memory = self._pipeline.memory
        return ids

    def _slid(self, ids: list[int]) -> list[int]:
        return ids[: self._keep] + ids[len(ids) - self.capacity // 2 :]

    def _forget(self) -> None:
        self._ids, self._snapshots = [], []
        if self._cache is not None:
            self._pipeline.rewind(self._cache, 0, None)

    def _remember(self, call: int) -> None:
        """Keep what the gates know now, so that a later call can go on from here."""
        with self._lock:
            if call != self._call or not self._ids:
                return
            if self._snapshots and self._snapshots[-1].length == len(self._ids):
                return
            evidence = self._pipeline.evidence(self._cache)
            self._snapshots.append(_Snapshot(len(self._ids), evidence))
            del self._snapshots[:-SNAPSHOTS_KEPT]


def _shared(one: Sequence[int], other: Sequence[int]) -> int:
    """Tokens that two texts begin with alike."""
    for index, (a, b) in enumerate(zip(one, other, strict=False)):
        if a != b:
            return index
    return min(len(one), len(other))
