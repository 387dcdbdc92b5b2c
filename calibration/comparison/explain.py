"""Why a memory gains what it gains: by gate, by λ, by expert and by token."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from knnmoe.runtime.memory import MemoryPack
from knnmoe.runtime.texts import TokenText

from .bench import Bench
from .measured import Change, change

BINS = 20  # of λ, from 0 to 1
QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)
TOKENS_SHOWN = 12
CONTEXT_BEFORE, CONTEXT_AFTER = 24, 6
GATE_TOKENS = 3000  # of each text, for the gates one by one


@dataclass(frozen=True)
class GateGain:
    """What one gate contributes, by text."""

    gate: int
    alone: Mapping[str, Change]  # the memory in this gate only
    without: Mapping[str, Change]  # in all but this one


@dataclass(frozen=True)
class Spread:
    """λ of one gate over the tokens of one text."""

    mean: float
    quantiles: tuple[float, ...]  # QUANTILES
    histogram: tuple[float, ...]  # share of the tokens in each of BINS bins


@dataclass(frozen=True)
class Load:
    """How the tokens of one text spread over the experts of one gate.

    Attributes:
        shares: Of all assignments, by expert.
        entropy: Of the shares, as a share of the largest possible: 1 is balanced.
        imbalance: The busiest expert's load over the mean.
    """

    shares: tuple[float, ...]
    entropy: float
    imbalance: float


@dataclass(frozen=True)
class TokenChange:
    """One token whose likelihood changed much, NLL in nats, with its surroundings."""

    change: float
    before: str
    token: str
    after: str
    document: int
    position: int


@dataclass(frozen=True)
class TextExplained:
    """What the memory did to one text; λ and loads by gate."""

    confidence: Mapping[int, Spread]
    frozen_load: Mapping[int, Load]
    memory_load: Mapping[int, Load]
    moved: float  # share of assignments to another expert than the frozen router's
    gained: Sequence[TokenChange]
    lost: Sequence[TokenChange]


@dataclass(frozen=True)
class Explanation:
    """All of it; `gates` is measured on fewer tokens."""

    gates: Sequence[GateGain]
    texts: Mapping[str, TextExplained]


def explain(bench: Bench) -> Explanation:
    """Take the memory as calibrated apart, on the test texts."""
    texts = {}
    for name, text in bench.tests.items():
        bench.say(f"λ, experts and tokens of {name} text")
        texts[name] = _explain_text(bench, text)
    gates = _gate_gains(bench)
    bench.model.swap_memory(None)
    return Explanation(gates, texts)


def _gate_gains(bench: Bench) -> list[GateGain]:
    tests = {name: text.limited(GATE_TOKENS) for name, text in bench.tests.items()}

    def measured(pack: MemoryPack | None) -> dict[str, NDArray[np.float64]]:
        bench.model.swap_memory(pack)
        return {name: bench.score(text) for name, text in tests.items()}

    base = measured(None)

    def gain(chosen: tuple[int, ...]) -> dict[str, Change]:
        kept = tuple(gate for gate in bench.pack.gates if gate.gate in chosen)
        nll = measured(replace(bench.pack, gates=kept)) if kept else base
        return {name: change(nll[name], base[name], text) for name, text in tests.items()}

    covered = tuple(gate.gate for gate in bench.pack.gates)
    gains = []
    for gate in covered:
        bench.say(f"gate {gate} alone, and all but gate {gate}")
        rest = tuple(other for other in covered if other != gate)
        gains.append(GateGain(gate, gain((gate,)), gain(rest)))
    return gains


def _explain_text(bench: Bench, text: TokenText) -> TextExplained:
    frozen, memory = _Trace.of(bench, text, None), _Trace.of(bench, text, bench.pack)
    experts = bench.pack.model.num_experts
    differing = [
        (a[:, :, None] != b[:, None, :]).all(axis=2).mean()
        for a, b in zip(memory.experts, frozen.experts, strict=True)
    ]
    gained, lost = _extremes(bench, text, memory.nll - frozen.nll)
    return TextExplained(
        confidence={gate.gate: _spread(memory.confidence[gate.gate]) for gate in bench.pack.gates},
        frozen_load={g: _load(ids, experts) for g, ids in enumerate(frozen.experts)},
        memory_load={g: _load(ids, experts) for g, ids in enumerate(memory.experts)},
        moved=float(np.mean(differing)),
        gained=gained,
        lost=lost,
    )


@dataclass(frozen=True)
class _Trace:
    """A text read token by token.

    Attributes:
        nll: [T] of the predicted tokens of all sequences.
        experts: By gate, ids [T', k] of all tokens.
        confidence: By gate, λ [T'].
    """

    nll: NDArray[np.float64]
    experts: tuple[NDArray[np.int32], ...]
    confidence: tuple[NDArray[np.float32], ...]

    @staticmethod
    def of(bench: Bench, text: TokenText, pack: MemoryPack | None) -> _Trace:
        bench.model.swap_memory(pack)
        nll, records = [], []
        for sequence in text.sequences:
            ids = sequence.tokens[None]
            cache = bench.model.pipeline.new_cache(capacity=ids.size)
            logits, gates = bench.model.pipeline.traced_step(cache, ids)
            credited = sequence.credited
            nll.append(_token_nll(logits[:-1][credited], sequence.tokens[1:][credited]))
            records.append(gates)
        top_k = bench.model.bundle.manifest.routing.top_k
        by_gate = list(zip(*records, strict=True))
        return _Trace(
            np.concatenate(nll),
            # Where the seam is wider than the rule, what comes after has no weight.
            tuple(np.concatenate([r.expert_ids[:, :top_k] for r in gate]) for gate in by_gate),
            tuple(np.concatenate([r.trace.confidence for r in gate]) for gate in by_gate),
        )


def _token_nll(logits: NDArray[np.float32], targets: NDArray[np.int64]) -> NDArray[np.float64]:
    rows = logits.astype(np.float64)
    highest = rows.max(axis=1)
    total = np.log(np.exp(rows - highest[:, None]).sum(axis=1)) + highest
    nll: NDArray[np.float64] = total - rows[np.arange(len(targets)), targets]
    return nll


def _spread(confidence: NDArray[np.float32]) -> Spread:
    counts, _ = np.histogram(confidence, bins=BINS, range=(0, 1))
    return Spread(
        float(confidence.mean()),
        tuple(np.quantile(confidence, QUANTILES).tolist()),
        tuple((counts / len(confidence)).tolist()),
    )


def _load(ids: NDArray[np.int32], experts: int) -> Load:
    shares = np.bincount(ids.ravel(), minlength=experts) / ids.size
    used = shares[shares > 0]
    entropy = -(used * np.log(used)).sum() / np.log(experts) if experts > 1 else 1.0
    return Load(tuple(shares.tolist()), float(entropy), float(shares.max() * experts))


def _extremes(
    bench: Bench, text: TokenText, changes: NDArray[np.float64]
) -> tuple[list[TokenChange], list[TokenChange]]:
    """The tokens that gained and that lost most, with their surroundings."""
    starts = np.cumsum([0, *(sequence.targets for sequence in text.sequences)])
    order = np.argsort(changes, kind="stable")

    def shown(index: int) -> TokenChange:
        number = int(np.searchsorted(starts, index, side="right")) - 1
        sequence = text.sequences[number]
        at = int(np.flatnonzero(sequence.credited)[index - int(starts[number])]) + 1
        ids = sequence.tokens.tolist()
        decode = bench.model.tokenizer.decode
        return TokenChange(
            float(changes[index]),
            decode(ids[max(0, at - CONTEXT_BEFORE) : at]),
            decode(ids[at : at + 1]),
            decode(ids[at + 1 : at + 1 + CONTEXT_AFTER]),
            sequence.document,
            sequence.position + at,
        )

    gained = [shown(i) for i in order[:TOKENS_SHOWN].tolist() if changes[i] < 0]
    lost = [shown(i) for i in order[::-1][:TOKENS_SHOWN].tolist() if changes[i] > 0]
    return gained, lost
