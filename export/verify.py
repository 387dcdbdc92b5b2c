"""Does the bundle compute what transformers computes? Every gate's router logits, and the logits.

The reference runs each sequence alone, whole and without a cache; the bundle runs the same tokens
in the pieces of `CASES`, through the segments and the frozen gate graph. torch and transformers are
imported only when a verification is asked for.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from knnmoe.runtime.bundle import FROZEN, Bundle
from knnmoe.runtime.errors import BackendError, VerificationError

TOLERANCE = 1e-4
MAX_TIED_SHARE = 0.1

Floats = NDArray[np.float32]
Tokens = NDArray[np.int64]
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Case:
    """Tokens a sequence: `past` fed first, then `new`; the shorter ones are padded on the right."""

    past: tuple[int, ...]
    new: tuple[int, ...]

    @property
    def name(self) -> str:
        """The case as (batch, sequence, past)."""
        return f"({len(self.new)}, {_span(self.new)}, {_span(self.past)})"


CASES = (
    Case((0,), (1,)),
    Case((0,), (24,)),
    Case((17,), (1,)),
    Case((9,), (13,)),
    Case((0, 0, 0), (12, 7, 1)),
    Case((11, 11), (1, 1)),
    Case((10, 4, 7), (5, 5, 5)),
    Case((8, 3), (4, 2)),
)


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
    """

    gates: tuple[float, ...]
    logits: float
    cases: dict[str, float]
    ties: int
    tolerance: float

    @property
    def max_abs_error(self) -> float:
        """The worst of all."""
        return max(*self.gates, self.logits)


@dataclass(frozen=True)
class _Outputs:
    """One sequence: router logits [G, L, E], expert ids [G, L, k], logits [L, V]."""

    router_logits: Floats
    expert_ids: NDArray[np.int32]
    logits: Floats


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
        VerificationError: If a difference is larger than the tolerance, or not a number.
        BackendError: If torch or transformers is not installed.
    """
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
    total = sum(map(len, tokens)) + len(cases)
    done = 0

    def step() -> None:
        nonlocal done
        done += 1
        if progress is not None:
            progress("verify", done, total)

    expected = _reference(checkpoint, tokens, bundle, step)
    runner = SplitRunner(bundle)
    found = []
    for case, sequences in zip(cases, tokens, strict=True):
        found.append(runner.run(case, sequences))
        step()
    report = _compare(cases, expected, found, bundle, tolerance)
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
    return report


def require_reference() -> None:
    """Raise `BackendError` unless torch and transformers are installed; imports neither."""
    for package in ("torch", "transformers"):
        if find_spec(package) is None:
            raise BackendError(
                "verification",
                f"needs the package {package}, which is not installed",
                fix="Run `pip install 'knnmoe[train]'`.",
            )


class SplitRunner:
    """Runs a bundle's segments and frozen gate graph with plain NumPy feeds: simple, not fast."""

    def __init__(self, bundle: Bundle) -> None:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        # Threads that spin while they wait would take the cores from the next session.
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")

        def session(file: str) -> Any:
            return onnxruntime.InferenceSession(bundle.file(file), options)

        self._manifest = bundle.manifest
        self._segments = [session(segment.file) for segment in bundle.manifest.segments]
        self._gate = session(bundle.manifest.gates[FROZEN].file)

    def run(self, case: Case, sequences: Sequence[Tokens]) -> list[_Outputs]:
        """Feed the sequences [past + new] in the pieces of the case."""
        batch = len(sequences)
        shape = self._manifest.architecture
        size = (batch, shape.num_kv_heads, max(map(len, sequences)) + 1, shape.head_size)
        cache = {
            f"past_{part}_{layer}": np.zeros(size, np.float32)
            for part in ("key", "value")
            for layer in range(shape.num_layers)
        }
        parts: list[list[_Outputs]] = [[] for _ in sequences]
        position = np.zeros(batch, np.int64)
        for counts in self._pieces(case):
            width = int(counts.max())
            ids = np.zeros((batch, width), np.int64)
            for row, sequence in enumerate(sequences):
                start = position[row]
                ids[row, : counts[row]] = sequence[start : start + counts[row]]
            outputs = self._step(ids, np.maximum(position + counts, position + 1), cache)
            for row, output in enumerate(outputs):
                count = counts[row]
                parts[row].append(
                    _Outputs(
                        output.router_logits[:, :count],
                        output.expert_ids[:, :count],
                        output.logits[:count],
                    )
                )
            position += counts
        return [_joined(pieces) for pieces in parts]

    @staticmethod
    def _pieces(case: Case) -> list[NDArray[np.int64]]:
        """Tokens a sequence of each call. GroupQueryAttention takes several tokens of several
        sequences only where no past is: such a piece is fed token by token."""
        past, new = np.array(case.past), np.array(case.new)
        if not past.any():
            return [new]
        if len(new) == 1:
            return [past, new]
        steps = [np.minimum(np.maximum(new - index, 0), 1) for index in range(new.max())]
        return [past, *steps]

    def _step(
        self, ids: Tokens, totals: NDArray[np.int64], cache: dict[str, Floats]
    ) -> list[_Outputs]:
        """One call over ids [B, S] with the total lengths [B] after it; the cache is updated.

        A sequence without a token in this call writes one that the next call overwrites.
        """
        batch, width = ids.shape
        values: dict[str, NDArray[Any]] = {
            "input_ids": ids,
            "seqlens_k": (totals - 1).astype(np.int32),
            "total_sequence_length": np.array(totals.max(), np.int32),
            "logit_rows": np.arange(ids.size, dtype=np.int64),
        }
        router_logits, expert_ids = [], []
        for segment in self._segments:
            feeds = {
                spec.name: values[spec.name] if spec.name in values else cache[spec.name]
                for spec in segment.get_inputs()
            }
            names = [spec.name for spec in segment.get_outputs()]
            for name, output in zip(names, segment.run(names, feeds), strict=True):
                if name.startswith("present_"):
                    cache[name.replace("present", "past", 1)] = output
                else:
                    values[name.removesuffix("_out")] = output
            if segment is not self._segments[-1]:
                gate_feeds = {name: values[name] for name in ("router_input", "router_logits")}
                gate_feeds = {spec.name: gate_feeds[spec.name] for spec in self._gate.get_inputs()}
                routed = self._gate.run(["expert_ids", "expert_weights"], gate_feeds)
                values["expert_ids"], values["expert_weights"] = routed
                router_logits.append(values["router_logits"].reshape(batch, width, -1))
                expert_ids.append(values["expert_ids"].reshape(batch, width, -1))
        logits = values["logits"].reshape(batch, width, -1)
        gates, experts = np.stack(router_logits), np.stack(expert_ids)
        return [_Outputs(gates[:, row], experts[:, row], logits[row]) for row in range(batch)]


