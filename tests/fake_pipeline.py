"""A pipeline without engines: the next token depends on the last one, by a table."""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray


@dataclass
class FakeCache:
    capacity: int
    lengths: NDArray[np.int64]
    memory: object = None


@dataclass
class FakePipeline:
    """Logits after a token are the row of `table` [V, V] that it names."""

    table: NDArray[np.float32]
    max_positions: int = 64
    steps: list[list[int]] = field(default_factory=list)
    capacities: list[int] = field(default_factory=list)

    @staticmethod
    def saying(token_ids: list[int], *, vocab_size: int, max_positions: int = 64) -> FakePipeline:
        """A pipeline that, greedily, says these tokens after the first of them."""
        table = np.zeros((vocab_size, vocab_size), np.float32)
        for token, following in pairwise(token_ids):
            table[token, following] = 5.0
        return FakePipeline(table, max_positions)

    prefill_chunk = 512
    memory = None

    @property
    def vocab_size(self) -> int:
        return len(self.table)

    def evidence(self, cache: FakeCache) -> NDArray[np.float32]:
        return np.zeros((1, 1, 2), np.float32)

    def rewind(self, cache: FakeCache, length: int, evidence: object) -> None:
        cache.lengths[:] = length

    def new_cache(self, batch: int, capacity: int) -> FakeCache:
        self.capacities.append(capacity)
        return FakeCache(capacity, np.zeros(batch, np.int64))

    def step(self, cache: FakeCache, input_ids: NDArray[np.int64]) -> NDArray[np.float32]:
        cache.lengths += input_ids.shape[1]
        assert cache.lengths.max() <= cache.capacity <= self.max_positions
        self.steps.append(input_ids[0].tolist())
        return self.table[input_ids[:, -1]]

    def next(self, cache: FakeCache, token_id: int) -> NDArray[np.float32]:
        return self.step(cache, np.array([[token_id]]))
