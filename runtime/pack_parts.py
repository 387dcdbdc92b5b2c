"""What a memory pack is made of: the model it belongs to, its gates, entries and their origins."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .calibration import Calibration
from .compressed_files import KeyKind, ScanStatement, ValuesStatement
from .pack_files import PackFile

Array = NDArray[Any]


@dataclass(frozen=True)
class ModelIdentity:
    """Which model a memory belongs to; a bundle and a checkpoint of it agree on every field."""

    fingerprint: str
    model_type: str
    num_gates: int
    hidden_size: int
    num_experts: int


@dataclass(frozen=True)
class GateEntries:
    """What building found for one gate.

    Attributes:
        keys: Router inputs [N, D], fp16 or fp32.
        router_logits: The frozen router's logits [N, E], same dtype.
        residuals: Learned minus router logits [N, E], same dtype.
        center: Mean of the keys [D], fp32.
    """

    keys: Array
    router_logits: Array
    residuals: Array
    center: NDArray[np.float32]


@dataclass(frozen=True)
class EntryOrigins:
    """Where each entry came from, [N] int32 each: token id, document, position in it.

    Attributes:
        token_ids: Token ids.
        documents: Documents; those of background text count down from -1.
        positions: Positions in them.
        merged: Of gates in which near-identical entries became one: the row above of each entry's
            first member, [N'] int32.
        counts: Of these gates, of how many entries each is the mean, [N'] int32.
    """

    token_ids: NDArray[np.int32]
    documents: NDArray[np.int32]
    positions: NDArray[np.int32]
    merged: Mapping[int, NDArray[np.int32]] = field(default_factory=dict)
    counts: Mapping[int, NDArray[np.int32]] = field(default_factory=dict)

    def documents_of(self, gate: int) -> NDArray[np.int32]:
        """The document of each entry of a gate."""
        rows = self.merged.get(gate)
        return self.documents if rows is None else self.documents[rows]


@dataclass(frozen=True)
class StoredTensors:
    """A file of a pack that is finished already, elsewhere on the disk.

    Attributes:
        path: The file; it stays where it is.
        rows: Its entries.
    """

    path: Path
    rows: int


@dataclass(frozen=True)
class PackGate:
    """One covered gate: its file, how many entries it has, how its similarity is used.

    `scan`, `keys` and `values` say what compressing added and changed, `key_widths` how many
    directions of graded keys are in 8 and in 4 bits.
    A gate that is not `used` is left to the frozen router; its file stays.
    """

    gate: int
    stored: PackFile
    entries: int
    calibration: Calibration
    scan: ScanStatement | None = None
    keys: KeyKind = "full"
    key_widths: tuple[int, ...] = ()
    values: ValuesStatement | None = None
    used: bool = True
