"""Reference text as token ids on disk, with an index in memory: what a memory is built from."""

from __future__ import annotations

import tempfile
from array import array
from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from knnmoe.runtime.atomic import output_error
from knnmoe.runtime.documents import Document, Render, TextHash, encode_document, read_documents
from knnmoe.runtime.errors import InputError, SettingError
from knnmoe.runtime.tokenizer import Tokenizer

from .references import Reference


@dataclass(frozen=True)
class Piece:
    """A sequence to learn: read by itself, from an empty context.

    Attributes:
        tokens: Token ids [n] int32, n ≥ 2.
        credited: [n - 1]; whether the token that follows is learned from, and an entry is made.
    """

    tokens: NDArray[np.int32]
    credited: NDArray[np.bool_]


@dataclass(frozen=True)
class SequenceIndex:
    """Where the sequences lie, [S] each.

    Attributes:
        starts: First token in the file of tokens.
        lengths: Tokens, ≥ 2.
        targets: Of these, the ones that are predicted and credited, ≥ 1: a sequence's entries.
        documents: Number of the document, from 0.
        positions: Position of the first token in its document.
        files: Number of the file.
    """

    starts: NDArray[np.int64]
    lengths: NDArray[np.int64]
    targets: NDArray[np.int64]
    documents: NDArray[np.int64]
    positions: NDArray[np.int64]
    files: NDArray[np.int64]

    def at(self, chosen: NDArray[Any]) -> SequenceIndex:
        """Some of the sequences."""
        return SequenceIndex(**{name: column[chosen] for name, column in vars(self).items()})

    def __len__(self) -> int:
        return len(self.starts)


@dataclass(frozen=True)
class Corpus:
    """Text files as sequences of tokens; use `Corpus.read`.

    Attributes:
        tokens: All token ids, mapped from a file without a name, which the system removes.
        credited: [tokens] 1 where a token is learned from.
        index: The sequences, in the order of the text.
        files: The files with their weights.
        sha256: Hash of the documents' text and of what in it is credited, independent of file
            names and of how the text is packed and cut.
    """

    tokens: NDArray[np.int32]
    credited: NDArray[np.uint8]
    index: SequenceIndex
    files: tuple[Reference, ...]
    sha256: str

    @staticmethod
    def read(
        references: Sequence[Reference],
        tokenizer: Tokenizer,
        *,
        vocab_size: int,
        max_length: int,
        max_tokens: int | None = None,
        render: Render | None = None,
        spool: Path | None = None,
    ) -> Corpus:
        """Read text files once from front to back and cut their documents into sequences.

        Memory holds a document's text (of a long .txt a piece of it) and 48 bytes a sequence.

        Args:
            references: The files.
            tokenizer: Of the model.
            vocab_size: Of the model; a tokenizer that goes beyond belongs to another one.
            max_length: Tokens of a sequence at most, ≥ 2. A rest without a credited token that
                follows another is dropped.
            max_tokens: Entries at most (see `limited`); None for all.
            render: For conversations.
            spool: Directory of the file of tokens; None for the system's.

        Raises:
            InputError: If a file cannot be used, or there is not one entry in all.
            SettingError: If a limit is out of its range.
            OutputError: If nothing can be written to `spool`.
        """
        if max_length < 2:
            raise SettingError("max length", "out of range", expected=">= 2", found=max_length)
        if max_tokens is not None and max_tokens < 1:
            raise SettingError("max tokens", "out of range", expected=">= 1", found=max_tokens)
        with _temporary(spool) as tokens, _temporary(spool) as credits:
            writer = _Writer(tokenizer, vocab_size, max_length, tokens, credits)
            for number, reference in enumerate(references):
                for document in read_documents(reference.path, render):
                    writer.add(document, number)
            corpus = writer.corpus(tuple(references))
        if not len(corpus.index):
            raise InputError(
                ", ".join(str(reference.path) for reference in references),
                "too short",
                expected="a document of at least two tokens",
                fix="Add text: a memory is worth building from some thousand tokens on.",
            )
        return corpus.weighted(max_tokens)

    @property
    def targets(self) -> int:
        """Entries that are made of the text."""
        return int(self.index.targets.sum())

    @property
    def documents(self) -> int:
        """Documents that the sequences come from."""
        return len(np.unique(self.index.documents))

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the files, without their directories."""
        return tuple(reference.path.name for reference in self.files)

    def piece(self, sequence: int) -> Piece:
        """One sequence."""
        first = int(self.index.starts[sequence])
        last = first + int(self.index.lengths[sequence])
        return Piece(
            np.array(self.tokens[first:last]), self.credited[first + 1 : last].astype(np.bool_)
        )

    def weighted(self, max_targets: int | None) -> Corpus:
        """Each file drawn from by its weight, at most so many entries in all.

        A file of the largest weight gives all, others by the ratio of their weight to that; if this
        is too much, all give less alike.
        """
        weights = np.array([reference.weight for reference in self.files])
        density = (weights / weights.max())[self.index.files]  # of each sequence
        if (density == 1).all():
            return self.limited(max_targets)
        wished = float(density @ self.index.targets)
        factor = 1.0 if max_targets is None else min(1.0, max_targets / wished)
        kept: list[int] = []
        for share in np.unique(density):
            members = np.flatnonzero(density == share)
            quota = factor * share * float(self.index.targets[members].sum())
            kept += self._drawn(members, quota)
        return self._kept(sorted(kept), max_targets)

    def limited(self, max_targets: int | None) -> Corpus:
        """At most so many entries: whole sequences drawn from all over the text by a fixed seed.

        The first sequence is kept if none fits (cut if need be), so that something always remains.
        """
        if max_targets is None or self.targets <= max_targets:
            return self
        return self._kept(sorted(self._drawn(np.arange(len(self.index)), max_targets)), max_targets)

    def _drawn(self, members: NDArray[np.int64], quota: float) -> list[int]:
        kept: list[int] = []
        total = 0
        targets = self.index.targets
        for index in members[np.random.default_rng(0).permutation(len(members))].tolist():
            if total + int(targets[index]) <= quota:
                kept.append(index)
                total += int(targets[index])
        return kept

    def _kept(self, kept: Sequence[int], max_targets: int | None) -> Corpus:
        if kept:
            return replace(self, index=self.index.at(np.array(kept)))
        index = self.index.at(np.arange(1))
        credited = np.flatnonzero(self.piece(0).credited)[:max_targets]
        lengths, targets = np.array([credited[-1] + 2]), np.array([len(credited)])
        return replace(self, index=replace(index, lengths=lengths, targets=targets))

    def origins(self, sequence: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Token ids and positions [targets] of one sequence's entries."""
        piece = self.piece(sequence)
        at = np.flatnonzero(piece.credited)
        return piece.tokens[at].astype(np.int64), self.index.positions[sequence] + at


