"""Building a memory pack: reference text through the frozen model, entries onto disk."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from numpy.typing import NDArray

import knnmoe
from knnmoe.runtime.atomic import check_free_space, check_replaceable
from knnmoe.runtime.calibration import Calibration, preset
from knnmoe.runtime.checkpoint import Checkpoint
from knnmoe.runtime.errors import BundleError, CheckpointError, SettingError
from knnmoe.runtime.memory import EntryOrigins, GateEntries, MemoryPack, ModelIdentity, write_pack
from knnmoe.runtime.tokenizer import Tokenizer

from .optimize import Learned, learn
from .partial import PartialBuild, Tensors
from .settings import BuildSettings, UseSettings, parse_gates
from .teacher import Teacher
from .texts import TokenSequence, TokenText, read_text

OBJECTIVE = "negative log-likelihood of the next token, summed, all gates jointly, plain SGD"
_PAIRS = 4096
_PILOT_TOKENS = 4096

# (predicted tokens done, in all)
Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class BuildReport:
    """What `build_memory` did.

    Attributes:
        pack: The pack, opened.
        tokens: Predicted tokens of the reference text: its entries in each gate.
        background_tokens: The same of the background text.
        nll_before: Mean negative log-likelihood of the reference text, nats a token, frozen router.
        nll_after: The same with the learned logits: what the steps did, not what retrieval will.
        seconds: Wall time of this run, loading included.
        tokens_per_second: Predicted tokens learned in this run by the time that took; 0 if none.
    """

    pack: MemoryPack
    tokens: int
    background_tokens: int
    nll_before: float
    nll_after: float
    seconds: float
    tokens_per_second: float

    def to_json(self) -> dict[str, Any]:
        """The figures by name, for scripts."""
        return {
            "pack": str(self.pack.path),
            "entries": self.pack.entries,
            "gates": len(self.pack.gates),
            "bytes": self.pack.bytes,
            "tokens": self.tokens,
            "background_tokens": self.background_tokens,
            "nll_before": self.nll_before,
            "nll_after": self.nll_after,
            "seconds": self.seconds,
            "tokens_per_second": self.tokens_per_second,
        }


@dataclass(frozen=True)
class _Batch:
    sequences: tuple[TokenSequence, ...]
    background: bool

    @property
    def targets(self) -> int:
        return sum(sequence.targets for sequence in self.sequences)


def build_memory(
    checkpoint: str | Path,
    references: Sequence[str | Path],
    pack: str | Path,
    *,
    settings: BuildSettings | None = None,
    use: UseSettings | None = None,
    background: Sequence[str | Path] = (),
    overwrite: bool = False,
    restart: bool = False,
    progress: Progress | None = None,
) -> BuildReport:
    """Build a memory pack from a checkpoint and reference text (kNN-MoE, arXiv 2601.02144, sec. 3).

    What is finished lies in `PACK.partial` until the pack is whole. Interrupted, by whatever, the
    same call goes on from there, and on the same machine gives the same numbers to the bit.

    Args:
        checkpoint: Hugging Face directory of a Mixture-of-Experts model.
        references: Text files of the domain.
        pack: The directory to write.
        settings: How to learn; None for the defaults.
        use: How the runtime will use it; None for the defaults.
        background: Text files of what the memory is not for: entries with residual zero, which
            text far from the domain finds instead of the domain's.
        overwrite: Replace a pack that is there.
        restart: Discard an interrupted build instead of going on.
        progress: Called after each batch.

    Raises:
        OutputError: If the pack or its work directory cannot be written or is in the way.
        InputError: If a text file cannot be used.
        CheckpointError: If the checkpoint cannot be used.
        SettingError: If a setting is out of its range, or learning diverges.
    """
    settings, use, target = settings or BuildSettings(), use or UseSettings(), Path(pack)
    started = time.monotonic()
    check_replaceable(target.absolute(), overwrite=overwrite)
    opened = Checkpoint.open(checkpoint)
    reference, backdrop = _read_texts(opened, references, background, settings)
    teacher = Teacher.load(checkpoint)
    gates = parse_gates(settings.gates, teacher.num_gates)
    identity = ModelIdentity(
        fingerprint=opened.fingerprint(),
        model_type=opened.model_type,
        num_gates=teacher.num_gates,
        hidden_size=teacher.hidden_size,
        num_experts=teacher.num_experts,
    )
    batches = _plan(reference, settings, background=False)
    if backdrop is not None:
        batches += _plan(backdrop, settings, background=True)
    job = _job(settings, gates, identity, reference, backdrop)
    entries = sum(batch.targets for batch in batches)
    width = teacher.hidden_size + 2 * teacher.num_experts
    item = 2 if settings.precision == "fp16" else 4
    check_free_space(target.absolute().parent, 2 * entries * len(gates) * width * item)
    partial = PartialBuild.open(target, job, restart=restart)
    try:
        rates = _rates(teacher, reference, gates, settings)
        speed = _learn_all(teacher, batches, rates, settings, partial, progress)
        found = _assemble(partial, batches, gates)
        before, after = (float(nll) / reference.targets for nll in found.nll)
        written = write_pack(
            target,
            model=identity,
            gates=found.gates,
            variant=use.variant,
            neighbors=use.neighbors,
            similarity=use.similarity,
            calibration=_calibrations(found.gates, use),
            origins=found.origins,
            provenance=_provenance(settings, rates, reference, backdrop, before, after),
            overwrite=overwrite,
        )
    except BaseException:
        if partial.finished == 0:
            partial.remove()
        raise
    partial.remove()
    return BuildReport(
        pack=written,
        tokens=reference.targets,
        background_tokens=0 if backdrop is None else backdrop.targets,
        nll_before=before,
        nll_after=after,
        seconds=time.monotonic() - started,
        tokens_per_second=speed,
    )


def _read_texts(
    checkpoint: Checkpoint,
    references: Sequence[str | Path],
    background: Sequence[str | Path],
    settings: BuildSettings,
) -> tuple[TokenText, TokenText | None]:
    vocab_size = checkpoint.config.get("vocab_size")
    if not isinstance(vocab_size, int):
        raise CheckpointError(checkpoint.path, "config.json states no vocab_size", found=vocab_size)
    try:
        tokenizer = Tokenizer.load(checkpoint.path)
    except BundleError as error:
        raise CheckpointError(
            error.where,
            error.problem,
            found=error.found,
            fix="Put the model's tokenizer.json beside its config.json.",
        ) from error
    reference = read_text(
        references,
        tokenizer,
        vocab_size=vocab_size,
        max_length=settings.max_length,
        max_tokens=settings.max_tokens,
    )
    room = int(settings.background_ratio * reference.targets)
    if not background or room == 0:
        return reference, None
    return reference, read_text(
        background,
        tokenizer,
        vocab_size=vocab_size,
        max_length=settings.max_length,
        max_tokens=room,
    )


def _plan(text: TokenText, settings: BuildSettings, *, background: bool) -> list[_Batch]:
    """Batches of sequences of like length, so that little is padding."""
    batches: list[_Batch] = []
    group: list[TokenSequence] = []
    for sequence in sorted(text.sequences, key=lambda sequence: len(sequence.tokens)):
        # The newest is the longest: the whole batch is padded to it.
        if group and (len(group) + 1) * len(sequence.tokens) > settings.batch_tokens:
            batches.append(_Batch(tuple(group), background))
            group = []
        group.append(sequence)
    batches.append(_Batch(tuple(group), background))
    return batches


def _job(
    settings: BuildSettings,
    gates: tuple[int, ...],
    identity: ModelIdentity,
    reference: TokenText,
    background: TokenText | None,
) -> dict[str, Any]:
    """All that the entries depend on."""
    return {
        **asdict(settings),
        "gates": list(gates),
        "model": identity.fingerprint,
        "reference": reference.sha256,
        "background": None if background is None else background.sha256,
        "versions": _versions(),
    }


def _rates(
    teacher: Teacher, reference: TokenText, gates: tuple[int, ...], settings: BuildSettings
) -> dict[int, float]:
    """Each gate's learning rate.

    One rate does not suit all gates, nor two models: early gates have larger gradients, because all
    that follows depends on them, and logits of any size. A relative rate asks a sample of the text.
    """
    if settings.rate == "absolute" or settings.steps == 0:
        return dict.fromkeys(gates, settings.learning_rate)
    logits, gradients = dict.fromkeys(gates, 0.0), dict.fromkeys(gates, 0.0)
    for batch in _plan(reference.limited(_PILOT_TOKENS), settings, background=False):
        tokens = [sequence.tokens for sequence in batch.sequences]
        # One step at rate one leaves the negative gradient.
        for gate, rows in learn(teacher, tokens, dict.fromkeys(gates, 1.0), steps=1).gates.items():
            logits[gate] += float(np.square(rows.router_logits, dtype=np.float64).sum())
            gradients[gate] += float(np.square(rows.residuals, dtype=np.float64).sum())
    return {
        gate: settings.learning_rate * math.sqrt(logits[gate] / gradients[gate])
        if gradients[gate]
        else 0.0
        for gate in gates
    }


def _learn_all(
    teacher: Teacher,
    batches: Sequence[_Batch],
    rates: Mapping[int, float],
    settings: BuildSettings,
    partial: PartialBuild,
    progress: Progress | None,
) -> float:
    """Learn the batches that are not finished yet; predicted tokens a second."""
    total = sum(batch.targets for batch in batches)
    done = sum(batch.targets for number, batch in enumerate(batches) if partial.has(number))
    already, started = done, time.monotonic()
    if progress is not None:
        progress(done, total)
    for number, batch in enumerate(batches):
        if partial.has(number):
            continue
        learned = learn(
            teacher,
            [sequence.tokens for sequence in batch.sequences],
            rates,
            steps=0 if batch.background else settings.steps,
        )
        partial.write(number, _tensors(learned, settings))
        done += batch.targets
        if progress is not None:
            progress(done, total)
    return (done - already) / max(time.monotonic() - started, 1e-9)


def _tensors(result: Learned, settings: BuildSettings) -> Tensors:
    dtype = np.float16 if settings.precision == "fp16" else np.float32
    tensors: Tensors = {"nll": np.array([result.nll_before, result.nll_after])}
    for gate, rows in result.gates.items():
        for name, tensor in asdict(rows).items():
            with np.errstate(over="ignore"):
                stored = tensor.astype(dtype)
            if not np.isfinite(stored).all():
                learned = name == "residuals"
                raise SettingError(
                    "learning rate" if learned else "precision",
                    f"the {name.replace('_', ' ')} of gate {gate} do not fit into {stored.dtype}",
                    found=f"a magnitude of {np.abs(tensor).max():g}",
                    fix="Build with a smaller --learning-rate."
                    if learned
                    else "Build with --precision fp32.",
                )
            tensors[f"{name}_{gate}"] = stored
    return tensors


@dataclass(frozen=True)
class _Found:
    gates: Mapping[int, GateEntries]
    origins: EntryOrigins
    nll: NDArray[np.float64]  # [2] summed over the reference text: before, after


def _assemble(partial: PartialBuild, batches: Sequence[_Batch], gates: tuple[int, ...]) -> _Found:
    """The finished batches as entries in the order of the text, background last."""
    origins, order = _origins(batches)
    parts = [partial.read(number) for number in range(len(batches))]
    nll = sum(
        (part["nll"] for part, batch in zip(parts, batches, strict=True) if not batch.background),
        np.zeros(2),
    )

    def rows(name: str) -> NDArray[Any]:
        return np.concatenate([part.pop(name) for part in parts])[order]

    entries = {}
    for gate in gates:
        keys = rows(f"router_inputs_{gate}")
        entries[gate] = GateEntries(
            keys=keys,
            router_logits=rows(f"router_logits_{gate}"),
            residuals=rows(f"residuals_{gate}"),
            center=keys.mean(axis=0, dtype=np.float64).astype(np.float32),
        )
    return _Found(entries, origins, nll)


def _origins(batches: Sequence[_Batch]) -> tuple[EntryOrigins, NDArray[np.int64]]:
    """Where the entries come from, in order, and that order of the batches' rows."""

    def column(values: Iterator[NDArray[np.int64]]) -> NDArray[np.int32]:
        return np.concatenate(list(values)).astype(np.int32)

    flat = [(sequence, batch.background) for batch in batches for sequence in batch.sequences]
    tokens = column(sequence.tokens[:-1] for sequence, _ in flat)
    positions = column(sequence.position + np.arange(sequence.targets) for sequence, _ in flat)
    # Documents of the background text count down from -1.
    documents = column(
        np.full(sequence.targets, -1 - sequence.document if background else sequence.document)
        for sequence, background in flat
    )
    order = np.lexsort((positions, np.abs(documents), documents < 0))
    return EntryOrigins(tokens[order], documents[order], positions[order]), order


