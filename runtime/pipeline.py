"""A step: segment, gate, segment, gate, …, logits."""

from __future__ import annotations

import threading
import weakref
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from .cache import Cache
from .errors import InputError
from .layouts import BoundStep, GateRecord, Layout, Parts, StepBuffers, StepTimes

Rows = Literal["last", "all"]

PLANS_KEPT = 6  # bound shapes a cache remembers; decoding needs one


@dataclass(frozen=True)
class _Plan:
    """A bound step with its buffers and the layout it was bound for."""

    layout: Layout
    buffers: StepBuffers
    bound: BoundStep


class Pipeline:
    """Runs steps over caches. It has no state but the layout: threads share it, each with a cache.

    Args:
        layout: Engines and gates. Assigning another one (a swapped memory) takes effect at the next
            step of each cache and never inside one. Nothing keeps the old one but steps that run.
    """

    def __init__(self, layout: Layout) -> None:
        self._layout = layout
        self._caches: weakref.WeakSet[Cache] = weakref.WeakSet()
        self._lock = threading.Lock()  # of the set

    @property
    def layout(self) -> Layout:
        """Engines and gates."""
        return self._layout

    @layout.setter
    def layout(self, layout: Layout) -> None:
        old, self._layout = self._layout, layout
        if old is layout:
            return
        with self._lock:
            caches = list(self._caches)
        for cache in caches:  # one that rests would keep the old memory until its next step
            old.release(cache)

    @property
    def vocab_size(self) -> int:
        """Columns of the logits."""
        return self.layout.architecture.vocab_size

    @property
    def max_positions(self) -> int:
        """Tokens a sequence can have."""
        return self.layout.architecture.max_positions

    @property
    def prefill_chunk(self) -> int:
        """Tokens that a pass over one sequence takes at most."""
        return self.layout.prefill_chunk

    @property
    def memory(self) -> object:
        """Which memory routes: another object after each swap."""
        return self.layout.memory

    def new_cache(self, batch: int = 1, capacity: int | None = None) -> Cache:
        """An empty cache for B sequences of up to `capacity` tokens (default: all positions)."""
        size = self.max_positions if capacity is None else capacity
        cache = self.layout.new_cache(batch, size)
        with self._lock:
            self._caches.add(cache)
        return cache

    def step(
        self,
        cache: Cache,
        input_ids: NDArray[np.int64],
        lengths: NDArray[np.int64] | None = None,
        rows: Rows = "last",
    ) -> NDArray[np.float32]:
        """Advance every sequence by its tokens and return logits.

        Args:
            cache: Of B sequences.
            input_ids: [B, S] token ids, padded on the right with any valid id.
            lengths: [B] how many of the S are real; all by default. A sequence that has ended may
                have none in a step of one token.
            rows: `last`: logits [B, V] after each sequence's last real token; `all`: [B·S, V].

        Returns:
            fp32 logits in a buffer that the next step over this cache overwrites.

        Raises:
            InputError: If ids are out of the vocabulary, or a sequence outgrows the cache.
        """
        ids = np.asarray(input_ids, np.int64)
        counts = self._check(cache, ids, lengths)
        layout = self.layout
        if ids.shape[0] == 1 and ids.shape[1] > layout.prefill_chunk:
            return self._chunk_by_chunk(layout, cache, ids, rows)
        if ids.shape[0] > 1 and ids.shape[1] > 1 and cache.lengths.any():
            return self._column_by_column(layout, cache, ids, counts, rows)
        plan = self._fill(layout, cache, ids, counts, rows)
        self._run(plan, cache, counts)
        return plan.buffers.logits

    def next(self, cache: Cache, token_id: int) -> NDArray[np.float32]:
        """`step` of one token over the cache of one sequence: logits [1, V].

        A number costs less than an array of one, and what of a step is no engine's is to be little.

        Args:
            cache: Of one sequence.
            token_id: What to advance it by.

        Raises:
            InputError: As `step`.
        """
        layout, past = self._layout, cache.lengths.item()
        if not (0 <= token_id < layout.architecture.vocab_size and past < cache.capacity):
            self._check(cache, np.array([[token_id]]), None)  # says what is wrong
        plan = self._plan(layout, cache, 1, "last", False)
        buffers = plan.buffers
        buffers.input_ids[0, 0] = token_id
        buffers.lengths[0], buffers.past_lengths[0], buffers.seqlens_k[0] = 1, past, past
        buffers.total_sequence_length[...] = past + 1
        buffers.logit_rows[0] = 0
        plan.bound.run()
        cache.lengths[0] = past + 1
        return buffers.logits

    def evidence(self, cache: Cache) -> NDArray[np.float32]:
        """What the gates know of the sequences so far, [G, B, 2] on the host; a copy."""
        return self.layout.evidence(cache)

    def rewind(self, cache: Cache, length: int, evidence: NDArray[np.float32] | None) -> None:
        """Set every sequence back to its first `length` tokens.

        Args:
            cache: Of sequences that are at least as long.
            length: Tokens that stay.
            evidence: What `evidence` said then; None where nothing was known.
        """
        cache.lengths[:] = length
        if evidence is None:
            self.layout.forget(cache)
        else:
            self.layout.recall(cache, evidence)

    def first_nonfinite(
        self,
        cache: Cache,
        input_ids: NDArray[np.int64],
        lengths: NDArray[np.int64] | None = None,
    ) -> str | None:
        """Run a step part by part: the first part that leaves NaN or infinite numbers, or None.

        The cache is of no use afterwards. Arguments as of `step`.
        """
        ids = np.asarray(input_ids, np.int64)
        counts = np.full(cache.batch, ids.shape[1], np.int64) if lengths is None else lengths
        plan = self._fill(self.layout, cache, ids, counts, "last")
        return plan.bound.first_nonfinite()

    def timed_step(
        self, cache: Cache, input_ids: NDArray[np.int64], rows: Rows = "last"
    ) -> StepTimes:
        """A step that returns the milliseconds of its parts."""
        ids = np.asarray(input_ids, np.int64)
        self._check(cache, ids, None)
        layout = self.layout
        times: list[StepTimes] = []
        for piece, counts in self._pieces(layout, ids):
            plan = self._fill(layout, cache, piece, counts, rows)
            times.append(plan.bound.timed())
            cache.lengths += counts
        return StepTimes.total(times)

    def bound_parts(self, cache: Cache, length: int, rows: Rows = "last") -> Parts:
        """What a step of that many tokens a sequence runs, with what the last such step left.

        For looking into its parts: of a prompt that is taken in pieces, this is a whole piece.
        """
        width = min(length, self.layout.prefill_chunk) if cache.batch == 1 else length
        return self._plan(self.layout, cache, width, rows, traced=False).bound.parts

    def traced_step(
        self, cache: Cache, input_ids: NDArray[np.int64]
    ) -> tuple[NDArray[np.float32], tuple[GateRecord, ...]]:
        """A step that also returns what each gate decided: (logits [B·S, V], one record a gate)."""
        ids = np.asarray(input_ids, np.int64)
        self._check(cache, ids, None)
        layout, logits = self.layout, []
        pieces: list[tuple[GateRecord, ...]] = []
        for piece, counts in self._pieces(layout, ids):
            plan = self._fill(layout, cache, piece, counts, "all", traced=True)
            self._run(plan, cache, counts)
            logits.append(plan.buffers.logits.copy())
            pieces.append(tuple(record.copy() for record in plan.bound.records))
        records = tuple(GateRecord.joined(parts) for parts in zip(*pieces, strict=True))
        return np.concatenate(logits), records

    def _check(
        self, cache: Cache, ids: NDArray[np.int64], lengths: NDArray[np.int64] | None
    ) -> NDArray[np.int64]:
        if ids.ndim != 2 or ids.shape[0] != cache.batch or ids.shape[1] < 1:
            raise InputError(
                "input_ids",
                "wrong shape",
                expected=f"[{cache.batch}, S >= 1]",
                found=list(ids.shape),
            )
        if ids.min() < 0 or ids.max() >= self.vocab_size:
            raise InputError(
                "input_ids",
                "token id outside the vocabulary",
                expected=f"0 to {self.vocab_size - 1}",
                found=f"{ids.min()} to {ids.max()}",
            )
        counts = np.full(cache.batch, ids.shape[1], np.int64)
        if lengths is not None:
            counts = np.asarray(lengths, np.int64)
            least = 0 if ids.shape[1] == 1 else 1
            short = counts.shape != (cache.batch,) or counts.min() < least
            if short or counts.max() != ids.shape[1]:
                raise InputError(
                    "lengths",
                    "out of range",
                    expected=f"[{cache.batch}] from {least} to S, S at least once",
                    found=counts.tolist(),
                )
        longest = int(cache.lengths.max()) + ids.shape[1]
        if longest > cache.capacity:
            raise InputError(
                "input_ids",
                "the sequence outgrows its context",
                expected=f"at most {cache.capacity} tokens",
                found=longest,
                fix="Use a shorter prompt or fewer new tokens.",
            )
        return counts

    def _fill(
        self,
        layout: Layout,
        cache: Cache,
        ids: NDArray[np.int64],
        counts: NDArray[np.int64],
        rows: Rows,
        *,
        traced: bool = False,
    ) -> _Plan:
        plan = self._plan(layout, cache, ids.shape[1], rows, traced)
        buffers = plan.buffers
        buffers.input_ids[...] = ids
        buffers.lengths[...] = counts
        buffers.past_lengths[...] = cache.lengths
        # A sequence without a real token (a padded column) writes beyond its end, where the next
        # real token will overwrite it.
        np.subtract(
            cache.lengths + np.maximum(counts, 1), 1, out=buffers.seqlens_k, casting="same_kind"
        )
        buffers.total_sequence_length[...] = cache.lengths.max() + ids.shape[1]
        if rows == "last":
            starts = np.arange(cache.batch) * ids.shape[1]
            buffers.logit_rows[...] = starts + np.maximum(counts, 1) - 1
        return plan

    def _plan(self, layout: Layout, cache: Cache, length: int, rows: Rows, traced: bool) -> _Plan:
        if cache.memory is not layout.memory:
            # Evidence about another memory says nothing about this one.
            layout.forget(cache)
            cache.memory = layout.memory
        key = (length, rows, traced)
        plans: OrderedDict[Any, _Plan] = cache.plans  # a swap puts others in their place
        plan = plans.get(key)
        if plan is not None and plan.layout is layout:
            plans.move_to_end(key)
            return plan
        if any(kept.layout is not layout for kept in plans.values()):
            plans.clear()
        count = cache.batch if rows == "last" else cache.batch * length
        buffers = layout.new_step(cache.batch, length, count)
        buffers.logit_rows[...] = np.arange(count)
        plan = _Plan(layout, buffers, layout.bind(buffers, cache, traced=traced))
        plans[key] = plan
        while len(plans) > PLANS_KEPT:
            plans.popitem(last=False)
        return plan

    def _chunk_by_chunk(
        self, layout: Layout, cache: Cache, ids: NDArray[np.int64], rows: Rows
    ) -> NDArray[np.float32]:
        """One long sequence takes its tokens in pieces."""
        pieces: list[NDArray[np.float32]] = []
        for piece, counts in self._pieces(layout, ids):
            plan = self._fill(layout, cache, piece, counts, rows)
            self._run(plan, cache, counts)
            pieces.append(plan.buffers.logits.copy() if rows == "all" else plan.buffers.logits)
        return np.concatenate(pieces) if rows == "all" else pieces[-1]

    @staticmethod
    def _pieces(
        layout: Layout, ids: NDArray[np.int64]
    ) -> Iterator[tuple[NDArray[np.int64], NDArray[np.int64]]]:
        """What each pass takes of one sequence (of more, all), and its tokens a sequence, [B]."""
        width = layout.prefill_chunk if len(ids) == 1 else ids.shape[1]
        for start in range(0, ids.shape[1], width):
            piece = ids[:, start : start + width]
            yield piece, np.full(len(ids), piece.shape[1], np.int64)

    def _column_by_column(
        self,
        layout: Layout,
        cache: Cache,
        ids: NDArray[np.int64],
        counts: NDArray[np.int64],
        rows: Rows,
    ) -> NDArray[np.float32]:
        """Several sequences with a past take one token at a time: the attention operator takes no
        longer piece of a batch once there is a past.
        """
        batch, length = ids.shape
        gathered = np.empty((batch, length, self.vocab_size), np.float32)
        for column in range(length):
            real = (counts > column).astype(np.int64)
            plan = self._fill(layout, cache, ids[:, column : column + 1], real, "last")
            self._run(plan, cache, real)
            gathered[:, column] = plan.buffers.logits
        if rows == "all":
            return gathered.reshape(batch * length, -1)
        return gathered[np.arange(batch), counts - 1]

    @staticmethod
    def _run(plan: _Plan, cache: Cache, counts: NDArray[np.int64]) -> None:
        plan.bound.run()
        cache.lengths += counts
