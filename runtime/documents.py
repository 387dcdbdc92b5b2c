"""Reading text: files as documents, one at a time, whatever their size.

    .txt      one document
    .jsonl    one a line, each an object with one of
                  {"text": …}                              all of it is credited
                  {"prompt": …, "completion": …}           the completion is
                  {"messages": [{"role", "content"}, …]}   what the assistant says is

What is credited is learned from, where a memory is built, and predicted, where one is measured.

A document is an iterator of spans, so that a file of a gigabyte never lies in memory as one string.
"""

from __future__ import annotations

import codecs
import hashlib
import io
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from .errors import InputError
from .utf8 import check_unicode

if TYPE_CHECKING:
    from .tokenizer import Tokenizer

SUFFIXES = (".txt", ".jsonl")
# Text beyond this is tokenised in pieces, cut behind a line's end.
PIECE_BYTES = 1 << 20
_WEIGHTED = "A weight is a number, as in FILE@0.5, and is for `knnmoe memory build` alone."
SHAPES = '{"text"}, {"prompt", "completion"} or {"messages": [{"role", "content"}, …]}'


@dataclass(frozen=True)
class Span:
    """A stretch of a document.

    Attributes:
        text: Its characters.
        credited: Whether its tokens count; others are only read.
    """

    text: str
    credited: bool = True


@dataclass(frozen=True)
class Document:
    """One document, to be read once.

    Attributes:
        where: File and line, for errors.
        spans: Consecutive; of each, adjacent spans are encoded together (see `rendered`).
        rendered: The text has its special tokens in it already, as chat templates write them. Then
            the spans are one text for the tokenizer; else each is encoded by itself, as prompt and
            completion are when the model is used.
    """

    where: str
    spans: Iterator[Span]
    rendered: bool = False


# where, record → documents of a conversation
Render = Callable[[str, dict[str, Any]], list[Document]]


def read_documents(path: Path, render: Render | None = None) -> Iterator[Document]:
    """The documents of a file, in order; documents of white space alone are left out.

    Each must be consumed before the next is asked for.

    Args:
        path: The file.
        render: Makes documents of a record with `messages`; None refuses such records.

    Raises:
        InputError: If the file cannot be read, is not UTF-8, has a malformed line or no text.
    """
    kind = path.suffix.lower()
    if kind not in SUFFIXES:
        raise InputError(
            path,
            "unknown kind of text file",
            expected=" or ".join(SUFFIXES),
            found="a directory" if path.is_dir() else path.suffix or "no suffix",
            fix=_WEIGHTED if "@" in path.name else None,
        )
    found = False
    try:
        with path.open("rb") as stream:
            documents = (
                _plain_text(path, stream) if kind == ".txt" else _json_lines(path, stream, render)
            )
            for document in documents:
                found = True
                yield document
    except OSError as error:
        raise InputError(path, "cannot be read", found=error.strerror) from error
    if not found:
        raise InputError(path, "has no text", expected="at least one document")


def _plain_text(path: Path, stream: BinaryIO) -> Iterator[Document]:
    pieces = _pieces(path, stream)
    # A file of white space is no document: look ahead as far as the first letter.
    head = ""
    for piece in pieces:
        head += piece
        if not head.isspace():
            yield Document(str(path), map(Span, chain([head], pieces)))
            return


def _pieces(path: Path, stream: BinaryIO) -> Iterator[str]:
    """A file's text in pieces of about `PIECE_BYTES`, cut at a line's end if there is one."""
    # Of files from elsewhere lines end in \r\n, which models know little of.
    decoder = io.IncrementalNewlineDecoder(
        codecs.getincrementaldecoder("utf-8-sig")(), translate=True
    )
    rest, lines, offset = "", 1, 0
    while True:
        data = stream.read(PIECE_BYTES)
        waiting = len(decoder.getstate()[0])  # bytes of a character that the last read cut
        try:
            rest += decoder.decode(data, final=not data)
        except UnicodeDecodeError as error:
            start = max(error.start, 0)
            line = lines + error.object.count(b"\n", 0, start)
            byte = error.object[start]
            raise _not_utf8(path, line, byte, offset - waiting + start) from error
        lines += data.count(b"\n")
        offset += len(data)
        if not data:
            if rest:
                yield rest
            return
        if len(rest) >= PIECE_BYTES // 4:  # a character has up to four bytes
            end = rest.rfind("\n") + 1 or max(rest.rfind(" "), 0) or len(rest)
            yield rest[:end]
            rest = rest[end:]


def _not_utf8(where: object, line: int, byte: int, offset: int) -> InputError:
    return InputError(
        f"{where}, line {line}",
        "not UTF-8",
        found=f"byte 0x{byte:02X} at offset {offset}",
        fix="Convert the text to UTF-8.",
    )


