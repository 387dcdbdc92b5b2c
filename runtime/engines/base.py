"""What the pipeline needs of an engine."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Protocol

from numpy.typing import NDArray

Array = NDArray[Any]
Run = Callable[[], None]


class Engine(Protocol):
    """A compiled graph that can be bound to fixed buffers and then run again and again."""

    def bind(self, inputs: Mapping[str, Array], outputs: Mapping[str, Array]) -> Run:
        """Bind buffers by name and return what runs the graph over them.

        Every input must be bound; outputs that are not are not returned. The buffers are read and
        written in place at every run, so an output may be another engine's input, and a KV cache
        may be bound as past and present at once.
        """
