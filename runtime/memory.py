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

from .blend import GateMemory
from .bundle import MAX_DIMENSION
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
    KEY_LENGTHS,
    PARTS,
    RESTORED,
    check_lengths,
    check_scan,
    key_lengths,
    map_tensor,
    sampled,
    stored_values,
    taken_projection,
)
from .errors import MemoryPackError, SettingError
from .manifest import Fields
from .pack_files import (
    ENTRIES,
    MANIFEST,
    REBUILD,
    PackFile,
    Seen,
    check_file,
    read_tensors,
    seen_as,
)
from .pack_manifest import KIND, OLDER, parse_file, parse_gate, parse_model
from .pack_parts import Array, EntryOrigins, GateEntries, ModelIdentity, PackGate
from .pack_tensors import gate_specs, prepare_keys, read_gate, read_origins
from .routing import RoutingRule
from .stored_values import Values, dense


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
        seen = {}
        for stored in pack.files:
            found = seen_as(root / stored.file)
            check_file(root, stored, verify)
            if verify and found is not None:
                seen[stored.file] = found
        return replace(pack, seen=seen)

    @property
    def files(self) -> tuple[PackFile, ...]:
        """All that hold tensors."""
        origins = () if self.origins is None else (self.origins,)
        return (*(gate.stored for gate in self.gates), *origins)

    def check_unchanged(self) -> None:
        """Hash the files again that are not those which were found right when it was opened.

        Raises:
            MemoryPackError: If one is missing, or was changed.
        """
        for stored in self.files:
            found = seen_as(self.path / stored.file)
            if found is None or found != self.seen.get(stored.file):
                check_file(self.path, stored, verify=True)

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
        if gate.values is not None or gate.keys in RESTORED:
            raise MemoryPackError(
                self.path,
                f"gate {gate.gate} no longer has what it was compressed from",
                expected="full keys, router logits and residuals",
                found=f"keys {gate.keys}, values {gate.values.of if gate.values else 'full'}",
                fix="Use the pack that this one was made of.",
            )
        keys, center, tensors = read_gate(self.path, gate, self.model)
        return GateEntries(keys=keys, center=center, **tensors)

    def read_origins(self) -> EntryOrigins | None:
        """Where the entries came from, or None if the pack does not say."""
        if self.origins is None:
            return None
        path = self.path / self.origins.file
        return read_origins(path, self.origin_rows, self.gates)

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
        if gate.keys in RESTORED:
            return self._compressed_memory(gate, rule, selection_bias).widened()
        whole, center, tensors = read_gate(self.path, gate, self.model)
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
        """One gate's memory: compressed where a projection serves this use, else `gate_memory`.

        Raises:
            MemoryPackError: If the file was changed since the pack was opened, is damaged, or its
                numbers leave some that are not finite.
        """
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
        tensors = read_tensors(path, gate_specs(gate, self.model), leave=("keys",))
        scan = taken_projection(tensors, "scan")
        parts = tuple(taken_projection(tensors, name) for name in PARTS if gate.key_widths)
        center = tensors.pop("center")
        keys: Array | None = None
        multipliers: Array
        if gate.keys in RESTORED:
            lengths = tensors.pop(KEY_LENGTHS)
            multipliers = np.ones_like(lengths) if parts else scan.scales
        else:
            steps = tensors.pop("key_steps", None)
            keys = map_tensor(path, "keys")
            lengths = tensors.pop(KEY_LENGTHS, None)
            if lengths is None:
                lengths = key_lengths(path, center, steps)
            multipliers = np.ones_like(lengths) if steps is None else steps
        norms = lengths**2
        if self.similarity == "cosine":
            divisors = np.where(lengths > 0, lengths, np.float32(1)).astype(np.float32)
            parts = tuple(replace(part, scales=part.scales / divisors) for part in parts)
            multipliers = multipliers if parts else multipliers / divisors
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
            parts=parts,
        )
        drawn = None if gate.keys == "projected" else memory.centred(sampled(gate.entries))
        if gate.scan.lengths or gate.keys in RESTORED:
            check_lengths(path, lengths, None if keys is None else drawn)
        for part, name in zip(parts, PARTS, strict=False):
            check_scan(path, part, None, name)
        check_scan(path, scan, drawn)
        return memory

    def read_keys(self, gate: PackGate) -> tuple[Array, NDArray[np.float32]]:
        """Keys [N, D] as far as they are kept, not yet minus the centre, and the centre [D]."""
        if gate.keys not in RESTORED:
            return read_gate(self.path, gate, self.model)[:2]
        tensors = read_tensors(self.path / gate.stored.file, gate_specs(gate, self.model))
        names = tuple(PARTS) if gate.key_widths else ("scan",)
        rows = sum(taken_projection(tensors, name).restored() for name in names)
        return rows + tensors["center"], tensors["center"]

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


def _parse(root: Path, top: Fields) -> MemoryPack:
    top.only(
        "schema", "model", "variant", "neighbors", "similarity", "gates", "entries", "provenance",
        optional=("evidence", "calibrated"),
    )  # fmt: skip
    older = top.content["schema"] in OLDER
    provenance = top.object("provenance").content
    model = parse_model(top.object("model"))
    gates = tuple(parse_gate(entry, model) for entry in top.objects("gates"))
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
        origins=parse_file(top.object("entries")) if top.has("entries") else None,
        origin_rows=rows,
        provenance=provenance,
        evidence=cast(EvidenceFrom, "all" if older else top.text("evidence", choices=EVIDENCE)),
        calibrated=("calibration" in provenance) if older else top.boolean("calibrated"),
    )
