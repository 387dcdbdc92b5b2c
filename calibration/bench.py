"""The model with held-out text in front of it, and a count of the tokens that went through."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from knnmoe.runtime.evaluation import score_sequences
from knnmoe.runtime.memory import MemoryPack
from knnmoe.runtime.model import Model
from knnmoe.runtime.texts import TokenSequence

from .confidence import Candidate, Measured
from .controls import Background
from .evidence import Evidence, measure_evidence

# (tokens done, in all)
Progress = Callable[[int, int], None]


class Bench:
    """What memories change in the likelihood of some texts.

    Args:
        model: Its memory is replaced again and again.
        pack: The memory at hand.
        passages: By name; of a `switch` each passage counts as one, whatever its length.
        background: Which of the pack's entries are of background text.
        progress: Called with the tokens done and in all.
        candidates: How many candidates will be measured at most, for the progress.
        domain_runs: How often the domain alone will be scored besides.
    """

    def __init__(
        self,
        model: Model,
        pack: MemoryPack,
        passages: Mapping[str, Sequence[TokenSequence]],
        background: Background,
        progress: Progress | None,
        *,
        candidates: int,
        domain_runs: int,
    ) -> None:
        self._model = model
        self._pack = pack
        self._passages = passages
        self._background = background
        self._progress = progress
        self._done = 0
        read = {name: sum(p.read for p in some) for name, some in passages.items()}
        traced = read["domain"] + read["general"]
        runs = (1 + candidates) * sum(read.values()) + domain_runs * read["domain"]
        self._total = traced + runs
        self._frozen: dict[str, NDArray[np.float64]] = {}

    def evidence(self, neighbors: int) -> dict[str, Evidence]:
        """Of `domain` and `general`, the router left frozen."""
        return {
            name: measure_evidence(
                self._model,
                self._pack,
                [passage.tokens for passage in self._passages[name]],
                neighbors,
                self._advance,
                self._background,
            )
            for name in ("domain", "general")
        }

    def measure(self, grid: Sequence[Candidate]) -> dict[str, Measured]:
        """What each candidate changes, by text."""
        deltas: dict[str, list[NDArray[np.float64]]] = {name: [] for name in self._passages}
        for one in grid:
            for name, change in self._changes(one.applied(self._pack), tuple(deltas)).items():
                deltas[name].append(change)
        return {
            name: Measured(
                deltas=np.array(deltas[name]),
                tokens=self.tokens(name),
                documents=np.array([passage.document for passage in some]),
            )
            for name, some in self._passages.items()
        }

    def change(self, name: str, pack: MemoryPack) -> NDArray[np.float64]:
        """What a pack changes in one text: a token of each sequence, [sequences]."""
        return self._changes(pack, (name,))[name]

    def tokens(self, name: str) -> NDArray[np.int64]:
        """What each passage of a text weighs, [sequences]."""
        some = self._passages[name]
        if name == "switch":
            return np.ones(len(some), np.int64)
        return np.array([passage.targets for passage in some])

    def finish(self) -> None:
        """Say that all is done, also what was not needed after all."""
        self._advance(self._total - self._done)

    def _changes(self, pack: MemoryPack, names: Sequence[str]) -> dict[str, NDArray[np.float64]]:
        for name in names:
            if name not in self._frozen:
                self._model.disable_memory()
                self._frozen[name] = self._nll(name)
        self._model.swap_memory(pack)
        return {name: self._nll(name) - self._frozen[name] for name in names}

    def _nll(self, name: str) -> NDArray[np.float64]:
        """Negative log-likelihood of each passage: a token, or of a switch in all."""
        some = self._passages[name]
        return score_sequences(self._model, some, self._advance).nll / self.tokens(name)

    def _advance(self, tokens: int) -> None:
        self._done += tokens
        if self._progress is not None:
            self._progress(self._done, self._total)