def _temporary(directory: Path | None) -> IO[bytes]:
    """A file without a name, gone when it is closed."""
    try:
        return tempfile.TemporaryFile(dir=directory)
    except OSError as error:
        raise output_error(directory or Path(tempfile.gettempdir()), error) from error


def _columns() -> dict[str, array[int]]:
    return {column.name: array("q") for column in fields(SequenceIndex)}


@dataclass
class _Writer:
    """Tokenises documents into the two files of a corpus."""

    tokenizer: Tokenizer
    vocab_size: int
    max_length: int
    tokens: IO[bytes]
    credits: IO[bytes]
    hashed: TextHash = field(default_factory=TextHash)
    index: dict[str, array[int]] = field(default_factory=_columns)
    documents: int = 0
    written: int = 0

    def add(self, document: Document, file: int) -> None:
        """Append one document."""
        first = self.written
        for ids, credited in encode_document(
            document, self.tokenizer, vocab_size=self.vocab_size, hashed=self.hashed
        ):
            self.tokens.write(ids.tobytes())
            self.credits.write(credited.astype(np.uint8).tobytes())
            self.written += len(ids)
        self._cut(first, file)

    def corpus(self, files: tuple[Reference, ...]) -> Corpus:
        """What was added."""
        self.credits.flush()
        self.tokens.flush()
        index = SequenceIndex(**{name: np.array(column) for name, column in self.index.items()})
        if not self.written:
            return Corpus(np.zeros(0, np.int32), np.zeros(0, np.uint8), index, files, "")
        tokens = np.memmap(self.tokens, np.int32, mode="r")
        credited = np.memmap(self.credits, np.uint8, mode="r")
        if len(index):
            ends = (index.starts + index.lengths).tolist()
            counts = (
                np.count_nonzero(credited[first + 1 : end])
                for first, end in zip(index.starts.tolist(), ends, strict=True)
            )
            targets = np.fromiter(counts, np.int64, len(index))
            index = replace(index, targets=targets).at(np.flatnonzero(targets))
        return Corpus(tokens, credited, index, files, self.hashed.hexdigest())

    def _cut(self, first: int, file: int) -> None:
        for start in range(first, self.written - 1, self.max_length):
            length = min(self.max_length, self.written - start)
            row = (start, length, 0, self.documents, start - first, file)
            for column, number in zip(self.index.values(), row, strict=True):
                column.append(number)
        self.documents += 1
