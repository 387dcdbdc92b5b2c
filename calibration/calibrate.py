"""Calibrating a memory pack: measure on held-out text, choose, prove, and only then write."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from knnmoe.runtime.atomic import check_writable
from knnmoe.runtime.errors import InputError, SettingError, VerificationError
from knnmoe.runtime.evaluation import read_for
from knnmoe.runtime.memory import MemoryPack
from knnmoe.runtime.model import Model
from knnmoe.runtime.pack_writing import rewrite_settings
from knnmoe.runtime.texts import TokenText

from .bench import Bench, Progress
from .confidence import (
    GATES,
    GRID,
    MIN_SEQUENCES,
    MORE_GATES,
    THOROUGH,
    Candidate,
    Interval,
    Limits,
    Measured,
    Separation,
    Steps,
    Way,
    candidate,
    choose,
    cross_fitted,
    gates_for,
    interval_of,
    separations,
    simultaneous,
    usable,
)
from .controls import (
    SHARES,
    Background,
    GainLaw,
    background_of,
    first_share,
    shuffled,
    without_retrieval,
)
from .latency import Latency, measure_latency
from .overlap import seen_sequences
from .switching import joined

DEFAULT_MAX_TOKENS = 6000
SWITCH_SHARE = 0.25  # tokens of text that changes its subject, of those of either text
LEAST_PASSAGES = 40  # if the texts have as many, whatever their tokens
MAX_SEEN = 0.1  # share of a text's sequences that may be in the memory


@dataclass(frozen=True)
class Tried:
    """One candidate and what it does: change of NLL in nats a token.

    `switch` is in nats a change of subject; None where the texts are too short to join.
    """

    candidate: Candidate
    domain: Interval
    general: Interval
    switch: Interval | None


@dataclass(frozen=True)
class Controls:
    """What the domain's change is made of, nats a token; the chosen settings throughout.

    Attributes:
        constant: With one correction a gate in the place of what is retrieved: the mean residual,
            or the mean value of the variant chosen, whichever is better.
        retrieval: The memory's change minus that: what looking entries up adds.
        shuffled: With every entry's values at another entry. Only with `thorough`.
    """

    constant: Interval
    retrieval: Interval
    shuffled: Interval | None = None


@dataclass(frozen=True)
class CalibrationReport:
    """What calibration found and wrote.

    Attributes:
        pack: The pack with its new settings.
        chosen: The settings written, and what they do on all the text given.
        domain: Change of the domain's NLL, cross-fitted: each part of the text scored with what the
            other parts chose.
        general: The same of general text.
        switch: The same of changes of subject, nats each; None where not measured.
        controls: How much of the gain is retrieval.
        law: The gain by size of the memory; only with `thorough`.
        latency: What the memory adds to a decode step here; None if nothing was asked about it.
        drawn: What the intervals' bootstrap draws, by text: documents or sequences.
        tried: All candidates, in the order of the grid.
        separations: By gate, evidence of domain and general text with the chosen K.
        provenance: What was written into the pack.
    """

    pack: MemoryPack
    chosen: Tried
    domain: Interval
    general: Interval
    switch: Interval | None
    controls: Controls
    law: GainLaw | None
    latency: Latency | None
    drawn: Mapping[str, str]
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
                 "general": asdict(one.general),
                 "switch": None if one.switch is None else asdict(one.switch)}
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
    max_switch_loss: float = 5.0,
    max_latency: float | None = 5.0,
    max_tokens: int | None = DEFAULT_MAX_TOKENS,
    max_length: int = 256,
    ways: Sequence[Way] | None = None,
    thorough: bool = False,
    threads: int | None = None,
    progress: Progress | None = None,
) -> CalibrationReport:
    """Choose variant, K, scale and gate of a memory by held-out text, and write them into the pack.

    For each gate the opening of a causal gate is fitted (`opening.py`). A few variants and
    strengths are measured with one such gate, and what gains most with others. Of all these the
    settings with the best NLL on the domain are taken among those that stay within both limits: of
    general text, and of general text that follows the domain's.

    Args:
        bundle: The model's bundle.
        pack: The pack; only its `memory.json` is changed, and only on success.
        domain: Held-out text files of the domain, none of it in the memory.
        general: Held-out text files of what the memory is not for.
        max_general_loss: In nats a token; upper end of the interval.
        max_switch_loss: In nats a change of subject; upper end of the interval.
        max_latency: Percent of a decode step that the memory may add on this machine. More is
            reported and does not refuse the pack; None does not measure.
        max_tokens: Predicted tokens of each text at most, drawn from all over it.
        max_length: Tokens of a sequence.
        ways: What to try; None takes the usual ways, then other gates for the best of them.
        thorough: Try more ways, and leaving each gate to the frozen router; measure the shuffled
            memory and memories of less text.
        threads: Of the runtime.
        progress: Called as text is scored.

    Raises:
        VerificationError: If the cross-fitted interval of the domain does not lie below zero, no
            candidate spares other text, or retrieval adds nothing to a constant correction; the
            pack is unchanged.
        InputError, SettingError, BundleError, MemoryPackError: If something given cannot be used.
        OutputError: If the pack cannot be written into.
    """
    for name, number in (
        ("max general loss", max_general_loss),
        ("max switch loss", max_switch_loss),
        ("max latency", 0.0 if max_latency is None else max_latency),
    ):
        if not (math.isfinite(number) and number >= 0):
            raise SettingError(name, "out of range", expected="a number >= 0", found=number)
    limits = Limits(max_general_loss, max_switch_loss)
    opened = MemoryPack.open(pack)
    check_writable(opened.path)
    model = Model.load(bundle, threads=threads)
    opened.check_belongs_to(model.identity)
    texts = read_texts(model, {"domain": domain, "general": general}, max_length, max_tokens)
    check_held_out(opened, texts)

    passages = {name: text.sequences for name, text in texts.items()}
    room = None if max_tokens is None else math.ceil(SWITCH_SHARE * max_tokens)
    switches = joined(texts["domain"], texts["general"], room, least=LEAST_PASSAGES)
    if len(switches) >= MIN_SEQUENCES:
        passages["switch"] = switches
    background = background_of(opened)
    mixed = background is not None
    wanted = [
        way
        for way in usable(ways or (THOROUGH if thorough else GRID), background=mixed)
        if opened.serves(way.variant)  # of a compressed pack not all do
    ]
    most = max(way.neighbors for way in wanted)
    around = () if ways else MORE_GATES if thorough else GATES
    extra = len(around) + (len(opened.gates) if thorough else 0)
    # Of the domain alone: the constant control, and with `thorough` the shuffled one and the law.
    bench = Bench(
        model, opened, passages, background, progress,
        candidates=len(wanted) + extra, domain_runs=2 + thorough * len(SHARES),
    )  # fmt: skip

    evidence = bench.evidence(most)

    def candidates(of: Sequence[Way]) -> list[Candidate]:
        near, far = evidence["domain"], evidence["general"]
        return [candidate(opened, way, near, far, background=mixed) for way in of]

    grid = candidates(wanted)
    measured = bench.measure(grid)
    steps = None
    leading = [index for index, way in enumerate(wanted) if way.gate == "sequence"]
    if around and leading:
        steps = Steps(len(grid), leading)
        leader = wanted[measured["domain"].leader(leading)]
        more = candidates([way for way in gates_for(leader, around) if way not in wanted])
        measured = _joined(measured, bench.measure(more))
        grid += more
    if thorough:
        index = choose(measured, limits)
        if index is not None and len(opened.gates) > 1:
            fewer = [grid[index].without(gate.gate) for gate in opened.gates]
            measured = _joined(measured, bench.measure(fewer))
            grid += fewer
    tried = _tried(grid, measured)
    index = choose(measured, limits)
    proven = cross_fitted(measured, limits, steps)
    if index is None:
        raise _harmful(opened, tried, limits)
    chosen = tried[index]
    applied = chosen.candidate.applied(opened)
    if not (proven["domain"].high < 0 and chosen.domain.high < 0):
        shares = _law(bench, applied, background, chosen)
        raise _useless(opened, chosen, proven["domain"], texts["domain"], shares)
    controls = _controls(bench, applied, background, measured["domain"], index, thorough=thorough)
    if not controls.retrieval.high < 0:
        raise _constant(opened, chosen, controls)
    law = _law(bench, applied, background, chosen) if thorough else None
    latency = None if max_latency is None else measure_latency(model, applied, max_latency)
    bench.finish()

    separated = separations(opened, evidence["domain"], evidence["general"], chosen.candidate)
    drawn = {name: m.drawn for name, m in measured.items()}
    provenance = {
        "chosen": chosen.candidate.name,
        "candidates": len(grid),
        "caution": chosen.candidate.caution,
        "max_general_loss": max_general_loss,
        "max_switch_loss": max_switch_loss,
        "drawn": drawn,
        "domain": _figures(texts["domain"], chosen.domain, proven["domain"]),
        "general": _figures(texts["general"], chosen.general, proven["general"]),
        "switch": None
        if chosen.switch is None
        else {
            "passages": len(switches),
            "nats": chosen.switch.mean,
            "nats_low": chosen.switch.low,
            "nats_high": chosen.switch.high,
        },
        "constant": asdict(controls.constant),
        "retrieval": asdict(controls.retrieval),
        "shuffled": None if controls.shuffled is None else asdict(controls.shuffled),
        "law": None if law is None else law.to_json(),
        "latency": None if latency is None else latency.to_json(),
        "evidence": {str(gate): asdict(found) for gate, found in separated.items()},
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }
    written = rewrite_settings(
        applied.with_settings(calibrated=True), {**opened.provenance, "calibration": provenance}
    )
    return CalibrationReport(
        written, chosen, proven["domain"], proven["general"], proven.get("switch"), controls, law,
        latency, drawn, tried, separated, provenance,
    )  # fmt: skip


def read_texts(
    model: Model,
    files: Mapping[str, Sequence[str | Path]],
    max_length: int,
    max_tokens: int | None,
) -> dict[str, TokenText]:
    """Texts by name, each long enough to measure on.

    Raises:
        InputError: If one is not, or cannot be read.
    """
    if max_length < 2:
        raise SettingError("max length", "out of range", expected=">= 2", found=max_length)
    context = min(max_length, model.pipeline.max_positions)
    texts = {
        name: read_for(model, paths, context=context, max_tokens=max_tokens)
        for name, paths in files.items()
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
    return texts


def _joined(measured: Mapping[str, Measured], more: Mapping[str, Measured]) -> dict[str, Measured]:
    return {name: m.more(more[name].deltas) for name, m in measured.items()}


def _tried(grid: Sequence[Candidate], measured: Mapping[str, Measured]) -> list[Tried]:
    switch = measured.get("switch")
    return [
        Tried(
            one,
            measured["domain"].interval(i),
            measured["general"].interval(i),
            None if switch is None else switch.interval(i),
        )
        for i, one in enumerate(grid)
    ]


def _controls(
    bench: Bench,
    applied: MemoryPack,
    background: Background,
    domain: Measured,
    index: int,
    *,
    thorough: bool,
) -> Controls:
    """The domain's change with a constant correction, and what is left of the memory's without."""

    def interval(deltas: Any) -> Interval:
        return interval_of(deltas, domain.tokens, domain.documents)

    constants = []
    if applied.serves("residual"):
        constants.append(bench.change("domain", without_retrieval(applied, background)))
    if applied.variant != "residual":
        alike = without_retrieval(applied, background, same_variant=True)
        constants.append(bench.change("domain", alike))
    constant = min(constants, key=lambda change: float(change @ domain.tokens))
    moved = bench.change("domain", shuffled(applied, background)) if thorough else None
    return Controls(
        interval(constant),
        interval(domain.deltas[index] - constant),
        None if moved is None else interval(moved),
    )


def _law(bench: Bench, applied: MemoryPack, background: Background, chosen: Tried) -> GainLaw:
    """The domain's change with the memory of an eighth, a quarter and a half of its text, and all.

    The settings are those chosen with the whole memory.
    """
    marked = None if background is None else max(background.values(), key=len)
    reference = applied.entries if marked is None else int((~marked).sum())
    tokens = bench.tokens("domain")
    changes = [
        float(bench.change("domain", first_share(applied, share, background)) @ tokens)
        / float(tokens.sum())
        for share in SHARES[:-1]
    ]
    sizes = [math.ceil(share * reference) for share in SHARES]
    return GainLaw(sizes, [*changes, chosen.domain.mean])


def check_held_out(pack: MemoryPack, texts: Mapping[str, TokenText]) -> None:
    """Raise `InputError` if a text is in the memory, or the domain's is the general one too."""
    domain, general = texts["domain"], texts.get("general")
    if general is not None and domain.sha256 == general.sha256:
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