def _calibrations(gates: Mapping[int, GateEntries], use: UseSettings) -> dict[int, Calibration]:
    def numbers(entries: GateEntries) -> Calibration:
        return preset(
            use.variant,
            confidence=use.confidence,
            weighting=use.weighting,
            temperature=use.temperature,
            scale=use.scale,
            power=use.power,
            gamma=median_gamma(entries.keys),
        )

    return {gate: numbers(entries) for gate, entries in gates.items()}


def median_gamma(keys: NDArray[Any]) -> float:
    """γ for RBF: one over the median squared distance between two of the keys [N, D].

    Two unrelated entries then have the similarity 1/e. From pairs drawn by a fixed seed; 1 where
    all keys are the same.
    """
    first, second = np.random.default_rng(0).integers(len(keys), size=(2, _PAIRS))
    apart = first != second
    differences = keys[first[apart]].astype(np.float64) - keys[second[apart]].astype(np.float64)
    squares = np.einsum("nd,nd->n", differences, differences)
    median = float(np.median(squares)) if len(squares) else 0.0
    return min(1 / median, 1e6) if median > 0 else 1.0


def _provenance(
    settings: BuildSettings,
    rates: Mapping[int, float],
    reference: TokenText,
    background: TokenText | None,
    before: float,
    after: float,
) -> dict[str, Any]:
    def described(text: TokenText) -> dict[str, Any]:
        return {
            "sha256": text.sha256,
            "files": list(text.names),
            "documents": text.documents,
            "tokens": text.targets,
        }

    return {
        "reference": described(reference),
        "background": None if background is None else described(background),
        "steps": settings.steps,
        "learning_rate": settings.learning_rate,
        "rate": settings.rate,
        "rates": {str(gate): rate for gate, rate in rates.items()},
        "max_length": settings.max_length,
        "objective": OBJECTIVE,
        "nll_before": before,
        "nll_after": after,
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "versions": _versions(),
        "calibration": None,
    }


def _versions() -> dict[str, str]:
    return {
        "knnmoe": knnmoe.__version__,
        "torch": str(torch.__version__),
        "transformers": transformers.__version__,
    }
