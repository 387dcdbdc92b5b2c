"""Building a memory pack: reference text through the frozen model, entries onto disk."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from numpy.typing import NDArray

import knnmoe
from knnmoe.runtime.atomic import check_free_space, check_replaceable, stated_failures
from knnmoe.runtime.calibration import preset
from knnmoe.runtime.checkpoint import Checkpoint
from knnmoe.runtime.conversations import Conversations
from knnmoe.runtime.errors import BundleError, CheckpointError
from knnmoe.runtime.memory import MemoryPack
from knnmoe.runtime.pack_files import ENTRIES
from knnmoe.runtime.pack_parts import ModelIdentity, StoredTensors
from knnmoe.runtime.pack_writing import write_pack
from knnmoe.runtime.shortage import memory_for
from knnmoe.runtime.tokenizer import Tokenizer

from .corpus import Corpus
from .deduplicate import Merging, find_merging, write_merged
from .learners import Learners, Recipe, Result, Task, open_learners, resolved
from .partial import PartialBuild
from .plan import Batch, plan
from .references import Reference
from .settings import BuildSettings, UseSettings, Workers, parse_gates
from .tensor_file import TensorFile

OBJECTIVES = {
    "future": "negative log-likelihood of all that follows, summed, all gates jointly, plain SGD",
    "next": "negative log-likelihood of the next token, all gates jointly, plain SGD",
}
_PAIRS = 4096
_LESS = "Close what else uses the memory, or pass a smaller --batch-tokens."
_PILOT_TOKENS = 4096

# (predicted tokens done, in all)
Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class BuildReport:
    """What `build_memory` did.

    Attributes:
        pack: The pack, opened.
        tokens: Predicted tokens of the reference text that were learned.
        background_tokens: The same of the background text.
        entries: By gate, its entries: one a token, less where near-identical ones were merged.
        nll_before: Mean negative log-likelihood of the reference text, nats a token, frozen router.
        nll_after: The same with the learned logits: what the steps did, not what retrieval will.
        seconds: Wall time of this run, loading included.
        tokens_per_second: Predicted tokens learned in this run by the time that took; 0 if none.
    """

    pack: MemoryPack
    tokens: int
    background_tokens: int
    entries: Mapping[int, int]
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
            "entries_by_gate": {str(gate): count for gate, count in self.entries.items()},
            "bytes": self.pack.bytes,
            "tokens": self.tokens,
            "background_tokens": self.background_tokens,
            "nll_before": self.nll_before,
            "nll_after": self.nll_after,
            "seconds": self.seconds,
            "tokens_per_second": self.tokens_per_second,
        }


def build_memory(
    checkpoint: str | Path,
    references: Sequence[str | Path | Reference],
    pack: str | Path,
    *,
    settings: BuildSettings | None = None,
    use: UseSettings | None = None,
    background: Sequence[str | Path | Reference] = (),
    workers: Workers | None = None,
    overwrite: bool = False,
    restart: bool = False,
    progress: Progress | None = None,
) -> BuildReport:
    """Build a memory pack from a checkpoint and reference text (kNN-MoE, arXiv 2601.02144, sec. 3).

    What is finished lies in `PACK.partial` until the pack is whole. Interrupted, by whatever, the
    same call goes on from there, and on the same CPU gives the same numbers to the bit, with
    however many workers of as many threads.

    Args:
        checkpoint: Hugging Face directory of a Mixture-of-Experts model.
        references: Text files of the domain, perhaps with weights; see `references.py`.
        pack: The directory to write.
        settings: How to learn; None for the defaults.
        use: How the runtime will use it; None for the defaults.
        background: Text files of what the memory is not for: entries with residual zero, which
            text far from the domain finds instead of the domain's.
        workers: Who learns; None for this process.
        overwrite: Replace a pack that is there.
        restart: Discard an interrupted build instead of going on.
        progress: Called after each batch.

    Raises:
        OutputError: If the pack or its work directory cannot be written or is in the way.
        InputError: If a text file cannot be used.
        CheckpointError: If the checkpoint cannot be used.
        SettingError: If a setting is out of its range, or learning diverges.
        BackendError: If a device, a package or a worker is missing.
        DeviceError: If there is not enough memory.
    """
    settings, use, target = settings or BuildSettings(), use or UseSettings(), Path(pack)
    workers = workers or Workers()
    started = time.monotonic()
    check_replaceable(target.absolute(), overwrite=overwrite)
    device, dtype = resolved(settings)
    settings = replace(settings, device=device, dtype=dtype)
    opened = Checkpoint.open(checkpoint)
    positions = opened.config.get("max_position_embeddings")
    if isinstance(positions, int) and 2 <= positions < settings.max_length:
        settings = replace(settings, max_length=positions)
    with stated_failures(target.absolute()):
        reference, backdrop = _read_texts(opened, references, background, settings, target)
    recipe = Recipe(Path(checkpoint).absolute(), settings, workers.threads)
    with (
        stated_failures(target.absolute()),
        memory_for("building the memory", fix=_LESS),
        open_learners(recipe, workers) as learners,
    ):
        shape = learners.shape
        gates = parse_gates(settings.gates, shape.num_gates)
        identity = ModelIdentity(
            fingerprint=opened.fingerprint(), model_type=opened.model_type, **vars(shape)
        )
        batches = plan(reference, backdrop, settings.batch_tokens).batches
        entries = sum(batch.targets for batch in batches)
        dtype_stored = np.float16 if settings.precision == "fp16" else np.float32
        width = shape.hidden_size + 2 * shape.num_experts
        copies = 1 if settings.deduplicate is None else 2
        check_free_space(
            target.absolute().parent,
            copies * entries * len(gates) * width * np.dtype(dtype_stored).itemsize,
        )
        job = _job(settings, gates, identity, reference, backdrop)
        with PartialBuild.open(target, job, restart=restart) as partial:
            widths = (shape.hidden_size, shape.num_experts)
            partial.prepare(gates, entries, widths, dtype_stored, batches)
            rates = _rates(learners, reference, gates, settings)
            speed = _learn_all(learners, batches, rates, settings, partial, progress)
            learned = [batch for batch in batches if not batch.background]
            before, after = (nll / reference.targets for nll in partial.nll(learned))
            found = _finish(partial, batches, reference.targets, entries, settings)
            written = write_pack(
                target,
                model=identity,
                gates=found.gates,
                variant=use.variant,
                neighbors=use.neighbors,
                similarity=use.similarity,
                calibration={
                    gate: preset(
                        use.variant,
                        confidence=use.confidence,
                        weighting=use.weighting,
                        temperature=use.temperature,
                        scale=use.scale,
                        power=use.power,
                        gamma=gamma,
                    )
                    for gate, gamma in found.gammas.items()
                },
                origins=found.origins,
                provenance=_provenance(
                    settings, rates, reference, backdrop, before, after, found.gates, entries
                ),
                evidence="all" if backdrop is None else "reference",
                overwrite=overwrite,
            )
    return BuildReport(
        pack=written,
        tokens=reference.targets,
        background_tokens=0 if backdrop is None else backdrop.targets,
        entries={gate.gate: gate.entries for gate in written.gates},
        nll_before=before,
        nll_after=after,
        seconds=time.monotonic() - started,
        tokens_per_second=speed,
    )


def _read_texts(
    checkpoint: Checkpoint,
    references: Sequence[str | Path | Reference],
    background: Sequence[str | Path | Reference],
    settings: BuildSettings,
    target: Path,
) -> tuple[Corpus, Corpus | None]:
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
    render = Conversations.load(checkpoint.path).documents

    def read(files: Sequence[str | Path | Reference], max_tokens: int | None) -> Corpus:
        return Corpus.read(
            [Reference.parse(file) for file in files],
            tokenizer,
            vocab_size=vocab_size,
            max_length=settings.max_length,
            max_tokens=max_tokens,
            render=render,
            spool=target.absolute().parent,
        )

    reference = read(references, settings.max_tokens)
    room = int(settings.background_ratio * reference.targets)
    return reference, read(background, room) if background and room else None


def _job(
    settings: BuildSettings,
    gates: tuple[int, ...],
    identity: ModelIdentity,
    reference: Corpus,
    background: Corpus | None,
) -> dict[str, Any]:
    """All that the entries depend on."""

    def described(text: Corpus | None) -> Any:
        return None if text is None else [text.sha256, *(file.weight for file in text.files)]

    return {
        **asdict(settings),
        "gates": list(gates),
        "model": identity.fingerprint,
        "reference": described(reference),
        "background": described(background),
        "versions": _versions(),
    }


def _rates(
    learners: Learners, reference: Corpus, gates: tuple[int, ...], settings: BuildSettings
) -> dict[int, float]:
    """Each gate's learning rate.

    One rate does not suit all gates, nor two models: early gates have larger gradients, because all
    that follows depends on them, and logits of any size. A relative rate asks a sample of the text.
    """
    if settings.rate == "absolute" or settings.steps == 0:
        return dict.fromkeys(gates, settings.learning_rate)
    sample = plan(reference.limited(_PILOT_TOKENS), None, settings.batch_tokens).batches
    # One step at rate one leaves the negative gradient.
    ones = dict.fromkeys(gates, 1.0)
    tasks = (Task(batch.number, batch.pieces(), ones, 1, pilot=True) for batch in sample)
    results = sorted(learners.run(tasks), key=lambda result: result.number)

    def rate(gate: int) -> float:
        logits = sum(result.squares[gate][0] for result in results)
        gradients = sum(result.squares[gate][1] for result in results)
        return settings.learning_rate * math.sqrt(logits / gradients) if gradients else 0.0

    return {gate: rate(gate) for gate in gates}


def _learn_all(
    learners: Learners,
    batches: Sequence[Batch],
    rates: Mapping[int, float],
    settings: BuildSettings,
    partial: PartialBuild,
    progress: Progress | None,
) -> float:
    """Learn the batches that are not finished yet; predicted tokens a second."""
    total = sum(batch.targets for batch in batches)
    done = sum(batch.targets for batch in batches if partial.has(batch.number))
    already, started = done, time.monotonic()
    if progress is not None:
        progress(done, total)

    def tasks() -> Iterator[Task]:
        for batch in batches:
            if not partial.has(batch.number):
                steps = 0 if batch.background else settings.steps
                yield Task(batch.number, batch.pieces(), rates, steps)

    results: Iterator[Result] = learners.run(tasks())
    for result in results:
        batch = batches[result.number]
        partial.write(batch, result.tensors, result.nll)
        done += batch.targets
        if progress is not None:
            progress(done, total)
    return (done - already) / max(time.monotonic() - started, 1e-9)


@dataclass(frozen=True)
class _Finished:
    """Files that are ready to become a pack's, and γ of each gate."""

    gates: Mapping[int, StoredTensors]
    gammas: Mapping[int, float]
    origins: StoredTensors


