"""Two profile records side by side: which parts became slower, and how sure that is.

Parts are matched by the shape of their point and by name. The figure of a part is the ratio of its
medians (or of another quantile). Its interval holds together with those of all other parts: whole
blocks of a run are drawn (`resample`), and on a logarithmic scale the largest deviation of any part
says how wide all are.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from ..errors import ProfileError, SettingError
from .record import Part, Point, ProfileRecord
from .resample import (
    Doubles,
    block_correlation,
    block_starts,
    joint_quantile,
    resampled_quantiles,
    student_factor,
)

SCHEMA = "knnmoe.profile-comparison/1"
WHOLE = "whole step"
CONFIDENCE = 0.95
MIN_SAMPLES = 5  # fewer say nothing of others
MIN_SHARE = 0.01
TINY_MS = 1e-6  # a clock that did not tick
MOST = 700.0  # whose exponential is still a number
COMPARED = ("cpu", "architecture", "cores_usable", "governor", "system", "python", "knnmoe",
            "numpy", "onnxruntime", "faiss-cpu")  # fmt: skip

Verdict = Literal["slower", "unclear", "within", "faster", "small"]


@dataclass(frozen=True)
class Change:
    """One part of one point before and after.

    Attributes:
        point: The shape, in words.
        part: `segment 3`, …, or `whole step`.
        before_ms, after_ms: The quantile compared, the median by default.
        ratio: After / before.
        low, high: Its interval; None where there are too few samples for one.
        verdict: `slower` if the interval is beyond the limit, `unclear` if it reaches there,
            `faster` if it is below 1, else `within`; `small` for parts that are not judged, because
            they are less than a given share of the step.
    """

    point: str
    part: str
    before_ms: float
    after_ms: float
    ratio: float
    low: float | None
    high: float | None
    verdict: Verdict


@dataclass(frozen=True)
class Comparison:
    """All parts of two records.

    Attributes:
        limit: A slowdown beyond it counts; 0.05 is 5 %.
        quantile: Of the times, that was compared.
        changes: One a part, in the order of the records.
        unmatched: Points and parts that only one record has, in words.
        differences: In what else the records differ: device, threads, bundle, …
        common: Median ratio of all parts that were judged: what hit all of them alike.
    """

    limit: float
    quantile: float
    changes: tuple[Change, ...]
    unmatched: tuple[str, ...]
    differences: tuple[str, ...]
    common: float

    @property
    def slower(self) -> tuple[Change, ...]:
        """Parts that became slower beyond the limit."""
        return tuple(change for change in self.changes if change.verdict == "slower")

    @property
    def unclear(self) -> tuple[Change, ...]:
        """Parts whose interval is too wide to tell."""
        return tuple(change for change in self.changes if change.verdict == "unclear")

    def to_json(self) -> dict[str, Any]:
        """All of it by name; ends of an interval that nothing is known of are null."""
        return {
            "schema": SCHEMA,
            "limit": self.limit,
            "quantile": self.quantile,
            "common": self.common,
            "slower": [f"{change.point}: {change.part}" for change in self.slower],
            "unclear": [f"{change.point}: {change.part}" for change in self.unclear],
            "changes": [asdict(change) for change in self.changes],
            "unmatched": list(self.unmatched),
            "differences": list(self.differences),
        }


@dataclass(frozen=True)
class _Pair:
    """A point of both records, with the parts that both have, the whole step first."""

    label: str
    names: tuple[str, ...]
    before: tuple[tuple[float, ...], ...]
    after: tuple[tuple[float, ...], ...]
    before_rounds: tuple[int, ...]
    after_rounds: tuple[int, ...]

    @property
    def enough(self) -> bool:
        """Whether there are samples enough for an interval."""
        return min(len(self.before_rounds), len(self.after_rounds)) >= MIN_SAMPLES


def compare(
    before: ProfileRecord,
    after: ProfileRecord,
    *,
    limit: float = 0.05,
    min_share: float = MIN_SHARE,
    quantile: float = 0.5,
    seed: int = 0,
) -> Comparison:
    """Compare all points that both records have.

    Args:
        before, after: The records.
        limit: The slowdown that is accepted; 0.05 is 5 %.
        min_share: Parts that are a smaller share of the step in both records are not judged.
        quantile: Of a part's times, what is compared: 0.5 is the median. A low one is less
            disturbed by other programs, which only ever add time.
        seed: Of the bootstrap.

    Raises:
        SettingError: If a number is out of its range.
        ProfileError: If the records have no point in common.
    """
    if not 0 <= limit < 10:
        raise SettingError("limit", "out of range", expected="0 % to 1000 %", found=limit)
    if not 0 <= min_share < 1:
        raise SettingError("share", "out of range", expected="0 % to 100 %", found=min_share)
    if not 0 < quantile < 1:
        raise SettingError("quantile", "out of range", expected="0 % to 100 %", found=quantile)
    pairs, unmatched = _matched(before, after)
    if not pairs:
        raise ProfileError(
            "records",
            "have no point in common",
            expected="the same shapes of steps",
            found=f"{_labels(before)} and {_labels(after)}",
            fix="Measure both with the same options.",
        )
    changes = _changes(pairs, limit, min_share, quantile, seed)
    judged = [change.ratio for change in changes if change.verdict != "small"]
    return Comparison(
        limit=limit,
        quantile=quantile,
        changes=tuple(changes),
        unmatched=tuple(unmatched),
        differences=tuple(_differences(before, after)),
        common=float(np.median(judged)) if judged else 1.0,
    )


def joined(records: Sequence[ProfileRecord]) -> ProfileRecord:
    """Several runs of the same as one record: their samples one after the other.

    How runs differ from each other is then part of what intervals allow for. Everything but the
    samples is the first one's; points that not all have are left out.

    Raises:
        ProfileError: If they are of different models, devices or threads.
    """
    first, *others = records
    for other in others:
        for name, here, there in _subjects(first, other):
            if here != there:
                raise ProfileError(
                    "records", f"of one side differ in {name}", expected=here, found=there,
                    fix="Join runs of the same model, memory and machine.",
                )  # fmt: skip
    points = []
    for point in first.points:
        same = [found for record in records for found in record.points if found.key == point.key]
        if len(same) == len(records):
            points.append(_chained(same))
    return replace(first, points=tuple(points))


def _chained(runs: Sequence[Point]) -> Point:
    """Samples of a point in several runs, in rounds that count on; parts that all runs have."""
    rounds: list[int] = []
    for run in runs:
        begin = rounds[-1] + 1 if rounds else 0
        rounds += [begin + number for number in run.rounds]
    kept = []
    for part in runs[0].parts:
        same = [found for run in runs for found in run.parts if found.name == part.name]
        if len(same) == len(runs):
            times = tuple(ms for found in same for ms in found.ms)
            kept.append(Part(part.name, part.kind, times))
    whole = tuple(ms for run in runs for ms in run.whole_ms)
    return replace(runs[0], whole_ms=whole, rounds=tuple(rounds), parts=tuple(kept))


def describe(point: Point) -> str:
    """A point's shape in words."""
    words = [
        f"decode at {point.past}" if point.phase == "decode" else f"prompt of {point.tokens}",
        f"batch {point.batch}" if point.batch != 1 else "",
        f"{point.memory_entries:,} entries" if point.memory_entries else "frozen",
        point.layout if point.layout != "split" else "",
        "without a CUDA graph" if point.cuda_graph is False else "",
    ]
    return ", ".join(word for word in words if word)


