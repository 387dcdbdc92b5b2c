"""The passages of reference text that a memory's entries came from.

A pack says of each entry which document and which token of it that was, not what it says: that is
read from the text, which has to be the one that the memory was built from.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from knnmoe.runtime.conversations import Conversations
from knnmoe.runtime.errors import InputError, MemoryPackError
from knnmoe.runtime.memory import MemoryPack
from knnmoe.runtime.pack_files import MANIFEST, REBUILD
from knnmoe.runtime.pack_parts import EntryOrigins
from knnmoe.runtime.tokenizer import Tokenizer

from .corpus import Corpus
from .references import Reference

WHOLE = 1 << 40  # tokens: no document is cut


@dataclass(frozen=True)
class Passage:
    """Where one entry came from.

    Attributes:
        document: Number of the document, from 0, in the order of the files.
        position: Of the token in its document, from 0.
        background: Whether it is background text; then that is what is counted.
        before: Text up to the token.
        token: The token whose router input is the key.
        after: Text that follows, whose likelihood the entry was made for.
    """

    document: int
    position: int
    background: bool
    before: str
    token: str
    after: str


@dataclass(frozen=True)
class Sources:
    """The reference text of one memory, as tokens; use `Sources.open`."""

    pack: MemoryPack
    origins: EntryOrigins
    tokenizer: Tokenizer
    reference: Corpus
    background: Corpus | None

    @staticmethod
    def open(
        pack: MemoryPack,
        references: Sequence[str | Path],
        tokenizer: str | Path,
        *,
        background: Sequence[str | Path] = (),
    ) -> Sources:
        """Read the text that a memory was built from.

        Args:
            pack: The memory.
            references: The files it was built from, in the order in which they were given; their
                weights say nothing here.
            tokenizer: The bundle or checkpoint.
            background: The files of its background text; without them their passages have no text.

        Raises:
            MemoryPackError: If the pack does not say where its entries came from.
            InputError: If a file cannot be used, or the text is another.
            KnnMoeError: If the tokenizer cannot be read.
        """
        origins = pack.read_origins()
        if origins is None:
            raise MemoryPackError(
                pack.path / MANIFEST, "does not say where its entries came from", fix=REBUILD
            )
        encoder = Tokenizer.load(tokenizer)
        render = Conversations.load(tokenizer).documents

        def read(files: Sequence[str | Path], kind: str) -> Corpus:
            # Of files with weights a corpus keeps some documents; these are all there.
            corpus = Corpus.read(
                [Reference(Reference.parse(file).path) for file in files], encoder,
                vocab_size=1 << 31, max_length=WHOLE, render=render,
            )  # fmt: skip
            stated = (pack.provenance.get(kind) or {}).get("sha256")
            if stated is not None and corpus.sha256 != stated:
                raise InputError(
                    ", ".join(map(str, files)), f"is not the {kind} text of this memory",
                    expected=f"sha256 {stated}", found=corpus.sha256,
                    fix="Give the files that it was built from, all of them, in that order.",
                )  # fmt: skip
            return corpus

        return Sources(
            pack, origins, encoder, read(references, "reference"),
            read(background, "background") if background else None,
        )  # fmt: skip

    def passage(self, gate: int, entry: int, *, width: int = 12) -> Passage:
        """Where an entry of a gate came from, as traces number them.

        Args:
            gate: Of the model.
            entry: From 0.
            width: Tokens of text on either side.

        Raises:
            InputError: If the pack has no such entry: one that was added while it served, perhaps.
        """
        count = next((one.entries for one in self.pack.gates if one.gate == gate), 0)
        if not 0 <= entry < count:
            raise InputError(
                f"entry {entry} of gate {gate}", "is not in the pack",
                expected=f"0 to {count - 1}" if count else "a gate that it covers",
            )  # fmt: skip
        row = int(self.origins.merged[gate][entry]) if gate in self.origins.merged else entry
        document, position = int(self.origins.documents[row]), int(self.origins.positions[row])
        corpus = self.reference if document >= 0 else self.background
        number = document if document >= 0 else -1 - document
        texts = ("", self.tokenizer.token_text(int(self.origins.token_ids[row])), "")
        if corpus is not None:
            texts = self._texts(corpus, number, position, width)
        return Passage(number, position, document < 0, *texts)

    def _texts(
        self, corpus: Corpus, document: int, position: int, width: int
    ) -> tuple[str, str, str]:
        (at,) = np.flatnonzero(corpus.index.documents == document)
        start = int(corpus.index.starts[at])
        end = start + int(corpus.index.lengths[at])
        token = start + position
        pieces = ((max(start, token - width), token), (token, token + 1), (token + 1, end))
        first, middle, last = (
            self.tokenizer.decode(corpus.tokens[a : min(b, token + 1 + width)].tolist())
            for a, b in pieces
        )
        return first, middle, last