def _reference(
    checkpoint: str | Path,
    tokens: Sequence[Sequence[Tokens]],
    bundle: Bundle,
    step: Callable[[], None],
) -> list[list[_Outputs]]:
    """transformers in fp32, each sequence alone; the model is freed on return."""
    require_reference()
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    silence: Callable[[], None] = logging.disable_progress_bar
    silence()
    model: Any = AutoModelForCausalLM.from_pretrained(
        Path(checkpoint), dtype=torch.float32, attn_implementation="eager", local_files_only=True
    )
    model.eval()
    rule = bundle.manifest.routing
    expected = []
    for sequences in tokens:
        row = []
        for sequence in sequences:
            with torch.inference_mode():
                output = model(torch.from_numpy(sequence)[None], output_router_logits=True)
            gates = np.stack([gate.float().numpy() for gate in output.router_logits])
            ids = np.stack([rule.apply(gate)[0] for gate in gates])
            row.append(_Outputs(gates, ids, output.logits[0].float().numpy()))
            step()
        expected.append(row)
    return expected


def _compare(
    cases: Sequence[Case],
    expected: Sequence[Sequence[_Outputs]],
    found: Sequence[Sequence[_Outputs]],
    bundle: Bundle,
    tolerance: float,
) -> VerifyReport:
    gates = np.zeros(bundle.manifest.architecture.num_gates)
    logits, ties, positions = 0.0, 0, 0
    by_case: dict[str, float] = {}
    for case, wanted, got in zip(cases, expected, found, strict=True):
        worst = 0.0
        for want, have in zip(wanted, got, strict=True):
            length = len(want.logits)
            limits = _comparable(want, have, bundle, tolerance)
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


def _comparable(want: _Outputs, have: _Outputs, bundle: Bundle, tolerance: float) -> list[int]:
    """How many leading positions can be compared at each gate, and of the logits.

    Where the last expert chosen and the first one not chosen have the same logit within the
    tolerance, rounding decides, and everything computed from there on may differ.
    """
    count = bundle.manifest.routing.top_k
    limits = [len(want.logits)]
    for logits, ids, other in zip(
        want.router_logits, want.expert_ids, have.expert_ids, strict=True
    ):
        ranked = -np.sort(-logits, axis=1)
        tied = np.zeros(len(logits), bool)
        if count < ranked.shape[1]:
            tied = ranked[:, count - 1] - ranked[:, count] <= tolerance
        differ = (np.sort(ids[:, :count], axis=1) != np.sort(other[:, :count], axis=1)).any(axis=1)
        excused = np.flatnonzero(tied & differ)
        limits.append(min(limits[-1], int(excused[0])) if len(excused) else limits[-1])
    return limits


def _joined(pieces: Sequence[_Outputs]) -> _Outputs:
    return _Outputs(
        np.concatenate([piece.router_logits for piece in pieces], axis=1),
        np.concatenate([piece.expert_ids for piece in pieces], axis=1),
        np.concatenate([piece.logits for piece in pieces]),
    )


def _largest(difference: Floats) -> float:
    """Largest magnitude, 0 of nothing; NaN stays NaN."""
    return float(np.abs(difference).max()) if difference.size else 0.0


def _span(counts: tuple[int, ...]) -> str:
    low, high = min(counts), max(counts)
    return str(low) if low == high else f"{low}-{high}"