def _labels(record: ProfileRecord) -> str:
    return "; ".join(describe(point) for point in record.points) or "none"


def _matched(before: ProfileRecord, after: ProfileRecord) -> tuple[list[_Pair], list[str]]:
    there = {point.key: point for point in after.points if point.whole_ms}
    pairs, unmatched = [], []
    for point in before.points:
        if not point.whole_ms:
            continue  # interrupted before it was measured
        other = there.pop(point.key, None)
        if other is None:
            unmatched.append(f"{describe(point)}: only before")
            continue
        first, second = _series(point), _series(other)
        names = tuple(name for name in first if name in second)
        for side, found in (("before", first), ("after", second)):
            missing = [name for name in found if name not in names]
            unmatched += [f"{describe(point)}, {name}: only {side}" for name in missing]
        pairs.append(
            _Pair(
                label=describe(point),
                names=names,
                before=tuple(first[name] for name in names),
                after=tuple(second[name] for name in names),
                before_rounds=point.rounds,
                after_rounds=other.rounds,
            )
        )
    unmatched += [f"{describe(point)}: only after" for point in there.values()]
    return pairs, unmatched


def _series(point: Point) -> dict[str, tuple[float, ...]]:
    return {WHOLE: point.whole_ms, **{part.name: part.ms for part in point.parts}}


