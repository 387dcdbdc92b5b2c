"""Does the bundle compute what transformers computes? Every gate's router logits, and the logits.

The reference runs each sequence alone, whole and without a cache; the bundle runs the same tokens
in the pieces of `CASES`, through the segments and the frozen gate graph.

What quantising costs is not an error of the export. Where weights are not stored as fp32, the
reference is given the weights that the stored ones stand for, and the bundle is run with operators
told to keep activations in fp32: then the tolerance is the same. Where the bundle as it is rounds
activations, it is run a second time, with the experts of the first run, and the difference that
rounding makes must stay below `ACTIVATION_BOUND`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from knnmoe.runtime.bundle import Bundle
from knnmoe.runtime.engines.requirements import check_onnxruntime
from knnmoe.runtime.errors import VerificationError

from .bundle_runs import SplitRunner
from .cases import CASES, Case, Outputs, Tokens
from .differences import VerifyReport, compare, relative_difference
from .reference import reference

TOLERANCE = 1e-4
# On the relative RMS difference that rounding activations to 8 bits makes to any router's logits,
# or to the logits. One rounding of a block of normal numbers makes 0.6 to 0.8 %; a layer has four
# in a row, and the residual stream adds up those of all layers.
ACTIVATION_BOUND = 0.1

Progress = Callable[[str, int, int], None]


def verify(
    checkpoint: str | Path,
    bundle: Bundle,
    *,
    tolerance: float = TOLERANCE,
    seed: int = 0,
    progress: Progress | None = None,
) -> VerifyReport:
    """Compare a bundle with the checkpoint it was exported from, on random tokens.

    Args:
        checkpoint: Its directory.
        tolerance: The largest |Δ| allowed, of router logits and logits.
        seed: Of the random tokens.
        progress: Called with ("verify", sequences and cases done, in all).

    Raises:
        VerificationError: If a difference is larger than the tolerance, or not a number, or
            rounding activations makes more of a difference than `ACTIVATION_BOUND`.
        BackendError: If torch or transformers is not installed, or ONNX Runtime is too old for the
            bundle.
        CheckpointError: If transformers cannot load the checkpoint.
    """
    check_onnxruntime(bundle)
    shape = bundle.manifest.architecture
    cases = [
        c for c in CASES if max(map(sum, zip(c.past, c.new, strict=True))) <= shape.max_positions
    ]
    rng = np.random.default_rng(seed)
    tokens = [
        [
            rng.integers(0, shape.vocab_size, past + new)
            for past, new in zip(c.past, c.new, strict=True)
        ]
        for c in cases
    ]
    quantization = bundle.manifest.quantization
    rounds = quantization is not None and quantization.accuracy_level > 0
    total = sum(map(len, tokens)) + len(cases) * (1 + rounds)
    done = 0

    def step() -> None:
        nonlocal done
        done += 1
        if progress is not None:
            progress("verify", done, total)

    expected = reference(checkpoint, tokens, bundle, step)
    runner = SplitRunner(bundle, exact=True)
    found = _run(runner, cases, tokens, step)
    decisions = runner.decisions
    del runner
    report = compare(cases, expected, found, bundle, tolerance)
    # Written so that NaN fails too.
    if not report.max_abs_error <= tolerance:
        worst = max(report.cases, key=lambda name: report.cases[name])
        raise VerificationError(
            f"export of {checkpoint}",
            f"disagrees with transformers, most in case (batch, sequence, past) = {worst}",
            expected=f"|Δ| at most {tolerance:g}",
            found=f"{report.max_abs_error:.3g}",
            fix="Nothing was kept. Export without --verify to look into the bundle.",
        )
    if not rounds:
        return report
    rounded = _run(SplitRunner(bundle, decisions=decisions), cases, tokens, step)
    difference = relative_difference(found, rounded)
    if not difference <= ACTIVATION_BOUND:
        raise VerificationError(
            f"export of {checkpoint}",
            "rounding activations to 8 bits makes too much of a difference",
            expected=f"a relative RMS of at most {ACTIVATION_BOUND:g}",
            found=f"{difference:.3g}",
            fix="Nothing was kept. Export with --exact-activations.",
        )
    return replace(report, activations=difference)


def _run(
    runner: SplitRunner,
    cases: Sequence[Case],
    tokens: Sequence[Sequence[Tokens]],
    step: Callable[[], None],
) -> list[list[Outputs]]:
    found = []
    for case, sequences in zip(cases, tokens, strict=True):
        found.append(runner.run(case, sequences))
        step()
    return found
