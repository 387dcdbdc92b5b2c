"""What a set of running sequences keeps between steps: keys and values, evidence, lengths."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .bundle import ModelShape
from .engines.base import Array, Zeros
from .errors import SettingError


@dataclass(eq=False)
class Cache:
    """State of B sequences that run together; one thread at a time may use it.

    Attributes:
        capacity: Tokens a sequence can reach.
        keys, values: By layer, [B, KV heads, capacity, head size] fp32 or fp16, updated in place;
            on the device of the layout. Where attention is latent, there are no values, or they are
            the keys.
        states: [G, B, 2] fp32, the evidence of each gate's sequence gate so far; there as well.
        states_out: The same after a step, before it is taken over.
        lengths: [B] int64 on the host, tokens so far.
        plans: Bound steps by shape, owned by the pipeline.
        memory: Which memory the evidence is about, as `Layout.memory` says it.
    """

    capacity: int
    keys: dict[int, Array]
    values: dict[int, Array]
    states: Array
    states_out: Array
    lengths: NDArray[np.int64]
    plans: OrderedDict[Any, Any] = field(default_factory=OrderedDict)
    memory: object = None

    @staticmethod
    def allocate(
        architecture: ModelShape,
        batch: int,
        capacity: int,
        *,
        zeros: Zeros = np.zeros,
        dtype: type[np.floating[Any]] = np.float32,
    ) -> Cache:
        """An empty cache; its pages are touched only as tokens arrive.

        Args:
            zeros: Makes an array of zeros on the device that the cache is for.
            dtype: Of keys and values.

        Raises:
            SettingError: If the batch is empty or the capacity is beyond the model's positions.
        """
        if batch < 1:
            raise SettingError("batch", "out of range", expected=">= 1", found=batch)
        if not 1 <= capacity <= architecture.max_positions:
            raise SettingError(
                "capacity",
                "out of range",
                expected=f"1 to {architecture.max_positions} tokens, the positions of this model",
                found=capacity,
            )
        shape = (batch, architecture.num_kv_heads, capacity, architecture.head_size)
        layers, shared = range(architecture.num_layers), architecture.latent_size > 0
        return Cache(
            capacity=capacity,
            keys={layer: zeros(shape, dtype) for layer in layers},
            values={layer: zeros(shape, dtype) for layer in layers if not shared},
            states=_rows(architecture.num_gates, batch, zeros),
            states_out=_rows(architecture.num_gates, batch, zeros),
            lengths=np.zeros(batch, np.int64),
        )

    @property
    def batch(self) -> int:
        """Sequences B."""
        return len(self.lengths)

    @property
    def bytes(self) -> int:
        """Memory of the keys and values at full capacity."""
        parts = (self.keys,) if self.values is self.keys else (self.keys, self.values)
        return sum(int(array.nbytes) for part in parts for array in part.values())


def _rows(gates: int, batch: int, zeros: Zeros) -> Array:
    """[G, B, 2] of which each gate's part begins where an engine of a device may read: every 256
    bytes.
    """
    width = -(-2 * batch // 64) * 64
    return zeros((gates, width), np.float32)[:, : 2 * batch].reshape(gates, batch, 2)
