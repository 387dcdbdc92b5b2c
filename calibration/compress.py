"""Compressing a memory pack: projected keys to scan, and perhaps smaller keys to score with.

Per gate the keys are projected to their W principal directions (runtime/projection.py) and stored
in 4 or 8 bits beside the full keys: in as few bytes as find the neighbours. For that a part
of the memory's own keys is held back, searched for among the others exactly and through the
projection, and the share of the K nearest that are among the R candidates is the recall. It is
measured as the gate runs it, rounding included, on a projection that has not seen the keys held
back.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from knnmoe.runtime.atomic import new_directory
from knnmoe.runtime.blend import unit_rows
from knnmoe.runtime.calibration import Similarity
from knnmoe.runtime.compressed_files import ScanStatement, width_is_possible
from knnmoe.runtime.errors import MemoryPackError, SettingError
from knnmoe.runtime.memory import KIND, GateEntries, MemoryPack, PackGate
from knnmoe.runtime.pack_files import write_manifest, write_tensors
from knnmoe.runtime.projection import (
    SCAN_BITS,
    WIDTH_STEP,
    ProjectedKeys,
    encode,
    projected_products,
    round_projection,
)
from knnmoe.runtime.two_stage import MAX_CANDIDATES, check_candidates

Keys = Literal["as-stored", "fp16", "int8"]
KEYS: tuple[Keys, ...] = get_args(Keys)
FEWEST = 256  # entries that a recall can be measured on
_HELD_BACK = 512  # at most
_FITTED = 16_384  # keys that directions are found from, at most
_AT_ONCE = 1 << 22  # elements
_TOGETHER = 64  # queries

Floats = NDArray[np.floating[Any]]


@dataclass(frozen=True)
class CompressSettings:
    """How a memory is compressed.

    Attributes:
        scan_width: W, or None for the smallest that has the recall.
        scan_bits: Of a projected key's elements, 4 or 8; None for what makes it smallest.
        candidates: R, scored again with the full keys.
        recall: What must be reached where width or bits are chosen.
        keys: Dtype of the full keys.
        seed: Of the keys held back and of the turn of the directions.

    Raises:
        SettingError: If a field is out of its range.
    """

    scan_width: int | None = None
    scan_bits: int | None = None
    candidates: int = 32
    recall: float = 0.999
    keys: Keys = "as-stored"
    seed: int = 0

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


@dataclass(frozen=True)
class CompressedGate:
    """What became of one gate.

    Attributes:
        gate: Its number.
        entries: N.
        width: W.
        bits: Of a projected key's elements.
        recall: Of the keys held back; see `CompressSettings.recall`.
        held_back: How many these were.
        scanned_bytes: What a search reads of projected keys.
        bytes_before, bytes_after: Size of the gate's file.
    """

    gate: int
    entries: int
    width: int
    bits: int
    recall: float
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


def compress_pack(
    path: str | Path,
    target: str | Path,
    settings: CompressSettings = CompressSettings(),
    *,
    overwrite: bool = False,
) -> CompressReport:
    """Write a compressed copy of a pack.

    Raises:
        MemoryPackError: If the pack is damaged, compressed already, or too small to measure on; or
            if no width has the recall that is asked for.
        SettingError: If a setting does not fit the memory.
        OutputError: If the directory cannot be written.
    """
    pack = MemoryPack.open(path)
    check_candidates(settings.candidates, pack.neighbors)
    _check(pack, settings)
    manifest = dict(KIND.read(pack.path).content)
    stated = {entry["gate"]: dict(entry) for entry in manifest["gates"]}
    done = []
    with new_directory(Path(target), overwrite=overwrite) as folder:
        for gate in pack.gates:
            result, tensors, statement = _compress_gate(pack, gate, settings)
            stored = write_tensors(folder, gate.stored.file, tensors)
            stated[gate.gate] |= {**asdict(stored), "scan": asdict(statement)}
            if settings.keys == "int8":
                stated[gate.gate]["keys"] = "int8"
            done.append({**result, "bytes_after": stored.size})
        if pack.origins is not None:
            shutil.copyfile(pack.path / pack.origins.file, folder / pack.origins.file)
        manifest["gates"] = [stated[gate.gate] for gate in pack.gates]
        manifest["provenance"] = {**manifest["provenance"], "compressed": asdict(settings)}
        write_manifest(folder, manifest)
    gates = tuple(CompressedGate(**each) for each in done)
    return CompressReport(MemoryPack.open(target), gates, settings)


def project_keys(centred: Floats, matrix: Floats, bits: int) -> ProjectedKeys:
    """Centred keys [N, D] projected by P [W, D], which is rounded first, and in some bits."""
    projection, scales = round_projection(matrix)
    rounded = projection * scales[:, None]
    codes, key_scales = encode(centred @ rounded.T, bits)
    return ProjectedKeys(projection, scales, codes, key_scales)


@dataclass(frozen=True)
class Exact:
    """Held-back keys, what they are searched among, and who is nearest.

    Attributes:
        queries, among: Centred keys [T, D] and [N, D].
        norms: [N] squared lengths of those searched.
        lengths: [N], where keys are compared at unit length.
        nearest: [T, K] the K nearest.
    """

    queries: Floats
    among: Floats
    norms: Floats
    lengths: Floats | None
    nearest: NDArray[np.int64]

    @staticmethod
    def of(queries: Floats, among: Floats, neighbors: int, similarity: Similarity) -> Exact:
        """Searched by brute force."""
        norms = np.einsum("nd,nd->n", among, among)
        lengths = np.sqrt(norms) if similarity == "cosine" else None
        exact = Exact(queries, among, norms, lengths, np.zeros((0, neighbors), np.int64))
        nearest = [_best(exact.scores(piece @ among.T), neighbors) for piece in _some(queries)]
        return replace(exact, nearest=np.concatenate(nearest))

    def scores(self, products: Floats) -> Floats:
        """What is ranked by [T, N], of inner products with the keys searched."""
        if self.lengths is None:
            return 2 * products - self.norms
        return products / np.where(self.lengths > 0, self.lengths, np.float32(1))


def measure_recall(exact: Exact, matrix: Floats, bits: int, candidates: int) -> float:
    """Share of the K nearest that are among R candidates found through a projection P [W, D]."""
    keys = project_keys(exact.among, matrix, bits)
    found = []
    for start, piece in zip(
        range(0, len(exact.queries), _TOGETHER), _some(exact.queries), strict=True
    ):
        scores = exact.scores(projected_products(piece, keys, int8_queries=True))
        among = np.zeros(scores.shape, np.bool_)
        np.put_along_axis(among, _best(scores, candidates), True, axis=1)
        nearest = exact.nearest[start : start + _TOGETHER]
        found.append(np.take_along_axis(among, nearest, axis=1))
    return float(np.concatenate(found).mean())


def _some(queries: Floats) -> Iterator[Floats]:
    """A few queries at a time: their scores are as wide as the memory is long."""
    for start in range(0, len(queries), _TOGETHER):
        yield queries[start : start + _TOGETHER]


def _best(scores: Floats, count: int) -> NDArray[np.int64]:
    return np.argpartition(-scores, count - 1, axis=1)[:, :count]


def _check(pack: MemoryPack, settings: CompressSettings) -> None:
    """Raise unless every gate can be compressed, before any work is done."""
    size, width = pack.model.hidden_size, settings.scan_width or WIDTH_STEP
    if not width_is_possible(width, size):
        raise SettingError(
            "scan width", "does not fit the model",
            expected=f"a multiple of {WIDTH_STEP} up to a hidden size that is one",
            found=f"{width} of {size}",
        )  # fmt: skip
    for gate in pack.gates:
        if gate.scan is not None or gate.int8_keys:
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
    pack: MemoryPack, gate: PackGate, settings: CompressSettings
) -> tuple[dict[str, Any], dict[str, NDArray[Any]], ScanStatement]:
    entries = pack.read(gate)
    random = np.random.default_rng([settings.seed, gate.gate])
    order = random.permutation(gate.entries)
    held = min(_HELD_BACK, gate.entries // 8)
    queries = _centred(entries, order[:held])
    fitted = _centred(entries, np.sort(order[held : held + _FITTED]))
    others = Exact.of(
        queries, _centred(entries, np.sort(order[held:])), pack.neighbors, pack.similarity
    )
    directions = principal(unit_rows(fitted) if pack.similarity == "cosine" else fitted)
    choice = _choose(others, directions, settings, f"{pack.path}: gate {gate.gate}")
    matrix = turned(directions, choice.width, settings.seed)
    del others, fitted
    scan = _project(entries, matrix, choice.bits)
    tensors: dict[str, NDArray[Any]] = {
        **_keys(entries, settings.keys),
        "router_logits": entries.router_logits,
        "residuals": entries.residuals,
        "center": entries.center,
        "scan_projection": scan.projection,
        "scan_projection_scales": scan.projection_scales,
        "scan_codes": scan.codes,
        "scan_scales": scan.scales,
    }
    statement = ScanStatement(
        choice.width,
        choice.bits,
        settings.candidates,
        pack.neighbors,
        pack.similarity,
        round(choice.recall, 6),
    )
    result = {
        "gate": gate.gate,
        "entries": gate.entries,
        **asdict(choice),
        "held_back": held,
        "scanned_bytes": scan.codes.nbytes,
        "bytes_before": gate.stored.size,
    }
    return result, tensors, statement


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


def principal(keys: Floats) -> Floats:
    """Principal directions of keys [N, D] about zero, all of them, the widest first."""
    moments = keys.T.astype(np.float64) @ keys
    directions: Floats = np.linalg.eigh(moments)[1][:, ::-1].T.astype(np.float32)
    return directions


def turned(directions: Floats, width: int, seed: int) -> Floats:
    """The first W directions, turned at random among themselves: P [W, D]."""
    random = np.random.default_rng([seed, width])
    turn = np.linalg.qr(random.standard_normal((width, width)))[0]
    matrix: Floats = turn.astype(np.float32) @ directions[:width]
    return matrix


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
    """The full keys as they are stored, with their steps where they are int8."""
    if kind == "as-stored":
        return {"keys": entries.keys}
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
