"""Calibrating a memory pack: measure on held-out text, choose, prove, and only then write."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from knnmoe.runtime.errors import InputError, SettingError, VerificationError
from knnmoe.runtime.evaluation import score_sequences
from knnmoe.runtime.memory import MemoryPack, rewrite_settings
from knnmoe.runtime.model import Model

from .confidence import (
    GRID,
    MIN_SEQUENCES,
    Candidate,
    Interval,
    Measured,
    Separation,
    Way,
    candidate,
    choose,
    cross_fitted,
    separations,
)
from .evidence import measure_evidence
from .overlap import seen_sequences
from .texts import TokenText, read_text

DEFAULT_MAX_TOKENS = 6000
MAX_SEEN = 0.1  # share of a text's sequences that may be in the memory

# (tokens done, in all)
Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Tried:
    """One candidate and what it does: change of NLL in nats a token."""

    candidate: Candidate
    domain: Interval
    general: Interval


@dataclass(frozen=True)
class CalibrationReport:
    """What calibration found and wrote.

    Attributes:
        pack: The pack with its new settings.
        chosen: The settings written, and what they do on all the text given.
        domain: Change of the domain's NLL, cross-fitted: each part of the text scored with what the
            other parts chose.
        general: The same of general text.
        tried: All candidates, in the order of the grid.
        separations: By gate, evidence of domain and general text with the chosen K.
        provenance: What was written into the pack.
    """

    pack: MemoryPack
    chosen: Tried
    domain: Interval
    general: Interval
    tried: Sequence[Tried]
    separations: Mapping[int, Separation]
    provenance: Mapping[str, Any]

    def to_json(self) -> dict[str, Any]:
        """The figures by name, for scripts."""
        return {
            "pack": str(self.pack.path),
            **self.provenance,
            "tried": [
                {"name": one.candidate.name, "domain": asdict(one.domain),
                 "general": asdict(one.general)}
                for one in self.tried
            ],
        }  # fmt: skip


def calibrate(
    bundle: str | Path,
    pack: str | Path,
    domain: Sequence[str | Path],
    general: Sequence[str | Path],
    *,
    max_general_loss: float = 0.002,
    max_tokens: int | None = DEFAULT_MAX_TOKENS,
    max_length: int = 256,
    ways: Sequence[Way] = GRID,
    threads: int | None = None,
    progress: Progress | None = None,
) -> CalibrationReport:
    """Choose variant, K, scale and gate of a memory by held-out text, and write them into the pack.

    For each gate a causal sequence gate is fitted: its midpoint lies half way between the mean
    evidence of domain and of general text, its sharpness is one over half their distance. Of a
    small grid around it, the settings with the best NLL on the domain are taken among those that
    cost general text at most `max_general_loss` (upper end of the 95 % interval).

    Args:
        bundle: The model's bundle.
        pack: The pack; only its `memory.json` is changed, and only on success.
        domain: Held-out text files of the domain, none of it in the memory.
        general: Held-out text files of what the memory is not for.
        max_general_loss: In nats a token.
        max_tokens: Predicted tokens of each text at most, drawn from all over it.
        max_length: Tokens of a sequence.
        ways: The grid.
        threads: Of the runtime.
        progress: Called as text is scored.

    Raises:
        VerificationError: If the cross-fitted interval of the domain does not lie below zero, or no
            candidate spares general text; the pack is unchanged.
        InputError, SettingError, BundleError, MemoryPackError: If something given cannot be used.
    """
    if not (math.isfinite(max_general_loss) and max_general_loss >= 0):
        raise SettingError(
            "max general loss", "out of range", expected="a number >= 0", found=max_general_loss
        )
    opened = MemoryPack.open(pack)
    model = Model.load(bundle, threads=threads)
    opened.check_belongs_to(model.identity)
    shape = model.bundle.manifest.architecture
    texts = {
        name: read_text(
            files,
            model.tokenizer,
            vocab_size=shape.vocab_size,
            max_length=min(max_length, shape.max_positions),
            max_tokens=max_tokens,
        )
        for name, files in (("domain", domain), ("general", general))
    }
    for name, text in texts.items():
        if len(text.sequences) < MIN_SEQUENCES:
            raise InputError(
                ", ".join(text.names),
                f"too little {name} text to measure on",
                expected=f"at least {MIN_SEQUENCES} sequences, better a hundred",
                found=f"{len(text.sequences)} of at most {max_length} tokens",
                fix="Give more text, or a larger --max-tokens.",
            )
    _check_held_out(opened, texts)
    bench = _Bench(model, opened, texts, ways, progress)
    by_neighbors = bench.separations()
    grid = [candidate(opened, way, by_neighbors) for way in ways]
    measured = bench.measure(grid)
    tried = [
        Tried(one, measured["domain"].interval(i), measured["general"].interval(i))
        for i, one in enumerate(grid)
    ]
    index = choose(measured["domain"], measured["general"], max_general_loss)
    proven, spared = cross_fitted(measured["domain"], measured["general"], max_general_loss)
    if index is None:
        raise _harmful(opened, tried, max_general_loss)
    chosen = tried[index]
    if not (proven.high < 0 and chosen.domain.high < 0):
        raise _useless(opened, chosen, proven, texts["domain"])
    separated = by_neighbors[chosen.candidate.neighbors]
    provenance = {
        "chosen": chosen.candidate.name,
        "candidates": len(grid),
        "max_general_loss": max_general_loss,
        "domain": _figures(texts["domain"], chosen.domain, proven),
        "general": _figures(texts["general"], chosen.general, spared),
        "evidence": {str(gate): asdict(found) for gate, found in separated.items()},
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }
    written = rewrite_settings(
        chosen.candidate.applied(opened), {**opened.provenance, "calibration": provenance}
    )
    return CalibrationReport(written, chosen, proven, spared, tried, separated, provenance)


class _Bench:
    """The model with the texts in front of it, and a count of the tokens that went through."""

    def __init__(
        self,
        model: Model,
        pack: MemoryPack,
        texts: Mapping[str, TokenText],
        ways: Sequence[Way],
        progress: Progress | None,
    ) -> None:
        self.model = model
        self.pack = pack
        self.texts = texts
        self.neighbors = sorted({way.neighbors for way in ways})
        self._progress = progress
        self._done = 0
        # One pass traces, one scores the frozen router, one each candidate.
        self._total = (len(ways) + 2) * sum(text.targets for text in texts.values())

    def separations(self) -> dict[int, dict[int, Separation]]:
        """By K and gate."""
        evidence = {
            name: measure_evidence(
                self.model,
                self.pack,
                [sequence.tokens for sequence in text.sequences],
                self.neighbors[-1],
                lambda tokens: self._advance(tokens - 1),
            )
            for name, text in self.texts.items()
        }
        return {
            neighbors: separations(self.pack, evidence["domain"], evidence["general"], neighbors)
            for neighbors in self.neighbors
        }

    def measure(self, grid: Sequence[Candidate]) -> dict[str, Measured]:
        """What each candidate changes, by text."""
        self.model.disable_memory()
        frozen = {name: self._nll(text) for name, text in self.texts.items()}
        deltas: dict[str, list[NDArray[np.float64]]] = {name: [] for name in self.texts}
        for one in grid:
            self.model.swap_memory(one.applied(self.pack))
            for name, text in self.texts.items():
                deltas[name].append(self._nll(text) - frozen[name])
        return {
            name: Measured(
                deltas=np.array(deltas[name]),
                tokens=np.array([s.targets for s in text.sequences]),
                documents=np.array([s.document for s in text.sequences]),
            )
            for name, text in self.texts.items()
        }

    def _nll(self, text: TokenText) -> NDArray[np.float64]:
        """Mean negative log-likelihood a token of each sequence."""
        sequences = [sequence.tokens.tolist() for sequence in text.sequences]
        scores = score_sequences(self.model, sequences, self._advance)
        return scores.nll / scores.tokens

    def _advance(self, tokens: int) -> None:
        self._done += tokens
        if self._progress is not None:
            self._progress(self._done, self._total)


def _check_held_out(pack: MemoryPack, texts: Mapping[str, TokenText]) -> None:
    domain, general = texts["domain"], texts["general"]
    if domain.sha256 == general.sha256:
        raise InputError(
            ", ".join(general.names),
            "is given as domain and as general text",
            expected="text that the memory is not for",
            fix="Give other text with --general.",
        )
    origins = pack.read_origins()
    if origins is None:
        return
    for name, text in texts.items():
        seen = seen_sequences(origins, [sequence.tokens for sequence in text.sequences])
        if seen > MAX_SEEN * len(text.sequences):
            raise InputError(
                ", ".join(text.names),
                "is in the memory already, so nothing can be measured on it",
                expected="text that the memory was not built from",
                found=f"{seen} of {len(text.sequences)} sequences in its entries",
                fix=f"Give held-out text with --{name}.",
            )


def _figures(text: TokenText, chosen: Interval, cross: Interval) -> dict[str, Any]:
    return {
        "sha256": text.sha256,
        "files": list(text.names),
        "documents": text.documents,
        "sequences": len(text.sequences),
        "tokens": text.targets,
        "delta": chosen.mean,
        "delta_low": chosen.low,
        "delta_high": chosen.high,
        "cross_fitted": cross.mean,
        "cross_fitted_low": cross.low,
        "cross_fitted_high": cross.high,
    }


def _harmful(pack: MemoryPack, tried: Sequence[Tried], limit: float) -> VerificationError:
    mildest = min(tried, key=lambda one: one.general.high)
    return VerificationError(
        pack.path,
        "every way of using this memory costs general text too much",
        expected=f"at most {limit:+.4f} nats a token, upper end of the interval",
        found=f"{_text(mildest.general)} with {mildest.candidate.name}",
        fix="Give more text to measure on, or allow more with --max-general-loss;"
        " the pack is unchanged.",
    )


def _useless(
    pack: MemoryPack, chosen: Tried, proven: Interval, text: TokenText
) -> VerificationError:
    return VerificationError(
        pack.path,
        "this memory does not make the domain's text more likely for sure",
        expected="a 95 % interval below zero on text that did not choose the settings",
        found=f"{_text(proven)} nats a token over {len(text.sequences)} sequences"
        f" ({_text(chosen.domain)} with {chosen.candidate.name}, which they chose)",
        fix="Build it from more reference text of the same domain, or give more text to measure on;"
        " the pack is unchanged.",
    )


def _text(interval: Interval) -> str:
    return f"{interval.mean:+.4f} [{interval.low:+.4f}, {interval.high:+.4f}]"
