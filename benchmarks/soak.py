"""Sessions side by side, memories swapped under them for minutes; then every token again, alone.

    .venv/bin/python benchmarks/soak.py --minutes 10 --sessions 24

Threads hold conversations: greedy and seeded, continued and departed from, cancelled, out of time,
left unread, sliding, traced. One thread swaps memories, takes them away, and offers one that is
refused. Each step says which memory routed it (`StepRecord.memory`), so that afterwards every
conversation is run again by one thread on a model of its own, each step under the memory that it
had: all tokens must be the same. A step has one memory, and one put in place before a step began
routes it. Now and then all threads rest between two conversations, and bytes that the allocator
has given out, Python's objects, files, threads and memories that something still holds are
counted: they must not grow. What is resident is told as well: the C library keeps pages that two
dozen threads freed into arenas of their own, and fewer of them with MALLOC_ARENA_MAX=2 in the
environment. A thread without a step for a minute ends the run with all stacks.
"""

from __future__ import annotations

import faulthandler
import gc
import json
import os
import random
import sys
import tempfile
import threading
import time
import weakref
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import IO, Any

import click
import numpy as np
from soak_counts import Sample, growth, open_files
from soak_replay import Replay
from versions import environment

from knnmoe.runtime import Hooks, MemoryPack, Model, StepRecord
from knnmoe.runtime.errors import MemoryPackError

ROOT = Path(__file__).resolve().parents[1]
ALLOWED_GROWTH = 0.05  # of what is in use, over the run
LEAST_GROWTH = 1 << 20  # bytes, and as many objects for a hundred bytes each


class StuckError(Exception):
    """A thread has made no step for too long."""


@dataclass
class Versions:
    """The memories that a model had, in order, and which object stands for each in its steps."""

    model: Model
    memories: Sequence[MemoryPack | None]
    which: list[int] = field(default_factory=list)  # by version: index of its memory
    refused: int = 0
    _numbers: dict[object, int] = field(default_factory=dict)
    _layouts: list[weakref.ref[Any]] = field(default_factory=list)

    def swap(self, which: int) -> None:
        self.model.swap_memory(self.memories[which])
        self._numbers[self.model.pipeline.memory] = len(self.which)
        self._layouts.append(weakref.ref(self.model.pipeline.layout))
        self.which.append(which)

    def offer_wrong(self) -> None:
        """Swap in the memory of another model, which must be refused and change nothing."""
        pack = next(memory for memory in self.memories if memory is not None)
        before = self.model.pipeline.layout
        try:
            self.model.swap_memory(replace(pack, model=replace(pack.model, fingerprint="sha256:0")))
        except MemoryPackError:
            assert self.model.pipeline.layout is before
            self.refused += 1

    @property
    def current(self) -> int:
        """The version that any step has which begins from now on, or a later one."""
        return len(self.which) - 1

    def number(self, memory: object) -> int:
        """The version of a step; it may be put in place and not listed yet."""
        while memory not in self._numbers:
            time.sleep(0.001)
        return self._numbers[memory]

    @property
    def held(self) -> int:
        """Memories that something still holds, the one in place among them."""
        self._layouts = [layout for layout in self._layouts if layout() is not None]
        return len(self._layouts)


class Rest:
    """Lets threads wait between two conversations until all of them do."""

    def __init__(self) -> None:
        self._going = threading.Event()
        self._going.set()
        self._count = 0
        self._lock = threading.Lock()

    @property
    def count(self) -> int:
        """Threads that rest."""
        return self._count

    def here(self) -> None:
        """What a thread calls where it may rest."""
        if self._going.is_set():
            return
        with self._lock:
            self._count += 1
        self._going.wait()
        with self._lock:
            self._count -= 1

    def begin(self) -> None:
        """Have threads rest as soon as they come by."""
        self._going.clear()

    def end(self) -> None:
        """Have them go on."""
        self._going.set()


