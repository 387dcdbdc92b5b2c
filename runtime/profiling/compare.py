"""Two profile records side by side: which parts became slower, and how sure that is.

Parts are matched by the shape of their point and by name. The figure of a part is the ratio of a
low quantile of its times, beside what all parts have in common: how fast a machine runs changes
from one run to the next, and alike for all. Its interval holds together with those of all other
parts: whole blocks of a run are drawn (`resample`), and on a logarithmic scale the largest
deviation of any part says how wide all are.
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
    TINY_MS,
    Doubles,
    Parts,
    block_correlation,
    block_starts,
    common,
    joint_quantile,
    logs,
    resampled_quantiles,
    student_factor,
    widening,
)

SCHEMA = "knnmoe.profile-comparison/2"
WHOLE = "whole step"
CONFIDENCE = 0.95
MIN_SAMPLES = 5  # fewer say nothing of others
MIN_SHARE = 0.01
QUANTILE = 0.1
MIN_BESIDE = 5  # parts; of fewer one cannot tell what they have in common
MIN_RUNS = 3  # of each side, that tell how runs differ
# Standard deviations of a part's level from run to run that no run shows in itself: of any run, and
# for each unit that all parts have changed by, since what slows a machine does not hit all alike.
UNSEEN = 0.005
SUFFERED = 0.05
MOST = 700.0  # whose exponential is still a number
COMPARED = ("cpu", "architecture", "cores_usable", "governor", "system", "python", "knnmoe",
            "numpy", "onnxruntime", "faiss-cpu")  # fmt: skip

Mask = NDArray[np.bool_]
Verdict = Literal["slower", "unclear", "within", "faster", "small"]


@dataclass(frozen=True)
class Change:
    """One part of one point before and after.

    Attributes:
        point: The shape, in words.
        part: `segment 3`, …, or `whole step`.
        before_ms, after_ms: The quantile compared.
        ratio: After / before.
        beside: Ratio / what all parts have in common; of whole steps, and of parts that are judged
            by themselves, the ratio.
        low, high: Interval of `beside`; None where there are too few samples for one.
        verdict: `slower` if the interval is beyond the limit, `unclear` if it reaches there,
            `faster` if it is below 1, else `within`; `small` for parts that are not judged, because
            they are less than a given share of the step. Whole steps of few runs are never more
            than `unclear`.
    """

    point: str
    part: str
    before_ms: float
    after_ms: float
    ratio: float
    beside: float
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
        absolute: Whether parts were judged by themselves and not beside what they have in common.
    """

    limit: float
    quantile: float
    changes: tuple[Change, ...]
    unmatched: tuple[str, ...]
    differences: tuple[str, ...]
    common: float
    absolute: bool

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
            "absolute": self.absolute,
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


@dataclass(frozen=True)
class _Settings:
    """As `compare` takes them."""

    limit: float
    quantile: float
    absolute: bool
    runs: int
    seed: int

    @property
    def whole(self) -> bool:
        """Whether whole steps are judged."""
        return self.absolute or self.runs >= MIN_RUNS