def _finish(
    partial: PartialBuild,
    batches: Sequence[Batch],
    reference_rows: int,
    entries: int,
    settings: BuildSettings,
) -> _Finished:
    """Centres, near-identical entries and origins: passes over the files, a chunk at a time."""
    gates: dict[int, StoredTensors] = {}
    gammas: dict[int, float] = {}
    merged: dict[int, Merging] = {}
    token_ids = _token_ids(batches, entries) if settings.deduplicate is not None else None
    for gate, file in partial.files.items():
        center = _center(file)
        file.write("center", 0, center)
        found = file
        if settings.deduplicate is not None and token_ids is not None:
            merging = find_merging(file, center, token_ids, reference_rows, settings.deduplicate)
            if len(merging.kept) < entries:
                merged[gate] = merging
                path = partial.path / f"merged-{gate:02d}.safetensors"
                found = write_merged(file, merging, token_ids, reference_rows, path)
        gammas[gate] = median_gamma(found.rows("keys"), found.row("keys"))
        gates[gate] = StoredTensors(found.path, found.rows("keys"))
        if found is not file:
            found.close()
    return _Finished(gates, gammas, _write_origins(partial, batches, entries, merged))


def _center(file: TensorFile) -> NDArray[np.float32]:
    """Mean of the keys [D]."""
    sums = sum(keys.sum(axis=0, dtype=np.float64) for _, keys in file.chunks("keys"))
    return (np.asarray(sums) / file.rows("keys")).astype(np.float32)


