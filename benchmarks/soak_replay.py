"""The conversations of a soak once more, each by one thread, every step under the memory it had."""

from __future__ import annotations

import json
import threading
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from knnmoe.runtime import GenerationConfig, MemoryPack, Model
from knnmoe.runtime.generation import Writer
from knnmoe.runtime.layouts import HostLayout
from knnmoe.runtime.pipeline import Pipeline


@dataclass(frozen=True)
class Checked:
    """What running a conversation again found.

    Attributes:
        tokens: That were chosen again.
        swapped: Texts whose steps had more than one memory.
        problems: What differs.
    """

    tokens: int
    swapped: int
    problems: tuple[str, ...]


class Replay:
    """Runs conversations again, on engines of its own.

    Nothing of `Session` is used but what it wrote down: which tokens each step ran behind how many,
    and under which memory.

    Args:
        bundle: What was run.
        memories: What was swapped.
        which: By version, the index of its memory.
    """

    def __init__(
        self, bundle: Path, memories: Sequence[MemoryPack | None], which: Sequence[int]
    ) -> None:
        self._model = Model.load(bundle, threads=1)
        self._which = which
        self._layouts: list[HostLayout] = []
        for memory in memories:
            self._model.swap_memory(memory)
            layout = self._model.pipeline.layout
            assert isinstance(layout, HostLayout)
            self._layouts.append(layout)
        self._versions: dict[int, HostLayout] = {}
        self._lock = threading.Lock()

    def layout(self, version: int) -> HostLayout:
        """The layout of a version: each forgets what gates knew of another."""
        with self._lock:
            if version not in self._versions:
                layout = self._layouts[self._which[version]]
                self._versions[version] = replace(layout, memory=object())
            return self._versions[version]

    def check(self, line: str) -> Checked:
        """Run a conversation, as it was spooled, again."""
        told = json.loads(line)
        voice = _Voice(self, told["capacity"], told["traced"])
        tokens = swapped = 0
        problems: list[str] = []
        for call in told["calls"]:
            where = f"session {told['session']}, prompt {call['ids'][:4]}…"
            found = self._check_call(voice, call, told, where)
            problems += found
            tokens += len(call["tokens"])
            swapped += len({version for _, _, version, _ in call["steps"]}) > 1
        return Checked(tokens, swapped, tuple(problems))

    def _check_call(
        self, voice: _Voice, call: dict[str, Any], told: dict[str, Any], where: str
    ) -> list[str]:
        config, ids = GenerationConfig(**call["config"]), call["ids"]
        budget = config.max_new_tokens
        if told.get("overflow") != "slide":
            budget = min(budget, told["capacity"] - len(ids))
        stream = self._model.tokenizer.stream()
        writer = Writer(config, stream, self._model.pipeline.vocab_size, ids, budget)
        if len(call["steps"]) != len(call["tokens"]):
            return [f"{where}: {len(call['steps'])} steps for {len(call['tokens'])} tokens"]
        problems = []
        for index, (past, fed, version, floor) in enumerate(call["steps"]):
            if version < max(floor, voice.version):
                problems.append(f"{where}: step {index} has memory {version}, {floor} was in place")
            event = writer.next(voice.step(past, fed, version))
            if (event.token_id, event.text) != (call["tokens"][index], call["pieces"][index]):
                problems.append(
                    f"{where}: token {index} is {call['tokens'][index]}, alone {event.token_id}"
                )
        return problems


class _Voice:
    """One cache, advanced and set back as a session's was."""

    def __init__(self, replay: Replay, capacity: int, traced: bool) -> None:
        self._replay, self._traced = replay, traced
        self._pipeline = Pipeline(replay.layout(0))
        self._cache = self._pipeline.new_cache(1, capacity)
        self._known: dict[int, NDArray[np.float32]] = {}
        self.version = 0

    def step(self, past: int, ids: list[int], version: int) -> NDArray[np.float32]:
        """Logits [V] after these ids behind the first `past` tokens."""
        pipeline, cache, self.version = self._pipeline, self._cache, version
        pipeline.layout = self._replay.layout(version)
        self._known = {length: each for length, each in self._known.items() if length <= past}
        if int(cache.lengths[0]) != past:
            pipeline.rewind(cache, past, self._known.get(past))
        tokens = np.array([ids], np.int64)
        run = (lambda: pipeline.traced_step(cache, tokens)[0]) if self._traced else None
        logits: NDArray[np.float32] = (run() if run else pipeline.step(cache, tokens))[-1]
        self._known[past + len(ids)] = pipeline.evidence(cache)
        return logits
