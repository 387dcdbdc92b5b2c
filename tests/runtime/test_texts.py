from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from knnmoe.runtime.errors import InputError, SettingError
from knnmoe.runtime.texts import TokenSequence, TokenText, cut, read_text
from knnmoe.runtime.tokenizer import Tokenizer


@pytest.fixture(scope="module")
def tokenizer(tiny_checkpoint: Path) -> Tokenizer:
    return Tokenizer.load(tiny_checkpoint)


def read(tokenizer: Tokenizer, *paths: Path, **options: int) -> TokenText:
    return read_text(paths, tokenizer, **({"vocab_size": 272} | options))


def pieces_of(tokens: int, document: int = 0) -> list[TokenSequence]:
    return cut(np.arange(tokens), np.ones(tokens, np.bool_), document, max_length=4)


def test_a_document_is_cut_into_pieces_that_know_where_they_begin() -> None:
    pieces = pieces_of(10, document=3)
    assert [piece.tokens.tolist() for piece in pieces] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]
    assert [(piece.document, piece.position) for piece in pieces] == [(3, 0), (3, 4), (3, 8)]
    assert [piece.targets for piece in pieces] == [3, 3, 1]


def test_a_single_token_at_the_end_is_dropped_because_nothing_follows_it() -> None:
    assert [len(piece.tokens) for piece in pieces_of(9)] == [4, 4]


def test_a_piece_of_which_nothing_is_credited_is_dropped() -> None:
    credited = np.array([0, 0, 0, 0, 1, 0, 1, 1, 0], np.bool_)
    first, *more = cut(np.arange(9), credited, 0, max_length=4)
    assert not more
    assert (first.position, first.credited.tolist(), first.targets) == (4, [False, True, True], 2)


def test_of_a_prompt_with_its_completion_the_completion_is_predicted(
    tokenizer: Tokenizer, tmp_path: Path
) -> None:
    (tmp_path / "a.jsonl").write_text('{"prompt": "2+2=", "completion": "four"}\n')
    (sequence,) = read(tokenizer, tmp_path / "a.jsonl").sequences
    assert tokenizer.decode(sequence.tokens[1:][sequence.credited].tolist()) == "four"
    assert sequence.credited.tolist() == [False] * 3 + [True] * 5  # and its end
    text = read(tokenizer, tmp_path / "a.jsonl", max_tokens=2)
    assert tokenizer.decode(text.sequences[0].tokens.tolist()) == "2+2=fo"


def test_a_conversation_without_a_template_is_refused(tokenizer: Tokenizer, tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"messages": [{"role": "user", "content": "hi"}]}\n')
    with pytest.raises(InputError, match="line 1: is a conversation"):
        read(tokenizer, tmp_path / "a.jsonl")


def test_files_are_read_in_order_and_documents_counted_through(
    tokenizer: Tokenizer, tmp_path: Path
) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "one"}\n{"text": "two"}\n')
    (tmp_path / "b.txt").write_text("three")
    text = read(tokenizer, tmp_path / "a.jsonl", tmp_path / "b.txt")
    assert [tokenizer.decode(s.tokens.tolist()) for s in text.sequences] == ["one", "two", "three"]
    assert [sequence.document for sequence in text.sequences] == [0, 1, 2]
    assert (text.names, text.documents, text.tokens, text.targets) == (
        ("a.jsonl", "b.txt"),
        3,
        11,
        8,
    )


def test_the_hash_is_of_the_text_and_not_of_its_packing(
    tokenizer: Tokenizer, tmp_path: Path
) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "one"}\n{"text": "two"}\n')
    (tmp_path / "one.txt").write_text("one")
    (tmp_path / "two.txt").write_text("two")
    (tmp_path / "both.txt").write_text("onetwo")
    packed = read(tokenizer, tmp_path / "a.jsonl").sha256
    assert packed == read(tokenizer, tmp_path / "one.txt", tmp_path / "two.txt").sha256
    assert packed != read(tokenizer, tmp_path / "two.txt", tmp_path / "one.txt").sha256
    assert packed != read(tokenizer, tmp_path / "both.txt").sha256


