"""What the pipeline needs of an engine."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

# A NumPy array, or a CuPy array where the engine runs on a CUDA device.
Array = Any
Run = Callable[[], None]
# Makes an array of zeros of that shape and dtype, where the engine can use it.
Zeros = Callable[[Any, Any], Array]


class Engine(Protocol):
    """A compiled graph that can be bound to fixed buffers and then run again and again."""

    def bind(self, inputs: Mapping[str, Array], outputs: Mapping[str, Array]) -> Run:
        """Bind buffers by name and return what runs the graph over them.

        Every input must be bound; outputs that are not are not returned. The buffers are read and
        written in place at every run, so an output may be another engine's input, and a KV cache
        may be bound as past and present at once.
        """


@dataclass(frozen=True)
class BoundEngine:
    """An engine with the buffers it was bound to, for looking into it."""

    engine: Engine
    inputs: Mapping[str, Array]
    outputs: Mapping[str, Array]
