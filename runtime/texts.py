"""Text files as token sequences: what a likelihood is measured on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from .documents import Render, TextHash, encode_document, read_documents
from .errors import InputError, SettingError
from .tokenizer import Tokenizer

DEFAULT_CONTEXT = 256


@dataclass(frozen=True)
class TokenSequence:
    """A piece of a document that is read by itself, from an empty context.

    Attributes:
        tokens: Token ids [n], n ≥ 2.
        credited: [n - 1]; whether the token that follows is predicted. At least one is.
        document: Number of the document among those read, from 0.
        position: Position of the first token in its document.
    """

    tokens: NDArray[np.int64]
    credited: NDArray[np.bool_]
    document: int = 0
    position: int = 0

    @staticmethod
    def of(
        tokens: Sequence[int] | NDArray[np.int64], *, first: int = 1, document: int = 0
    ) -> TokenSequence:
        """Token ids of which all from the `first` on are predicted, ≥ 1."""
        ids = np.asarray(tokens, np.int64)
        return TokenSequence(ids, np.arange(1, len(ids)) >= first, document)

    @property
    def targets(self) -> int:
        """Tokens that are predicted."""
        return int(np.count_nonzero(self.credited))

    @property
    def read(self) -> int:
        """Tokens that are read, but for the last."""
        return len(self.tokens) - 1


@dataclass(frozen=True)
class TokenText:
    """Text files as sequences, in their order.

    Attributes:
        sequences: At least one.
        names: Names of the files, without their directories.
        documents: Documents that the sequences come from.
        sha256: Hash of the documents' text and of what in it is credited, independent of file
            names and of how the text is packed and cut.
    """

    sequences: tuple[TokenSequence, ...]
    names: tuple[str, ...]
    documents: int
    sha256: str

    @property
    def tokens(self) -> int:
        """Tokens of all sequences."""
        return sum(len(sequence.tokens) for sequence in self.sequences)

    @property
    def targets(self) -> int:
        """Tokens that are predicted; a memory built from the text has one entry for each."""
        return sum(sequence.targets for sequence in self.sequences)

    @property
    def read(self) -> int:
        """Tokens that scoring the text reads."""
        return sum(sequence.read for sequence in self.sequences)

    def limited(self, max_targets: int | None) -> TokenText:
        """At most so many targets: whole sequences drawn from all over the text by a fixed seed.

        The first sequence drawn is kept (cut if need be), so that something always remains.
        """
        if max_targets is None or self.targets <= max_targets:
            return self
        if max_targets < 1:
            raise SettingError("max tokens", "out of range", expected=">= 1", found=max_targets)
        kept: list[int] = []
        total = 0
        order = np.random.default_rng(0).permutation(len(self.sequences)).tolist()
        for index in order:
            if total + self.sequences[index].targets <= max_targets:
                kept.append(index)
                total += self.sequences[index].targets
        chosen = [self.sequences[index] for index in sorted(kept)]
        if not kept:
            first = self.sequences[order[0]]
            end = int(np.flatnonzero(first.credited)[max_targets - 1]) + 1
            chosen = [replace(first, tokens=first.tokens[: end + 1], credited=first.credited[:end])]
        documents = len({sequence.document for sequence in chosen})
        return replace(self, sequences=tuple(chosen), documents=documents)


def read_text(
    paths: Sequence[str | Path],
    tokenizer: Tokenizer,
    *,
    vocab_size: int,
    max_length: int = DEFAULT_CONTEXT,
    max_tokens: int | None = None,
    render: Render | None = None,
) -> TokenText:
    """Read text files and cut their documents into sequences.

    Args:
        paths: `.txt` (one document each) or `.jsonl` (one a line) files (see `documents`).
        tokenizer: Of the model.
        vocab_size: Of the model; a tokenizer that goes beyond belongs to another one.
        max_length: Tokens of a sequence at most, ≥ 2. A rest without a credited token that
            follows another is dropped.
        max_tokens: Predicted tokens at most, drawn from all over the text; None for all.
        render: Makes documents of conversations; None refuses them.

    Raises:
        InputError: If a file cannot be used (see `read_documents`) or no document has two tokens.
        SettingError: If a limit is out of its range.
    """
    if max_length < 2:
        raise SettingError("max length", "out of range", expected=">= 2", found=max_length)
    hashed = TextHash()
    sequences: list[TokenSequence] = []
    documents = 0
    for path in map(Path, paths):
        for document in read_documents(path, render):
            parts = list(encode_document(document, tokenizer, vocab_size=vocab_size, hashed=hashed))
            if parts:
                ids, credited = (np.concatenate(each) for each in zip(*parts, strict=True))
                sequences += cut(ids.astype(np.int64), credited, documents, max_length)
            documents += 1
    if not sequences:
        raise InputError(
            ", ".join(str(path) for path in paths),
            "too short",
            expected="a document of at least two tokens",
            fix="Give more text.",
        )
    names = tuple(Path(path).name for path in paths)
    return TokenText(tuple(sequences), names, documents, hashed.hexdigest()).limited(max_tokens)


def cut(
    ids: NDArray[np.int64], credited: NDArray[np.bool_], document: int, max_length: int
) -> list[TokenSequence]:
    """One document's ids [n] in pieces of at most `max_length`, none without a target."""
    pieces = [
        TokenSequence(
            ids[start : start + max_length],
            credited[start + 1 : start + max_length],
            document,
            start,
        )
        for start in range(0, len(ids), max_length)
    ]
    return [piece for piece in pieces if piece.targets]
