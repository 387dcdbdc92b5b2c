"""Tokens that arrive one at a time as text that appears piece by piece."""

from __future__ import annotations

import codecs
from typing import Protocol

import tokenizers

BROKEN = "\N{REPLACEMENT CHARACTER}"
CONTEXT = 16  # tokens that are decoded again with each new one, at most


class TextStream(Protocol):
    """Decodes tokens as they arrive and gives out whole characters only.

    The pieces of `push` and `finish`, joined, are `Tokenizer.decode` of all tokens. `push` holds
    back bytes that may yet become a character; `finish` gives out what is left.
    """

    def push(self, token_id: int) -> str:
        """The text that this token completes, maybe empty."""

    def finish(self) -> str:
        """What is held back; characters that stay incomplete become U+FFFD."""


class ByteStream:
    """A `TextStream` of tokens that stand for bytes, whatever comes before them.

    Args:
        token_bytes: Of the tokenizer.
    """

    def __init__(self, token_bytes: TokenBytes) -> None:
        self._token_bytes = token_bytes
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token_id: int) -> str:
        """See `TextStream.push`."""
        return self._utf8.decode(self._token_bytes[token_id])

    def finish(self) -> str:
        """See `TextStream.finish`."""
        return self._utf8.decode(b"", final=True)


class DecodingStream:
    """A `TextStream` of any tokenizer: decodes each token together with some before it.

    Args:
        backend: The tokenizer.
        special_ids: Tokens that are no text.
        byte_ids: Tokens of single bytes, of which the decoder judges a run as a whole.
    """

    def __init__(
        self, backend: tokenizers.Tokenizer, special_ids: frozenset[int], byte_ids: frozenset[int]
    ) -> None:
        self._backend = backend
        self._special_ids = special_ids
        self._byte_ids = byte_ids
        # Decoded together with what follows, because some decoders treat the first token in
        # another way (they drop its leading space).
        self._context: list[int] = []
        self._context_length = 0  # of its text
        self._pending: list[int] = []

    def push(self, token_id: int) -> str:
        """See `TextStream.push`."""
        if token_id in self._special_ids:
            return ""
        self._pending.append(token_id)
        if token_id in self._byte_ids:
            return ""
        text = self._decoded(self._context + self._pending)
        piece = text[self._context_length :]
        if not piece or piece.endswith(BROKEN):
            return ""
        self._context += self._pending
        self._context_length = len(text)
        if len(self._context) > CONTEXT:
            self._context = self._pending
            self._context_length = len(self._decoded(self._context))
        self._pending = []
        return piece

    def finish(self) -> str:
        """See `TextStream.finish`."""
        text = self._decoded(self._context + self._pending) if self._pending else ""
        piece = text[self._context_length :]
        self._context, self._context_length, self._pending = [], 0, []
        return piece

    def _decoded(self, token_ids: list[int]) -> str:
        text: str = self._backend.decode(token_ids)
        return text


class TokenBytes(dict[int, bytes]):
    """What each token of a byte-level tokenizer stands for; nothing, if it is special or none.

    Such vocabularies write each byte as a character (GPT-2): those that are printable in Latin-1
    as themselves, the others in their order from U+0100 on. A token with any other character, as
    added ones may have, is text as it is. Tokens are looked up when they first come.
    """

    def __init__(self, backend: tokenizers.Tokenizer, special_ids: frozenset[int]) -> None:
        super().__init__(dict.fromkeys(special_ids, b""))
        self._backend = backend

    def __missing__(self, token_id: int) -> bytes:
        token = self._backend.id_to_token(token_id) or ""
        plain = all(character in _BYTES for character in token)
        found = bytes(map(_BYTES.__getitem__, token)) if plain else token.encode()
        self[token_id] = found
        return found


def _bytes_by_character() -> dict[str, int]:
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    shifted = {chr(0x100 + place): byte for place, byte in enumerate(others)}
    return {chr(byte): byte for byte in printable} | shifted


_BYTES = _bytes_by_character()