def _json_lines(path: Path, stream: BinaryIO, render: Render | None) -> Iterator[Document]:
    offset = 0
    # A file opened for bytes is split at \n only: other line separators are legal inside a string.
    for number, data in enumerate(stream, start=1):
        where = f"{path}, line {number}"
        if number == 1:
            data = data.removeprefix(codecs.BOM_UTF8)
        try:
            line = data.decode("utf-8")
        except UnicodeDecodeError as error:
            byte = data[error.start]
            raise _not_utf8(path, number, byte, offset + error.start) from error
        offset += len(data)
        if line.strip():
            yield from _of_record(where, _parse(where, line), render)


def _parse(where: str, line: str) -> dict[str, Any]:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise InputError(where, "not valid JSON", found=error) from error
    if not isinstance(record, dict):
        raise InputError(
            where, "malformed", expected=f"an object: {SHAPES}", found=line.strip()[:60]
        )
    return record


def _of_record(where: str, record: dict[str, Any], render: Render | None) -> Iterator[Document]:
    if "messages" in record:
        if render is None:
            raise InputError(where, "is a conversation", expected='an object with a "text"')
        yield from render(where, record)
        return
    names = ("prompt", "completion") if "prompt" in record else ("text",)
    texts = [record[name] for name in names if isinstance(record.get(name), str)]
    if len(texts) != len(names):
        raise InputError(
            where, "malformed", expected=f"an object: {SHAPES}", found=str(record)[:60]
        )
    for text in texts:
        check_unicode(where, text)
    if len(texts) == 1:
        if texts[0] and not texts[0].isspace():
            yield Document(where, iter([Span(texts[0])]))
        return
    prompt, completion = texts
    if not completion or completion.isspace():
        raise InputError(where, "has an empty completion", expected="text that is predicted")
    yield Document(where, iter([Span(prompt, credited=False), Span(completion)]))


class TextHash:
    """A hash of documents' text and of what in it is credited, however files pack them."""

    def __init__(self) -> None:
        self._all = hashlib.sha256()
        self._document = hashlib.sha256()
        self._credited = True

    def note(self, span: Span) -> None:
        """Take a stretch of the document at hand."""
        if span.credited != self._credited:
            self._document.update(b"\xff")  # in no text's UTF-8
            self._credited = span.credited
        self._document.update(span.text.encode("utf-8"))

    def end(self) -> None:
        """The document at hand ends."""
        self._all.update(self._document.digest())
        self._document, self._credited = hashlib.sha256(), True

    def hexdigest(self) -> str:
        """Of the documents that ended."""
        return self._all.hexdigest()


def encode_document(
    document: Document, tokenizer: Tokenizer, *, vocab_size: int, hashed: TextHash
) -> Iterator[tuple[NDArray[np.int32], NDArray[np.bool_]]]:
    """Token ids [n] of a document and which are credited [n], stretch by stretch.

    Args:
        document: Is consumed.
        tokenizer: Of the model.
        vocab_size: Of the model; a tokenizer that goes beyond belongs to another one.
        hashed: Takes the text.

    Raises:
        InputError: If there are token ids that the model does not have.
    """
    for ids, credited in _encoded(document, tokenizer, hashed):
        tokens = np.array(ids, np.int32)
        if len(tokens) and tokens.max() >= vocab_size:
            raise InputError(
                document.where,
                "gives token ids that the model does not have",
                expected=f"ids below {vocab_size}",
                found=int(tokens.max()),
                fix="Use the tokenizer that belongs to the model.",
            )
        yield tokens, credited
    hashed.end()


def _encoded(
    document: Document, tokenizer: Tokenizer, hashed: TextHash
) -> Iterator[tuple[Sequence[int], NDArray[np.bool_]]]:
    if document.rendered:
        spans = list(document.spans)
        for span in spans:
            hashed.note(span)
        yield _encode_rendered(tokenizer, spans)
        return
    first, partly = True, False
    for span in document.spans:
        hashed.note(span)
        partly |= not span.credited
        if span.text:
            ids = tokenizer.encode_part(span.text, first=first)
            first = first and not ids
            yield ids, np.full(len(ids), span.credited)
    if partly:  # a completion ends; a text may have been cut anywhere
        end = tokenizer.eos_token_ids[:1]
        yield end, np.ones(len(end), np.bool_)


def _encode_rendered(
    tokenizer: Tokenizer, spans: Sequence[Span]
) -> tuple[list[int], NDArray[np.bool_]]:
    """Spans as one text for the tokenizer; a token belongs to the span that it begins in."""
    ids, offsets = tokenizer.encode_with_offsets("".join(span.text for span in spans))
    ends = np.cumsum([len(span.text) for span in spans])
    begins = np.array([begin for begin, _ in offsets], np.int64)
    inside = np.minimum(np.searchsorted(ends, begins, side="right"), len(spans) - 1)
    return ids, np.array([span.credited for span in spans], np.bool_)[inside]
