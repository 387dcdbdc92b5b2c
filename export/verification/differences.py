"""How far a bundle's results are from those of transformers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from knnmoe.runtime.bundle import Bundle
from knnmoe.runtime.errors import VerificationError
from knnmoe.runtime.routing import RoutingRule
from knnmoe.runtime.selection_bias import read_selection_biases

from .cases import Case, Floats, Outputs

MAX_TIED_SHARE = 0.1


@dataclass(frozen=True)
class VerifyReport:
    """How far the bundle is from transformers.

    Attributes:
        gates: Worst |Δ| of each gate's router logits.
        logits: Worst |Δ| of the logits.
        cases: Worst |Δ| of either, by (batch, sequence, past).
        ties: Positions left out, because two experts' logits were equal within the tolerance and
            either choice is right.
        tolerance: What was allowed.
        activations: Relative RMS difference made by rounding activations, worst of all gates and
            the logits; None where they are not rounded. At most `ACTIVATION_BOUND`.
    """

    gates: tuple[float, ...]
    logits: float
    cases: dict[str, float]
    ties: int
    tolerance: float
    activations: float | None = None

    @property
    def max_abs_error(self) -> float:
        """The worst of all."""
        return max(*self.gates, self.logits)


def compare(
    cases: Sequence[Case],
    expected: Sequence[Sequence[Outputs]],
    found: Sequence[Sequence[Outputs]],
    bundle: Bundle,
    tolerance: float,
) -> VerifyReport:
    """The differences between two runs of some cases, in which ties are left out.

    Raises:
        VerificationError: If more than `MAX_TIED_SHARE` of the positions are.
    """
    gates = np.zeros(bundle.manifest.architecture.num_gates)
    biases = read_selection_biases(bundle)
    logits, ties, positions = 0.0, 0, 0
    by_case: dict[str, float] = {}
    for case, wanted, got in zip(cases, expected, found, strict=True):
        worst = 0.0
        for want, have in zip(wanted, got, strict=True):
            length = len(want.logits)
            limits = _comparable(want, have, bundle.manifest.routing, biases, tolerance)
            errors = [
                _largest(want.router_logits[g, :limit] - have.router_logits[g, :limit])
                for g, limit in enumerate(limits[:-1])
            ]
            error = _largest(want.logits[: limits[-1]] - have.logits[: limits[-1]])
            gates = np.maximum(gates, errors)
            logits = float(np.maximum(logits, error))
            worst = float(np.max([worst, error, *errors]))
            ties += length - limits[-1]
            positions += length
        by_case[case.name] = worst
    if ties > MAX_TIED_SHARE * positions:
        raise VerificationError(
            "router logits",
            "too many routing decisions are ties to compare anything",
            expected=f"at most {MAX_TIED_SHARE:.0%} of the positions",
            found=f"{ties} of {positions}",
            fix="Check the checkpoint: its routers do not tell experts apart.",
        )
    return VerifyReport(tuple(map(float, gates)), logits, by_case, ties, tolerance)


def _comparable(
    want: Outputs,
    have: Outputs,
    rule: RoutingRule,
    biases: Sequence[Floats | None],
    tolerance: float,
) -> list[int]:
    """How many leading positions can be compared at each gate, and of the logits.

    Where the last expert (or group) chosen and the first one not chosen rank the same within the
    tolerance, rounding decides, and everything computed from there on may differ.
    """
    count = rule.top_k
    limits = [len(want.logits)]
    for logits, bias, ids, other in zip(
        want.router_logits, biases, want.expert_ids, have.expert_ids, strict=True
    ):
        tied = rule.margins(logits, bias) <= tolerance
        differ = (np.sort(ids[:, :count], axis=1) != np.sort(other[:, :count], axis=1)).any(axis=1)
        excused = np.flatnonzero(tied & differ)
        limits.append(min(limits[-1], int(excused[0])) if len(excused) else limits[-1])
    return limits


def relative_difference(
    exact: Sequence[Sequence[Outputs]], rounded: Sequence[Sequence[Outputs]]
) -> float:
    """Relative RMS difference of the gates' logits and the logits, the worst of them."""
    pairs = [
        pair for row, other in zip(exact, rounded, strict=True)
        for pair in zip(row, other, strict=True)
    ]  # fmt: skip

    def relative(wanted: Sequence[Floats], found: Sequence[Floats]) -> float:
        difference = sum(np.square(w - f).sum() for w, f in zip(wanted, found, strict=True))
        return float(np.sqrt(difference / sum(np.square(w).sum() for w in wanted)))

    gates = [
        relative(
            [want.router_logits[gate] for want, _ in pairs],
            [have.router_logits[gate] for _, have in pairs],
        )
        for gate in range(len(pairs[0][0].router_logits))
    ]
    logits = relative([want.logits for want, _ in pairs], [have.logits for _, have in pairs])
    return float(np.max([logits, *gates]))  # NaN stays NaN


def _largest(difference: Floats) -> float:
    """Largest magnitude, 0 of nothing; NaN stays NaN."""
    return float(np.abs(difference).max()) if difference.size else 0.0
