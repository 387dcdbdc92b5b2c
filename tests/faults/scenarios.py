"""What is interrupted: every command that writes a directory or a file, on something tiny.

A scenario prepares a directory, writes into it, and says what is there: `nothing`, `old` or `new`,
checked as whoever opens it would. Anything else is the fault that is looked for.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from knnmoe.runtime.bundle import Bundle
from knnmoe.runtime.calibration import preset
from knnmoe.runtime.memory import MemoryPack
from knnmoe.runtime.pack_parts import EntryOrigins, GateEntries, ModelIdentity
from knnmoe.runtime.pack_writing import rewrite_settings, write_pack

TARGET = "target"


@dataclass(frozen=True)
class Scenario:
    """One command that writes.

    Attributes:
        prepare: Called once with a directory for what the command needs.
        old: Makes what is at the target before; None if there is nothing.
        write: The command: (prepared directory, target).
        open: Opens a target, raising what its reader would; returns what tells old from new.
        keeps_work: Whether what is finished is kept in `target.partial` for the next run.
    """

    prepare: Callable[[Path], None]
    write: Callable[[Path, Path], object]
    open: Callable[[Path], object]
    old: Callable[[Path, Path], object] | None = None
    keeps_work: bool = False


def _pack(path: Path, *, entries: int, overwrite: bool = False, seed: int = 0) -> MemoryPack:
    identity = ModelIdentity("sha256:" + "0" * 64, "olmoe", 2, 32, 8)
    rng = np.random.default_rng(seed)

    def rows(width: int) -> Any:
        return rng.normal(size=(entries, width)).astype(np.float32)

    gates = {}
    for gate in range(2):
        keys = rows(32)
        gates[gate] = GateEntries(keys, rows(8), rows(8), keys.mean(0))
    numbers = np.arange(entries, dtype=np.int32)
    return write_pack(
        path, model=identity, gates=gates, variant="residual", neighbors=4, similarity="cosine",
        calibration=preset("residual"), origins=EntryOrigins(numbers, numbers, numbers),
        provenance={}, overwrite=overwrite,
    )  # fmt: skip


def _opened_pack(target: Path) -> object:
    pack = MemoryPack.open(target)
    gates = [pack.read(gate) for gate in pack.gates]
    return pack.neighbors, [float(gate.keys.sum()) for gate in gates], pack.provenance


def _recalibrate(_: Path, target: Path) -> None:
    rewrite_settings(MemoryPack.open(target).with_settings(neighbors=2), {"calibration": {}})


def _compress(source: Path, target: Path) -> None:
    from knnmoe.calibration.compress import CompressSettings, compress_pack

    settings = CompressSettings(scan_width=32, scan_bits=8, candidates=8)
    compress_pack(source / "pack", target, settings, overwrite=True)


def _checkpoint(source: Path) -> None:
    from tiny import make_tiny

    make_tiny(source / "checkpoint", num_hidden_layers=1)
    (source / "text.txt").write_text("The spring was late that year, and the river stood high.")


def _export(source: Path, target: Path) -> None:
    from knnmoe.export.exporter import export

    export(source / "checkpoint", target, overwrite=True)


def _old_export(source: Path, target: Path) -> None:
    from knnmoe.export.exporter import export

    export(source / "checkpoint", target, fused=False)


def _opened_bundle(target: Path) -> object:
    bundle = Bundle.open(target)
    return sorted((name, spec.sha256) for name, spec in bundle.manifest.files.items())


def _build(source: Path, target: Path) -> None:
    import torch

    from knnmoe.calibration.build import build_memory
    from knnmoe.calibration.settings import BuildSettings

    torch.set_num_threads(1)
    settings = BuildSettings(max_length=16, batch_tokens=20, gates="0")
    build_memory(
        source / "checkpoint", [source / "text.txt"], target, settings=settings, overwrite=True
    )


def _opened_built(target: Path) -> object:
    pack = MemoryPack.open(target)
    sums = [float(pack.read(gate).residuals.astype(np.float64).sum()) for gate in pack.gates]
    return sums, pack.entries, pack.provenance["nll_after"]


def _with_bundle(source: Path) -> None:
    _checkpoint(source)
    _export(source, source / "bundle")


def _settings(layout: str) -> Any:
    from knnmoe.export.engines.settings import BuildSettings
    from knnmoe.runtime.engines.engine_set import Limits

    limits = Limits(batch=1, context=64, prefill=8, entries=64)
    return BuildSettings("onnxruntime", layout, limits=limits, prefill=False)


def _engines(source: Path, target: Path) -> None:
    from knnmoe.export.engines.build import build

    bundle = Bundle.open(source / "bundle", verify=False)
    build(bundle, _settings("split"), output=target, overwrite=True)


def _old_engines(source: Path, target: Path) -> None:
    from knnmoe.export.engines.build import build

    bundle = Bundle.open(source / "bundle", verify=False)
    build(bundle, _settings("fused"), output=target)


def _opened_engines(target: Path) -> object:
    from knnmoe.runtime.engines.engine_set import EngineSet

    bundle = Bundle.open(target.parent.parent / "source" / "bundle", verify=False)
    return EngineSet.open(target, bundle).key


def _page(_: Path, target: Path) -> None:
    from knnmoe.runtime.reports.page import page, write_html

    write_html(target, page("New", "text " * 3000))


def _opened_page(target: Path) -> object:
    text = target.read_text(encoding="utf-8")
    if not text.endswith("</html>\n") and text != "old":
        raise AssertionError("half a page")
    return len(text)


SCENARIOS: dict[str, Scenario] = {
    "a new pack": Scenario(
        lambda source: None,
        lambda source, target: _pack(target, entries=40, overwrite=True),
        _opened_pack,
    ),
    "a pack over another": Scenario(
        lambda source: None,
        lambda source, target: _pack(target, entries=40, overwrite=True),
        _opened_pack,
        old=lambda source, target: _pack(target, entries=7, seed=1),
    ),
    "the settings of a pack": Scenario(
        lambda source: None,
        _recalibrate,
        _opened_pack,
        old=lambda source, target: _pack(target, entries=7),
    ),
    "a compressed pack over another": Scenario(
        lambda source: _pack(source / "pack", entries=300) and None,
        _compress,
        _opened_pack,
        old=lambda source, target: _pack(target, entries=7),
    ),
    "a page over another": Scenario(
        lambda source: None, _page, _opened_page,
        old=lambda source, target: target.write_text("old"),
    ),
    "a new bundle": Scenario(_checkpoint, _export, _opened_bundle, keeps_work=True),
    "a bundle over another": Scenario(
        _checkpoint, _export, _opened_bundle, old=_old_export, keeps_work=True
    ),
    "a new memory": Scenario(_checkpoint, _build, _opened_built, keeps_work=True),
    "a memory over another": Scenario(
        _checkpoint, _build, lambda target: MemoryPack.open(target).entries,
        old=lambda source, target: _pack(target, entries=7), keeps_work=True,
    ),
    "engines over others": Scenario(
        _with_bundle, _engines, _opened_engines, old=_old_engines,
    ),
}  # fmt: skip
