"""What a model needs on a device, against a count by hand."""

from __future__ import annotations

from knnmoe.export.fit import GIB, Needs, fits, needs
from knnmoe.runtime.bundle import ModelShape

OLMOE = ModelShape(2048, 50304, 16, 16, 64, 16, 16, 128, 4096)


def test_the_parts_are_what_they_are_counted_to_be() -> None:
    # OLMoE-1B-7B: 2 * 16 layers * 16 heads * 128 numbers a token; 16 gates of 10,000 entries.
    found = needs(OLMOE, 5 * GIB, context=4096, entries=10_000)
    assert found.cache == 4096 * 65_536 * 4 == 1 << 30
    assert found.memory == 16 * 10_000 * (2048 * 4 + 64 * 4 + 8)
    half = needs(OLMOE, 5 * GIB, context=4096, entries=10_000, cache_bytes=2, key_bytes=2)
    assert half.cache == found.cache // 2
    assert half.memory == 16 * 10_000 * (2048 * 2 + 64 * 4 + 8)
    assert needs(OLMOE, 1, context=1, entries=0).memory == 0


def test_devices_that_are_too_small_are_said_to_be() -> None:
    rows = {fit.device: fit for fit in fits(Needs(weights=13 * GIB, cache=GIB, memory=GIB))}
    assert not rows["Jetson Orin NX 16 GB"].fits
    assert rows["Jetson Orin NX 16 GB"].left == -GIB
    assert rows["Jetson AGX Orin 32 GB"].fits
