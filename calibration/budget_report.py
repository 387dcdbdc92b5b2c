"""What a search within a budget reports: the points it measured, and the one it chose."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

from knnmoe.runtime.memory import MemoryPack

from .confidence import Interval, Limits
from .costs import Costs
from .recipes import Recipe

Judge = Literal["likelihood", "recall"]


@dataclass(frozen=True)
class Point:
    """A recipe on the front.

    Attributes:
        recipe: None for the memory as it is.
        bytes: That the runtime holds of all gates.
        by_gate: Of each gate.
        stored: Of the pack on disk; None where it was not written.
        recall: Share of the K nearest that a search returns among the entries left, on router
            inputs of the domain, or on keys held back.
        error: What probes found; 0 for the memory as it is.
        ms: Predicted milliseconds of a decode step; None without a bundle.
        domain, general: Change of NLL, nats a token; None where not measured.
        switch: Nats a change of subject; None where not measured.
        kept: Share of the whole memory's gain, both measured on the same text.
    """

    recipe: Recipe | None
    bytes: int
    by_gate: Mapping[int, int]
    stored: int | None
    recall: float
    error: float
    ms: float | None
    domain: Interval | None = None
    general: Interval | None = None
    switch: Interval | None = None
    kept: Interval | None = None

    @property
    def name(self) -> str:
        """As people read it."""
        return "as it is" if self.recipe is None else self.recipe.name

    def spares(self, limits: Limits) -> bool:
        """Whether what was measured on other text is within its limits."""
        return (self.general is None or self.general.high <= limits.general) and (
            self.switch is None or self.switch.high <= limits.switch
        )


@dataclass(frozen=True)
class BudgetReport:
    """What was tried and what was written.

    Attributes:
        pack: The pack that was written.
        limit: Bytes.
        points: The memory as it is, then all points measured, by bytes.
        chosen: Of them.
        judge: What chose: the likelihood of text, or recall alone.
        gates: By gate: nats a token that its retrieval gains, on the half of the text that chooses
            entries; empty without text.
        dropped: Gates whose retrieval gains nothing.
        calibration: Whether the settings were `carried` over or `refitted`.
        costs: Of this device; None without a bundle.
        limits: What other text was allowed to lose.
    """

    pack: MemoryPack
    limit: int
    points: tuple[Point, ...]
    chosen: Point
    judge: Judge
    gates: Mapping[int, float]
    dropped: tuple[int, ...]
    calibration: Literal["carried", "refitted"]
    costs: Costs | None
    limits: Limits

    def to_json(self) -> dict[str, Any]:
        """All of it as one JSON object."""
        return {
            "pack": str(self.pack.path),
            "stored_bytes": self.pack.bytes,
            "budget_bytes": self.limit,
            "judged_by": self.judge,
            "gate_gains": {str(gate): gain for gate, gain in self.gates.items()},
            "dropped_gates": list(self.dropped),
            "calibration": self.calibration,
            "costs": None if self.costs is None else asdict(self.costs),
            "points": [
                {
                    "name": point.name,
                    "recipe": None if point.recipe is None else asdict(point.recipe),
                    "chosen": point is self.chosen,
                    "bytes": point.bytes,
                    "bytes_share": point.bytes / self.points[0].bytes,
                    "bytes_by_gate": {str(gate): n for gate, n in point.by_gate.items()},
                    "stored_bytes": point.stored,
                    "recall": point.recall,
                    "error": point.error,
                    "predicted_ms": point.ms,
                    **_gain_kept(point.kept),
                    **{
                        name: None if found is None else asdict(found)
                        for name, found in (
                            ("domain", point.domain),
                            ("general", point.general),
                            ("switch", point.switch),
                        )
                    },
                }
                for point in self.points
            ],
        }


def _gain_kept(kept: Interval | None) -> dict[str, float | None]:
    """By name; a bound is null where nothing bounds it."""
    names = ("gain_kept", "gain_kept_low", "gain_kept_high")
    if kept is None:
        return dict.fromkeys(names)
    numbers = (kept.mean, kept.low, kept.high)
    return {
        name: number if math.isfinite(number) else None
        for name, number in zip(names, numbers, strict=True)
    }
