"""Text as token sequences: what memories are built from and confidences are measured on."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from knnmoe.runtime.errors import InputError, SettingError
from knnmoe.runtime.texts import read_documents
from knnmoe.runtime.tokenizer import Tokenizer

MAX_LENGTH = 256


@dataclass(frozen=True)
class TokenSequence:
    """A piece of a document that is read by itself, from an empty context.

    Attributes:
        tokens: Token ids [n], n ≥ 2; all but the first are predicted.
        document: Number of the document among those read, from 0.
        position: Position of the first token in its document.
    """

    tokens: NDArray[np.int64]
    document: int
    position: int

    @property
    def targets(self) -> int:
        """Tokens that have a true next token here."""
        return len(self.tokens) - 1


@dataclass(frozen=True)
class TokenText:
    """Text files as sequences, in their order.

    Attributes:
        sequences: At least one.
        names: Names of the files, without their directories.
        documents: Documents that the sequences come from.
        sha256: Hash of the documents' text, independent of file names and of how they are cut.
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
        for index in np.random.default_rng(0).permutation(len(self.sequences)).tolist():
            if total + self.sequences[index].targets <= max_targets:
                kept.append(index)
                total += self.sequences[index].targets
        if kept:
            chosen = [self.sequences[index] for index in sorted(kept)]
        else:
            first = self.sequences[0]
            chosen = [replace(first, tokens=first.tokens[: max_targets + 1])]
        documents = len({sequence.document for sequence in chosen})
        return replace(self, sequences=tuple(chosen), documents=documents)


def read_text(
    paths: Sequence[str | Path],
    tokenizer: Tokenizer,
    *,
    vocab_size: int,
    max_length: int = MAX_LENGTH,
    max_tokens: int | None = None,
) -> TokenText:
    """Read text files and cut their documents into sequences.

    Args:
        paths: `.txt` (one document each) or `.jsonl` (one a line) files.
        tokenizer: Of the model.
        vocab_size: Of the model; a tokenizer that goes beyond belongs to another one.
        max_length: Tokens of a sequence at most, ≥ 2. A rest of a single token is dropped, because
            nothing follows it.
        max_tokens: Predicted tokens at most, drawn from all over the text; None for all.

    Raises:
        InputError: If a file cannot be used (see `read_documents`) or no document has two tokens.
        SettingError: If a limit is out of its range.
    """
    if max_length < 2:
        raise SettingError("max length", "out of range", expected=">= 2", found=max_length)
    digest = hashlib.sha256()
    sequences: list[TokenSequence] = []
    documents = 0
    for path in paths:
        for text in read_documents(path):
            encoded = text.encode("utf-8")
            digest.update(len(encoded).to_bytes(8, "little") + encoded)
            ids = np.array(tokenizer.encode(text, where=path), dtype=np.int64)
            if ids.max() >= vocab_size:
                raise InputError(
                    path,
                    "gives token ids that the model does not have",
                    expected=f"ids below {vocab_size}",
                    found=int(ids.max()),
                    fix="Use the tokenizer that belongs to the model.",
                )
            sequences += cut(ids, documents, max_length)
            documents += 1
    if not sequences:
        raise InputError(
            ", ".join(str(path) for path in paths),
            "too short",
            expected="a document of at least two tokens",
            fix="Add text: a memory is worth building from some thousand tokens on.",
        )
    names = tuple(Path(path).name for path in paths)
    text_read = TokenText(tuple(sequences), names, documents, digest.hexdigest())
    return text_read.limited(max_tokens)


def cut(ids: NDArray[np.int64], document: int, max_length: int) -> list[TokenSequence]:
    """One document's ids [n] in pieces of at most `max_length`, none of a single token."""
    pieces = [
        TokenSequence(ids[start : start + max_length], document, start)
        for start in range(0, len(ids), max_length)
    ]
    return [piece for piece in pieces if piece.targets >= 1]
