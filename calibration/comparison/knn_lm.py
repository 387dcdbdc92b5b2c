"""The alternative that retrieves tokens instead of routing: kNN-LM (arXiv 1911.00172)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from knnmoe.runtime.texts import TokenText

from ..teacher import Teacher
from .bench import Bench
from .measured import Measured
from .torch_model import Batch, batches, token_nll

NEIGHBORS = 1024  # as in the paper
QUERIES_AT_ONCE = 128
LAMBDAS = (0.02, 0.05, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5)
# Temperatures, as shares of the median squared distance to the nearest entry.
TEMPERATURES = (0.03, 0.1, 0.3, 1.0, 3.0)


@dataclass(frozen=True)
class _States:
    """Hidden states [T, D] that predict tokens, the tokens [T], the model's own NLL of them [T]."""

    hidden: Tensor
    tokens: Tensor
    nll: Tensor
    sequences: NDArray[np.int64]  # [T] which sequence each is of


@dataclass(frozen=True)
class _Found:
    """Squared distances to the nearest entries [T, K], and whether they carry the true token."""

    distances: Tensor
    right: Tensor


def knn_lm(bench: Bench) -> Measured:
    """Mix the model's distribution with that of the tokens that followed similar states.

    p = λ p_kNN + (1 - λ) p_LM with p_kNN ∝ Σ exp(-d²/temperature) over the nearest reference states
    (equations 2 and 3); keys are last hidden states. λ and temperature are chosen on validation
    text.
    """
    teacher = Teacher.load(bench.checkpoint)
    store = _states(teacher, bench.reference)
    bench.say("kNN-LM: choosing λ and temperature")
    held = _states(teacher, bench.validation)
    found = _search(store, held)
    unit = max(float(found.distances[:, 0].median()), 1e-12)
    grid = [
        (float(_mixed(held, found, lam, share * unit).sum()), lam, share)
        for lam in LAMBDAS
        for share in TEMPERATURES
    ]
    best, lam, share = min(grid)
    before = float(held.nll.sum())
    if before <= best:
        best, lam, share = before, 0.0, 1.0
    nll: dict[str, NDArray[np.float64]] = {}
    for name, text in bench.tests.items():
        states = _states(teacher, text)
        mixed = _mixed(states, _search(store, states), lam, share * unit)
        nll[name] = np.zeros(len(text.sequences))
        np.add.at(nll[name], states.sequences, mixed.numpy())
    entries, width = store.hidden.shape
    return Measured(
        nll,
        "torch",
        entries * (2 * width + 4),  # keys in fp16, tokens in int32
        chosen={
            "lambda": lam,
            "temperature": share * unit,
            "neighbors": min(NEIGHBORS, entries),
            "validation_nll": best / len(held.tokens),
            "validation_nll_before": before / len(held.tokens),
        },
    )


def _states(teacher: Teacher, text: TokenText) -> _States:
    parts = list(_parts(teacher, text))
    return _States(
        torch.cat([part.hidden for part in parts]),
        torch.cat([part.tokens for part in parts]),
        torch.cat([part.nll for part in parts]),
        np.concatenate([part.sequences for part in parts]),
    )


def _parts(teacher: Teacher, text: TokenText) -> Iterator[_States]:
    kept: list[Tensor] = []
    head = teacher.model.get_output_embeddings()
    hook = head.register_forward_pre_hook(lambda module, inputs: kept.append(inputs[0]))
    try:
        with torch.no_grad():
            for batch in batches(text):
                kept.clear()
                nll = token_nll(teacher.logits(batch.token_ids), batch.labels)
                yield _flat(batch, kept[0], nll)
    finally:
        hook.remove()


def _flat(batch: Batch, hidden: Tensor, nll: Tensor) -> _States:
    real = batch.labels >= 0
    rows = real.nonzero()[:, 0].numpy()
    return _States(
        hidden[real].clone(), batch.labels[real], nll[real].double(), batch.numbers[rows]
    )


def _search(store: _States, queries: _States) -> _Found:
    squares = (store.hidden**2).sum(dim=1)
    distances, right = [], []
    for start in range(0, len(queries.hidden), QUERIES_AT_ONCE):
        rows = slice(start, start + QUERIES_AT_ONCE)
        x = queries.hidden[rows]
        apart = squares - 2 * x @ store.hidden.T + (x**2).sum(dim=1, keepdim=True)
        nearest, ids = apart.topk(min(NEIGHBORS, len(squares)), dim=1, largest=False)
        distances.append(nearest.clamp(min=0))
        right.append(store.tokens[ids] == queries.tokens[rows, None])
    return _Found(torch.cat(distances), torch.cat(right))


def _mixed(states: _States, found: _Found, lam: float, temperature: float) -> Tensor:
    """NLL [T] of the mixture, float64."""
    weights = torch.softmax(-found.distances.double() / temperature, dim=1)
    retrieved = (weights * found.right).sum(dim=1)
    return -torch.log(lam * retrieved + (1 - lam) * torch.exp(-states.nll))