def _harmful(pack: MemoryPack, tried: Sequence[Tried], limits: Limits) -> VerificationError:
    count = len(tried)
    mildest = min(tried, key=lambda one: simultaneous(one.general, count))
    if (upper := simultaneous(mildest.general, count)) > limits.general:
        return VerificationError(
            pack.path,
            "every way of using this memory costs general text too much",
            expected=f"at most {limits.general:+.4f} nats a token, upper end of an interval that"
            f" holds for all {count} ways at once",
            found=f"{mildest.general.mean:+.4f}, upper end {upper:+.4f}, with"
            f" {mildest.candidate.name}",
            fix="Give more text to measure on, or allow more with --max-general-loss;"
            " the pack is unchanged.",
        )
    sparing = [one for one in tried if limits.allow(one.general, None, count) and one.switch]
    quickest = min(sparing, key=lambda one: one.switch.high if one.switch else math.inf)
    assert quickest.switch is not None
    return VerificationError(
        pack.path,
        "every way of using this memory that spares general text lets go of it too late where"
        " it follows the domain's",
        expected=f"at most {limits.switch:+.2f} nats a change of subject, upper end",
        found=f"{quickest.switch} with {quickest.candidate.name}",
        fix="Build the memory with --background text, or allow more with --max-switch-loss;"
        " the pack is unchanged.",
    )


