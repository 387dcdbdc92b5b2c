"""Ways of making a memory smaller, and which are worth measuring: by probes, not by likelihood."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from itertools import product

import numpy as np
from numpy.typing import NDArray

from knnmoe.runtime.calibration import Variant
from knnmoe.runtime.memory import MemoryPack
from knnmoe.runtime.pack_parts import GateEntries, PackGate
from knnmoe.runtime.projection import SCAN_BITS, WIDTH_STEP, ProjectedKeys
from knnmoe.runtime.routing import RoutingRule
from knnmoe.runtime.stored_values import value_types

from .compress import CompressSettings, Kept, StoredAs
from .controls import Background
from .costs import GateShape, held_bytes
from .probes import (
    KeysFound,
    Probe,
    compared_keys,
    make_probe,
    probe_entries,
    probe_graded,
    probe_keys,
    probe_scan,
    probe_values,
)
from .recall import Keys, Widths, graded_widths, scanned
from .recorded import GateInputs
from .reduce import REDUCTIONS, Credit, Reduction, credit_of, keep, merge

LEAST_ENTRIES = 64  # of a gate
SHARES = (0.5, 0.2)  # of the entries, that reductions are tried at
PROBED_GATES = 2
KEPT_AS: tuple[Keys, ...] = ("projected", "int8", "fp16")  # and graded
_NAMES = {"projected": "keys projected", "int8": "int8 keys", "fp16": "fp16 keys"}


@dataclass(frozen=True)
class Recipe:
    """A way of making a memory smaller.

    Attributes:
        keys, width, bits, values: As in `CompressSettings`.
        share: Of each gate's entries that are left.
        reduction: How those are found; None where all are.
        key_widths: Of graded keys.
    """

    keys: Keys
    width: int
    bits: int
    values: StoredAs
    share: float = 1.0
    reduction: Reduction | None = None
    key_widths: Widths | None = None

    @property
    def name(self) -> str:
        """As people read it."""
        kept = _NAMES.get(self.keys, self.keys)
        if self.key_widths is not None:
            kept = "keys {}×8 + {}×4 bit".format(*self.key_widths)
        keys = f"{kept}, scan {self.width}×{self.bits} bit"
        less = f", {self.share:.0%} of entries by {self.reduction}" if self.reduction else ""
        return f"{keys}, {self.values} values{less}"

    def settings(self, candidates: int) -> CompressSettings:
        """What writes it."""
        return CompressSettings(
            self.width, self.bits, candidates, keys=self.keys, values=self.values,
            key_widths=self.key_widths,
        )  # fmt: skip

    def entries(self, gate: PackGate) -> int:
        """Entries of a gate that are left, at most."""
        if self.reduction is None:
            return gate.entries
        return min(gate.entries, max(LEAST_ENTRIES, int(self.share * gate.entries)))

    def shape(self, pack: MemoryPack, gate: PackGate, candidates: int) -> GateShape:
        """A gate of it, as costs see it."""
        size, experts = pack.model.hidden_size, pack.model.num_experts
        return GateShape(
            self.entries(gate), size, experts, self.width, self.bits, candidates, self.keys,
            self.values, key_widths=self.key_widths,
        )  # fmt: skip

    def bytes(self, pack: MemoryPack, gates: Sequence[PackGate], candidates: int) -> int:
        """What the runtime holds of it."""
        return sum(held_bytes(self.shape(pack, gate, candidates)) for gate in gates)


def recipes(pack: MemoryPack, *, reductions: Sequence[Reduction] = REDUCTIONS) -> list[Recipe]:
    """All that are considered, the shares of their entries still open."""
    kinds = value_types(pack.model.num_experts)
    size = pack.model.hidden_size
    ways: list[tuple[Keys, Widths | None]] = [(keys, None) for keys in KEPT_AS]
    ways += [("graded", each) for each in graded_widths(size)]
    return [
        Recipe(keys, width, bits, values, 1.0, reduction, graded)
        for (keys, graded), width, bits, values, reduction in product(
            ways, widths(size), SCAN_BITS, kinds, (None, *reductions)
        )
    ]


def widths(size: int) -> tuple[int, ...]:
    """Widths that are tried of keys of D elements."""
    shares = (1 / 8, 1 / 4, 3 / 8, 1 / 2, 3 / 4, 1)
    found = {max(WIDTH_STEP, round(s * size / WIDTH_STEP) * WIDTH_STEP) for s in shares}
    return tuple(sorted(w for w in found if w <= size))


def smallest(pack: MemoryPack, gates: Sequence[PackGate], candidates: int) -> int:
    """The bytes of the smallest memory that is made."""
    values = value_types(pack.model.num_experts)[-1]
    least = Recipe("projected", WIDTH_STEP, 4, values, 0.0, "credit")
    return least.bytes(pack, gates, candidates)


def fitted(
    recipe: Recipe, pack: MemoryPack, gates: Sequence[PackGate], candidates: int, limit: int
) -> Recipe | None:
    """The recipe with as many entries as a limit of bytes has room for; None if it has none.

    A recipe that reduces although all entries would fit is none either.
    """
    if recipe.reduction is None:
        return recipe if recipe.bytes(pack, gates, candidates) <= limit else None
    if replace(recipe, reduction=None).bytes(pack, gates, candidates) <= limit:
        return None
    low, high = 0.0, 1.0
    if replace(recipe, share=low).bytes(pack, gates, candidates) > limit:
        return None
    for _ in range(30):
        middle = (low + high) / 2
        fits = replace(recipe, share=middle).bytes(pack, gates, candidates) <= limit
        low, high = (middle, high) if fits else (low, middle)
    return replace(recipe, share=low)


class Reducer:
    """Entries of gates left by a recipe; credit is found once a gate.

    Args:
        pack: The memory.
        rule: The model's, and its gates' selection biases.
        asked: By gate, router inputs of the domain's text; empty without text.
        gains: [T] nats gained with each of their tokens.
        background: Which entries are of background text.
    """

    def __init__(
        self,
        pack: MemoryPack,
        rule: RoutingRule,
        asked: Mapping[int, GateInputs],
        gains: NDArray[np.float64] | None,
        background: Background,
    ) -> None:
        self._pack, self._rule, self._asked = pack, rule, asked
        self._gains, self._background = gains, background
        origins = pack.read_origins()
        self._counts = {} if origins is None else dict(origins.counts)
        self._credits: dict[int, Credit] = {}

    def credit(self, gate: PackGate) -> Credit:
        """A gate's."""
        if gate.gate not in self._credits:
            # Only neighbours and their weights are read of it: its values may be any variant's.
            plain = self._pack.with_settings(variant=_plain_variant(self._pack))
            memory = plain.gate_memory(gate, self._rule)
            asked = self._asked.get(gate.gate)
            self._credits[gate.gate] = credit_of(memory, asked, self._gains)
        return self._credits[gate.gate]

    def reduce(self, gate: PackGate, entries: GateEntries, recipe: Recipe) -> Kept:
        """What a recipe leaves of a gate."""
        count = len(entries.keys)
        members = np.asarray(self._counts.get(gate.gate, np.ones(count)), np.int64)
        if recipe.reduction is None:
            return Kept(entries, np.arange(count), members)
        room = recipe.entries(gate)
        if recipe.reduction == "credit":
            return keep(entries, self.credit(gate), room, members)
        kinds = None if self._background is None else self._background[gate.gate]
        compared = compared_keys(entries, self._pack)
        return merge(entries, compared, self.credit(gate), room, members, kinds)


