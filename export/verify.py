"""Does the bundle compute what transformers computes? Every gate's router logits, and the logits.

The reference runs each sequence alone, whole and without a cache; the bundle runs the same tokens
in the pieces of `CASES`, through the segments and the frozen gate graph. torch and transformers are
imported only when a verification is asked for.

What quantising costs is not an error of the export. Where weights are not stored as fp32, the
reference is given the weights that the stored ones stand for, and the bundle is run with operators
told to keep activations in fp32: then the tolerance is the same. Where the bundle as it is rounds
activations, it is run a second time, with the experts of the first run, and the difference that
rounding makes must stay below `ACTIVATION_BOUND`.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from knnmoe.runtime.bundle import FROZEN, Bundle
from knnmoe.runtime.checkpoint import CONFIG
from knnmoe.runtime.engines.requirements import check_onnxruntime
from knnmoe.runtime.errors import BackendError, VerificationError
from knnmoe.runtime.routing import RoutingRule
from knnmoe.runtime.selection_bias import read_selection_biases

from .families import FAMILIES
from .mxfp4 import ENTRY
from .storage import EXPERT_PARTS, FIELD_PARTS, Storage
from .torch_frontend.names import is_traced

TOLERANCE = 1e-4
# On the relative RMS difference that rounding activations to 8 bits makes to any router's logits,
# or to the logits. One rounding of a block of normal numbers makes 0.6 to 0.8 %; a layer has four
# in a row, and the residual stream adds up those of all layers.
ACTIVATION_BOUND = 0.1
MAX_TIED_SHARE = 0.1
# Where ONNX Runtime looks for the arithmetic of quantised experts, before the node's attribute.
_QMOE_ARITHMETIC = "ORT_QMOE_CPU_QNBIT_GEMM"

Floats = NDArray[np.float32]
Tokens = NDArray[np.int64]
Decision = tuple[NDArray[np.int32], Floats]
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
        VerificationError: If a difference is larger than the tolerance, or not a number, or
            rounding activations makes more of a difference than `ACTIVATION_BOUND`.
        BackendError: If torch or transformers is not installed, or ONNX Runtime is too old for the
            bundle.
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
    found_quantization = bundle.manifest.quantization
    rounds = found_quantization is not None and found_quantization.accuracy_level > 0
    total = sum(map(len, tokens)) + len(cases) * (1 + rounds)
    done = 0

    def step() -> None:
        nonlocal done
        done += 1
        if progress is not None:
            progress("verify", done, total)

    expected = _reference(checkpoint, tokens, bundle, step)
    runner = SplitRunner(bundle, exact=True)
    found = []
    for case, sequences in zip(cases, tokens, strict=True):
        found.append(runner.run(case, sequences))
        step()
    decisions = runner.decisions
    del runner
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
    if not rounds:
        return report
    shipped = SplitRunner(bundle, decisions=decisions)
    rounded = []
    for case, sequences in zip(cases, tokens, strict=True):
        rounded.append(shipped.run(case, sequences))
        step()
    difference = _relative_difference(found, rounded)
    if not difference <= ACTIVATION_BOUND:
        raise VerificationError(
            f"export of {checkpoint}",
            "rounding activations to 8 bits makes too much of a difference",
            expected=f"a relative RMS of at most {ACTIVATION_BOUND:g}",
            found=f"{difference:.3g}",
            fix="Nothing was kept. Export with --exact-activations.",
        )
    return replace(report, activations=difference)


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
    """Runs a bundle's segments and frozen gate graph with plain NumPy feeds: simple, not fast.

    Args:
        bundle: What to run.
        exact: Whether operators over quantised weights keep activations in fp32, whatever the
            bundle's graphs say.
        decisions: Expert ids and weights to use in place of the gates' own, in order.

    Attributes:
        decisions: (expert ids, expert weights) of each gate that ran, in order.
    """

    def __init__(
        self,
        bundle: Bundle,
        *,
        exact: bool = False,
        decisions: Sequence[Decision] | None = None,
    ) -> None:
        self._manifest = bundle.manifest
        load = _exact_session if exact and bundle.manifest.quantization else _session
        self._segments = [load(bundle, segment.file) for segment in bundle.manifest.segments]
        self._gate = _session(bundle, bundle.manifest.gates[FROZEN].file)
        self._selection_biases = read_selection_biases(bundle)
        self._given = None if decisions is None else iter(decisions)
        self.decisions: list[Decision] = []

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
        values: dict[str, Any] = {
            "input_ids": ids,
            "seqlens_k": (totals - 1).astype(np.int32),
            "total_sequence_length": np.array(totals.max(), np.int32),
            "logit_rows": np.arange(ids.size, dtype=np.int64),
        }
        router_logits, expert_ids = [], []
        for index, segment in enumerate(self._segments):
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
                values["selection_bias"] = self._selection_biases[index]
                gate_feeds = {spec.name: values[spec.name] for spec in self._gate.get_inputs()}
                ids_, weights = self._gate.run(["expert_ids", "expert_weights"], gate_feeds)
                if self._given is not None:
                    ids_, weights = next(self._given)
                self.decisions.append((ids_, weights))
                values["expert_ids"], values["expert_weights"] = ids_, weights
                router_logits.append(values["router_logits"].reshape(batch, width, -1))
                expert_ids.append(values["expert_ids"].reshape(batch, width, -1))
        logits = values["logits"].reshape(batch, width, -1)
        gates, experts = np.stack(router_logits), np.stack(expert_ids)
        return [_Outputs(gates[:, row], experts[:, row], logits[row]) for row in range(batch)]


def _session(bundle: Bundle, file: str) -> Any:
    import onnxruntime

    return onnxruntime.InferenceSession(bundle.file(file), _session_options(bundle))


def _exact_session(bundle: Bundle, file: str) -> Any:
    """A segment whose operators keep activations in fp32."""
    import onnx
    import onnxruntime

    model = onnx.load(bundle.file(file), load_external_data=False)
    for node in model.graph.node:
        for attribute in node.attribute:
            if attribute.name == "accuracy_level":
                attribute.i = 0
    with _environment(_QMOE_ARITHMETIC, "fp32"):  # 8-bit experts know no other way
        return onnxruntime.InferenceSession(model.SerializeToString(), _session_options(bundle))


def _session_options(bundle: Bundle) -> Any:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    # Threads that spin while they wait would take the cores from the next session.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    # For graphs from memory: where their weights lie.
    options.add_session_config_entry(
        "session.model_external_initializers_file_folder_path", str(bundle.path / "segments")
    )
    return options


@contextmanager
def _environment(name: str, value: str) -> Iterator[None]:
    before = os.environ.get(name)
    os.environ[name] = value
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before


def _reference(
    checkpoint: str | Path,
    tokens: Sequence[Sequence[Tokens]],
    bundle: Bundle,
    step: Callable[[], None],
) -> list[list[_Outputs]]:
    """transformers in fp32 over the weights as they were stored, each sequence alone; the model is
    freed on return.
    """
    require_reference()
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    silence: Callable[[], None] = logging.disable_progress_bar
    silence()
    loader: Any = AutoModelForCausalLM
    model: Any = loader.from_pretrained(
        Path(checkpoint),
        dtype=torch.float32,
        attn_implementation="eager",
        local_files_only=True,
        quantization_config=_quantization(bundle),
    )
    model.eval()
    _restore(model, bundle)
    run = _recording(model, bundle)
    rule, biases = bundle.manifest.routing, read_selection_biases(bundle)
    expected = []
    for sequences in tokens:
        row = []
        for sequence in sequences:
            with torch.inference_mode():
                router_logits, logits = run(torch.from_numpy(sequence)[None])
            gates = np.stack([gate.float().numpy() for gate in router_logits])
            ids = np.stack([rule.apply(*pair)[0] for pair in zip(gates, biases, strict=True)])
            row.append(_Outputs(gates, ids, logits[0].float().numpy()))
            step()
        expected.append(row)
    return expected


def _recording(model: Any, bundle: Bundle) -> Callable[[Any], tuple[Sequence[Any], Any]]:
    """What runs a model of transformers: ids [1, S] → (router logits of each gate, logits)."""
    if is_traced(bundle.manifest):
        from .torch_frontend.reference import watched_routers

        watched = watched_routers(model, bundle)

        def run_watched(ids: Any) -> tuple[Sequence[Any], Any]:
            with watched:
                logits = model(ids, use_cache=False).logits
            return watched.found, logits

        return run_watched

    def run(ids: Any) -> tuple[Sequence[Any], Any]:
        output = model(ids, output_router_logits=True)
        return output.router_logits, output.logits

    return run


def _quantization(bundle: Bundle) -> Any:
    """What has transformers dequantise experts in MXFP4 as it loads them; None for others."""
    if json.loads(bundle.file(CONFIG).read_bytes()).get(ENTRY) is None:
        return None
    import transformers

    library: Any = transformers  # whose types do not say what it exports
    return library.Mxfp4Config(dequantize=True)


def _restore(model: Any, bundle: Bundle) -> None:
    """Give a model of transformers the weights that those stored in the bundle stand for."""
    manifest = bundle.manifest
    if manifest.precision == "fp32":
        return
    if is_traced(manifest):
        from .torch_frontend.reference import round_weights

        round_weights(model, bundle)
        return
    import torch

    parameters: dict[str, Any] = dict(model.named_parameters())
    names = FAMILIES[manifest.model_type].tensors
    tied = names.head not in parameters
    storage = Storage(manifest.precision, manifest.quantization, tied)
    if tied and storage.scheme("head") is not None:
        # The head is stored apart from the embedding that it is.
        head = model.get_output_embeddings()
        rows = storage.restored("head", head.weight.detach().numpy())
        head.weight = torch.nn.Parameter(torch.from_numpy(rows))

    def restore(name: str, part: str, *, turned: bool = False) -> None:
        with torch.no_grad():
            weight = parameters[name]
            if turned:  # transformers has [in, out] where the checkpoint does
                weight = weight.transpose(-1, -2)
            for rows in weight if weight.ndim > 2 else (weight,):  # one expert at a time
                # As they lay in memory when they were stored: the order decides how sums round.
                stored = np.ascontiguousarray(rows.numpy())
                rows.copy_(torch.from_numpy(storage.restored(part, stored)))

    restored = 0
    stacked = names.stacked_down is not None
    for field, part in FIELD_PARTS.items():
        template = getattr(names, field, None)
        if template is None:
            continue
        for layer in range(manifest.architecture.num_layers if "{layer}" in template else 1):
            name = template.format(layer=layer)
            if name in parameters:
                restore(name, part)
    for name in parameters:
        # transformers stacks the experts of a layer, whatever the checkpoint does.
        module, _, stack = name.rpartition(".experts.")
        if module and stack in EXPERT_PARTS:
            restore(name, EXPERT_PARTS[stack], turned=stacked)
            restored += 1
    if restored != manifest.architecture.num_gates * len(EXPERT_PARTS):
        raise BackendError(
            "verification",
            "this version of transformers keeps experts under other names",
            expected=f"{' and '.join(EXPERT_PARTS)} of {manifest.architecture.num_gates} layers",
            found=f"{restored} of them",
            fix="Install another version of transformers, or export without --verify.",
        )


def _relative_difference(
    exact: Sequence[Sequence[_Outputs]], rounded: Sequence[Sequence[_Outputs]]
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


def _compare(
    cases: Sequence[Case],
    expected: Sequence[Sequence[_Outputs]],
    found: Sequence[Sequence[_Outputs]],
    bundle: Bundle,
    tolerance: float,
) -> VerifyReport:
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
    want: _Outputs,
    have: _Outputs,
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
