"""Memory packs: one memory on disk, with its provenance, and what the runtime makes of it.

The format is described in docs/formats.md. A pack is checked whole before any of it is used:
schema, paths, sizes, hashes, shapes, finite numbers, and that it belongs to the model at hand.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from .atomic import new_directory
from .blend import GateMemory, unit_rows
from .bundle import MAX_DIMENSION, MAX_GATES
from .calibration import (
    EVIDENCE,
    MAX_NEIGHBORS,
    SIMILARITIES,
    VARIANTS,
    Calibration,
    EvidenceFrom,
    Similarity,
    Variant,
    check_neighbors,
)
from .compressed import CompressedMemory, Memory
from .compressed_files import (
    KEY_KINDS,
    KEY_LENGTHS,
    SCAN_TENSORS,
    VALUES_OF,
    KeyKind,
    ScanStatement,
    ValuesOf,
    ValuesStatement,
    check_lengths,
    check_scan,
    key_lengths,
    map_tensor,
    sampled,
    scan_specs,
    stored_values,
    value_specs,
    width_is_possible,
)
from .errors import MemoryPackError, SettingError
from .manifest import Fields, ManifestKind
from .pack_files import (
    MANIFEST,
    REBUILD,
    PackFile,
    Seen,
    TensorSpecs,
    check_file,
    link_tensors,
    read_tensors,
    seen_as,
    write_manifest,
    write_tensors,
)
from .projection import SCAN_BITS, WIDTH_STEP, ProjectedKeys, decode
from .routing import RoutingRule
from .stored_values import Values, ValueType, dense, value_types
from .two_stage import MAX_CANDIDATES

SCHEMA = "knnmoe.memory/2"
OLDER = ("knnmoe.memory/1",)  # without decay, evidence and calibrated
ENTRIES = "entries.safetensors"
KIND = ManifestKind(
    "a memory pack",
    MANIFEST,
    SCHEMA,
    MemoryPackError,
    REBUILD,
    "Use the version of knnmoe that wrote the pack, or build it again with this one.",
    OLDER,
)

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

    `scan`, `keys` and `values` say what compressing added and changed.
    A gate that is not `used` is left to the frozen router; its file stays.
    """

    gate: int
    stored: PackFile
    entries: int
    calibration: Calibration
    scan: ScanStatement | None = None
    keys: KeyKind = "full"
    values: ValuesStatement | None = None
    used: bool = True


