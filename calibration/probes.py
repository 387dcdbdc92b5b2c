"""What becomes of a gate's corrections when its memory is made smaller, without running a model.

A probe is some router inputs of a gate and what the memory answers them: the correction
s̄ · (v̄ - interpolate · r). How far a smaller memory's answers are from these, as a share of their
mean square, ranks ways of making it smaller; which of the best is best the likelihood decides.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from knnmoe.runtime.blend import neighbor_weights, token_evidence, unit_rows
from knnmoe.runtime.calibration import Calibration, Similarity
from knnmoe.runtime.memory import MemoryPack
from knnmoe.runtime.pack_parts import GateEntries, PackGate
from knnmoe.runtime.pack_tensors import prepare_keys
from knnmoe.runtime.projection import ProjectedKeys
from knnmoe.runtime.stored_values import store_values

from .compress import StoredAs
from .recall import (
    RESTORED,
    Exact,
    Keys,
    Widths,
    correction,
    graded_parts,
    principal,
    project_keys,
    scored,
    turned,
)
from .recorded import GateInputs

QUERIES = 192
AMONG = 20_000  # entries that probes are searched among, at most
_FITTED = 16_384

Floats = NDArray[np.floating[Any]]


@dataclass(frozen=True)
class Probe:
    """Router inputs of a gate and what its memory answers.

    Attributes:
        exact: Centred queries [T, D], the centred keys [N', D] they are searched among, and who is
            nearest.
        router_logits: [T, E], of the queries.
        values: [N', E].
        entries: [N'] which of the gate's entries those are.
        directions: Principal directions of the keys, [D, D].
        numbers, similarity: Of the gate.
    """

    exact: Exact
    router_logits: Floats
    values: Floats
    entries: NDArray[np.int64]
    directions: Floats
    numbers: Calibration
    similarity: Similarity

    def answers(self, neighbors: NDArray[np.int64], products: Floats, values: Floats) -> Floats:
        """Corrections [T, E] of neighbours [T, K] with inner products as keys are compared."""
        similar = self._similarities(neighbors, products)
        found = np.ones(similar.shape, np.bool_)
        weights = neighbor_weights(similar, found, self.numbers)
        means = np.einsum("tk,tke->te", weights, values[neighbors])
        evidence = token_evidence(similar, found, self.numbers)
        replaced = self.numbers.interpolate * self.router_logits
        corrections: Floats = evidence[:, None] * (means - replaced)
        return corrections

    def right(self) -> Floats:
        """The memory's own."""
        return self.answers(self.exact.nearest, self.exact.nearest_products(), self.values)

    def _similarities(self, neighbors: NDArray[np.int64], products: Floats) -> Floats:
        squares = (self.exact.queries**2).sum(axis=1, keepdims=True)
        if self.similarity == "cosine":
            cosines: Floats = np.clip(products / np.sqrt(np.maximum(squares, 1e-30)), 0, 1)
            return cosines
        distances = np.maximum(squares - 2 * products + self.exact.norms[neighbors], 0)
        similar: Floats = np.exp(-self.numbers.gamma * distances)
        return similar


@dataclass(frozen=True)
class KeysFound:
    """What a way of storing keys does to a probe.

    Attributes:
        recall: Share of the K nearest that are among the K returned.
        error: Of the corrections, mean square over that of the right ones.
    """

    recall: float
    error: float


def make_probe(
    pack: MemoryPack, gate: PackGate, entries: GateEntries, asked: GateInputs | None, seed: int = 0
) -> Probe:
    """A probe of a gate.

    Args:
        pack: For its K, similarity and variant.
        gate: The gate.
        entries: Its entries.
        asked: Router inputs of text; None takes entries of the memory, which are then not among
            those searched.
        seed: Of what is drawn.
    """
    random = np.random.default_rng([seed, gate.gate])
    order = random.permutation(len(entries.keys))
    held = 0 if asked is not None else min(QUERIES, len(order) // 8)
    among = np.sort(order[held : held + AMONG])
    if asked is not None:
        drawn = random.permutation(len(asked.x))[:QUERIES]
        x, router_logits = asked.x[drawn], asked.router_logits[drawn]
    else:
        x = entries.keys[order[:held]].astype(np.float32)
        router_logits = entries.router_logits[order[:held]].astype(np.float32)
    keys = entries.keys[among].astype(np.float32) - entries.center
    values = values_of(entries, pack)[among]
    exact = Exact.of(x - entries.center, keys, min(pack.neighbors, len(among)), pack.similarity)
    fitted = (
        keys[:_FITTED] if len(keys) <= _FITTED else keys[random.permutation(len(keys))[:_FITTED]]
    )
    directions = principal(unit_rows(fitted) if pack.similarity == "cosine" else fitted)
    return Probe(exact, router_logits, values, among, directions, gate.calibration, pack.similarity)


def values_of(entries: GateEntries, pack: MemoryPack) -> NDArray[np.float32]:
    """What a pack's variant blends [N, E], the learned logits for `assignment`."""
    values: NDArray[np.float32] = entries.residuals.astype(np.float32)
    return values if pack.variant == "residual" else values + entries.router_logits


def probe_scan(probe: Probe, width: int, bits: int) -> ProjectedKeys:
    """The keys as they are scanned."""
    return project_keys(probe.exact.among, turned(probe.directions, width, 0), bits)


def probe_graded(probe: Probe, widths: Widths) -> list[ProjectedKeys]:
    """What graded keys are the sum of."""
    matrices = graded_parts(probe.directions, widths, 0)
    return [project_keys(probe.exact.among, *part) for part in matrices]


def probe_keys(
    probe: Probe, candidates: NDArray[np.int64], kind: Keys, parts: Sequence[ProjectedKeys]
) -> KeysFound:
    """Of keys that are kept so.

    Args:
        probe: The probe.
        candidates: [T, R] that a scan found.
        kind: How keys are kept.
        parts: Of projected or graded keys, what they are the sum of.
    """
    ids, products = scored(probe.exact, candidates, kind, parts)
    if kind in RESTORED:
        products = products * correction(probe.exact, products)
    answers = probe.answers(ids, products, probe.values)
    same = (probe.exact.nearest[:, :, None] == ids[:, None, :]).any(axis=2)
    return KeysFound(float(same.mean()), _error(answers, probe.right()))


def probe_values(probe: Probe, kind: StoredAs) -> float:
    """The error of values stored so."""
    if kind == "as-stored":
        return 0.0
    near = np.unique(probe.exact.nearest)
    rounded = probe.values.copy()
    rounded[near] = store_values(probe.values[near], kind).widened()
    products = probe.exact.nearest_products()
    return _error(probe.answers(probe.exact.nearest, products, rounded), probe.right())


def probe_entries(probe: Probe, entries: GateEntries, pack: MemoryPack) -> float:
    """The error of a memory of other entries, kept in full."""
    keys = entries.keys.astype(np.float32) - entries.center
    count = min(probe.exact.nearest.shape[1], len(keys))
    exact = Exact.of(probe.exact.queries, keys, count, probe.similarity)
    other = Probe(
        exact, probe.router_logits, values_of(entries, pack), probe.entries, probe.directions,
        probe.numbers, probe.similarity,
    )  # fmt: skip
    return _error(other.right(), probe.right())


def compared_keys(entries: GateEntries, pack: MemoryPack) -> NDArray[np.float32]:
    """Keys [N, D] as they are compared."""
    return prepare_keys(entries.keys, entries.center, pack.similarity)[0]


def _error(answers: Floats, right: Floats) -> float:
    return float(((answers - right) ** 2).sum() / max(float((right**2).sum()), 1e-30))
