"""`memory.json` of a pack, entry by entry: checked, and made into what it states."""

from __future__ import annotations

from typing import cast

from .bundle import MAX_DIMENSION, MAX_GATES
from .calibration import MAX_NEIGHBORS, SIMILARITIES, Calibration, Similarity
from .compressed_files import (
    KEY_KINDS,
    RESTORED,
    VALUES_OF,
    KeyKind,
    ScanStatement,
    ValuesOf,
    ValuesStatement,
    width_is_possible,
    widths_are_possible,
)
from .errors import MemoryPackError, SettingError
from .manifest import Fields, ManifestKind
from .pack_files import MANIFEST, REBUILD, PackFile
from .pack_parts import ModelIdentity, PackGate
from .projection import SCAN_BITS, WIDTH_STEP
from .stored_values import ValueType, value_types
from .two_stage import MAX_CANDIDATES

SCHEMA = "knnmoe.memory/2"
OLDER = ("knnmoe.memory/1",)  # without decay, evidence and calibrated
KIND = ManifestKind(
    "a memory pack",
    MANIFEST,
    SCHEMA,
    MemoryPackError,
    REBUILD,
    "Use the version of knnmoe that wrote the pack, or build it again with this one.",
    OLDER,
)


def parse_model(entry: Fields) -> ModelIdentity:
    """The model that the memory belongs to."""
    entry.only("fingerprint", "model_type", "num_gates", "hidden_size", "num_experts")
    return ModelIdentity(
        fingerprint=entry.text("fingerprint", pattern=r"sha256:[0-9a-f]{64}"),
        model_type=entry.text("model_type"),
        num_gates=entry.integer("num_gates", 1, MAX_GATES),
        hidden_size=entry.integer("hidden_size", 1, MAX_DIMENSION),
        num_experts=entry.integer("num_experts", 1, MAX_DIMENSION),
    )


def parse_gate(entry: Fields, model: ModelIdentity) -> PackGate:
    """One covered gate, within what a model of this shape can have."""
    entry.only(
        "gate", "file", "sha256", "size", "entries", "calibration",
        optional=("key_widths", "keys", "scan", "used", "values"),
    )  # fmt: skip
    try:
        calibration = Calibration.from_json(entry.object("calibration").content)
    except SettingError as error:
        raise MemoryPackError(
            f"{entry.where}: {error.where}",
            error.problem,
            expected=error.expected,
            found=error.found,
            fix=REBUILD,
        ) from error
    keys = entry.text("keys", choices=KEY_KINDS[1:]) if entry.has("keys") else "full"
    scan = _parse_scan(entry.object("scan"), model) if entry.has("scan") else None
    if keys in RESTORED and scan is None:
        raise entry.wrong("keys", "are projected by nothing", expected="a scan", found=keys)
    return PackGate(
        gate=entry.integer("gate", 0, model.num_gates - 1),
        stored=parse_file(entry),
        entries=entry.integer("entries", 1, MAX_DIMENSION),
        calibration=calibration,
        scan=scan,
        keys=cast(KeyKind, keys),
        key_widths=_parse_widths(entry, model) if keys == "graded" else (),
        values=_parse_values(entry.object("values"), model) if entry.has("values") else None,
        used=entry.boolean("used") if entry.has("used") else True,
    )


def _parse_widths(entry: Fields, model: ModelIdentity) -> tuple[int, ...]:
    found = entry.content.get("key_widths")
    whole = isinstance(found, list) and all(type(width) is int for width in found)
    widths = tuple(found) if isinstance(found, list) and whole else ()
    if not widths_are_possible(widths, model.hidden_size):
        raise entry.wrong(
            "key_widths", "are not those of graded keys",
            expected=f"two multiples of {WIDTH_STEP} with a sum up to {model.hidden_size}",
            found=found,
        )  # fmt: skip
    return widths


def _parse_values(entry: Fields, model: ModelIdentity) -> ValuesStatement:
    entry.only("dtype", "of")
    dtype = entry.text("dtype", choices=value_types(model.num_experts))
    of = entry.text("of", choices=VALUES_OF)
    return ValuesStatement(cast(ValueType, dtype), cast(ValuesOf, of))


def _parse_scan(entry: Fields, model: ModelIdentity) -> ScanStatement:
    entry.only(
        "width", "bits", "candidates", "neighbors", "similarity", "recall", optional=("lengths",)
    )
    neighbors = entry.integer("neighbors", 1, MAX_NEIGHBORS)
    recall = entry.number("recall")
    if not 0 <= recall <= 1:
        raise entry.wrong("recall", "out of range", expected="0 to 1", found=recall)
    width = entry.integer("width", 1, MAX_DIMENSION)
    if not width_is_possible(width, model.hidden_size):
        raise entry.wrong(
            "width",
            "out of range",
            expected=f"a multiple of {WIDTH_STEP} up to {model.hidden_size}",
            found=width,
        )
    bits = entry.integer("bits", 1, 8)
    if bits not in SCAN_BITS:
        raise entry.wrong("bits", "out of range", expected=SCAN_BITS, found=bits)
    return ScanStatement(
        width=width,
        bits=bits,
        candidates=entry.integer("candidates", neighbors, MAX_CANDIDATES),
        neighbors=neighbors,
        similarity=cast(Similarity, entry.text("similarity", choices=SIMILARITIES)),
        recall=recall,
        lengths=entry.has("lengths") and entry.boolean("lengths"),
    )


def parse_file(entry: Fields) -> PackFile:
    """A file of the pack, by a name without any path."""
    return PackFile(
        entry.text("file", pattern=r"[A-Za-z0-9_-][A-Za-z0-9._-]{0,99}"),
        entry.text("sha256", pattern=r"[0-9a-f]{64}"),
        entry.integer("size", 0, 1 << 50),
    )