def median_gamma(count: int, key: Callable[[int], NDArray[Any]]) -> float:
    """γ for RBF: one over the median squared distance between two of a gate's keys.

    Two unrelated entries then have the similarity 1/e. From pairs drawn by a fixed seed; 1 where
    all keys are the same.

    Args:
        count: Of the keys.
        key: Gives one of them [D] by its number.
    """
    pairs = np.random.default_rng(0).integers(count, size=(2, _PAIRS)).T.tolist()
    squares = [
        float(np.square(key(first).astype(np.float64) - key(second)).sum())
        for first, second in pairs
        if first != second
    ]
    median = float(np.median(squares)) if squares else 0.0
    return min(1 / median, 1e6) if median > 0 else 1.0


def _token_ids(batches: Sequence[Batch], entries: int) -> NDArray[np.int32]:
    found = np.zeros(entries, np.int32)
    for batch in batches:
        for sequence, row in zip(batch.sequences, batch.rows, strict=True):
            tokens, _ = batch.corpus.origins(int(sequence))
            found[row : row + len(tokens)] = tokens
    return found


def _write_origins(
    partial: PartialBuild, batches: Sequence[Batch], entries: int, merged: Mapping[int, Merging]
) -> StoredTensors:
    """Where the entries come from; of merged ones also which rows they are, and for how many."""
    columns = dict.fromkeys(("token_ids", "documents", "positions"), entries)
    for gate, merging in merged.items():
        columns |= dict.fromkeys((f"rows_{gate:02d}", f"counts_{gate:02d}"), len(merging.kept))
    file = TensorFile.create(
        partial.path / ENTRIES, {name: (np.int32, (rows,)) for name, rows in columns.items()}
    )
    for batch in batches:
        for sequence, row in zip(batch.sequences.tolist(), batch.rows.tolist(), strict=True):
            tokens, positions = batch.corpus.origins(sequence)
            document = int(batch.corpus.index.documents[sequence])
            # Documents of the background text count down from -1.
            number = -1 - document if batch.background else document
            file.write("token_ids", row, tokens)
            file.write("documents", row, np.full(len(tokens), number))
            file.write("positions", row, positions)
    for gate, merging in merged.items():
        file.write(f"rows_{gate:02d}", 0, merging.kept)
        file.write(f"counts_{gate:02d}", 0, merging.counts)
    file.close()
    return StoredTensors(file.path, entries)


def _provenance(
    settings: BuildSettings,
    rates: Mapping[int, float],
    reference: Corpus,
    background: Corpus | None,
    before: float,
    after: float,
    gates: Mapping[int, StoredTensors],
    entries: int,
) -> dict[str, Any]:
    def described(text: Corpus) -> dict[str, Any]:
        weights = [file.weight for file in text.files]
        return {
            "sha256": text.sha256,
            "files": list(text.names),
            **({} if len(set(weights)) == 1 else {"weights": weights}),
            "documents": text.documents,
            "tokens": text.targets,
        }

    merged = {str(gate): entries - stored.rows for gate, stored in gates.items()}
    return {
        "reference": described(reference),
        "background": None if background is None else described(background),
        "steps": settings.steps,
        "learning_rate": settings.learning_rate,
        "rate": settings.rate,
        "rates": {str(gate): rate for gate, rate in rates.items()},
        "max_length": settings.max_length,
        "objective": OBJECTIVES[settings.objective],
        "gradient": settings.gradient,
        "computed": f"{settings.dtype} on {settings.device}",
        "deduplicated": None
        if settings.deduplicate is None
        else {"cosine": settings.deduplicate, "merged": merged},
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