@dataclass
class Talker:
    """One thread's conversations, each written to `spool` when it has ended."""

    number: int
    versions: Versions
    spool: IO[str]
    writing: threading.Lock
    stop: threading.Event
    rest: Rest
    seed: int
    steps: int = 0  # also the sign of life
    counts: Counter[str] = field(default_factory=Counter)
    problem: BaseException | None = None
    done: bool = False

    def run(self) -> None:
        try:
            draw = random.Random(f"{self.seed} {self.number}")
            while not self.stop.is_set():
                self._converse(draw)
                self.rest.here()
        except BaseException as error:
            self.problem = error
        finally:
            self.done = True

    def _converse(self, draw: random.Random) -> None:
        model = self.versions.model
        capacity = draw.choice((48, 96, 128))
        settings: dict[str, Any] = {"capacity": capacity}
        if draw.random() < 0.3:
            settings |= {"overflow": "slide", "keep": draw.choice((0, 4))}
        traced = draw.random() < 0.15
        made: list[tuple[StepRecord, tuple[int, ...]]] = []

        def on_step(step: StepRecord) -> None:
            self.steps += 1
            made.append((step, own().tokens[step.past : step.past + step.tokens]))

        ignored = (lambda ids, records: None) if traced else None
        session = model.session(hooks=Hooks(on_step=on_step, on_route=ignored), **settings)
        own: Callable[[], Any] = weakref.ref(session)  # without a cycle
        told: dict[str, Any] = {"session": self.number, **settings, "traced": traced, "calls": []}
        text: list[int] = []
        for _ in range(draw.randint(1, 4)):
            cut = draw.randint(0, len(text)) if draw.random() < 0.3 else len(text)
            fresh = draw.randint(1, 16)
            text = [*text[:cut], *(draw.randrange(model.pipeline.vocab_size) for _ in range(fresh))]
            text = text[-(capacity - 1) :]
            made.clear()
            call = self._call(session, text, draw)
            call["steps"] = [
                [step.past, list(ids), self.versions.number(step.memory), floor]
                for (step, ids), floor in zip(made, call.pop("floors"), strict=False)
            ]
            told["calls"].append(call)
            text = [*text, *call["tokens"]]
            if self.stop.is_set():
                break
        with self.writing:
            self.spool.write(json.dumps(told) + "\n")

    def _call(self, session: Any, ids: list[int], draw: random.Random) -> dict[str, Any]:
        """One text of a session, read to its end or not."""
        config: dict[str, Any] = {"max_new_tokens": draw.randint(1, 24), "eos_token_ids": []}
        config |= {"do_sample": draw.random() < 0.5, "seed": draw.randrange(1 << 30)}
        config |= {"temperature": draw.choice((0.7, 1.0)), "top_p": draw.choice((0.9, 1.0))}
        config |= {"repetition_penalty": draw.choice((1.0, 1.2))}
        fate = draw.choices(("read", "cancel", "deadline", "leave"), (85, 5, 5, 5))[0]
        after = draw.randint(0, 6)
        cancelled = threading.Event()
        events = session.stream(
            ids, cancel=_Either(cancelled, self.stop),
            deadline_s=draw.uniform(0, 0.1) if fate == "deadline" else None, **config,
        )  # fmt: skip
        tokens: list[int] = []
        pieces: list[str] = []
        floors: list[int] = []
        reason = None
        while reason is None:
            if len(tokens) == after and fate == "cancel":
                cancelled.set()
            if len(tokens) == after and fate == "leave":
                break  # and `events` with it, unclosed: the collector ends it
            floors.append(self.versions.current)
            event = next(events)
            pieces.append(event.text)
            reason = event.finish_reason
            if event.token_id is not None:
                tokens.append(event.token_id)
        self.counts[reason or "left"] += 1
        self.counts["texts"] += 1
        return {
            "ids": ids, "config": config, "tokens": tokens, "pieces": pieces, "floors": floors,
            "reason": reason,
        }  # fmt: skip


@dataclass(frozen=True)
class _Either:
    one: threading.Event
    other: threading.Event

    def is_set(self) -> bool:
        return self.one.is_set() or self.other.is_set()


