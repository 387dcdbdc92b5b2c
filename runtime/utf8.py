"""What can be text: bytes that are UTF-8, and strings that UTF-8 can state."""

from __future__ import annotations

from .errors import InputError


def decode_utf8(content: bytes, where: object) -> str:
    """Bytes as text, or `InputError` naming the line and byte.

    A byte order mark is dropped, and lines end as they do on Unix, as of all text that is read.
    """
    try:
        return content.decode("utf-8-sig").replace("\r\n", "\n").replace("\r", "\n")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise InputError(
            f"{where}, line {line}",
            "not UTF-8",
            found=f"byte 0x{content[error.start]:02X} at offset {error.start}",
            fix="Convert the text to UTF-8.",
        ) from error


def check_unicode(where: object, text: str) -> None:
    """Raise `InputError` for lone surrogates, which JSON can state and UTF-8 cannot."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise InputError(
            where,
            "not valid Unicode",
            expected="text without lone surrogates",
            found=f"U+{ord(text[error.start]):04X} at character {error.start}",
            fix="Give the text as UTF-8, without that character.",
        ) from error
