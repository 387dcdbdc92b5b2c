from __future__ import annotations

import json
from pathlib import Path

import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st

from knnmoe.runtime.errors import BundleError, InputError
from knnmoe.runtime.text_stream import BROKEN, CONTEXT, ByteStream, DecodingStream
from knnmoe.runtime.tokenizer import Tokenizer
from tiny import write_tiny_tokenizer


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("tokenizer")
    write_tiny_tokenizer(root)
    return root


@pytest.fixture(scope="module")
def by_bytes(directory: Path) -> Tokenizer:
    """Every byte is a token, so that most characters straddle several."""
    return Tokenizer.load(directory)


@pytest.fixture(scope="module")
def by_fallback() -> Tokenizer:
    """As in the Llama and Mixtral families: words with ▁ for a space, bytes for what is unknown."""
    words = ["<unk>", "<s>", "</s>", "▁", "a", "b", "▁a", "▁▁", "é"]
    vocabulary = [*words, *(f"<0x{byte:02X}>" for byte in range(256))]
    backend = tokenizers.Tokenizer(
        tokenizers.models.BPE(
            vocab={token: index for index, token in enumerate(vocabulary)},
            merges=[],
            unk_token="<unk>",
            byte_fallback=True,
        )
    )
    backend.add_special_tokens(["<s>", "</s>"])
    backend.decoder = tokenizers.decoders.Sequence(
        [
            tokenizers.decoders.Replace("▁", " "),
            tokenizers.decoders.ByteFallback(),
            tokenizers.decoders.Fuse(),
            tokenizers.decoders.Strip(" ", 1, 0),
        ]
    )
    return Tokenizer(backend)


def pieces_of(tokenizer: Tokenizer, token_ids: list[int]) -> list[str]:
    stream = tokenizer.stream()
    return [*(stream.push(token_id) for token_id in token_ids), stream.finish()]


@given(text=st.text(min_size=1))
def test_encoding_and_decoding_return_the_text(by_bytes: Tokenizer, text: str) -> None:
    assert by_bytes.decode(by_bytes.encode(text)) == text


@given(text=st.text(st.sampled_from("aé\u0416\u4f60\U0001f600\u200d\ufe0f \n"), min_size=1))
def test_streamed_characters_arrive_whole_and_at_once(by_bytes: Tokenizer, text: str) -> None:
    stream = by_bytes.stream()
    so_far = b""
    for token_id in by_bytes.encode(text):
        piece = stream.push(token_id)
        assert BROKEN not in piece
        so_far += piece.encode()
        assert text.encode().startswith(so_far)
    assert stream.finish() == ""
    assert so_far.decode() == text


@given(token_ids=st.lists(st.integers(0, 271)))
def test_streamed_pieces_of_any_bytes_join_to_the_decoded_whole(
    by_bytes: Tokenizer, token_ids: list[int]
) -> None:
    assert isinstance(by_bytes.stream(), ByteStream)
    assert "".join(pieces_of(by_bytes, token_ids)) == by_bytes.decode(token_ids)


def test_added_tokens_are_streamed_as_they_are_written(directory: Path) -> None:
    backend = tokenizers.Tokenizer.from_file(str(directory / "tokenizer.json"))
    backend.add_tokens(["<think>", "two words", "Ġé", "你好"])
    tokenizer = Tokenizer(backend)
    ids = [backend.token_to_id(token) for token in ("<think>", "two words", "Ġé", "你好")]
    text = tokenizer.encode("aé")
    for token_ids in (ids, [*text, *ids, *text], [*text[:-1], *ids], [*ids, 5000, *ids]):
        assert "".join(pieces_of(tokenizer, token_ids)) == tokenizer.decode(token_ids)


@given(text=st.text(st.sampled_from("aé\u4f60 "), min_size=1))
def test_a_stream_that_decodes_again_gives_the_same_text(by_bytes: Tokenizer, text: str) -> None:
    ids = by_bytes.encode(text)
    stream = DecodingStream(by_bytes._backend, frozenset(), frozenset())
    assert "".join([*(stream.push(token_id) for token_id in ids), stream.finish()]) == text


def test_a_long_text_is_decoded_again_in_short_pieces(by_fallback: Tokenizer) -> None:
    decoded: list[int] = []

    class Counting:
        def decode(self, ids: list[int]) -> str:
            decoded.append(len(ids))
            return by_fallback.decode(ids)

    stream = DecodingStream(Counting(), frozenset(), frozenset())  # type: ignore[arg-type]
    ids = [6, 4, 5, 8] * 50
    assert "".join(map(stream.push, ids)) == by_fallback.decode(ids)
    assert max(decoded) <= CONTEXT + 1
    assert len(decoded) < 1.2 * len(ids)


