"""A run configuration: how much of one memory a device uses, as a file.

`knnmoe profile --budget-ms` writes it as measured, `Model.load(run_config=…)` follows it.
The format is described in docs/formats.md.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .atomic import write_file
from .compressed import CompressedMemory, Memory
from .errors import SettingError
from .manifest import Fields, read_object
from .memory import MemoryPack
from .pack_files import MANIFEST
from .pack_parts import ModelIdentity
from .stored_values import StoredValues, Values

SCHEMA = "knnmoe.run/1"
WRITE_AGAIN = "Write it again with `knnmoe profile … --budget-ms MS --write-run-config FILE`."
MOST = 1 << 40


@dataclass(frozen=True)
class RunConfig:
    """How much of a memory is used.

    Attributes:
        fingerprint: Of the checkpoint.
        precision: Of the bundle's weights: a bundle of another one has another speed.
        memory: `sha256:…` of the pack's `memory.json`, which states the hashes of all its files.
        entries: A gate uses so many at most, evenly spread over its entries, which lie in the
            order of the reference text: so each document keeps its share.
        gates: Those that use the memory; the others are left to the frozen router.
        expected: What it was chosen by: the budget, the shape of step, what it should take. Nothing
            is computed from it.
    """

    fingerprint: str
    precision: str
    memory: str
    entries: int
    gates: tuple[int, ...]
    expected: Mapping[str, Any] = field(default_factory=dict)

    def write(self, path: str | Path) -> None:
        """Write the file; one that is there is replaced.

        Raises:
            OutputError: If it cannot be written there.
        """
        content = {"schema": SCHEMA, **asdict(self), "gates": list(self.gates)}
        write_file(Path(path), (json.dumps(content, indent=1) + "\n").encode())

    @staticmethod
    def read(path: str | Path) -> RunConfig:
        """Read and check a file.

        Raises:
            SettingError: If it cannot be read, is of another schema, or a field is malformed.
        """
        file = Path(path)
        content = read_object(file, SettingError, WRITE_AGAIN)
        fields = Fields(str(file), content, SettingError, WRITE_AGAIN)
        if (found := content.get("schema")) != SCHEMA:
            raise fields.wrong("schema", "unknown", expected=SCHEMA, found=found)
        fields.only("schema", "fingerprint", "precision", "memory", "entries", "gates", "expected")
        return RunConfig(
            fingerprint=fields.text("fingerprint"),
            precision=fields.text("precision"),
            memory=fields.text("memory"),
            entries=fields.integer("entries", 1, MOST),
            gates=tuple(fields.integers("gates", 0, MOST)),
            expected=fields.object("expected").content,
        )

    def applied(
        self, pack: MemoryPack | None, model: ModelIdentity, precision: str, where: object
    ) -> MemoryPack:
        """The pack as this configuration uses it; nothing on disk changes.

        Raises:
            SettingError: If it was written for another model, precision or pack, or names gates
                that the pack does not use.
        """
        if pack is None:
            raise SettingError(
                where, "says how a memory is used, and there is none",
                fix="Give the memory with --memory PACK, or leave the run configuration out.",
            )  # fmt: skip
        stated = {
            "checkpoint": (self.fingerprint, model.fingerprint),
            "precision of the bundle": (self.precision, precision),
            "memory pack": (self.memory, pack_hash(pack)),
        }
        for name, (expected, found) in stated.items():
            if expected != found:
                raise SettingError(
                    where, f"was written for another {name}", expected=expected, found=found,
                    fix="Measure this one, and write its own run configuration.",
                )  # fmt: skip
        usable = used_gates(pack)
        if not self.gates or not set(self.gates) <= set(usable):
            raise SettingError(
                f"{where}: gates", "not those of the memory", expected=f"some of {list(usable)}",
                found=list(self.gates), fix=WRITE_AGAIN,
            )  # fmt: skip
        unused = {gate.gate for gate in pack.gates} - set(self.gates)
        return replace(pack.with_settings(unused=unused), most_entries=self.entries)


def pack_hash(pack: MemoryPack) -> str:
    """What names a pack, whatever its path: the hash of its manifest."""
    return "sha256:" + hashlib.sha256((pack.path / MANIFEST).read_bytes()).hexdigest()


def used_gates(pack: MemoryPack) -> tuple[int, ...]:
    """The gates that a pack is used in."""
    return tuple(gate.gate for gate in pack.gates if gate.used)


def limited(memory: Memory, most: int | None) -> Memory:
    """A memory with at most so many of its entries, evenly spread; itself if it has no more."""
    if most is None or memory.n_valid <= most:
        return memory
    return taken(memory, np.arange(most) * memory.n_valid // most)


def taken(memory: Memory, rows: NDArray[np.int64]) -> Memory:
    """A memory of some of the entries of another one, in that order."""
    weights = memory.evidence_weights
    kept: dict[str, Any] = {
        "values": _taken(memory.values, rows),
        "n_valid": len(rows),
        "evidence_weights": None if weights is None else weights[rows],
    }
    if isinstance(memory, CompressedMemory):
        return replace(
            memory,
            **kept,
            keys=None if memory.keys is None else memory.keys[rows],
            multipliers=memory.multipliers[rows],
            norms=memory.norms[rows],
            lengths=memory.lengths[rows],
            scan=memory.scan.of(rows),
            parts=tuple(part.of(rows) for part in memory.parts),
        )
    return replace(memory, **kept, keys=memory.keys[rows], key_scales=memory.key_scales[rows])


def _taken(values: Values, rows: NDArray[np.int64]) -> Values:
    if not isinstance(values, StoredValues):
        return values[rows]
    steps, lows = values.steps, values.lows
    return replace(
        values,
        codes=values.codes[rows],
        steps=None if steps is None else steps[rows],
        lows=None if lows is None else lows[rows],
    )
