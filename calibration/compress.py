"""Compressing a memory pack: projected keys to scan, smaller keys to score with, smaller values.

Per gate the keys are projected to their W principal directions (runtime/projection.py) and stored
in 4 or 8 bits beside the full keys: in as few bytes as find the neighbours. For that a part
of the memory's own keys is held back, searched for among the others exactly and through the
projection, and the share of the K nearest that are among the R candidates is the recall. It is
measured as the gate runs it, rounding included, on a projection that has not seen the keys held
back. Where no full keys are kept, products with the projected ones are a little too small,
because the query's part outside of the projection meets nothing: one number a gate, found on the
same keys held back, makes the similarity of neighbours come out as large as it was on average.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from knnmoe.runtime.atomic import check_copy, new_directory
from knnmoe.runtime.blend import unit_rows
from knnmoe.runtime.calibration import Variant
from knnmoe.runtime.compressed_files import (
    KEY_KINDS,
    KEY_LENGTHS,
    PARTS,
    ScanStatement,
    ValuesOf,
    ValuesStatement,
    centred_lengths,
    projection_tensors,
    width_is_possible,
    widths_are_possible,
)
from knnmoe.runtime.errors import MemoryPackError, SettingError
from knnmoe.runtime.memory import MemoryPack
from knnmoe.runtime.pack_files import write_manifest, write_tensors
from knnmoe.runtime.pack_manifest import KIND
from knnmoe.runtime.pack_parts import EntryOrigins, GateEntries, PackGate
from knnmoe.runtime.pack_writing import write_origins
from knnmoe.runtime.projection import (
    SCAN_BITS,
    WIDTH_STEP,
    ProjectedKeys,
)
from knnmoe.runtime.stored_values import LARGEST, store_values, value_types
from knnmoe.runtime.two_stage import MAX_CANDIDATES, check_candidates

from .recall import (
    KEYS,
    RESTORED,
    Exact,
    Floats,
    Keys,
    Widths,
    graded_parts,
    measure_recall,
    measure_search,
    principal,
    project_keys,
    turned,
)

StoredAs = Literal["as-stored", "fp16", "int8", "int4"]
VALUES: tuple[StoredAs, ...] = get_args(StoredAs)
FEWEST = 256  # entries that a recall can be measured on
_HELD_BACK = 512  # at most
_FITTED = 16_384  # keys that directions are found from, at most
_AT_ONCE = 1 << 22  # elements
_VALUES_OF: Mapping[Variant, ValuesOf] = {
    "residual": "residuals", "logits": "learned", "assignment": "learned",
}  # fmt: skip


@dataclass(frozen=True)
class CompressSettings:
    """How a memory is compressed.

    Attributes:
        scan_width: W, or None for the smallest that has the recall.
        scan_bits: Of a projected key's elements, 4 or 8; None for what makes it smallest.
        candidates: R, scored again with the full keys.
        recall: What must be reached where width or bits are chosen.
        keys: Dtype of the full keys; `projected` keeps none, and scores by what is scanned;
            `graded` keeps a projection of its own.
        key_widths: Of graded keys: how many of the widest directions are kept in 8 bits, and how
            many others in 4; None for a quarter of them and the rest.
        values: Dtype of the values; unless it is `as-stored`, only those of the pack's variant are
            kept, and not router logits and residuals.
        seed: Of the keys held back and of the turn of the directions.

    Raises:
        SettingError: If a field is out of its range.
    """

    scan_width: int | None = None
    scan_bits: int | None = None
    candidates: int = 32
    recall: float = 0.999
    keys: Keys = "as-stored"
    values: StoredAs = "as-stored"
    seed: int = 0
    key_widths: Widths | None = None

    def __post_init__(self) -> None:
        width = self.scan_width
        if width is not None and (width <= 0 or width % WIDTH_STEP):
            raise SettingError(
                "scan width", "out of range", expected=f"a multiple of {WIDTH_STEP}, or auto",
                found=width,
            )  # fmt: skip
        if self.scan_bits is not None and self.scan_bits not in SCAN_BITS:
            raise SettingError("scan bits", "unknown", expected=SCAN_BITS, found=self.scan_bits)
        check_candidates(self.candidates, 1)
        if not 0 < self.recall <= 1:
            raise SettingError(
                "recall", "out of range", expected="above 0, at most 1", found=self.recall
            )
        if self.keys not in KEYS:
            raise SettingError("keys", "unknown", expected=KEYS, found=self.keys)
        if self.key_widths is not None and self.keys != "graded":
            raise SettingError(
                "key widths", "are of graded keys alone", expected="keys graded", found=self.keys
            )
        if self.values not in VALUES:
            raise SettingError("values", "unknown", expected=VALUES, found=self.values)


@dataclass(frozen=True)
class CompressedGate:
    """What became of one gate.

    Attributes:
        gate: Its number.
        entries: N.
        width: W.
        bits: Of a projected key's elements.
        recall: Of the keys held back; see `CompressSettings.recall`.
        kept: Share of their K nearest that are also the K nearest by the keys that are kept, among
            the R candidates: what a search returns.
        held_back: How many these were.
        scanned_bytes: What a search reads of projected keys.
        bytes_before, bytes_after: Size of the gate's file.
    """

    gate: int
    entries: int
    width: int
    bits: int
    recall: float
    kept: float
    held_back: int
    scanned_bytes: int
    bytes_before: int
    bytes_after: int


@dataclass(frozen=True)
class CompressReport:
    """The pack that was written and what became of its gates."""

    pack: MemoryPack
    gates: tuple[CompressedGate, ...]
    settings: CompressSettings

    def to_json(self) -> dict[str, Any]:
        """All of it as one JSON object."""
        return {
            "pack": str(self.pack.path),
            "bytes": self.pack.bytes,
            "settings": asdict(self.settings),
            "gates": [asdict(gate) for gate in self.gates],
        }


@dataclass(frozen=True)
class Kept:
    """A gate's entries where they are not those of the pack any more.

    Attributes:
        entries: N' of them.
        rows: [N'] which entry of the gate each is, or the first that it was merged of.
        counts: [N'] of how many entries each was made.
    """

    entries: GateEntries
    rows: NDArray[np.int64]
    counts: NDArray[np.int64]


def compress_pack(
    path: str | Path | MemoryPack,
    target: str | Path,
    settings: CompressSettings = CompressSettings(),
    *,
    gates: Collection[int] | None = None,
    reduced: Callable[[PackGate, GateEntries], Kept] | None = None,
    about: Mapping[str, Any] | None = None,
    overwrite: bool = False,
) -> CompressReport:
    """Write a compressed copy of a pack.

    Args:
        path: The pack.
        target: The directory to write.
        settings: How.
        gates: Those to write; None writes all. The others are left to the frozen router.
        reduced: What is left of a gate's entries; None leaves all.
        about: Said of the compression in the provenance beside the settings.
        overwrite: Replace what is there.

    Raises:
        MemoryPackError: If the pack is damaged, was changed since it was opened, is compressed
            already, or too small to measure on; or if no width has the recall that is asked for.
        SettingError: If a setting does not fit the memory.
        OutputError: If the directory cannot be written.
    """
    pack = path if isinstance(path, MemoryPack) else MemoryPack.open(path)
    check_copy(pack.path, Path(target), overwrite=overwrite)
    check_candidates(settings.candidates, pack.neighbors)
    check_compressible(pack, settings.scan_width or WIDTH_STEP, settings.values)
    if settings.keys == "graded":
        settings = replace(settings, key_widths=_widths(settings, pack.model.hidden_size))
    pack.check_unchanged()
    written = [gate for gate in pack.gates if gates is None or gate.gate in gates]
    manifest = dict(KIND.read(pack.path).content)
    stated = {entry["gate"]: dict(entry) for entry in manifest["gates"]}
    done, kept = [], {}
    with new_directory(Path(target), overwrite=overwrite) as folder:
        for gate in written:
            entries = pack.read(gate)
            if reduced is not None:
                left = reduced(gate, entries)
                entries, kept[gate.gate] = left.entries, (left.rows, left.counts)
            found, tensors, scan, values = _compress_gate(pack, gate, entries, settings)
            stored = write_tensors(folder, gate.stored.file, tensors)
            stated[gate.gate] |= {
                **asdict(stored), "entries": len(entries.keys),
                "calibration": gate.calibration.to_json(), "used": gate.used,
                "scan": asdict(scan),
            }  # fmt: skip
            if settings.keys in KEY_KINDS:
                stated[gate.gate]["keys"] = settings.keys
            if settings.key_widths is not None:
                stated[gate.gate]["key_widths"] = list(settings.key_widths)
            if values is not None:
                stated[gate.gate]["values"] = asdict(values)
            done.append({**found, "bytes_after": stored.size})
        if pack.origins is not None:
            manifest["entries"] = _origins(pack, folder, written, kept)
        manifest["gates"] = [stated[gate.gate] for gate in written]
        manifest |= {
            "variant": pack.variant, "neighbors": pack.neighbors, "similarity": pack.similarity,
        }  # fmt: skip
        compressed = {**asdict(settings), **(about or {})}
        manifest["provenance"] = {**manifest["provenance"], "compressed": compressed}
        pack.check_unchanged()
        write_manifest(folder, manifest)
    return CompressReport(
        MemoryPack.open(target), tuple(CompressedGate(**each) for each in done), settings
    )


def _origins(
    pack: MemoryPack,
    folder: Path,
    gates: Sequence[PackGate],
    kept: Mapping[int, tuple[NDArray[np.int64], NDArray[np.int64]]],
) -> Any:
    """Where the entries of the gates came from, for the pack that is written.

    `kept`: rows and counts of those that have not all of their entries any more.
    """
    origins = pack.read_origins()
    assert origins is not None
    assert pack.origins is not None
    if not kept and len(gates) == len(pack.gates):
        shutil.copyfile(pack.path / pack.origins.file, folder / pack.origins.file)
        return KIND.read(pack.path).content["entries"]
    written = {gate.gate for gate in gates}
    rows = {gate: found for gate, found in origins.merged.items() if gate in written}
    counts = {gate: origins.counts[gate] for gate in rows}
    for gate, (left, made_of) in kept.items():
        if len(left) == pack.origin_rows:
            continue
        before = origins.merged.get(gate, np.arange(pack.origin_rows, dtype=np.int32))
        rows[gate] = before[left].astype(np.int32)
        counts[gate] = made_of.astype(np.int32)
    stated = write_origins(folder, EntryOrigins(
        origins.token_ids, origins.documents, origins.positions, rows, counts
    ))  # fmt: skip
    return {**(stated or {}), "rows": pack.origin_rows}


def _widths(settings: CompressSettings, size: int) -> Widths:
    """Of graded keys of D elements."""
    fine = max(WIDTH_STEP, size // 4 // WIDTH_STEP * WIDTH_STEP)
    found = settings.key_widths or (fine, size - fine)
    if not widths_are_possible(found, size):
        raise SettingError(
            "key widths", "do not fit the model",
            expected=f"two multiples of {WIDTH_STEP} with a sum up to {size}", found=found,
        )  # fmt: skip
    return found


def check_compressible(pack: MemoryPack, width: int, values: StoredAs) -> None:
    """Raise unless every gate can be compressed, before any work is done."""
    size, experts = pack.model.hidden_size, pack.model.num_experts
    if not width_is_possible(width, size):
        raise SettingError(
            "scan width", "does not fit the model",
            expected=f"a multiple of {WIDTH_STEP} up to a hidden size that is one",
            found=f"{width} of {size}",
        )  # fmt: skip
    if values != "as-stored" and values not in value_types(experts):
        raise SettingError(
            "values", "cannot be stored in pairs", expected=value_types(experts),
            found=f"{values} of {experts} experts",
        )  # fmt: skip
    for gate in pack.gates:
        if gate.scan is not None or gate.values is not None:
            raise MemoryPackError(
                pack.path, f"gate {gate.gate} is compressed already",
                fix="Compress the pack that this one was made of.",
            )  # fmt: skip
        if gate.entries < FEWEST:
            raise MemoryPackError(
                pack.path, f"gate {gate.gate} is too small to compress",
                expected=f"at least {FEWEST} entries", found=gate.entries,
                fix="Leave it as it is: scanning it whole costs next to nothing.",
            )  # fmt: skip


def _compress_gate(
    pack: MemoryPack, gate: PackGate, entries: GateEntries, settings: CompressSettings
) -> tuple[dict[str, Any], dict[str, NDArray[Any]], ScanStatement, ValuesStatement | None]:
    random = np.random.default_rng([settings.seed, gate.gate])
    count = len(entries.keys)
    order = random.permutation(count)
    held = min(_HELD_BACK, max(1, count // 8))
    queries = _centred(entries, order[:held])
    fitted = _centred(entries, np.sort(order[held : held + _FITTED]))
    others = Exact.of(
        queries, _centred(entries, np.sort(order[held:])), pack.neighbors, pack.similarity
    )
    directions = principal(unit_rows(fitted) if pack.similarity == "cosine" else fitted)
    choice = _choose(others, directions, settings, f"{pack.path}: gate {gate.gate}")
    matrix = turned(directions, choice.width, settings.seed)
    graded = (
        graded_parts(directions, settings.key_widths, settings.seed) if settings.key_widths else []
    )
    found = measure_search(others, matrix, choice.bits, settings.candidates, settings.keys, graded)
    del others, fitted
    scan = _project(entries, matrix, choice.bits)
    parts = dict(zip(PARTS, (_project(entries, *part) for part in graded), strict=False))
    factor = np.float32(found.correction)
    if settings.keys == "projected":
        scan = replace(scan, scales=scan.scales * factor)
    parts = {name: replace(part, scales=part.scales * factor) for name, part in parts.items()}
    values, tensors = _values(entries, pack.variant, settings.values)
    stored = _keys(entries, settings.keys)
    tensors |= {
        **stored,
        KEY_LENGTHS: _lengths(entries, stored, pack.path / gate.stored.file),
        "center": entries.center,
    }
    for name, part in {"scan": scan, **parts}.items():
        arrays = (part.projection, part.projection_scales, part.codes, part.scales)
        tensors |= dict(zip(projection_tensors(name), arrays, strict=True))
    statement = ScanStatement(
        choice.width,
        choice.bits,
        settings.candidates,
        pack.neighbors,
        pack.similarity,
        round(choice.recall, 6),
        lengths=True,
    )
    result = {
        "gate": gate.gate,
        "entries": count,
        **asdict(choice),
        "kept": found.kept,
        "held_back": held,
        "scanned_bytes": scan.codes.nbytes,
        "bytes_before": gate.stored.size,
    }
    return result, tensors, statement, values


def _values(
    entries: GateEntries, variant: Variant, kind: StoredAs
) -> tuple[ValuesStatement | None, dict[str, NDArray[Any]]]:
    """The values' tensors, and what is said of them."""
    if kind == "as-stored":
        return None, {"router_logits": entries.router_logits, "residuals": entries.residuals}
    values = entries.residuals.astype(np.float32)
    if variant != "residual":
        values = values + entries.router_logits.astype(np.float32)
    largest = float(np.abs(values).max())
    if largest > LARGEST:
        raise SettingError(
            "values", "too large for fp16", expected=f"at most {LARGEST:g}", found=largest,
            fix="Keep them as they are stored.",
        )  # fmt: skip
    stored = store_values(values, kind)
    tensors: dict[str, NDArray[Any]] = {"values": stored.codes}
    if stored.steps is not None and stored.lows is not None:
        tensors |= {"value_steps": stored.steps, "value_lows": stored.lows}
    return ValuesStatement(kind, _VALUES_OF[variant]), tensors


@dataclass(frozen=True)
class _Choice:
    width: int
    bits: int
    recall: float


def _choose(exact: Exact, directions: Floats, settings: CompressSettings, where: str) -> _Choice:
    """The width and bits asked for, or the fewest bytes with the recall asked for."""
    tried: dict[tuple[int, int], _Choice] = {}

    def measure(width: int, bits: int) -> _Choice:
        if (width, bits) not in tried:
            matrix = turned(directions, width, settings.seed)
            recall = measure_recall(exact, matrix, bits, settings.candidates)
            tried[width, bits] = _Choice(width, bits, recall)
        return tried[width, bits]

    all_bits = SCAN_BITS if settings.scan_bits is None else (settings.scan_bits,)
    if settings.scan_width is not None:
        found = [measure(settings.scan_width, bits) for bits in all_bits]
        enough = [choice for choice in found if choice.recall >= settings.recall]
        # The width is the person's own choice: what it finds is reported, not judged.
        return min(enough, key=_bytes) if enough else max(found, key=lambda each: each.recall)
    widths = range(WIDTH_STEP, exact.among.shape[1] + 1, WIDTH_STEP)
    narrow = [_narrowest(widths, partial(measure, bits=bits), settings.recall) for bits in all_bits]
    reached = [choice for choice in narrow if choice is not None]
    if reached:
        return min(reached, key=_bytes)
    best = max(tried.values(), key=lambda each: each.recall)
    raise MemoryPackError(
        where, "no projection finds enough of the neighbours",
        expected=f"a recall of {settings.recall:g}",
        found=f"{best.recall:.4f} of width {best.width} in {best.bits} bits with"
        f" {settings.candidates} candidates",
        fix=f"Ask for more candidates (up to {MAX_CANDIDATES}) or a lower recall, or use the pack"
        " as it is.",
    )  # fmt: skip


def _bytes(choice: _Choice) -> int:
    return choice.width * choice.bits // 8


def _narrowest(
    widths: Sequence[int], measure: Callable[[int], _Choice], recall: float
) -> _Choice | None:
    """The smallest width with the recall, which rises with the width but for noise."""
    # Doubled until it is reached, then halved between: wide ones take long to try.
    high = 1
    while measure(widths[min(high, len(widths)) - 1]).recall < recall:
        if high >= len(widths):
            return None
        high *= 2
    low, high = high // 2, min(high, len(widths))
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (
            (low, middle) if measure(widths[middle - 1]).recall >= recall else (middle, high)
        )
    return measure(widths[high - 1])


def _centred(entries: GateEntries, rows: Any) -> Floats:
    centred: Floats = entries.keys[rows].astype(np.float32) - entries.center
    return centred


def _pieces(entries: GateEntries) -> Iterator[slice]:
    rows = max(1, _AT_ONCE // entries.keys.shape[1])
    for start in range(0, len(entries.keys), rows):
        yield slice(start, start + rows)


def _project(entries: GateEntries, matrix: Floats, bits: int) -> ProjectedKeys:
    parts = [project_keys(_centred(entries, piece), matrix, bits) for piece in _pieces(entries)]
    return ProjectedKeys(
        parts[0].projection,
        parts[0].projection_scales,
        np.concatenate([part.codes for part in parts]),
        np.concatenate([part.scales for part in parts]),
    )


def _keys(entries: GateEntries, kind: Keys) -> Mapping[str, NDArray[Any]]:
    """The full keys as they are stored, if they are, with their steps where they are int8."""
    if kind == "as-stored":
        return {"keys": entries.keys}
    if kind in RESTORED:
        return {}
    if kind == "fp16":
        if np.abs(entries.keys).max() > np.finfo(np.float16).max:
            raise SettingError(
                "keys", "too large for fp16", expected="at most 65504",
                found=float(np.abs(entries.keys).max()), fix="Keep them as they are stored.",
            )  # fmt: skip
        return {"keys": entries.keys.astype(np.float16)}
    keys = np.empty(entries.keys.shape, np.int8)
    steps = np.empty(len(keys), np.float32)
    for piece in _pieces(entries):
        centred = _centred(entries, piece)
        largest = np.abs(centred).max(axis=1, keepdims=True)
        keys[piece] = np.rint(centred / np.where(largest > 0, largest, 1) * 127)
        steps[piece] = largest[:, 0] / 127
    return {"keys": keys, "key_steps": steps}


def _lengths(
    entries: GateEntries, stored: Mapping[str, NDArray[Any]], where: Path
) -> NDArray[np.float32]:
    """Lengths [N] of the centred keys as they are stored, or as they were if none are."""
    keys = stored.get("keys", entries.keys)
    pieces = (keys[piece] for piece in _pieces(entries))
    return centred_lengths(pieces, entries.center, stored.get("key_steps"), where)