@dataclass(frozen=True)
class MemoryPack:
    """A memory pack that has been opened and checked, tensors still on disk.

    Use `MemoryPack.open`; it raises `MemoryPackError` for anything wrong with the directory.

    Attributes:
        evidence: Whether `all` entries are evidence of the domain, or those of `reference` text
            alone, and not the ones of background text.
        calibrated: Whether held-out text has chosen the settings (`knnmoe memory calibrate`).
        most_entries: Of a gate, that a model uses; None uses all (see `RunConfig`).
        seen: By file, as which its hash was found right.
    """

    path: Path
    model: ModelIdentity
    variant: Variant
    neighbors: int
    similarity: Similarity
    gates: tuple[PackGate, ...]
    origins: PackFile | None
    provenance: Mapping[str, Any]
    origin_rows: int = 0
    evidence: EvidenceFrom = "all"
    calibrated: bool = False
    most_entries: int | None = None
    seen: Mapping[str, Seen] = field(default_factory=dict)

    @staticmethod
    def open(path: str | Path, *, verify: bool = True) -> MemoryPack:
        """Read and check a pack; with `verify` also every file's hash."""
        root = Path(path)
        pack = _parse(root, KIND.read(root))
        files = [gate.stored for gate in pack.gates] + ([pack.origins] if pack.origins else [])
        seen = {}
        for stored in files:
            found = seen_as(root / stored.file)
            check_file(root, stored, verify)
            if verify and found is not None:
                seen[stored.file] = found
        return replace(pack, seen=seen)

    @property
    def entries(self) -> int:
        """Entries of the largest gate."""
        return max(gate.entries for gate in self.gates)

    @property
    def bytes(self) -> int:
        """Size of the pack's tensors on disk."""
        return sum(gate.stored.size for gate in self.gates)

    @property
    def loaded_bytes(self) -> int:
        """Bytes that the gates in use take in memory as fp32, uncompressed."""
        width = self.model.hidden_size + self.model.num_experts + 3
        return sum(4 * gate.entries * width for gate in self.gates if gate.used)

    def check_belongs_to(self, model: ModelIdentity) -> None:
        """Raise `MemoryPackError` unless this memory was built for that model."""
        for name, expected in asdict(model).items():
            found = getattr(self.model, name)
            if found != expected:
                raise MemoryPackError(
                    self.path / MANIFEST,
                    f"this memory belongs to another model (model.{name} differs)",
                    expected=expected,
                    found=found,
                    fix="Build a memory from the checkpoint this bundle was exported from.",
                )

    def check_calibrated(self) -> None:
        """Raise `MemoryPackError` if serving this pack as it is could do great harm.

        That is a variant that puts its values in the place of the router's logits, with settings
        that nobody has measured: if its values are wrong, so is the routing of all its domain.
        """
        if not self.calibrated and any(gate.calibration.interpolate for gate in self.gates):
            raise MemoryPackError(
                self.path / MANIFEST,
                f"is not calibrated, and its variant {self.variant} replaces the router's logits",
                expected="a calibrated pack, or the variant residual",
                fix="Calibrate it with `knnmoe memory calibrate`, use it with --variant residual,"
                f" or ask for it with --variant {self.variant}.",
            )

    def background(self, gate: PackGate) -> NDArray[np.bool_]:
        """Which of a gate's entries are of background text, [N].

        Raises:
            MemoryPackError: If the pack does not say where its entries came from.
        """
        origins = self.read_origins()
        if origins is None:
            raise MemoryPackError(
                self.path / MANIFEST,
                "counts entries of reference text as evidence, but does not say which they are",
                expected=f"a file {ENTRIES}",
                fix=REBUILD,
            )
        found: NDArray[np.bool_] = origins.documents_of(gate.gate) < 0
        return found

    def _evidence_weights(self, gate: PackGate) -> NDArray[np.float32] | None:
        if self.evidence == "all":
            return None
        return (~self.background(gate)).astype(np.float32)

    def read(self, gate: PackGate) -> GateEntries:
        """Load one gate's tensors, checking shapes before allocating and numbers after.

        Raises:
            MemoryPackError: If the file is damaged, or compressing has left nothing to tell the
                router's logits from what was learned, or full keys from projected ones.
        """
        if gate.values is not None or gate.keys == "projected":
            raise MemoryPackError(
                self.path,
                f"gate {gate.gate} no longer has what it was compressed from",
                expected="full keys, router logits and residuals",
                found=f"keys {gate.keys}, values {gate.values.of if gate.values else 'full'}",
                fix="Use the pack that this one was made of.",
            )
        keys, center, tensors = self._read_keys(gate)
        return GateEntries(keys=keys, center=center, **tensors)

    def _read_keys(self, gate: PackGate) -> tuple[Array, NDArray[np.float32], dict[str, Any]]:
        """Keys [N, D] that are not projected, centre [D], and the tensors of the values."""
        path = self.path / gate.stored.file
        tensors = read_tensors(path, self._specs(gate), leave=(*SCAN_TENSORS, KEY_LENGTHS))
        steps = tensors.pop("key_steps", None)
        if steps is not None:
            tensors["keys"] = tensors["keys"] * steps[:, None] + tensors["center"]
        return tensors.pop("keys"), tensors.pop("center"), tensors

    def _specs(self, gate: PackGate) -> TensorSpecs:
        """What a gate's file must hold."""
        entries, size, experts = gate.entries, self.model.hidden_size, self.model.num_experts
        floats = ("F16", "F32")
        specs: dict[str, tuple[tuple[int, ...], tuple[str, ...]]] = {
            "center": ((size,), floats),
        }
        if gate.keys == "projected":
            specs[KEY_LENGTHS] = ((entries,), ("F32",))
        else:
            specs["keys"] = ((entries, size), ("I8",) if gate.keys == "int8" else floats)
        if gate.keys == "int8":
            specs["key_steps"] = ((entries,), ("F32",))
        if gate.values is None:
            both = dict.fromkeys(("router_logits", "residuals"), ((entries, experts), floats))
            specs |= both
        else:
            specs |= value_specs(gate.values, entries, experts)
        if gate.scan is not None:
            specs |= scan_specs(gate.scan, entries, size)
        return specs

    def read_origins(self) -> EntryOrigins | None:
        """Where the entries came from, or None if the pack does not say."""
        if self.origins is None:
            return None
        path = self.path / self.origins.file
        kind = ((self.origin_rows,), ("I32",))
        specs = dict.fromkeys(("token_ids", "documents", "positions"), kind)
        merged = [gate for gate in self.gates if gate.entries < self.origin_rows]
        for gate in merged:
            names = (f"rows_{gate.gate:02d}", f"counts_{gate.gate:02d}")
            specs |= dict.fromkeys(names, ((gate.entries,), ("I32",)))
        tensors = read_tensors(path, specs)
        rows = {gate.gate: tensors.pop(f"rows_{gate.gate:02d}") for gate in merged}
        counts = {}
        for gate in merged:
            counts[gate.gate] = tensors.pop(f"counts_{gate.gate:02d}")
            found = rows[gate.gate]
            if found.min() < 0 or found.max() >= self.origin_rows:
                raise MemoryPackError(
                    path,
                    f"rows_{gate.gate:02d} names rows that are not there",
                    expected=f"0 to {self.origin_rows - 1}",
                    found=f"{found.min()} to {found.max()}",
                    fix=REBUILD,
                )
        return EntryOrigins(**tensors, merged=rows, counts=counts)

    def with_settings(
        self,
        *,
        variant: Variant | None = None,
        neighbors: int | None = None,
        similarity: Similarity | None = None,
        calibration: Calibration | Mapping[int, Calibration] | None = None,
        evidence: EvidenceFrom | None = None,
        calibrated: bool | None = None,
        unused: Collection[int] | None = None,
    ) -> MemoryPack:
        """The same memory used differently; nothing on disk changes.

        A change of variant alone keeps each gate's other numbers. Gates among the `unused` are left
        to the frozen router, all others are used; None leaves that as it is.
        """
        if variant is not None and variant not in VARIANTS:
            raise SettingError("variant", "unknown", expected=VARIANTS, found=variant)
        if variant is not None and not self.serves(variant):
            raise SettingError(
                "variant",
                "cannot be made of what this compressed memory keeps of its values",
                expected=[each for each in VARIANTS if self.serves(each)],
                found=variant,
                fix="Compress the original pack for this variant, or with --values as-stored.",
            )
        if similarity is not None and similarity not in SIMILARITIES:
            raise SettingError("similarity", "unknown", expected=SIMILARITIES, found=similarity)
        if evidence is not None and evidence not in EVIDENCE:
            raise SettingError("evidence", "unknown", expected=EVIDENCE, found=evidence)

        def numbers(gate: PackGate) -> Calibration:
            if isinstance(calibration, Calibration):
                return calibration
            if calibration is not None and gate.gate in calibration:
                return calibration[gate.gate]
            return gate.calibration.with_variant(variant) if variant else gate.calibration

        return replace(
            self,
            variant=variant or self.variant,
            neighbors=check_neighbors(self.neighbors if neighbors is None else neighbors),
            similarity=similarity or self.similarity,
            gates=tuple(
                replace(
                    gate,
                    calibration=numbers(gate),
                    used=gate.used if unused is None else gate.gate not in unused,
                )
                for gate in self.gates
            ),
            evidence=evidence or self.evidence,
            calibrated=self.calibrated if calibrated is None else calibrated,
        )

    def gate_memory(
        self,
        gate: PackGate,
        rule: RoutingRule,
        selection_bias: NDArray[np.float32] | None = None,
    ) -> GateMemory:
        """One gate's memory as the blend takes it.

        Args:
            gate: One of `self.gates`.
            rule: The model's; the `assignment` variant applies it to the learned logits.
            selection_bias: [E], of this gate, where the rule has one.
        """
        if gate.keys == "projected":
            return self._compressed_memory(gate, rule, selection_bias).widened()
        whole, center, tensors = self._read_keys(gate)
        keys, scales = prepare_keys(whole, center, self.similarity)
        return GateMemory(
            keys=keys,
            key_scales=scales,
            values=dense(self._values_of(gate, tensors, rule, selection_bias)),
            n_valid=gate.entries,
            k=self.neighbors,
            center=center,
            calibration=gate.calibration,
            similarity=self.similarity,
            rule_first=self.variant == "assignment",
            evidence_weights=self._evidence_weights(gate),
        )

    def memory_of(
        self,
        gate: PackGate,
        rule: RoutingRule,
        selection_bias: NDArray[np.float32] | None = None,
    ) -> Memory:
        """One gate's memory: compressed where a projection serves this use, else `gate_memory`."""
        path = self.path / gate.stored.file
        # The pack was hashed when it was opened; what was put in its place since is hashed again.
        before = seen_as(path)
        if before is None or before != self.seen.get(gate.stored.file):
            check_file(self.path, gate.stored, verify=True)
        with np.errstate(over="ignore", invalid="ignore"):  # looked for below
            found: Memory | None = self.compressed_memory(gate, rule, selection_bias)
            if found is None:
                found = self.gate_memory(gate, rule, selection_bias)
        if seen_as(path) != before:
            check_file(self.path, gate.stored, verify=True)
        _check_finite(path, found)
        return found

    def compressed_memory(
        self,
        gate: PackGate,
        rule: RoutingRule,
        selection_bias: NDArray[np.float32] | None = None,
    ) -> CompressedMemory | None:
        """One gate's memory to be scanned by its projection; None if it has none for this use.

        The keys are mapped from the file, which may be replaced meanwhile but not written to.

        Args:
            gate, rule, selection_bias: See `gate_memory`.

        Raises:
            MemoryPackError: If the file holds anything else than the manifest states, or a
                projection that is none, or not of these keys.
        """
        if gate.scan is None or not gate.scan.serves(self.similarity, self.neighbors):
            return None
        return self._compressed_memory(gate, rule, selection_bias)

    def _compressed_memory(
        self,
        gate: PackGate,
        rule: RoutingRule,
        selection_bias: NDArray[np.float32] | None,
    ) -> CompressedMemory:
        assert gate.scan is not None
        path = self.path / gate.stored.file
        tensors = read_tensors(path, self._specs(gate), leave=("keys",))
        scan = ProjectedKeys(*(tensors.pop(name) for name in SCAN_TENSORS))
        center = tensors.pop("center")
        keys: Array | None = None
        multipliers: Array
        if gate.keys == "projected":
            lengths, multipliers = tensors.pop(KEY_LENGTHS), scan.scales
        else:
            steps = tensors.pop("key_steps", None)
            keys = map_tensor(path, "keys")
            lengths = tensors.pop(KEY_LENGTHS, None)
            if lengths is None:
                lengths = key_lengths(path, center, steps)
            multipliers = np.ones_like(lengths) if steps is None else steps
        norms = lengths**2
        if self.similarity == "cosine":
            multipliers = multipliers / np.where(lengths > 0, lengths, np.float32(1))
            norms = (lengths > 0).astype(np.float32)
        memory = CompressedMemory(
            keys=keys,
            multipliers=multipliers[:, None].astype(np.float32),
            norms=norms,
            lengths=lengths,
            scan=scan,
            candidates=gate.scan.candidates,
            values=self._values_of(gate, tensors, rule, selection_bias),
            n_valid=gate.entries,
            k=self.neighbors,
            center=center,
            calibration=gate.calibration,
            similarity=self.similarity,
            rule_first=self.variant == "assignment",
            evidence_weights=self._evidence_weights(gate),
        )
        drawn = None if keys is None else memory.centred(sampled(gate.entries))
        if gate.scan.lengths or gate.keys == "projected":
            check_lengths(path, lengths, drawn)
        check_scan(path, scan, drawn)
        return memory

    def read_keys(self, gate: PackGate) -> tuple[Array, NDArray[np.float32]]:
        """Keys [N, D] as far as they are kept, not yet minus the centre, and the centre [D]."""
        if gate.keys != "projected":
            return self._read_keys(gate)[:2]
        tensors = read_tensors(self.path / gate.stored.file, self._specs(gate))
        scan = ProjectedKeys(*(tensors[name] for name in SCAN_TENSORS))
        steps = decode(scan.codes, scan.bits) * scan.scales[:, None]
        return steps @ scan.matrix() + tensors["center"], tensors["center"]

    def serves(self, variant: Variant) -> bool:
        """Whether the values of a variant can be made of what the pack holds."""
        return all(gate.values is None or gate.values.serve(variant) for gate in self.gates)

    def _values_of(
        self,
        gate: PackGate,
        tensors: dict[str, Any],
        rule: RoutingRule,
        selection_bias: NDArray[np.float32] | None,
    ) -> Values:
        """The variant's values of a gate's tensors, as they are stored if they can be."""
        if gate.values is not None:
            kept = stored_values(tensors, self.model.num_experts)
            if self.variant != "assignment":
                return kept
            return rule.assignments(kept.widened(), selection_bias)
        residuals = tensors["residuals"].astype(np.float32)
        if self.variant == "residual":
            return cast(NDArray[np.float32], residuals)
        learned = tensors["router_logits"].astype(np.float32) + residuals
        if self.variant == "logits":
            return cast(NDArray[np.float32], learned)
        return rule.assignments(learned, selection_bias)


