"""Reading text files: what counts as a document."""

from __future__ import annotations

import json
from pathlib import Path

from .errors import InputError
from .tokenizer import decode_utf8

SUFFIXES = (".txt", ".jsonl")


def read_documents(path: str | Path) -> list[str]:
    """The documents of a text file, in order; documents of white space alone are left out.

    A `.txt` file is one document. A `.jsonl` file is one a line, the string `text` of an object;
    other keys are ignored.

    Raises:
        InputError: If the file cannot be read, is not UTF-8, has a malformed line or no text.
    """
    file = Path(path)
    kind = file.suffix.lower()
    if kind not in SUFFIXES:
        raise InputError(
            file,
            "unknown kind of text file",
            expected=" or ".join(SUFFIXES),
            found=file.suffix or "no suffix",
        )
    try:
        text = decode_utf8(file.read_bytes(), file)
    except OSError as error:
        raise InputError(file, "cannot be read", found=error.strerror) from error
    documents = [text] if kind == ".txt" else _json_lines(file, text)
    documents = [document for document in documents if not document.isspace() and document]
    if not documents:
        raise InputError(file, "has no text", expected="at least one document")
    return documents


def _json_lines(file: Path, text: str) -> list[str]:
    # Split at \n only: other line separators are legal inside a JSON string.
    lines = enumerate(text.split("\n"), start=1)
    return [_document(f"{file}, line {number}", line) for number, line in lines if line.strip()]


def _document(where: str, line: str) -> str:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise InputError(where, "not valid JSON", found=error) from error
    document = record.get("text") if isinstance(record, dict) else None
    if not isinstance(document, str):
        raise InputError(
            where, "malformed", expected='an object with a string "text"', found=line[:60]
        )
    try:
        document.encode("utf-8")
    except UnicodeEncodeError as error:
        raise InputError(
            where,
            "not valid Unicode",
            expected="text without lone surrogates",
            found=f"U+{ord(document[error.start]):04X}",
        ) from error
    return document