def _changes(
    pairs: Sequence[_Pair], limit: float, min_share: float, quantile: float, seed: int
) -> list[Change]:
    alike = (
        block_correlation([(pair.before, pair.before_rounds) for pair in pairs]),
        block_correlation([(pair.after, pair.after_rounds) for pair in pairs]),
    )
    deviations, judged = [], []
    for number, pair in enumerate(pairs):
        drawn = _drawn(pair, alike, quantile, seed + number)
        deviations.append(drawn - drawn.mean(axis=0))
        if pair.enough:
            judged.append(deviations[-1][:, _share(pair) >= min_share])
    together = np.concatenate(judged, axis=1) if judged else np.zeros((1, 0))
    joint = joint_quantile(together, together.std(axis=0), CONFIDENCE)
    return [
        change
        for pair, moved in zip(pairs, deviations, strict=True)
        for change in _of_pair(pair, joint * moved.std(axis=0), joint, limit, min_share, quantile)
    ]


def _of_pair(
    pair: _Pair, spread: Doubles, joint: float, limit: float, min_share: float, quantile: float
) -> Iterator[Change]:
    reach = spread * student_factor(joint, max(_degrees(pair), 1))
    small = _share(pair) < min_share
    for number, name in enumerate(pair.names):
        before, after = (
            float(np.quantile(side[number], quantile)) for side in (pair.before, pair.after)
        )
        ratio = max(after, TINY_MS) / max(before, TINY_MS)
        low = ratio * math.exp(-reach[number]) if pair.enough else None
        high = ratio * math.exp(min(reach[number], MOST)) if pair.enough else None
        verdict = "small" if small[number] else _verdict(low, high, limit)
        yield Change(pair.label, name, before, after, ratio, low, high, verdict)


def _drawn(pair: _Pair, alike: tuple[float, float], quantile: float, seed: int) -> Doubles:
    """Logarithms of the ratio in resampled pairs of runs [draws, parts]."""
    before, after = (
        resampled_quantiles(
            parts, rounds, quantile=quantile, correlation=correlation, seed=2 * seed + side
        )
        for side, (parts, rounds, correlation) in enumerate(
            (
                (pair.before, pair.before_rounds, alike[0]),
                (pair.after, pair.after_rounds, alike[1]),
            )
        )
    )
    found: Doubles = np.log(np.maximum(after, TINY_MS) / np.maximum(before, TINY_MS))
    return found


def _degrees(pair: _Pair) -> int:
    return len(block_starts(pair.before_rounds)) + len(block_starts(pair.after_rounds)) - 2


def _share(pair: _Pair) -> NDArray[np.float64]:
    """Of the step, the larger of before and after [parts]; the whole step comes first."""
    shares = [
        np.array([np.median(part) for part in side]) / max(float(np.median(side[0])), TINY_MS)
        for side in (pair.before, pair.after)
    ]
    larger: NDArray[np.float64] = np.maximum(*shares)
    return larger


def _verdict(low: float | None, high: float | None, limit: float) -> Verdict:
    if low is None or high is None:
        return "unclear"
    if low > 1 + limit:
        return "slower"
    if high > 1 + limit:
        return "unclear"
    return "faster" if high < 1 else "within"


def _differences(before: ProfileRecord, after: ProfileRecord) -> Iterator[str]:
    """What else differs, in words."""
    for name, first, second in (*_subjects(before, after), *_machines(before, after)):
        if first != second:
            yield f"{name}: {first} before, {second} after"


def _subjects(before: ProfileRecord, after: ProfileRecord) -> Iterator[tuple[str, Any, Any]]:
    for name in ("fingerprint", "precision", "device", "backend", "threads"):
        yield name, getattr(before.subject, name), getattr(after.subject, name)
    first, second = before.subject.memory, after.subject.memory
    if first is not None and second is not None:
        for name in ("entries", "gates", "variant", "similarity", "neighbors", "backends"):
            yield f"memory: {name}", getattr(first, name), getattr(second, name)


def _machines(before: ProfileRecord, after: ProfileRecord) -> Iterator[tuple[str, Any, Any]]:
    for name in COMPARED:
        first, second = before.environment.get(name), after.environment.get(name)
        if first is not None or second is not None:
            yield name, first, second