@dataclass(frozen=True)
class Report:
    """What a soak found.

    Attributes:
        differing: Steps whose token another one alone was not, described; none if all is well.
        rests: How often all threads rested.
        used: Bytes in use at some twenty of the rests.
        resident: Resident bytes at the same.
        growth: Bytes in use more at the end of the run than at its beginning, by the median slope
            of the settled rests.
        block_growth: The same of Python's blocks.
        arenas: MALLOC_ARENA_MAX.
        files, threads: Open at the beginning and at the end.
        memories: That something still held, at most at rest and at the end.
    """

    seconds: float
    sessions: int
    steps: int
    tokens: int
    texts: dict[str, int]
    swaps: int
    refused_swaps: int
    swapped_texts: int
    conversations: int
    differing: list[str]
    rests: int
    used: list[int]
    resident: list[int]
    growth: int
    allowed_growth: int
    block_growth: int
    allowed_block_growth: int
    arenas: str | None
    files: tuple[int, int]
    threads: tuple[int, int]
    memories: tuple[int, int]

    @property
    def problems(self) -> list[str]:
        found = list(self.differing)
        if self.growth > self.allowed_growth:
            found.append(f"memory in use grew by {self.growth} bytes")
        if self.block_growth > self.allowed_block_growth:
            found.append(f"Python's objects grew by {self.block_growth}")
        for name, (first, last) in (("files", self.files), ("threads", self.threads)):
            if last > first:
                found.append(f"{name}: {first} at the beginning, {last} at the end")
        if max(self.memories) > 1:
            found.append(f"memories held at rest and at the end: {self.memories}")
        return found