def _plain_variant(pack: MemoryPack) -> Variant:
    return "residual" if pack.variant == "assignment" else pack.variant


@dataclass(frozen=True)
class Probed:
    """What probes say of a recipe.

    Attributes:
        error: Of the corrections, mean square over that of the memory's own, mean of gates.
        recall: Of the K nearest by the keys kept.
    """

    error: float
    recall: float


class Prober:
    """Errors of recipes, each part of which is probed once: their sum is the recipe's.

    Args:
        pack: The memory.
        gates: Of which some are probed.
        reducer: For fewer entries.
        asked: By gate; empty without text.
        candidates: R.
    """

    def __init__(
        self,
        pack: MemoryPack,
        gates: Sequence[PackGate],
        reducer: Reducer,
        asked: Mapping[int, GateInputs],
        candidates: int,
    ) -> None:
        spread = np.unique(np.linspace(0, len(gates) - 1, PROBED_GATES).round().astype(int))
        self._pack, self._reducer, self._candidates = pack, reducer, candidates
        self._entries = [(gates[i], pack.read(gates[i])) for i in spread]
        self._probes: list[Probe] = [
            make_probe(pack, gate, entries, asked.get(gate.gate)) for gate, entries in self._entries
        ]
        self._keys = cache(self._probe_keys)
        self._graded = cache(self._probe_graded)
        self._scans: dict[tuple[int, int, int], NDArray[np.int64]] = {}
        self._values = cache(self._probe_values)
        self._reduced = cache(self._probe_reduced)

    def probed(self, recipe: Recipe) -> Probed:
        """Of a recipe."""
        scan = (recipe.width, recipe.bits)
        keys = (
            self._keys(scan)[recipe.keys]
            if recipe.key_widths is None
            else (self._graded(recipe.key_widths)[scan])
        )
        error = keys.error + self._values(recipe.values)
        if recipe.reduction is not None:
            shares = np.log(np.array([0.01, *SHARES[::-1], 1.0]))
            errors = [self._reduced(recipe.reduction, share) for share in SHARES[::-1]]
            points = [max(1.0, errors[0]), *errors, 0.0]
            error += float(np.interp(np.log(max(recipe.share, 1e-3)), shares, points))
        return Probed(float(error), keys.recall)

    def _probe_keys(self, scan: tuple[int, int]) -> dict[Keys, KeysFound]:
        """Of a width and bits that are scanned, by how keys are kept."""
        found: dict[Keys, list[KeysFound]] = {kind: [] for kind in KEPT_AS}
        for number, probe in enumerate(self._probes):
            keys = probe_scan(probe, *scan)
            candidates = self._candidates_of(number, scan, keys)
            for kind in KEPT_AS:
                found[kind].append(probe_keys(probe, candidates, kind, [keys]))
        return {kind: _mean(each) for kind, each in found.items()}

    def _probe_graded(self, key_widths: Widths) -> dict[tuple[int, int], KeysFound]:
        """Of graded keys, by width and bits that are scanned: they are made once for all."""
        found: dict[tuple[int, int], list[KeysFound]] = {}
        size = self._pack.model.hidden_size
        for number, probe in enumerate(self._probes):
            parts = probe_graded(probe, key_widths)
            for scan in product(widths(size), SCAN_BITS):
                candidates = self._candidates_of(number, scan)
                each = probe_keys(probe, candidates, "graded", parts)
                found.setdefault(scan, []).append(each)
        return {scan: _mean(each) for scan, each in found.items()}

    def _candidates_of(
        self, number: int, scan: tuple[int, int], keys: ProjectedKeys | None = None
    ) -> NDArray[np.int64]:
        """What a probe's scan finds, kept: it takes longer than to score what it found."""
        name = (number, *scan)
        if name not in self._scans:
            probe = self._probes[number]
            keys = probe_scan(probe, *scan) if keys is None else keys
            self._scans[name] = scanned(probe.exact, keys, self._candidates)
        return self._scans[name]

    def _probe_values(self, kind: StoredAs) -> float:
        return float(np.mean([probe_values(probe, kind) for probe in self._probes]))

    def _probe_reduced(self, reduction: Reduction, share: float) -> float:
        recipe = Recipe("fp16", WIDTH_STEP, 8, "fp16", share, reduction)
        errors = []
        for probe, (gate, entries) in zip(self._probes, self._entries, strict=True):
            left = self._reducer.reduce(gate, entries, recipe).entries
            errors.append(probe_entries(probe, left, self._pack))
        return float(np.mean(errors))


def _mean(found: Sequence[KeysFound]) -> KeysFound:
    """Of the gates probed."""
    return KeysFound(
        float(np.mean([one.recall for one in found])), float(np.mean([one.error for one in found]))
    )


def short_list(
    considered: Sequence[Recipe], probed: Callable[[Recipe], Probed], count: int
) -> list[Recipe]:
    """The likeliest of those that fit: by their errors, but not all alike.

    No two differ in width, bits and values alone: the best of each way to keep keys and of each
    reduction come first, as far as the best error is not far off, then the next best.
    """
    ranked = sorted(considered, key=lambda recipe: (probed(recipe).error, recipe.name))
    if not ranked:
        return []
    near = probed(ranked[0]).error * 4 + 0.05
    chosen: list[Recipe] = []
    for recipe in ranked:
        kind = (recipe.keys, recipe.reduction)
        if probed(recipe).error <= near and kind not in {(c.keys, c.reduction) for c in chosen}:
            chosen.append(recipe)
    chosen = chosen[: max(1, count - 1)]
    chosen += [recipe for recipe in ranked if recipe not in chosen][: count - len(chosen)]
    return chosen