def _check_finite(path: Path, memory: Memory) -> None:
    """Raise `MemoryPackError` if finite numbers of a file made others: sums, squares of keys."""
    made = {"values": memory.values}
    if isinstance(memory, GateMemory):
        made["squares of the keys"] = memory.key_scales
    for name, array in made.items():
        if isinstance(array, np.ndarray) and not np.isfinite(array).all():
            raise MemoryPackError(
                path, f"its numbers are so large that {name} are not finite", fix=REBUILD
            )


def prepare_keys(
    keys: Array, center: NDArray[np.float32], similarity: Similarity
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Stored keys [N, D] as the blend compares them: (keys fp32 [N, D], key_scales fp32 [N, 2])."""
    prepared = keys.astype(np.float32) - center
    if similarity == "cosine":
        prepared = unit_rows(prepared)
    squares = np.einsum("nd,nd->n", prepared, prepared, dtype=np.float64)
    scales = np.stack([np.ones(len(prepared)), squares], axis=1).astype(np.float32)
    return np.ascontiguousarray(prepared, dtype=np.float32), scales


def write_pack(
    path: str | Path,
    *,
    model: ModelIdentity,
    gates: Mapping[int, GateEntries] | Mapping[int, StoredTensors],
    variant: Variant,
    neighbors: int,
    similarity: Similarity,
    calibration: Calibration | Mapping[int, Calibration],
    origins: EntryOrigins | StoredTensors | None,
    provenance: Mapping[str, Any],
    evidence: EvidenceFrom = "all",
    overwrite: bool = False,
) -> MemoryPack:
    """Write a memory pack and return it opened.

    Args:
        gates: Entries by gate, in memory or in files; gates without any are left to the frozen
            router. What is in a file is not looked at.
        calibration: For all gates, or by gate.
        evidence: Which entries are; `reference` needs `origins`.

    Raises:
        MemoryPackError: If a gate is empty, or holds NaN or infinite numbers.
        OutputError: If the directory cannot be written.
    """
    if not gates:
        raise MemoryPackError(path, "no gate has entries", fix="Use a longer reference text.")
    check_neighbors(neighbors)
    written: Mapping[int, GateEntries | StoredTensors] = dict(gates)
    for gate, entries in written.items():
        if isinstance(entries, StoredTensors):
            continue
        if len(entries.keys) == 0:
            raise MemoryPackError(
                path, f"gate {gate} has no entries", fix="Use a longer reference text."
            )
        for name, tensor in vars(entries).items():
            if not np.isfinite(tensor).all():
                raise MemoryPackError(
                    path,
                    f"{name} of gate {gate} has NaN or infinite numbers",
                    fix="Store with more precision, or build with a lower rate.",
                )
    with new_directory(Path(path), overwrite=overwrite) as target:
        stated = []
        for gate, entries in sorted(written.items()):
            numbers = calibration if isinstance(calibration, Calibration) else calibration[gate]
            name = f"gate-{gate:02d}.safetensors"
            if isinstance(entries, StoredTensors):
                stored, count = link_tensors(target, name, entries.path), entries.rows
            else:
                stored, count = write_tensors(target, name, vars(entries)), len(entries.keys)
            stated.append(
                {
                    "gate": gate,
                    **asdict(stored),
                    "entries": count,
                    "calibration": numbers.to_json(),
                    "used": True,
                }
            )
        write_manifest(
            target,
            {
                "schema": SCHEMA,
                "model": asdict(model),
                "variant": variant,
                "neighbors": neighbors,
                "similarity": similarity,
                "evidence": evidence,
                "calibrated": False,
                "gates": stated,
                "entries": write_origins(target, origins),
                "provenance": dict(provenance),
            },
        )
    return MemoryPack.open(path)


def write_origins(
    target: Path, origins: EntryOrigins | StoredTensors | None
) -> dict[str, Any] | None:
    """Write where the entries came from into a pack's directory; what its manifest says of that."""
    if origins is None:
        return None
    if isinstance(origins, StoredTensors):
        linked = link_tensors(target, ENTRIES, origins.path)
        return {**asdict(linked), "rows": origins.rows}
    columns = {name: getattr(origins, name) for name in ("token_ids", "documents", "positions")}
    columns |= {f"rows_{gate:02d}": rows for gate, rows in origins.merged.items()}
    columns |= {f"counts_{gate:02d}": counts for gate, counts in origins.counts.items()}
    stated = asdict(write_tensors(target, ENTRIES, columns))
    return {**stated, "rows": len(origins.documents)} if origins.merged else stated


def rewrite_settings(pack: MemoryPack, provenance: Mapping[str, Any]) -> MemoryPack:
    """Replace the settings and provenance of a pack on disk by those of `pack`, atomically.

    Only `memory.json` changes; it is written beside the old one and renamed over it.
    """
    manifest = dict(KIND.read(pack.path).content)
    by_gate = {gate.gate: gate for gate in pack.gates}
    manifest["variant"] = pack.variant
    manifest["neighbors"] = pack.neighbors
    manifest["similarity"] = pack.similarity
    manifest["schema"] = SCHEMA
    manifest["evidence"] = pack.evidence
    manifest["calibrated"] = pack.calibrated
    manifest["provenance"] = dict(provenance)
    for stated in manifest["gates"]:
        stated["calibration"] = by_gate[stated["gate"]].calibration.to_json()
        stated["used"] = by_gate[stated["gate"]].used
    write_manifest(pack.path, manifest)
    return MemoryPack.open(pack.path)


def _parse(root: Path, top: Fields) -> MemoryPack:
    top.only(
        "schema", "model", "variant", "neighbors", "similarity", "gates", "entries", "provenance",
        optional=("evidence", "calibrated"),
    )  # fmt: skip
    older = top.content["schema"] in OLDER
    provenance = top.object("provenance").content
    model = _parse_model(top.object("model"))
    gates = tuple(_parse_gate(entry, model) for entry in top.objects("gates"))
    numbers = [gate.gate for gate in gates]
    if not gates or sorted(set(numbers)) != numbers:
        raise top.wrong(
            "gates", "must be listed once each, in order, at least one", found=numbers[:10]
        )
    rows = max(gate.entries for gate in gates)
    if top.has("entries") and top.object("entries").has("rows"):
        rows = top.object("entries").integer("rows", rows, MAX_DIMENSION)
    variant = top.text("variant", choices=VARIANTS)
    similarity = top.text("similarity", choices=SIMILARITIES)
    for gate in gates:
        if gate.values is not None and not gate.values.serve(cast(Variant, variant)):
            raise top.wrong(
                "variant", f"cannot be made of the values of gate {gate.gate}",
                expected="residual" if gate.values.of == "residuals" else "logits or assignment",
                found=variant,
            )  # fmt: skip
    return MemoryPack(
        path=root,
        model=model,
        variant=cast(Variant, variant),
        neighbors=top.integer("neighbors", 1, MAX_NEIGHBORS),
        similarity=cast(Similarity, similarity),
        gates=gates,
        origins=_parse_file(top.object("entries")) if top.has("entries") else None,
        origin_rows=rows,
        provenance=provenance,
        evidence=cast(EvidenceFrom, "all" if older else top.text("evidence", choices=EVIDENCE)),
        calibrated=("calibration" in provenance) if older else top.boolean("calibrated"),
    )


def _parse_model(entry: Fields) -> ModelIdentity:
    entry.only("fingerprint", "model_type", "num_gates", "hidden_size", "num_experts")
    return ModelIdentity(
        fingerprint=entry.text("fingerprint", pattern=r"sha256:[0-9a-f]{64}"),
        model_type=entry.text("model_type"),
        num_gates=entry.integer("num_gates", 1, MAX_GATES),
        hidden_size=entry.integer("hidden_size", 1, MAX_DIMENSION),
        num_experts=entry.integer("num_experts", 1, MAX_DIMENSION),
    )


def _parse_gate(entry: Fields, model: ModelIdentity) -> PackGate:
    entry.only(
        "gate", "file", "sha256", "size", "entries", "calibration",
        optional=("keys", "scan", "used", "values"),
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
    if keys == "projected" and scan is None:
        raise entry.wrong("keys", "are projected by nothing", expected="a scan", found=keys)
    return PackGate(
        gate=entry.integer("gate", 0, model.num_gates - 1),
        stored=_parse_file(entry),
        entries=entry.integer("entries", 1, MAX_DIMENSION),
        calibration=calibration,
        scan=scan,
        keys=cast(KeyKind, keys),
        values=_parse_values(entry.object("values"), model) if entry.has("values") else None,
        used=entry.boolean("used") if entry.has("used") else True,
    )


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


def _parse_file(entry: Fields) -> PackFile:
    return PackFile(
        entry.text("file", pattern=r"[A-Za-z0-9_-][A-Za-z0-9._-]{0,99}"),
        entry.text("sha256", pattern=r"[0-9a-f]{64}"),
        entry.integer("size", 0, 1 << 50),
    )