def soak(
    bundle: Path,
    memories: Sequence[MemoryPack | None],
    spool: Path,
    *,
    seconds: float,
    sessions: int,
    swap_every: float = 0.3,
    seed: int = 0,
    stuck_after: float = 60.0,
    rest_every: float = 15.0,
    replayers: int = 1,
) -> Report:
    """Run the sessions, then each conversation again.

    Args:
        bundle: What to run.
        memories: What to swap; at least one is a pack. None stands for the frozen router.
        spool: File for the conversations, so that they do not fill the memory that is watched.
        seconds: How long sessions run; running them again takes about as long.
        sessions: Threads.
        swap_every: Seconds between two swaps.
        seed: Of all that is drawn.
        stuck_after: Seconds without a step of a thread that end the run.
        rest_every: Seconds between two rests.
        replayers: Threads that run the conversations again.

    Raises:
        StuckError: If a thread has made no step for so long; all stacks are on standard error.
    """
    started_with = open_files(), threading.active_count()
    model = Model.load(bundle, threads=1)
    versions = Versions(model, memories)
    versions.swap(0)
    stop, rest = threading.Event(), Rest()
    begun = time.monotonic()
    with spool.open("w", encoding="utf-8") as stream:
        writing = threading.Lock()
        talkers = [Talker(n, versions, stream, writing, stop, rest, seed) for n in range(sessions)]
        threads = [threading.Thread(target=one.run, daemon=True) for one in talkers]
        swapping = threading.Thread(
            target=_swap, args=(versions, swap_every, seed, stop, rest), daemon=True
        )
        for thread in (*threads, swapping):
            thread.start()
        try:
            samples = _watch(
                talkers, versions, rest, begun + seconds, rest_every=rest_every,
                stuck_after=stuck_after,
            )  # fmt: skip
        finally:
            stop.set()
            rest.end()
        for thread in (*threads, swapping):
            thread.join(stuck_after)
    _raise_of(talkers)
    lasted = time.monotonic() - begun
    held = versions.held
    model.close()
    counts = sum((talker.counts for talker in talkers), Counter[str]())
    lines = spool.read_text(encoding="utf-8").splitlines()
    replay = Replay(bundle, memories, versions.which)
    with ThreadPoolExecutor(replayers) as pool:
        found = list(pool.map(replay.check, lines))
    few = samples[:: max(1, len(samples) // 20)]
    usual = {name: np.median([getattr(sample, name) for sample in samples] or [0])
             for name in ("used", "blocks")}  # fmt: skip
    return Report(
        seconds=round(lasted, 1),
        sessions=sessions,
        steps=sum(talker.steps for talker in talkers),
        tokens=sum(one.tokens for one in found),
        texts=dict(counts),
        swaps=len(versions.which) - 1,
        refused_swaps=versions.refused,
        swapped_texts=sum(one.swapped for one in found),
        conversations=len(lines),
        differing=[problem for one in found for problem in one.problems],
        rests=len(samples),
        used=[sample.used for sample in few],
        resident=[sample.resident for sample in few],
        growth=growth(samples, "used"),
        allowed_growth=max(int(ALLOWED_GROWTH * usual["used"]), LEAST_GROWTH),
        block_growth=growth(samples, "blocks"),
        allowed_block_growth=max(int(ALLOWED_GROWTH * usual["blocks"]), LEAST_GROWTH // 100),
        arenas=os.environ.get("MALLOC_ARENA_MAX"),
        files=(started_with[0], open_files()),
        threads=(started_with[1], threading.active_count()),
        memories=(max((sample.memories for sample in samples), default=held), held),
    )


def _swap(versions: Versions, every: float, seed: int, stop: threading.Event, rest: Rest) -> None:
    draw = random.Random(f"{seed} swaps")
    due = time.monotonic()
    while not stop.wait(min(0.1, every)):
        rest.here()
        if time.monotonic() < due:
            continue
        due = time.monotonic() + draw.uniform(0.5, 1.5) * every
        if draw.random() < 0.1:
            versions.offer_wrong()
        versions.swap(draw.randrange(len(versions.memories)))


def _watch(
    talkers: Sequence[Talker],
    versions: Versions,
    rest: Rest,
    end: float,
    *,
    rest_every: float,
    stuck_after: float,
) -> list[Sample]:
    """Count what the process holds whenever all rest, and see that every thread goes on."""
    begun = time.monotonic()
    samples: list[Sample] = []
    alive = {talker.number: (0, begun) for talker in talkers}
    next_rest = begun + rest_every
    resting = False
    while (now := time.monotonic()) < end or resting:
        for talker in talkers:
            steps, since = alive[talker.number]
            if talker.problem is not None:
                raise talker.problem
            if talker.steps != steps or resting:
                alive[talker.number] = (talker.steps, now)
            elif now - since > stuck_after:
                _stuck(f"session {talker.number} has made no step for {now - since:.0f} s")
        if not resting and now >= next_rest:
            resting = True
            rest.begin()
        elif resting and rest.count == len(talkers) + 1:
            versions.swap(0)
            gc.collect()
            samples.append(Sample.now(now - begun, versions.held))
            rest.end()
            resting, next_rest = False, now + rest_every
        elif resting and now > next_rest + stuck_after:
            _stuck(f"of {len(talkers) + 1} threads {rest.count} came to rest")
        time.sleep(min(0.1, rest_every / 10))
    return samples


def _stuck(what: str) -> None:
    faulthandler.dump_traceback(all_threads=True)
    raise StuckError(what)


def _raise_of(talkers: Sequence[Talker]) -> None:
    for talker in talkers:
        if talker.problem is not None:
            raise talker.problem
        if not talker.done:
            _stuck(f"session {talker.number} does not end")


def memories_of(pack: MemoryPack) -> list[MemoryPack | None]:
    """A pack, the same used otherwise, and none."""
    return [
        pack,
        None,
        pack.with_settings(neighbors=max(1, pack.neighbors // 2)),
        pack.with_settings(variant="residual"),
    ]


@click.command()
@click.argument("bundle", type=click.Path(path_type=Path), default=ROOT / "build/demo/bundle")
@click.option("--memory", type=click.Path(path_type=Path),
              default=ROOT / "build/demo/memory-scripture", help="Memory pack.")  # fmt: skip
@click.option("--minutes", type=float, default=10.0, show_default=True)
@click.option("--sessions", type=int, default=24, show_default=True)
@click.option("--swap-every", type=float, default=2.0, show_default=True, help="Seconds.")
@click.option("--rest-every", type=float, default=15.0, show_default=True, help="Seconds.")
@click.option("--seed", type=int, default=0, show_default=True)
@click.option("--replayers", type=int, default=2, show_default=True, help="Threads.")
@click.option("--output", type=click.Path(path_type=Path), help="Write the report there as JSON.")
def main(
    bundle: Path,
    memory: Path,
    minutes: float,
    sessions: int,
    swap_every: float,
    rest_every: float,
    seed: int,
    replayers: int,
    output: Path | None,
) -> None:
    """Run sessions side by side, then all of it again alone; exit code 1 if anything differs."""
    faulthandler.enable()
    with tempfile.TemporaryDirectory() as folder:
        report = soak(
            bundle, memories_of(MemoryPack.open(memory)), Path(folder, "conversations.jsonl"),
            seconds=60 * minutes, sessions=sessions, swap_every=swap_every,
            rest_every=rest_every, seed=seed, replayers=replayers,
        )  # fmt: skip
    content = {**asdict(report), "problems": report.problems, "environment": environment()}
    if output is not None:
        output.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    click.echo(json.dumps(content, indent=2))
    sys.exit(1 if report.problems else 0)


if __name__ == "__main__":
    main()