def _constant(pack: MemoryPack, chosen: Tried, controls: Controls) -> VerificationError:
    return VerificationError(
        pack.path,
        "what this memory gains is a constant correction: looking entries up adds nothing",
        expected="an interval below zero of the memory's change minus that of its mean residual",
        found=f"{controls.retrieval} nats a token; mean residual alone"
        f" {controls.constant}, memory {chosen.domain}",
        fix="Check that values belong to their keys, or build it from more reference text;"
        " the pack is unchanged.",
    )


def _useless(
    pack: MemoryPack, chosen: Tried, proven: Interval, text: TokenText, law: GainLaw
) -> VerificationError:
    # The gain that an interval as wide as this one would prove.
    needed = law.needed(-(proven.high - proven.mean))
    more = (
        "More reference text gains nothing with this memory"
        if needed is None
        else f"About {needed:,} reference tokens would do, by the gain of memories of"
        f" {', '.join(f'{n:,}' for n in law.tokens)}"
    )
    return VerificationError(
        pack.path,
        "this memory does not make the domain's text more likely for sure",
        expected="a 95 % interval below zero on text that did not choose the settings",
        found=f"{proven} nats a token over {len(text.sequences)} sequences"
        f" ({chosen.domain} with {chosen.candidate.name}, which they chose)",
        fix=f"{more}. Build it from more text of the same domain, or give more text to measure"
        " on; the pack is unchanged.",
    )