CHARACTERS = [[9 + byte for byte in character.encode()] for character in "aé你😀"]


@given(
    chunks=st.lists(
        st.integers(0, 264).map(lambda token_id: [token_id]) | st.sampled_from(CHARACTERS)
    )
)
def test_streamed_pieces_with_byte_fallback_join_to_the_decoded_whole(
    by_fallback: Tokenizer, chunks: list[list[int]]
) -> None:
    token_ids = [token_id for chunk in chunks for token_id in chunk]
    assert "".join(pieces_of(by_fallback, token_ids)) == by_fallback.decode(token_ids)


def test_a_space_at_the_start_of_a_later_token_is_kept(by_fallback: Tokenizer) -> None:
    # ▁a a ▁a: the decoder drops the space of the first token only
    assert pieces_of(by_fallback, [6, 4, 6]) == ["a", "a", " a", ""]


def test_an_unfinished_character_shows_only_when_the_text_ends(by_bytes: Tokenizer) -> None:
    token_ids = by_bytes.encode("a你")[:-1]
    assert pieces_of(by_bytes, token_ids) == ["a", "", "", BROKEN]


def test_special_tokens_are_not_text(by_bytes: Tokenizer) -> None:
    token_ids = [*by_bytes.encode("a"), 256, *by_bytes.encode("b")]
    assert by_bytes.decode(token_ids) == "ab"
    assert pieces_of(by_bytes, token_ids) == ["a", "", "b", ""]
    assert by_bytes.token_text(256) == "<|endoftext|>"


def test_special_ids_are_read_from_the_configuration(by_bytes: Tokenizer) -> None:
    assert by_bytes.bos_token_id is None
    assert by_bytes.eos_token_ids == (256,)
    assert by_bytes.pad_token_id == 257


def test_what_stands_before_every_text_is_known(by_bytes: Tokenizer) -> None:
    assert by_bytes.added_before() == []
    backend = tokenizers.Tokenizer(
        tokenizers.models.WordLevel({"<s>": 0, "</s>": 1, "a": 2, "<unk>": 3}, unk_token="<unk>")
    )
    both = {"single": "<s> $A </s>", "special_tokens": [("<s>", 0), ("</s>", 1)]}
    backend.post_processor = tokenizers.processors.TemplateProcessing(**both)
    assert Tokenizer(backend).added_before() == [0]


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("", "empty"),
        (b"", "empty"),
        (b"\xef\xbb\xbf", "empty"),
        ("a\ud800", "not valid Unicode"),
        (b"ok\n\xff", "not UTF-8"),
    ],
)
def test_unusable_text_is_refused(by_bytes: Tokenizer, text: str | bytes, problem: str) -> None:
    with pytest.raises(InputError, match=problem):
        by_bytes.encode(text)


def test_bytes_that_are_not_utf8_are_located(by_bytes: Tokenizer) -> None:
    with pytest.raises(InputError, match=r"notes\.txt, line 2: .*0xFF at offset 3"):
        by_bytes.encode(b"ok\n\xff", where="notes.txt")


def test_limits_of_the_training_do_not_cut_prompts(directory: Path, tmp_path: Path) -> None:
    backend = tokenizers.Tokenizer.from_file(str(directory / "tokenizer.json"))
    backend.enable_truncation(4)
    backend.enable_padding(length=16)
    backend.save(str(tmp_path / "tokenizer.json"))
    assert len(Tokenizer.load(tmp_path).encode("12345678")) == 8


def test_a_missing_or_broken_tokenizer_is_named(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match=r"tokenizer\.json: missing"):
        Tokenizer.load(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(BundleError, match=r"tokenizer\.json: not a readable tokenizer"):
        Tokenizer.load(tmp_path)


@pytest.mark.parametrize("config", ["[]", "{", '{"eos_token": "<nowhere>"}', '{"bos_token": 3}'])
def test_a_broken_configuration_is_named(directory: Path, tmp_path: Path, config: str) -> None:
    (tmp_path / "tokenizer.json").write_bytes((directory / "tokenizer.json").read_bytes())
    (tmp_path / "tokenizer_config.json").write_text(config)
    with pytest.raises(BundleError, match=r"tokenizer_config\.json"):
        Tokenizer.load(tmp_path)


def test_a_special_token_may_be_written_as_an_object(directory: Path, tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_bytes((directory / "tokenizer.json").read_bytes())
    config = {"eos_token": {"content": "<|endoftext|>", "special": True}, "bos_token": None}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    assert Tokenizer.load(tmp_path).eos_token_ids == (256,)
