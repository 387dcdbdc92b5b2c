"""What a model needs on a device, before anything is exported: weights, key-value cache, memory."""

from __future__ import annotations

from dataclasses import dataclass

from knnmoe.runtime.bundle import ModelShape

GIB = 1 << 30
# What a system and a runtime take before a model is there; a guess on the safe side.
RESERVED = 2 * GIB
# Memory of the devices that people ask about, shared by processor and GPU (NVIDIA's data sheets).
DEVICES = (
    ("Jetson Orin Nano 8 GB", 8 * GIB),
    ("Jetson Orin NX 16 GB", 16 * GIB),
    ("Jetson AGX Orin 32 GB", 32 * GIB),
    ("Jetson AGX Orin 64 GB", 64 * GIB),
    ("Jetson AGX Thor 128 GB", 128 * GIB),
)


@dataclass(frozen=True)
class Needs:
    """Bytes that a loaded model takes.

    Attributes:
        weights: Of all segments, as the bundle holds them.
        cache: Keys and values of one sequence of the context asked for.
        memory: The memory of all gates.
    """

    weights: int
    cache: int
    memory: int

    @property
    def total(self) -> int:
        """All of them."""
        return self.weights + self.cache + self.memory


@dataclass(frozen=True)
class Fit:
    """Whether it fits a device: what is left of its memory, below zero if it does not."""

    device: str
    memory: int
    left: int

    @property
    def fits(self) -> bool:
        """Whether anything is left."""
        return self.left >= 0


def needs(
    shape: ModelShape,
    weights: int,
    *,
    context: int,
    entries: int,
    cache_bytes: int = 4,
    key_bytes: int = 4,
) -> Needs:
    """What a model of these sizes needs.

    Args:
        shape: Of the model.
        weights: Bytes of its weights.
        context: Tokens of a sequence.
        entries: Of each gate's memory; 0 for none.
        cache_bytes: Of a number in the key-value cache: 4 on the CPU, 2 in fp16 engines.
        key_bytes: Of a number in the memory's keys: 4 on the CPU, 2 or 1 on a CUDA device.
    """
    of_a_token = shape.num_layers * shape.cache_width * cache_bytes
    # Key, value of every expert, and the two scales of the blend node.
    of_an_entry = shape.hidden_size * key_bytes + shape.num_experts * 4 + 2 * 4
    return Needs(weights, context * of_a_token, shape.num_gates * entries * of_an_entry)


def fits(needed: Needs) -> tuple[Fit, ...]:
    """Which devices it fits."""
    return tuple(Fit(name, memory, memory - RESERVED - needed.total) for name, memory in DEVICES)
