"""What a profile measured, as a file: raw samples with all that is needed to judge them.

Times are milliseconds. Samples are kept one by one and in the order they were taken, so that
whoever compares two records can resample them. The format is described in docs/formats.md.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal, get_args

from ..atomic import write_file
from ..errors import ProfileError
from ..manifest import Fields, read_object
from .intervals import median, percentiles

SCHEMA = "knnmoe.profile/2"
MEASURE_AGAIN = "Measure again with `knnmoe profile --output FILE.json`."
MAX_RECORD_BYTES = 1 << 28
MOST = 1 << 62

Phase = Literal["prefill", "decode"]
PartKind = Literal["segment", "gate", "fused", "transfer", "runtime"]
PHASES: tuple[Phase, ...] = get_args(Phase)
PART_KINDS: tuple[PartKind, ...] = get_args(PartKind)
RUNTIME = "runtime"
FIGURES = "figures"  # of a point: derived from its samples when it is written, not read

Samples = tuple[float, ...]


@dataclass(frozen=True)
class Bound:
    """The least time a part can take on this machine.

    Attributes:
        bytes: Read and written at least: active weights, keys and values, memory.
        flops: Multiplications and additions, two a product.
        ms: max(bytes / bandwidth, flops / peak), with the rates of `MachineBounds`.
    """

    bytes: int
    flops: int
    ms: float


@dataclass(frozen=True)
class Part:
    """One part of the steps of a point.

    Attributes:
        name: `segment 3`, `gate 3`, `fused`, `upload`, …, `runtime`.
        kind: What it is; `runtime` is what of the whole step is no other part.
        host_ms: [n], one a step of the point, in the order of its `whole_ms`.
        device_ms: [n] on the device's own clock, where there is one; the host then waits for no
            part, and `host_ms` is what it took to launch it.
        inside: What a gate spent on `scan`, `select`, `gather`, `blend` and so on: samples of steps
            of their own, as many as there were; their sum is not the part's.
        bound: The least it could take, where that is known.
        backend: Of a gate: `onnx`, `two-stage`, `numpy`, …
    """

    name: str
    kind: PartKind
    host_ms: Samples
    device_ms: Samples | None = None
    inside: Mapping[str, Samples] = field(default_factory=dict)
    bound: Bound | None = None
    backend: str | None = None

    @property
    def ms(self) -> Samples:
        """What the part takes of a step: the device's time where there is one, else the host's."""
        return self.host_ms if self.device_ms is None else self.device_ms


@dataclass(frozen=True)
class Point:
    """One shape of step, measured again and again.

    Attributes:
        phase: `decode` for one token a sequence after a context, `prefill` for a whole prompt.
        layout: `split` or `fused`.
        batch: Sequences.
        tokens: Of each sequence in the step.
        past: Tokens of each sequence before it.
        memory_entries: A gate's, at most; 0 is the frozen router.
        cuda_graph: Whether the step was one launch of a captured graph; None on the host.
        whole_ms: [n] steps as a caller sees them.
        rounds: [n], the round each was taken in: steps of one round follow each other, and between
            two rounds every other point had its turn. A bootstrap draws whole rounds.
        parts: In the order they run, `runtime` last; empty where the step cannot be taken apart.
    """

    phase: Phase
    layout: str
    batch: int
    tokens: int
    past: int
    memory_entries: int
    cuda_graph: bool | None
    whole_ms: Samples
    rounds: tuple[int, ...]
    parts: tuple[Part, ...]

    @property
    def key(self) -> tuple[str, str, int, int, int, int, bool | None]:
        """What makes it the same point in another record."""
        return (
            self.phase, self.layout, self.batch, self.tokens, self.past, self.memory_entries,
            self.cuda_graph,
        )  # fmt: skip

    @property
    def bound_ms(self) -> float | None:
        """The least a step can take: the sum over its parts, which run one after another."""
        known = [part.bound.ms for part in self.parts if part.bound is not None]
        return sum(known) if known else None

    @property
    def tokens_per_s(self) -> float:
        """Tokens of all sequences a second, at the median step; 0 before any was measured."""
        return 1e3 * self.batch * self.tokens / median(self.whole_ms) if self.whole_ms else 0.0

    def figures(self) -> dict[str, Any]:
        """Percentiles and rates for scripts that want no samples; empty before any was taken."""
        if not self.whole_ms:
            return {}
        return {
            **percentiles(self.whole_ms),
            "tokens_per_s": self.tokens_per_s,
            "parts": {part.name: median(part.ms) for part in self.parts},
        }


@dataclass(frozen=True)
class ProfiledMemory:
    """The memory pack that was measured with.

    Attributes:
        path: As it was given.
        entries: Of a gate, at most.
        gates: How many gates have one.
        variant, similarity, neighbors: How it is used; `neighbors` is K.
        bytes: Of the pack.
        backends: Of the gates that were measured, each once.
    """

    path: str
    entries: int
    gates: int
    variant: str
    similarity: str
    neighbors: int
    bytes: int
    backends: tuple[str, ...]


@dataclass(frozen=True)
class Subject:
    """What was measured.

    Attributes:
        bundle: Path as it was given.
        fingerprint: Of the checkpoint that the bundle was made of.
        model_type: Its family.
        precision: Of the weights.
        layouts: That were measured.
        device: `cpu`, or the name of the CUDA device.
        backend: What runs the graphs: `onnxruntime`, `tensorrt`, …
        threads: Of one operator; None where the runtime chose.
        memory: None for the frozen router alone.
    """

    bundle: str
    fingerprint: str
    model_type: str
    precision: str
    layouts: tuple[str, ...]
    device: str
    backend: str
    threads: int | None
    memory: ProfiledMemory | None


@dataclass(frozen=True)
class Grid:
    """Settings of a measurement: every combination that fits the model is a point.

    Attributes:
        batches: Sequences of a step.
        prompts: Prompt lengths of prefills.
        contexts: Tokens before each decode step.
        entries: Memory sizes, a gate's; 0 is the frozen router.
        steps, prefills: Steps measured at each point of a phase.
        warmup: Steps at each point before the first that counts.
        seed: Of the tokens, and of which entries a smaller memory keeps.
    """

    batches: tuple[int, ...]
    prompts: tuple[int, ...]
    contexts: tuple[int, ...]
    entries: tuple[int, ...]
    steps: int
    prefills: int
    warmup: int
    seed: int


@dataclass(frozen=True)
class ReadRate:
    """How fast this many bytes are read again and again: caches serve small working sets."""

    working_set: int
    gb_s: float


@dataclass(frozen=True)
class MachineBounds:
    """What the machine can do, measured beside the profile and on the same threads.

    Attributes:
        reads: By growing working set; the last is that of main memory.
        copy_gb_s: Copying in main memory, bytes read and written.
        gemm_gflop_s: A large fp32 product of matrices.
        threads: That measured.
        how: In words.
    """

    reads: tuple[ReadRate, ...]
    copy_gb_s: float
    gemm_gflop_s: float
    threads: int
    how: str

    def read_gb_s(self, working_set: int) -> float:
        """The rate of the largest working set measured that is no larger than this one."""
        fitting = [rate.gb_s for rate in self.reads if rate.working_set <= working_set]
        return fitting[-1] if fitting else self.reads[0].gb_s


@dataclass(frozen=True)
class Resident:
    """Bytes that the model holds while it runs; None where that is not known.

    Attributes:
        weights: Of the files that the layout runs.
        kv_cache: Of the largest point.
        retrieval_memory: Of the largest memory, as the gates hold it.
        workspace: Peak of the process less all of the above and what it was before loading.
        peak_rss: Of the process.
        device: Taken on the device.
    """

    weights: int | None
    kv_cache: int | None
    retrieval_memory: int | None
    workspace: int | None
    peak_rss: int | None
    device: int | None


@dataclass(frozen=True)
class ProfileRecord:
    """All that was measured, and with what.

    Attributes:
        subject: What was measured.
        environment: The machine, versions, and how quiet it was; its fields vary by machine.
        settings: What was asked for.
        points: One a shape, in the order they were measured.
        machine_bounds: None where they were not measured.
        resident: Bytes held.
        started: When, ISO 8601 with its offset.
        finished: False where somebody interrupted it: the points have what was measured until then.
        warnings: What a reader of the figures should know.
    """

    subject: Subject
    environment: Mapping[str, Any]
    settings: Grid
    points: tuple[Point, ...]
    machine_bounds: MachineBounds | None
    resident: Resident
    started: str
    finished: bool
    warnings: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """The record as a JSON object of schema `SCHEMA`; `from_json` is its inverse."""
        content = {"schema": SCHEMA, **_plain(self)}
        for point, written in zip(self.points, content["points"], strict=True):
            written[FIGURES] = point.figures()
        return content


def from_json(content: Mapping[str, Any], where: str = "profile") -> ProfileRecord:
    """The record that a JSON object describes.

    Args:
        content: The parsed object.
        where: What errors call it.

    Raises:
        ProfileError: If it is of another schema, or a field is missing, unknown or malformed.
    """
    record = Fields(where, dict(content), ProfileError, MEASURE_AGAIN)
    if (found := content.get("schema")) != SCHEMA:
        raise record.wrong("schema", "unknown", expected=SCHEMA, found=found)
    record.only("schema", *_names(ProfileRecord))
    return ProfileRecord(
        subject=_subject(record.object("subject")),
        environment=record.object("environment").content,
        settings=_grid(record.object("settings")),
        points=tuple(_point(point) for point in record.objects("points")),
        machine_bounds=_optional(record, "machine_bounds", _machine_bounds),
        resident=_resident(record.object("resident")),
        started=record.text("started"),
        finished=record.boolean("finished"),
        warnings=record.texts("warnings"),
    )


def read_record(path: str | Path) -> ProfileRecord:
    """Read a file that `write_record` or `knnmoe profile --output` wrote.

    Raises:
        ProfileError: If it cannot be read, or is no such record.
    """
    file = Path(path)
    content = read_object(file, ProfileError, MEASURE_AGAIN, most_bytes=MAX_RECORD_BYTES)
    return from_json(content, str(file))


def write_record(record: ProfileRecord, path: str | Path) -> None:
    """Write a record: the file appears whole or stays what it was.

    Raises:
        OutputError: If it cannot be written there.
    """
    text = json.dumps(record.to_json(), allow_nan=False)
    write_file(Path(path), (text + "\n").encode("utf-8"))


def _names(kind: type) -> tuple[str, ...]:
    return tuple(field.name for field in fields(kind))


def _plain(value: Any) -> Any:
    """Dataclasses and tuples as JSON has them."""
    if hasattr(value, "__dataclass_fields__"):
        return {name: _plain(getattr(value, name)) for name in _names(type(value))}
    if isinstance(value, Mapping):
        return {str(name): _plain(entry) for name, entry in value.items()}
    if isinstance(value, tuple | list):
        return [_plain(entry) for entry in value]
    return value


def _optional(record: Fields, name: str, read: Any) -> Any:
    return read(record.object(name)) if record.raw(name) is not None else None


def _count(record: Fields, name: str) -> int:
    return record.integer(name, 0, MOST)


def _maybe(record: Fields, name: str) -> int | None:
    return None if record.raw(name) is None else _count(record, name)


def _subject(subject: Fields) -> Subject:
    subject.only(*_names(Subject))
    return Subject(
        bundle=subject.text("bundle"),
        fingerprint=subject.text("fingerprint"),
        model_type=subject.text("model_type"),
        precision=subject.text("precision"),
        layouts=subject.texts("layouts"),
        device=subject.text("device"),
        backend=subject.text("backend"),
        threads=_maybe(subject, "threads"),
        memory=_optional(subject, "memory", _memory),
    )


def _memory(memory: Fields) -> ProfiledMemory:
    memory.only(*_names(ProfiledMemory))
    return ProfiledMemory(
        path=memory.text("path"),
        entries=_count(memory, "entries"),
        gates=_count(memory, "gates"),
        variant=memory.text("variant"),
        similarity=memory.text("similarity"),
        neighbors=_count(memory, "neighbors"),
        bytes=_count(memory, "bytes"),
        backends=memory.texts("backends"),
    )


def _grid(grid: Fields) -> Grid:
    grid.only(*_names(Grid))
    return Grid(
        batches=tuple(grid.integers("batches", 1, MOST)),
        prompts=tuple(grid.integers("prompts", 1, MOST)),
        contexts=tuple(grid.integers("contexts", 0, MOST)),
        entries=tuple(grid.integers("entries", 0, MOST)),
        **{name: _count(grid, name) for name in ("steps", "prefills", "warmup", "seed")},
    )


def _point(point: Fields) -> Point:
    point.only(*_names(Point), optional=(FIGURES,))
    whole = _samples(point, "whole_ms")
    rounds = tuple(point.integers("rounds", 0, MOST))
    if len(rounds) != len(whole):
        raise point.wrong("rounds", "of another length", expected=len(whole), found=len(rounds))
    return Point(
        phase=_choice(point, "phase", PHASES),
        layout=point.text("layout"),
        batch=_count(point, "batch"),
        tokens=_count(point, "tokens"),
        past=_count(point, "past"),
        memory_entries=_count(point, "memory_entries"),
        cuda_graph=None if point.raw("cuda_graph") is None else point.boolean("cuda_graph"),
        whole_ms=whole,
        rounds=rounds,
        parts=tuple(_part(part, len(whole)) for part in point.objects("parts")),
    )


def _part(part: Fields, count: int) -> Part:
    part.only(*_names(Part))
    inside = part.object("inside")
    return Part(
        name=part.text("name"),
        kind=_choice(part, "kind", PART_KINDS),
        host_ms=_samples(part, "host_ms", count),
        device_ms=None if part.raw("device_ms") is None else _samples(part, "device_ms", count),
        inside={name: _samples(inside, name) for name in inside.names},
        bound=_optional(part, "bound", _bound),
        backend=None if part.raw("backend") is None else part.text("backend"),
    )


def _bound(bound: Fields) -> Bound:
    bound.only(*_names(Bound))
    return Bound(_count(bound, "bytes"), _count(bound, "flops"), bound.number("ms"))


def _machine_bounds(bounds: Fields) -> MachineBounds:
    bounds.only(*_names(MachineBounds))
    reads = []
    for rate in bounds.objects("reads"):
        rate.only(*_names(ReadRate))
        reads.append(ReadRate(_count(rate, "working_set"), _rate(rate, "gb_s")))
    if not reads:
        raise bounds.wrong("reads", "empty", expected="at least one")
    return MachineBounds(
        reads=tuple(reads),
        copy_gb_s=_rate(bounds, "copy_gb_s"),
        gemm_gflop_s=_rate(bounds, "gemm_gflop_s"),
        threads=_count(bounds, "threads"),
        how=bounds.text("how"),
    )


def _rate(record: Fields, name: str) -> float:
    rate = record.number(name)
    if rate <= 0:
        raise record.wrong(name, "out of range", expected="more than 0", found=rate)
    return rate


def _resident(resident: Fields) -> Resident:
    resident.only(*_names(Resident))
    return Resident(**{name: _maybe(resident, name) for name in _names(Resident)})


def _samples(record: Fields, name: str, count: int | None = None) -> Samples:
    samples = tuple(record.numbers(name))
    if count is not None and len(samples) != count:
        raise record.wrong(name, "of another length", expected=count, found=len(samples))
    return samples


def _choice(record: Fields, name: str, choices: tuple[Any, ...]) -> Any:
    return record.text(name, choices=choices)
