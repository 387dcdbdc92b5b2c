"""Load-aware routing by the shape of the scores, on the runtime's own seam.

LASER (*From Score Distributions to Balance*, arXiv 2510.03293): where the scores prefer some
experts clearly, take the strongest; where they do not, widen the choice and take the least loaded
of it. The thresholds here are ours.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from itertools import product, starmap

import numpy as np
from numpy.typing import NDArray

from knnmoe.runtime.engines.base import Run
from knnmoe.runtime.errors import BackendError
from knnmoe.runtime.gates.base import GateBuffers, GateTrace, pad_experts
from knnmoe.runtime.layouts import HostLayout, SplitWiring
from knnmoe.runtime.routing import RoutingRule
from knnmoe.runtime.selection_bias import read_selection_biases
from knnmoe.runtime.texts import TokenText

from .bench import Bench
from .measured import Measured

# Of these, the setting that balances validation text best is taken among those that cost it at most
# COST nats a token: the share of the scores' mass which, where the k best have it, is a clear
# preference, and what share of the k-th best score makes an expert a choice where it is not.
CLEAR = (0.85, 0.7, 0.55, 0.4)
VIABLE = (0.9, 0.7, 0.5)
COST = 0.01
CHOICE_TOKENS = 1500  # of validation text

_SELECTED = 1e6  # more than any score, so that a bias decides


@dataclass(frozen=True)
class Thresholds:
    """When the choice is widened, and how far; see `CLEAR` and `VIABLE`."""

    clear: float
    viable: float


@dataclass(frozen=True)
class LoadAwareGate:
    """A gate without a memory that balances the load of its experts.

    Args:
        rule: The model's; it also makes the weights of what is chosen.
        experts_per_token: k of the seam.
        load: [E] float64, tokens each expert has had so far; grows.
        bias: [E], the gate's selection bias, where the rule has one.
        thresholds: None routes by the rule alone, and counts.
    """

    rule: RoutingRule
    experts_per_token: int
    load: NDArray[np.float64]
    bias: NDArray[np.float32] | None = None
    thresholds: Thresholds | None = None

    backend = "load-aware"
    neighbors = 0

    def bind(self, buffers: GateBuffers, trace: GateTrace | None = None) -> Run:
        """See `Gate.bind`."""

        def run() -> None:
            ids, weights = self.route(buffers.router_logits)
            ranking = self.rule.ranking(buffers.router_logits, self.bias)
            ids, weights = pad_experts(ids, weights, ranking, self.experts_per_token)
            np.copyto(buffers.expert_ids, ids)
            np.copyto(buffers.expert_weights, weights, casting="same_kind")
            np.copyto(buffers.state_out, buffers.state)

        return run

    def route(
        self, router_logits: NDArray[np.float32]
    ) -> tuple[NDArray[np.int32], NDArray[np.float32]]:
        """Logits [T, E] → ids and weights [T, k], token after token, counting as it goes."""
        if self.thresholds is None:
            ids, weights = self.rule.apply(router_logits, self.bias)
            self.load[:] += np.bincount(ids.ravel(), minlength=len(self.load))
            return ids, weights.astype(np.float32)
        forced = replace(self.rule, selection_bias=True)
        scores = _scores(self.rule, router_logits, self.bias)
        own = np.zeros(len(self.load), np.float32) if self.bias is None else self.bias
        parts = []
        for row, score in zip(router_logits, scores, strict=True):
            chosen = choose(score, self.load, self.rule.top_k, self.thresholds)
            self.load[chosen] += 1
            bias = own.copy()
            bias[chosen] += _SELECTED
            parts.append(forced.apply(row[None], bias))
        ids, weights = (np.concatenate(part) for part in zip(*parts, strict=True))
        return ids, weights


def choose(
    scores: NDArray[np.float64], load: NDArray[np.float64], k: int, thresholds: Thresholds
) -> NDArray[np.int64]:
    """The experts of one token, [k]: scores [E] ≥ 0, -inf for those that may not be chosen."""
    order = np.argsort(-scores, kind="stable")
    best = order[:k]
    mass = scores[scores > 0].sum()
    if scores[best].sum() >= thresholds.clear * mass:
        return best
    pool = order[scores[order] >= thresholds.viable * scores[best[-1]]]
    # Ties of load go to the higher score, since the pool is in that order.
    least: NDArray[np.int64] = pool[np.argsort(load[pool], kind="stable")][:k]
    return least


def _scores(
    rule: RoutingRule, logits: NDArray[np.float32], bias: NDArray[np.float32] | None
) -> NDArray[np.float64]:
    """Scores [T, E] that rank as the rule ranks, as non-negative numbers."""
    ranking = rule.ranking(logits, bias).astype(np.float64)
    if rule.score == "softmax-topk":
        ranking = np.exp(ranking - ranking.max(axis=1, keepdims=True))
    outside = np.isneginf(ranking)
    # A selection bias may make a score negative: such an expert is as good as none.
    return np.where(outside, -np.inf, np.maximum(ranking, 0))


def load_aware(bench: Bench) -> Measured:
    """The frozen router with LASER, and what that does to the balance."""
    wiring = _frozen_wiring(bench)
    held = bench.validation.limited(CHOICE_TOKENS)
    before, _ = _score(bench, wiring, held, None)
    tried = []
    for thresholds in starmap(Thresholds, product(CLEAR, VIABLE)):
        nll, busiest = _score(bench, wiring, held, thresholds)
        tried.append((float((nll - before).sum() / held.targets), busiest, thresholds))
    spared = [one for one in tried if one[0] <= COST]
    cost, _, chosen = min(spared, key=lambda one: one[1]) if spared else min(tried, key=_cost)
    found, facts = {}, {}
    for name, text in bench.tests.items():
        found[name], busiest = _score(bench, wiring, text, chosen)
        _, plain = _score(bench, wiring, text, None)
        facts[f"busiest expert over mean, {name}"] = f"{plain:.2f} → {busiest:.2f}"
    bench.model.swap_memory(None)
    settings = {**asdict(chosen), "change_on_validation": cost}
    return Measured(found, "runtime", 0, chosen=settings, facts=facts)


def _cost(one: tuple[float, float, Thresholds]) -> float:
    return one[0]


def _score(
    bench: Bench, wiring: SplitWiring, text: TokenText, thresholds: Thresholds | None
) -> tuple[NDArray[np.float64], float]:
    """Summed NLL of each sequence, and the busiest expert's load over the mean, mean of gates."""
    manifest = bench.model.bundle.manifest
    experts = manifest.architecture.num_experts
    gates = tuple(
        LoadAwareGate(
            manifest.routing, wiring.experts_per_token, np.zeros(experts), bias, thresholds
        )
        for bias in read_selection_biases(bench.model.bundle)
    )
    bench.model.pipeline.layout = HostLayout(replace(wiring, gates=gates))
    nll = bench.score(text)
    return nll, float(np.mean([gate.load.max() / gate.load.mean() for gate in gates]))


def _frozen_wiring(bench: Bench) -> SplitWiring:
    bench.model.swap_memory(None)
    layout = bench.model.pipeline.layout
    if not (isinstance(layout, HostLayout) and isinstance(layout.wiring, SplitWiring)):
        raise BackendError("load-aware routing", "runs in the split layout on the CPU only")
    return layout.wiring