def test_a_limit_draws_whole_sequences_from_all_over_the_text(
    tokenizer: Tokenizer, tmp_path: Path
) -> None:
    (tmp_path / "long.txt").write_text("".join(chr(97 + i % 26) for i in range(1000)))
    whole = read(tokenizer, tmp_path / "long.txt", max_length=10)
    some = read(tokenizer, tmp_path / "long.txt", max_length=10, max_tokens=200)
    assert 191 < some.targets <= 200
    positions = [sequence.position for sequence in some.sequences]
    assert positions == sorted(positions)
    assert positions[0] < 200
    assert positions[-1] > 800
    kept = {sequence.position: sequence.tokens.tolist() for sequence in whole.sequences}
    assert all(kept[s.position] == s.tokens.tolist() for s in some.sequences)
    assert some.limited(10_000) is some


def test_a_limit_below_every_sequence_cuts_one(tokenizer: Tokenizer, tmp_path: Path) -> None:
    (tmp_path / "long.txt").write_text("abcdefghij")
    text = read(tokenizer, tmp_path / "long.txt", max_tokens=3)
    assert [tokenizer.decode(s.tokens.tolist()) for s in text.sequences] == ["abcd"]
    with pytest.raises(SettingError, match="max tokens"):
        read(tokenizer, tmp_path / "long.txt", max_tokens=0)


def test_lines_of_text_from_windows_end_as_others_do(
    tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "unix.txt").write_bytes("é one\ntwo\n\nthree".encode())
    (tmp_path / "windows.txt").write_bytes("\ufeffé one\r\ntwo\r\n\r\nthree".encode())
    monkeypatch.setattr("knnmoe.runtime.documents.PIECE_BYTES", 11)  # between \r and \n
    unix, windows = (read(tokenizer, tmp_path / f"{name}.txt") for name in ("unix", "windows"))
    assert windows.sha256 == unix.sha256
    assert windows.sequences[0].tokens.tolist() == unix.sequences[0].tokens.tolist()


def test_a_weight_where_none_has_a_meaning_is_refused_as_one(
    tokenizer: Tokenizer, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match=r"FILE@0\.5, and is for"):
        read(tokenizer, tmp_path / "a.txt@0.5")
    with pytest.raises(InputError, match="found a directory"):
        read(tokenizer, tmp_path)


def test_text_that_is_not_utf8_is_refused_naming_file_and_line(
    tokenizer: Tokenizer, tmp_path: Path
) -> None:
    (tmp_path / "latin.txt").write_bytes(b"first\nsecond\ncaf\xe9\n")
    with pytest.raises(InputError, match=r"latin\.txt, line 3"):
        read(tokenizer, tmp_path / "latin.txt")


def test_a_line_without_text_is_refused_naming_file_and_line(
    tokenizer: Tokenizer, tmp_path: Path
) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "one"}\n{"content": "two"}\n')
    with pytest.raises(InputError, match=r"a\.jsonl, line 2.*text"):
        read(tokenizer, tmp_path / "a.jsonl")


@pytest.mark.parametrize("content", ["", " \n", "x"])
def test_a_reference_without_two_tokens_is_refused(
    tokenizer: Tokenizer, tmp_path: Path, content: str
) -> None:
    (tmp_path / "short.txt").write_text(content)
    with pytest.raises(InputError, match=r"short\.txt"):
        read(tokenizer, tmp_path / "short.txt")


def test_ids_beyond_the_models_vocabulary_are_refused(tokenizer: Tokenizer, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("abc")
    with pytest.raises(InputError, match="ids below 20"):
        read(tokenizer, tmp_path / "a.txt", vocab_size=20)
