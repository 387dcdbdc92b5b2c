"""Rows that use the memory: as calibrated, as the paper has it, and as controls."""

from __future__ import annotations

from functools import partial

from knnmoe.runtime.calibration import Variant, preset
from knnmoe.runtime.memory import MemoryPack

from .bench import Bench
from .controls import changed_pack, constant, shuffled
from .measured import Measured


def frozen(bench: Bench) -> Measured:
    """The model's own router."""
    return Measured(bench.runtime_nll(None), "runtime", 0)


def calibrated(bench: Bench) -> Measured:
    """The memory with the settings in its pack."""
    return _measured(bench, bench.pack)


def paper(bench: Bench) -> Measured:
    """kNN-MoE as published (v2): logits interpolated with λ the mean similarity."""
    numbers = preset("logits", confidence="mean", weighting="similarity")
    return _measured(bench, bench.pack.with_settings(variant="logits", calibration=numbers))


def variant(bench: Bench, name: Variant) -> Measured:
    """The pack's own settings, but another variant."""
    return _measured(bench, bench.pack.with_settings(variant=name))


def shuffled_values(bench: Bench) -> Measured:
    """The memory as calibrated with its values shuffled among its entries."""
    return _measured(
        bench, changed_pack(bench.pack, bench.scratch / "shuffled", shuffled, "values shuffled")
    )


def constant_value(bench: Bench) -> Measured:
    """The mean residual of all entries, added as strongly as the memory as calibrated is."""
    pack = changed_pack(bench.pack, bench.scratch / "constant", constant, "mean residual")
    return _measured(bench, pack.with_settings(variant="residual"))


def _measured(bench: Bench, pack: MemoryPack) -> Measured:
    return Measured(bench.runtime_nll(pack), "runtime", bench.pack.bytes)


logits = partial(variant, name="logits")
assignment = partial(variant, name="assignment")
residual = partial(variant, name="residual")
