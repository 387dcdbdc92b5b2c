"""Text to token ids and back, also one token at a time."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import tokenizers

from .errors import BundleError, InputError
from .manifest import parse_object
from .text_stream import ByteStream, DecodingStream, TextStream, TokenBytes
from .utf8 import check_unicode, decode_utf8


class Tokenizer:
    """The tokenizer of a bundle or checkpoint; use `Tokenizer.load`.

    Attributes:
        bos_token_id: Start of text, or None.
        eos_token_ids: Tokens that end a text; may be empty.
        pad_token_id: Padding, or None.
    """

    def __init__(
        self, backend: tokenizers.Tokenizer, special: dict[str, int] | None = None
    ) -> None:
        # A tokenizer.json may carry the limits of its training; here they would cut prompts unseen.
        backend.no_truncation()
        backend.no_padding()
        special = special or {}
        self._backend = backend
        self._special_ids = frozenset(
            token_id
            for token_id, token in backend.get_added_tokens_decoder().items()
            if token.special
        )
        decoder = json.loads(backend.to_str())["decoder"] or {}
        self._byte_ids = _byte_fallback_ids(backend, decoder)
        byte_level = decoder.get("type") == "ByteLevel"
        self._token_bytes = TokenBytes(backend, self._special_ids) if byte_level else None
        self.bos_token_id = special.get("bos_token")
        self.eos_token_ids = (special["eos_token"],) if "eos_token" in special else ()
        self.pad_token_id = special.get("pad_token")

    @staticmethod
    def load(directory: str | Path) -> Tokenizer:
        """Read `tokenizer.json` and, where it is there, `tokenizer_config.json`.

        Raises:
            BundleError: If a file is missing or malformed.
        """
        path = Path(directory) / "tokenizer.json"
        if not path.is_file():
            raise BundleError(
                path, "missing", fix="Export the checkpoint again with its tokenizer."
            )
        try:
            backend = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises bare Exception for every cause
            raise BundleError(path, "not a readable tokenizer", found=error) from error
        return Tokenizer(backend, _special_tokens(path.with_name("tokenizer_config.json"), backend))

    @property
    def vocab_size(self) -> int:
        """Tokens known, the added ones included; a model may have room for more."""
        return int(self._backend.get_vocab_size())

    def encode(self, text: str | bytes, *, where: object = "prompt") -> list[int]:
        """Token ids of a text, with the special tokens that the tokenizer adds by itself.

        Args:
            text: Unicode, or UTF-8 bytes.
            where: What the text is, for the error message.

        Raises:
            InputError: If the text is empty or not Unicode.
        """
        return self._checked(text, where, add_special=True)

    def encode_rendered(self, text: str, *, where: object = "prompt") -> list[int]:
        """Token ids of a text that has its special tokens in it, as chat templates write them.

        Raises:
            InputError: If the text is empty or not Unicode.
        """
        return self._checked(text, where, add_special=False)

    def _checked(self, text: str | bytes, where: object, *, add_special: bool) -> list[int]:
        if isinstance(text, bytes):
            text = decode_utf8(text, where)
        if not text:
            raise InputError(where, "empty", expected="at least one character")
        check_unicode(where, text)
        ids: list[int] = self._backend.encode(text, add_special_tokens=add_special).ids
        if not ids:
            raise InputError(where, "gives no tokens", found=repr(text[:40]))
        return ids

    def added_before(self) -> list[int]:
        """Ids of the special tokens that the tokenizer puts before every text; often none."""
        plain = self._backend.encode("a", add_special_tokens=False).ids
        whole: list[int] = self._backend.encode("a", add_special_tokens=True).ids
        places = range(len(whole) - len(plain) + 1)
        return next((whole[:at] for at in places if whole[at : at + len(plain)] == plain), [])

    def encode_part(self, text: str, *, first: bool) -> list[int]:
        """Token ids of a part of a text; nothing is checked.

        Args:
            text: Unicode.
            first: Whether to add the special tokens that the tokenizer adds by itself.
        """
        ids: list[int] = self._backend.encode(text, add_special_tokens=first).ids
        return ids

    def encode_with_offsets(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        """Token ids of a text with its special tokens in it, and the characters of each: from, to.

        Nothing is added and nothing is checked.
        """
        encoded = self._backend.encode(text, add_special_tokens=False)
        return encoded.ids, encoded.offsets

    def decode(self, token_ids: Sequence[int]) -> str:
        """Text of token ids, special tokens left out; incomplete characters become U+FFFD."""
        text: str = self._backend.decode(list(token_ids), skip_special_tokens=True)
        return text

    def token_text(self, token_id: int) -> str:
        """One token as text for tables, special tokens by their name."""
        text: str = self._backend.decode([token_id], skip_special_tokens=False)
        return text

    def is_special(self, token_id: int) -> bool:
        """Whether `decode` leaves this token out."""
        return token_id in self._special_ids

    def stream(self) -> TextStream:
        """A decoder for tokens that arrive one at a time."""
        if self._token_bytes is not None:
            return ByteStream(self._token_bytes)
        return DecodingStream(self._backend, self._special_ids, self._byte_ids)


def _byte_fallback_ids(backend: tokenizers.Tokenizer, decoder: Mapping[str, Any]) -> frozenset[int]:
    kinds = [part.get("type") for part in (decoder, *decoder.get("decoders", ()))]
    if "ByteFallback" not in kinds:
        return frozenset()
    ids = (backend.token_to_id(f"<0x{byte:02X}>") for byte in range(256))
    return frozenset(token_id for token_id in ids if token_id is not None)


def _special_tokens(path: Path, backend: tokenizers.Tokenizer) -> dict[str, int]:
    """Ids of the special tokens that `tokenizer_config.json` names."""
    if not path.is_file():
        return {}
    try:
        config = parse_object(path.read_bytes())
    except ValueError as error:
        raise BundleError(path, "not a JSON object", found=error) from error
    special = {}
    for name in ("bos_token", "eos_token", "pad_token"):
        token = config.get(name)
        content = token.get("content") if isinstance(token, dict) else token
        if content is None:
            continue
        token_id = backend.token_to_id(content) if isinstance(content, str) else None
        if token_id is None:
            raise BundleError(path, f"{name} is not a token of tokenizer.json", found=content)
        special[name] = token_id
    return special
