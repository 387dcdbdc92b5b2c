"""What a compressed memory costs: bytes that the runtime holds, and milliseconds a token.

What a gate adds to a step is a sum of parts, each proportional to something that is known without
running it; how much a unit of each takes is fitted to steps of the model with made-up memories,
each in turn with the frozen step. Gates by themselves take half as long as between the segments of
a step, which leave them cold caches.

    ms = constant + scanned codes (of 4 and of 8 bits) + blocks of them + entries + projection W·D
         + gathered R·D (of projected keys R·W') + restored W'·D (where no full keys are kept)
         + widening values (where they are stored)

Weights of the fit are 1/ms, so that small gates count as large ones do; coefficients are not
negative.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from time import perf_counter, thread_time
from typing import Any

import numpy as np
from numpy.typing import NDArray

from knnmoe.runtime.atomic import write_file
from knnmoe.runtime.calibration import Calibration, Similarity
from knnmoe.runtime.compressed import CompressedMemory
from knnmoe.runtime.compressed_files import PARTS
from knnmoe.runtime.engines.base import Run
from knnmoe.runtime.errors import SettingError
from knnmoe.runtime.gates.scan import BLOCKED_ENTRIES
from knnmoe.runtime.gates.two_stage import SCANNED_ELEMENTS
from knnmoe.runtime.memory import MemoryPack
from knnmoe.runtime.model import Model
from knnmoe.runtime.pipeline import Pipeline
from knnmoe.runtime.projection import ProjectedKeys, block_size
from knnmoe.runtime.stored_values import BITS, groups_of, store_values

from .compress import StoredAs
from .recall import RESTORED, Keys, Widths, graded_widths

SCHEMA = "knnmoe.costs/3"
FEATURES = (
    "constant", "codes_4", "codes_8", "blocks", "entries", "projection", "gathered", "restored",
    "values",
)  # fmt: skip
_SECONDS = 12.0  # of timing, at least
_FEWEST = 12  # rounds
_KEY_ELEMENTS = 1 << 24  # of made-up full keys, at most
_CONTEXT = 32
_GATES = 4  # that have a memory, at most
_MEMORY_BYTES = 1 << 29
_MANY_BLOCKS = 96  # a width with three blocks, which 32, 64 and 128 have one of
_LEAST_MS = 1e-4  # where noise hides what a gate adds


@dataclass(frozen=True)
class GateShape:
    """One gate of a compressed memory, as far as its costs go.

    Attributes:
        entries, hidden_size, experts: N, D, E.
        width, bits: Of what is scanned.
        candidates: R.
        keys, values: How they are stored.
        element: Bytes of an element of full keys as the pack has them.
        key_widths: Of graded keys.
    """

    entries: int
    hidden_size: int
    experts: int
    width: int
    bits: int
    candidates: int
    keys: Keys
    values: StoredAs
    element: int = 2
    key_widths: Widths | None = None

    @property
    def restored(self) -> int:
        """Directions of projected keys that stand for full ones; 0 where these are kept."""
        return sum(self.key_widths or ()) or (self.width if self.keys == "projected" else 0)

    @property
    def features(self) -> NDArray[np.float64]:
        """What its time is a sum of, in millions but for numbers of a kind."""
        codes = self.entries * self.width / 1e6
        gathered = min(self.candidates, self.entries) * (self.restored or self.hidden_size) / 1e6
        named = {
            "constant": 1.0,
            f"codes_{self.bits}": codes,
            "blocks": self.entries * (self.width // block_size(self.width)) / 1e6,
            "entries": self.entries / 1e6,
            "projection": self.width * self.hidden_size / 1e6,
            "gathered": gathered,
            "restored": self.restored * self.hidden_size / 1e6,
            "values": float(self.values in BITS),
        }
        return np.array([named.get(name, 0.0) for name in FEATURES])


def held_bytes(gate: GateShape) -> int:
    """What the runtime holds of a compressed gate on the host, arrays of the search and the blend.

    What is scanned is held as ONNX Runtime rearranged it; codes of keys that are not kept in full
    once more, by row. Mapped keys count too.
    """
    n, d, w = gate.entries, gate.hidden_size, gate.width
    fine, coarse = gate.key_widths or (0, 0)
    codes = n * w * gate.bits // 8
    scan = codes + n * 4 * (w // block_size(w)) + 4 * n  # scales by block; mask and norms
    scan += w * d + 4 * w * (d // block_size(d))
    rows = 4 * d + n * (4 + 4)  # centre; multiplier, evidence
    rows += 8 * n if n >= BLOCKED_ENTRIES else 0  # numbers of the entries by block
    keys = {
        "as-stored": n * d * gate.element,
        "fp16": n * d * 2,
        "int8": n * d,
        "projected": codes + w * d + 4 * w,
        "graded": n * (fine + coarse // 2 + 8) + (fine + coarse) * (d + 4),
    }[gate.keys]
    return scan + rows + keys + value_bytes(gate)


def value_bytes(gate: GateShape) -> int:
    """Of a gate's values as the runtime holds them."""
    if gate.values not in BITS:
        return gate.entries * gate.experts * (2 if gate.values == "fp16" else 4)
    return gate.entries * (gate.experts * BITS[gate.values] // 8 + 4 * groups_of(gate.experts))


def plain_bytes(entries: int, hidden_size: int, experts: int) -> int:
    """What the runtime holds of a gate that is not compressed, as `auto` searches it.

    That is all in fp32, and for large memories int8 keys to scan.
    """
    whole = entries * (4 * hidden_size + 8 + 4 * experts + 4) + 4 * hidden_size
    if entries * hidden_size < SCANNED_ELEMENTS:
        return whole
    return whole + entries * (hidden_size + 4 + 4)


@dataclass(frozen=True)
class Costs:
    """Milliseconds of one machine.

    Attributes:
        device: Its name.
        threads: Of the runtime; None as many as the processor has cores.
        hidden_size, experts, neighbors: Of the gates that were timed.
        frozen_ms: A decode step of the frozen model.
        coefficients: Milliseconds a unit of each of `FEATURES`.
    """

    device: str
    threads: int | None
    hidden_size: int
    experts: int
    neighbors: int
    frozen_ms: float
    coefficients: tuple[float, ...]

    def gate_ms(self, gate: GateShape) -> float:
        """What one gate adds to a token."""
        return float(gate.features @ np.array(self.coefficients))

    def token_ms(self, gates: Sequence[GateShape]) -> float:
        """A decode step with these gates compressed and all others frozen."""
        return self.frozen_ms + sum(map(self.gate_ms, gates))

    def write(self, path: Path) -> None:
        """As JSON, over what is there only when it is whole."""
        named = dict(zip(FEATURES, self.coefficients, strict=True))
        content = {"schema": SCHEMA, **asdict(self), "coefficients": named}
        write_file(path, (json.dumps(content, indent=1) + "\n").encode())

    @staticmethod
    def read(path: Path) -> Costs:
        """What `write` wrote.

        Raises:
            SettingError: If the file is something else.
        """
        fix = "Name a file that is not there yet: costs are measured and written to it."
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            if content.pop("schema") != SCHEMA:
                raise ValueError("another schema")
            named = content.pop("coefficients")
            costs = Costs(**content, coefficients=tuple(float(named[name]) for name in FEATURES))
            numbers = (costs.frozen_ms, *costs.coefficients)
            if not all(np.isfinite(number) and number >= 0 for number in numbers):
                raise ValueError("numbers that are no times")
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise SettingError(
                path, "is no record of costs", expected=f"JSON of the schema {SCHEMA}",
                found=error, fix=fix,
            ) from error  # fmt: skip
        return costs


def clock_of(threads: int | None) -> Callable[[], float]:
    """Seconds: of one thread the processor's, which other work on the machine does not stretch."""
    return thread_time if threads == 1 else perf_counter


@dataclass(frozen=True)
class Use:
    """How a memory is used, each part of which takes operators of a gate.

    Attributes:
        neighbors, calibration, similarity: Of the pack.
        rule_first: Whether the variant is `assignment`.
        weighted: Whether entries count as evidence or not.
    """

    neighbors: int
    calibration: Calibration = field(default_factory=Calibration)
    similarity: Similarity = "cosine"
    rule_first: bool = False
    weighted: bool = False

    @staticmethod
    def of(pack: MemoryPack) -> Use:
        """As a pack says; its gates are used alike but for their numbers."""
        return Use(
            pack.neighbors, pack.gates[0].calibration, pack.similarity,
            pack.variant == "assignment", pack.evidence == "reference",
        )  # fmt: skip


def measure_costs(
    model: Model, pack: MemoryPack, candidates: int, device: str, threads: int | None
) -> Costs:
    """Time steps with made-up memories of this model's sizes, each in turn with the frozen step.

    Args:
        model: Is left without a memory.
        pack: Says how many entries there are about, and how they are used.
        candidates: R.
        device: A name for the record.
        threads: Of the runtime.
    """
    shape = model.bundle.manifest.architecture
    size, experts = shape.hidden_size, shape.num_experts
    model.disable_memory()
    frozen = decode_step(model.beside(0), _CONTEXT)
    designs, use = _designs(pack.entries, size, experts, candidates), Use.of(pack)
    added: list[float] = []
    steps: list[float] = []
    for design in designs:
        # Each gate has arrays of its own: what one read is not there for the next.
        room = max(1, _MEMORY_BYTES // held_bytes(design))
        count = min(shape.num_gates, _GATES, room)
        memories = [made_up(design, use) for _ in range(count)]
        with_memory = model.backend.beside([*memories, *[None] * (shape.num_gates - count)])
        pair = {"frozen": frozen, "memory": decode_step(Pipeline(with_memory), _CONTEXT)}
        samples = turn_by_turn(pair, clock_of(threads), _SECONDS / len(designs))
        # As a share of the frozen step: a machine that others use is not always equally fast.
        ratio = np.median(samples["memory"]) / np.median(samples["frozen"])
        added.append(float(ratio - 1) / count)
        steps += samples["frozen"]
    step = float(np.median(steps))
    times = [max(share * step, _LEAST_MS) for share in added]
    coefficients = fit([design.features for design in designs], times)
    return Costs(device, threads, size, experts, use.neighbors, step, tuple(coefficients))


def decode_step(pipeline: Pipeline, context: int) -> Run:
    """Runs one token behind so many others, always at the same place."""
    cache = pipeline.new_cache(capacity=context + 1)
    random = np.random.default_rng(0)
    pipeline.step(cache, random.integers(0, pipeline.vocab_size, (1, context)))
    token = np.array([[1]])

    def run() -> None:
        cache.lengths[:] = context
        pipeline.step(cache, token)

    return run


def turn_by_turn(
    runs: Mapping[Any, Run], clock: Callable[[], float], seconds: float = _SECONDS
) -> dict[Any, list[float]]:
    """Milliseconds of each of some runs, one of each in turn, the first not counted."""
    for run in runs.values():
        run()
    samples: dict[Any, list[float]] = {name: [] for name in runs}
    end = perf_counter() + seconds
    while perf_counter() < end or min(map(len, samples.values())) < _FEWEST:
        for name, run in runs.items():
            started = clock()
            run()
            samples[name].append((clock() - started) * 1e3)
    return samples


def fit(features: Sequence[NDArray[np.float64]], times: Sequence[float]) -> NDArray[np.float64]:
    """Non-negative coefficients of the least relative squares, by coordinate descent."""
    rows = np.array(features) / np.array(times)[:, None]
    scale = np.linalg.norm(rows, axis=0)
    scale[scale == 0] = 1
    rows = rows / scale
    gram, goal = rows.T @ rows, rows.sum(axis=0)
    found = np.zeros(rows.shape[1])
    for _ in range(20_000):
        before = found.copy()
        for i in range(len(found)):
            if gram[i, i] > 0:
                rest = goal[i] - gram[i] @ found + gram[i, i] * found[i]
                found[i] = max(0.0, rest / gram[i, i])
        if np.abs(found - before).max() <= 1e-9 * max(1e-12, np.abs(found).max()):
            break
    kept: NDArray[np.float64] = found / scale
    return kept


def _designs(entries: int, size: int, experts: int, candidates: int) -> list[GateShape]:
    """Gates of made-up entries that tell the coefficients apart."""
    widths = sorted({max(32, size // part // 32 * 32) for part in (8, 4, 2, 1)})[:3]
    graded = sorted(graded_widths(size), key=sum)
    graded = [graded[0], graded[-1]] if graded else []
    few, most = max(512, entries // 4), max(1024, entries)
    whole = max(512, min(most, _KEY_ELEMENTS // size))
    kind = GateShape(most, size, experts, widths[-1], 4, candidates, "projected", "int4")
    return [
        *(replace(kind, width=width) for width in widths),
        *(replace(kind, width=width, bits=8) for width in widths[:2]),
        *(
            replace(kind, width=_MANY_BLOCKS, entries=n)
            for n in (few, most)
            if size >= _MANY_BLOCKS
        ),
        replace(kind, entries=few),
        replace(kind, entries=few, width=widths[0], bits=8),
        replace(kind, values="fp16"),
        replace(kind, entries=few, width=widths[0], values="fp16"),
        *(replace(kind, width=widths[0], keys="graded", key_widths=each) for each in graded),
        replace(kind, entries=whole, width=widths[0], keys="fp16"),
        replace(kind, entries=whole, keys="int8", values="fp16"),
        replace(kind, entries=whole, width=widths[0], bits=8, keys="int8"),
    ]


def made_up(shape: GateShape, use: Use) -> CompressedMemory:
    """A memory of random codes: a search takes as long as with any others."""
    random = np.random.default_rng(0)
    n, d = shape.entries, shape.hidden_size
    scales = np.full(n, 1e-2, np.float32)

    def projected(width: int, bits: int) -> ProjectedKeys:
        return ProjectedKeys(
            random.integers(-127, 128, (width, d), np.int8), np.full(width, 1e-3, np.float32),
            random.integers(0, 256, (n, width * bits // 8), np.uint8), scales.copy(),
        )  # fmt: skip

    keys: NDArray[Any] | None = None
    if shape.keys == "int8":
        keys = random.integers(-127, 128, (n, d), np.int8)
    elif shape.keys not in RESTORED:
        keys = random.standard_normal((n, d), np.float32).astype(np.float16)
    values: Any = random.standard_normal((n, shape.experts), np.float32)
    if shape.values != "as-stored":
        values = store_values(values, shape.values)
    return CompressedMemory(
        keys=keys,
        multipliers=scales[:, None],
        norms=np.ones(n, np.float32),
        lengths=np.ones(n, np.float32),
        scan=projected(shape.width, shape.bits),
        candidates=shape.candidates,
        values=values,
        n_valid=n,
        k=use.neighbors,
        center=np.zeros(d, np.float32),
        calibration=use.calibration,
        similarity=use.similarity,
        rule_first=use.rule_first,
        evidence_weights=np.ones(n, np.float32) if use.weighted else None,
        parts=tuple(map(projected, shape.key_widths or (), PARTS.values())),
    )
