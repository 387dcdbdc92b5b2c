"""What every row of a comparison is measured on: one model, one memory, the same texts."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from knnmoe.runtime.checkpoint import Checkpoint
from knnmoe.runtime.conversations import Conversations
from knnmoe.runtime.errors import CheckpointError, InputError
from knnmoe.runtime.evaluation import read_for, score_sequences
from knnmoe.runtime.memory import MemoryPack
from knnmoe.runtime.model import Model
from knnmoe.runtime.pack_parts import EntryOrigins
from knnmoe.runtime.texts import DEFAULT_CONTEXT, TokenSequence, TokenText

from ..corpus import Corpus
from ..overlap import seen_sequences
from ..references import Reference

DEFAULT_MAX_TOKENS = 10_000
VALIDATION_TOKENS = 4_000
MAX_SEEN = 0.1  # share of a text's sequences that another text may have as well

DOMAIN, GENERAL = "domain", "general"


@dataclass(frozen=True)
class Bench:
    """What the rows share; rows leave it as it is, but for the memory that the model has.

    Attributes:
        checkpoint: The model for torch.
        model: The model on the runtime.
        pack: The memory as calibrated.
        reference: The text the memory was built from.
        validation: Text of the domain that rows may choose their settings on.
        tests: `domain` and, if given, `general`: text that chooses nothing.
        scratch: Directory for what rows write.
        say: Called with what is being done.
    """

    checkpoint: Path
    model: Model
    pack: MemoryPack
    reference: TokenText
    validation: TokenText
    tests: Mapping[str, TokenText]
    scratch: Path
    say: Callable[[str], None] = field(default=lambda text: None)

    def runtime_nll(self, pack: MemoryPack | None) -> dict[str, NDArray[np.float64]]:
        """Summed NLL of each sequence of the tests, [n] by text, with a memory or frozen."""
        self.model.swap_memory(pack)
        return {name: self.score(text) for name, text in self.tests.items()}

    def score(self, text: TokenText) -> NDArray[np.float64]:
        """Summed NLL of each sequence, [n], by the model as it is now."""
        return score_sequences(self.model, text.sequences).nll


@dataclass(frozen=True)
class Inputs:
    """Where everything is, as a user names it; repeatable files are sequences.

    Raises of `open_bench` name these by their options.
    """

    checkpoint: Path
    bundle: Path
    memory: Path
    reference: Sequence[Path]
    validation: Sequence[Path]
    text: Sequence[Path]
    general: Sequence[Path] = ()


def open_bench(
    inputs: Inputs,
    scratch: Path,
    *,
    context: int | None = None,
    max_tokens: int | None = DEFAULT_MAX_TOKENS,
    threads: int | None = None,
    say: Callable[[str], None] = lambda text: None,
) -> Bench:
    """Open the model, the memory and the texts, and check that they may be compared.

    Args:
        inputs: The files.
        scratch: An empty directory.
        context: Tokens a sequence; None takes 256, or all positions of a model with fewer.
        max_tokens: Predicted tokens of each test text at most, drawn from all over it.
        threads: Of the runtime.
        say: Called with what is being done.

    Raises:
        MemoryPackError: If the memory is damaged, or belongs to another model.
        CheckpointError: If the checkpoint is damaged, or not what the bundle was exported from.
        InputError: If a text is too short, holds no text, is not the memory's reference, or was
            seen already by what it is to judge.
        SettingError: If a setting is out of its range.
    """
    pack = MemoryPack.open(inputs.memory)
    model = Model.load(inputs.bundle, threads=threads)
    pack.check_belongs_to(model.identity)
    _check_checkpoint(inputs.checkpoint, model)
    if context is None:
        context = min(DEFAULT_CONTEXT, model.pipeline.max_positions)

    def read(files: Sequence[Path], limit: int | None) -> TokenText:
        return read_for(model, files, context=context, max_tokens=limit)

    validation = read(inputs.validation, VALIDATION_TOKENS)
    reference = _read_reference(inputs, model, _stated_reference(pack), context, scratch)
    tests = {DOMAIN: read(inputs.text, max_tokens)}
    if inputs.general:
        tests[GENERAL] = read(inputs.general, max_tokens)
    _check_apart(reference, validation, tests)
    return Bench(inputs.checkpoint, model, pack, reference, validation, tests, scratch, say)


def _check_checkpoint(path: Path, model: Model) -> None:
    found, expected = Checkpoint.open(path).fingerprint(), model.identity.fingerprint
    if found != expected:
        raise CheckpointError(
            path,
            "is not the checkpoint that the bundle was exported from",
            expected=expected,
            found=found,
            fix="Name that checkpoint, or export this one.",
        )


def _stated_reference(pack: MemoryPack) -> dict[str, Any]:
    """What the memory says of its reference text: tokens, max_length and sha256, where it does."""
    reference = pack.provenance.get("reference")
    stated = dict(reference) if isinstance(reference, Mapping) else {}
    stated["max_length"] = pack.provenance.get("max_length")
    kinds = {"tokens": int, "max_length": int, "sha256": str}
    return {
        name: stated[name] for name, kind in kinds.items() if isinstance(stated.get(name), kind)
    }


def _read_reference(
    inputs: Inputs, model: Model, stated: Mapping[str, Any], context: int, scratch: Path
) -> TokenText:
    """The reference text as the memory was built from it."""
    corpus = Corpus.read(
        [Reference.parse(file) for file in inputs.reference],
        model.tokenizer,
        vocab_size=model.bundle.manifest.architecture.vocab_size,
        max_length=stated.get("max_length", context),
        max_tokens=stated.get("tokens"),
        render=Conversations.load(inputs.checkpoint).documents,
        spool=scratch,
    )
    if stated.get("sha256", corpus.sha256) != corpus.sha256:
        raise InputError(
            ", ".join(corpus.names),
            "is not the text that the memory was built from",
            expected=f"sha256 {stated['sha256']}",
            found=corpus.sha256,
            fix=f"Give --reference the files that {inputs.memory.name} was built from, in their"
            " order: every row learns from the same text.",
        )
    sequences = tuple(
        TokenSequence(
            piece.tokens.astype(np.int64),
            piece.credited,
            int(corpus.index.documents[number]),
            int(corpus.index.positions[number]),
        )
        for number, piece in enumerate(map(corpus.piece, range(len(corpus.index))))
    )
    return TokenText(sequences, corpus.names, corpus.documents, corpus.sha256)


def _check_apart(
    reference: TokenText, validation: TokenText, tests: Mapping[str, TokenText]
) -> None:
    """Nothing that is measured on may have been learned from or have chosen."""
    domain = tests[DOMAIN]
    pairs = [
        ("--validation", validation, "--reference", reference),
        ("--text", domain, "--reference", reference),
        ("--text", domain, "--validation", validation),
    ]
    if GENERAL in tests:
        pairs += [
            ("--general", tests[GENERAL], "--reference", reference),
            ("--general", tests[GENERAL], "--validation", validation),
            ("--general", tests[GENERAL], "--text", domain),
        ]
    for option, text, other_option, other in pairs:
        count = len(text.sequences)
        seen = count
        if text.sha256 != other.sha256:
            seen = seen_sequences(_as_origins(other), [s.tokens for s in text.sequences])
        if seen > MAX_SEEN * count:
            raise InputError(
                f"{option} {', '.join(text.names)}",
                f"is in {other_option} as well, so nothing can be measured on it",
                expected="text of its own",
                found=f"{seen} of {count} sequences in {', '.join(other.names)}",
                fix=f"Give other text with {option}.",
            )


def _as_origins(text: TokenText) -> EntryOrigins:
    """A text as a memory would name its entries."""

    def joined(parts: Iterable[NDArray[np.int64]]) -> NDArray[np.int32]:
        return np.concatenate(list(parts)).astype(np.int32)

    return EntryOrigins(
        token_ids=joined(s.tokens for s in text.sequences),
        documents=joined(np.full(len(s.tokens), s.document) for s in text.sequences),
        positions=joined(s.position + np.arange(len(s.tokens)) for s in text.sequences),
    )