def compare(
    before: ProfileRecord,
    after: ProfileRecord,
    *,
    limit: float = 0.05,
    min_share: float = MIN_SHARE,
    quantile: float = QUANTILE,
    absolute: bool = False,
    runs: int = 1,
    seed: int = 0,
) -> Comparison:
    """Compare all points that both records have.

    Args:
        before, after: The records.
        limit: The slowdown that is accepted; 0.05 is 5 %.
        min_share: Parts that are a smaller share of the step in both records are not judged.
        quantile: Of a part's times, what is compared: 0.5 is the median. A low one is less
            disturbed by other programs, which only ever add time.
        absolute: Judge parts and whole steps by themselves, also where there is one run of each
            side: for machines that run equally fast at all times. So it is for records of fewer
            than five parts.
        runs: That each side is `joined` of, the fewer. Of three and more whole steps are judged.
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
    shown = [_judged(pair, min_share) for pair in pairs]
    absolute = absolute or sum(int(mask.sum()) for mask in shown) < MIN_BESIDE
    settings = _Settings(limit, quantile, absolute, runs, seed)
    shared, changes = _changes(pairs, shown, settings)
    return Comparison(
        limit=limit,
        quantile=quantile,
        changes=tuple(changes),
        unmatched=tuple(unmatched),
        differences=tuple(_differences(before, after)),
        common=shared,
        absolute=absolute,
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
    pairs: Sequence[_Pair], shown: Sequence[Mask], settings: _Settings
) -> tuple[float, list[Change]]:
    """What all parts that are `shown`, and no others, have in common; the change of each part."""
    ratios = [_levels(pair.after, settings) - _levels(pair.before, settings) for pair in pairs]
    shared = common(_of_all(ratios, shown))
    sides = [
        _moves([(pair.before, pair.before_rounds) for pair in pairs], shown, settings, 0),
        _moves([(pair.after, pair.after_rounds) for pair in pairs], shown, settings, 1),
    ]
    random = np.random.default_rng(settings.seed)
    unseen = math.hypot(UNSEEN * math.sqrt(2 / settings.runs), SUFFERED * shared[0])
    moved = [
        after - before + random.normal(0, unseen, before.shape)
        for before, after in zip(*sides, strict=True)
    ]
    enough = [mask & pair.enough for mask, pair in zip(shown, pairs, strict=True)]
    together = _of_all(moved, enough)
    joint = joint_quantile(together, together.std(axis=0), CONFIDENCE)
    changes = [
        change
        for pair, mask, ratio, moves in zip(pairs, shown, ratios, moved, strict=True)
        for change in _of_pair(
            pair, mask, ratio, float(shared[0]), joint * moves.std(axis=0), joint, settings
        )
    ]
    return math.exp(shared[0]), changes


def _of_pair(
    pair: _Pair, shown: Mask, ratios: Doubles, shared: float, spread: Doubles, joint: float,
    settings: _Settings,
) -> Iterator[Change]:  # fmt: skip
    reach = np.minimum(spread * student_factor(joint, max(_degrees(pair), 1)), MOST)
    before, after = (np.exp(_levels(side, settings)) for side in (pair.before, pair.after))
    for number, name in enumerate(pair.names):
        whole = number == 0
        beside = ratios[number] if whole or settings.absolute else ratios[number] - shared
        low = math.exp(beside - reach[number]) if pair.enough else None
        high = math.exp(beside + reach[number]) if pair.enough else None
        verdict = _verdict(low, high, settings.limit)
        if whole and not settings.whole:
            verdict = "within" if verdict in ("within", "faster") else "unclear"
        elif not whole and not shown[number]:
            verdict = "small"
        yield Change(
            pair.label, name, float(before[number]), float(after[number]),
            math.exp(ratios[number]), math.exp(beside), low, high, verdict,
        )  # fmt: skip


def _levels(parts: Parts, settings: _Settings) -> Doubles:
    """Logarithms of what is compared [parts]."""
    return logs(np.quantile(np.asarray(parts, np.float64), settings.quantile, axis=1))


def _moves(
    runs: Sequence[tuple[Parts, Sequence[int]]],
    shown: Sequence[Mask],
    settings: _Settings,
    side: int,
) -> list[Doubles]:
    """How far resampled runs of one side are off, by point: logarithms [draws, parts].

    All points take turns, so the same blocks of each are drawn. What the parts have in common in a
    draw is taken away from each, but not from whole steps.
    """
    found = []
    for parts, rounds in runs:
        drawn = logs(
            resampled_quantiles(
                parts, rounds, quantile=settings.quantile, seed=2 * settings.seed + side
            )
        )
        found.append(drawn - drawn.mean(axis=0))
    alike = block_correlation(runs, quantile=settings.quantile)
    factors = np.array([widening(rounds, alike) for _, rounds in runs])
    if settings.absolute:
        return [moves * factor for moves, factor in zip(found, factors, strict=True)]
    shared = common(_of_all(found, shown))
    beside = block_correlation(runs, quantile=settings.quantile, beside=True)
    for (_, rounds), moves, factor in zip(runs, found, factors, strict=True):
        moves[:, 0] *= factor
        moves[:, 1:] = (moves[:, 1:] - shared) * widening(rounds, beside)
    return found


def _of_all(values: Sequence[Doubles], shown: Sequence[Mask]) -> Doubles:
    """Those of all points side by side: [..., parts shown], or one zero if there are none."""
    chosen = np.concatenate(
        [of[..., mask] for of, mask in zip(values, shown, strict=True)], axis=-1
    )
    return chosen if chosen.shape[-1] else np.zeros((*chosen.shape[:-1], 1))


def _degrees(pair: _Pair) -> int:
    return len(block_starts(pair.before_rounds)) + len(block_starts(pair.after_rounds)) - 2


def _judged(pair: _Pair, min_share: float) -> Mask:
    """Which parts are no whole steps, and not too small [parts]."""
    mask: Mask = _share(pair) >= min_share
    mask[0] = False
    return mask


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
