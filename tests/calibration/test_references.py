from __future__ import annotations

import json
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from knnmoe.calibration.corpus import Corpus
from knnmoe.calibration.references import Reference
from knnmoe.runtime import documents as documents_module
from knnmoe.runtime.chat import ChatTemplate
from knnmoe.runtime.conversations import Conversations
from knnmoe.runtime.errors import (
    CheckpointError,
    InputError,
    KnnMoeError,
    OutputError,
    SettingError,
)
from knnmoe.runtime.tokenizer import Tokenizer

TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}<|endoftext|>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
# Earlier replies lose their reasoning, as in some families.
FORGETFUL = (
    "{% for m in messages %}<{{ m.role }}>"
    "{% if m.role == 'assistant' and not loop.last %}{{ m.content.split('~')[-1] }}"
    "{% else %}{{ m.content }}{% endif %}|{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
END = 256  # <|endoftext|>


@pytest.fixture(scope="module")
def tokenizer(tiny_checkpoint: Path) -> Tokenizer:
    return Tokenizer.load(tiny_checkpoint)


def read(
    tokenizer: Tokenizer, *files: Path | Reference, template: str | None = None, **options: Any
) -> Corpus:
    chat = Conversations(ChatTemplate(Path("checkpoint"), template, {}))
    return Corpus.read(
        [Reference.parse(file) for file in files],
        tokenizer,
        render=chat.documents,
        **({"vocab_size": 272, "max_length": 64} | options),
    )


def lines(path: Path, *records: Any) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def conversation(*contents: str) -> dict[str, Any]:
    roles = ["user", "assistant"] * len(contents)
    return {"messages": [{"role": r, "content": c} for r, c in zip(roles, contents, strict=False)]}


def read_and_credited(tokenizer: Tokenizer, corpus: Corpus) -> list[tuple[str, str]]:
    """Each document's text, and what of it is learned."""
    found = []
    for document in np.unique(corpus.index.documents):
        (at,) = np.flatnonzero(corpus.index.documents == document)
        piece = corpus.piece(at)
        learned = piece.tokens[1:][piece.credited]
        found.append((tokenizer.decode(piece.tokens.tolist()), tokenizer.decode(learned.tolist())))
    return found


# --- weights --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a.txt", Reference(Path("a.txt"))),
        ("a.txt@0.5", Reference(Path("a.txt"), 0.5)),
        ("dir@2/a.txt@2", Reference(Path("dir@2/a.txt"), 2.0)),
        ("dir@2/a.txt", Reference(Path("dir@2/a.txt"))),
    ],
)
def test_a_weight_stands_behind_the_name(text: str, expected: Reference) -> None:
    assert Reference.parse(text) == expected


def test_a_file_whose_name_ends_like_a_weight_is_that_file(tmp_path: Path) -> None:
    (tmp_path / "a.txt@2").write_text("abc")
    assert Reference.parse(str(tmp_path / "a.txt@2")) == Reference(tmp_path / "a.txt@2")


@pytest.mark.parametrize("weight", ["0", "-1", "nan", "inf"])
def test_a_weight_is_above_zero(weight: str) -> None:
    with pytest.raises(SettingError, match=r"weight of a\.txt.*above 0"):
        Reference.parse(f"a.txt@{weight}")


def test_a_file_of_half_the_weight_gives_half_as_much(tokenizer: Tokenizer, tmp_path: Path) -> None:
    a, b = tmp_path / "a.jsonl", tmp_path / "b.jsonl"
    lines(a, *[{"text": f"document {i:03}"} for i in range(200)])
    lines(b, *[{"text": f"elsewhere {i:02}"} for i in range(400)])
    whole = read(tokenizer, a, b)
    some = read(tokenizer, f"{a}@2", Reference(b, 1.0))

    def targets(corpus: Corpus, file: int) -> int:
        return int(corpus.index.targets[corpus.index.files == file].sum())

    assert targets(some, 0) == targets(whole, 0)
    assert targets(some, 1) == pytest.approx(targets(whole, 1) / 2, abs=12)
    limited = read(tokenizer, f"{a}@2", Reference(b, 1.0), max_tokens=900)
    assert limited.targets == pytest.approx(900, abs=24)
    assert limited.targets <= 900
    assert targets(limited, 0) / targets(limited, 1) == pytest.approx(
        targets(whole, 0) / (targets(whole, 1) / 2), rel=0.05
    )
    # Equal weights are none.
    equal = read(tokenizer, f"{a}@3", f"{b}@3", max_tokens=900)
    unweighted = read(tokenizer, a, b, max_tokens=900)
    np.testing.assert_array_equal(equal.index.starts, unweighted.index.starts)


# --- prompts and conversations --------------------------------------------------------------


def test_of_prompt_and_completion_the_completion_is_learned_and_ends(
    tokenizer: Tokenizer, tmp_path: Path
) -> None:
    corpus = read(tokenizer, lines(tmp_path / "a.jsonl", {"prompt": "2+2=", "completion": "four"}))
    assert read_and_credited(tokenizer, corpus) == [("2+2=four", "four")]
    piece = corpus.piece(0)
    assert piece.tokens[-1] == END
    assert piece.credited.tolist() == [False] * 3 + [True] * 5
    tokens, positions = corpus.origins(0)
    assert tokenizer.decode(tokens.tolist()) == "=four"
    assert positions.tolist() == [3, 4, 5, 6, 7]


def test_of_a_conversation_what_the_assistant_says_is_learned(
    tokenizer: Tokenizer, tmp_path: Path
) -> None:
    file = lines(tmp_path / "a.jsonl", conversation("hi", "yes?", "no", "oh", "bye"))
    (piece,) = [read(tokenizer, file, template=TEMPLATE).piece(0)]
    names = [tokenizer.token_text(int(token)) for token in piece.tokens]
    learned = [name for name, credited in zip(names[1:], piece.credited, strict=True) if credited]
    assert "".join(names) == (
        "<user>hi<|endoftext|><assistant>yes?<|endoftext|><user>no<|endoftext|>"
        "<assistant>oh<|endoftext|>"
    )
    assert "".join(learned) == "yes?<|endoftext|>oh<|endoftext|>"


def test_replies_that_are_written_otherwise_later_are_documents_of_their_own(
    tokenizer: Tokenizer, tmp_path: Path
) -> None:
    file = lines(tmp_path / "a.jsonl", conversation("hi", "hm~yes", "no", "so~oh"))
    corpus = read(tokenizer, file, template=FORGETFUL)
    assert read_and_credited(tokenizer, corpus) == [
        ("<user>hi|<assistant>hm~yes|", "hm~yes|"),
        ("<user>hi|<assistant>yes|<user>no|<assistant>so~oh|", "so~oh|"),
    ]


def test_kinds_of_lines_may_be_mixed(tokenizer: Tokenizer, tmp_path: Path) -> None:
    file = lines(
        tmp_path / "a.jsonl",
        {"text": "plain"},
        {"prompt": "", "completion": "answer"},
        {"text": "  "},
        conversation("hi", "yo"),
    )
    corpus = read(tokenizer, file, template="{% for m in messages %}{{ m.content }}{% endfor %}")
    assert read_and_credited(tokenizer, corpus) == [
        ("plain", "lain"),
        ("answer", "nswer"),
        ("hiyo", "yo"),
    ]


def test_a_template_that_cannot_be_read_is_the_checkpoints_fault(tmp_path: Path) -> None:
    (tmp_path / "tokenizer_config.json").write_text("[")
    with pytest.raises(CheckpointError, match=r"tokenizer_config\.json"):
        Conversations.load(tmp_path)


# --- what cannot be used --------------------------------------------------------------------

CHAT = conversation("hi", "yes?")


@pytest.mark.parametrize(
    ("record", "template", "kind", "message"),
    [
        (CHAT, None, InputError, "line 2: .*no chat template.*chat_template.jinja"),
        (CHAT, "{{ raise_exception('roles!') }}", InputError, r"line 2: .*refuses.*roles!"),
        (CHAT, "{{ messages[5].content }}", InputError, "line 2: .*refuses"),
        (CHAT, "{% if", InputError, "line 2: .*refuses"),
        (
            CHAT,
            "{{ 'ask' if add_generation_prompt else 'told' }}",
            InputError,
            "line 2: .*does not begin message 2 as it asks",
        ),
        (conversation("hi"), TEMPLATE, InputError, "line 2: .*no message of the assistant"),
        ({"messages": []}, TEMPLATE, InputError, "line 2: .*malformed.*at least one"),
        ({"messages": ["hi"]}, TEMPLATE, InputError, "line 2: message 1 is malformed"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image"}]}]},
            TEMPLATE,
            InputError,
            "line 2: message 1 is malformed",
        ),
        ({"prompt": "a"}, TEMPLATE, InputError, "line 2: malformed"),
        ({"prompt": "a", "completion": " "}, TEMPLATE, InputError, "line 2: .*empty completion"),
        ({"content": "a"}, TEMPLATE, InputError, "line 2: malformed"),
        (["a"], TEMPLATE, InputError, "line 2: malformed"),
        ({"text": "\ud800"}, TEMPLATE, InputError, "line 2: not valid Unicode"),
    ],
)
def test_a_line_that_cannot_be_used_is_named(
    tokenizer: Tokenizer,
    tmp_path: Path,
    record: Any,
    template: str | None,
    kind: type[KnnMoeError],
    message: str,
) -> None:
    file = lines(tmp_path / "a.jsonl", {"text": "fine"}, record)
    with pytest.raises(kind, match=message):
        read(tokenizer, file, template=template)


def test_malformed_json_is_named_by_its_line(tokenizer: Tokenizer, tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "fine"}\n\n{"text": \n')
    with pytest.raises(InputError, match=r"a\.jsonl, line 3: not valid JSON"):
        read(tokenizer, tmp_path / "a.jsonl")


@pytest.mark.parametrize("suffix", [".txt", ".jsonl"])
def test_another_encoding_is_named_by_line_and_byte(
    tokenizer: Tokenizer, tmp_path: Path, suffix: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(documents_module, "PIECE_BYTES", 16)  # so that it is not in the first
    text = '{"text": "first"}\n{"text": "second"}\n{"text": "caf\xe9"}\n'.encode("latin-1")
    (tmp_path / f"latin{suffix}").write_bytes(text)
    at = text.index(b"\xe9")
    with pytest.raises(InputError, match=rf"latin\{suffix}, line 3: .*0xE9 at offset {at}"):
        read(tokenizer, tmp_path / f"latin{suffix}")


@pytest.mark.parametrize("content", ["", " \n\t", "\ufeff"])
def test_a_file_without_text_is_refused(tokenizer: Tokenizer, tmp_path: Path, content: str) -> None:
    (tmp_path / "a.txt").write_text(content)
    with pytest.raises(InputError, match=r"a\.txt: has no text"):
        read(tokenizer, tmp_path / "a.txt")


def test_a_reference_of_one_token_is_too_short(tokenizer: Tokenizer, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("x")
    with pytest.raises(InputError, match=r"a\.txt: too short.*two tokens"):
        read(tokenizer, tmp_path / "a.txt")


# --- reading in pieces ----------------------------------------------------------------------


def test_a_long_file_is_one_document_however_it_is_read(
    tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = (
        "\ufeff"
        + "".join(f"Zeile {i} — äöü {'x' * (i % 7)}\n" for i in range(300))
        + "\U0001f40e" * 99
    )
    (tmp_path / "a.txt").write_text(text)
    whole = read(tokenizer, tmp_path / "a.txt")
    monkeypatch.setattr(documents_module, "PIECE_BYTES", 61)
    pieces = read(tokenizer, tmp_path / "a.txt")
    assert tokenizer.decode(whole.tokens.tolist()) == text[1:]
    assert pieces.sha256 == whole.sha256
    # Tokens of this tokenizer are bytes: where it was cut does not show.
    np.testing.assert_array_equal(pieces.tokens, whole.tokens)
    np.testing.assert_array_equal(pieces.index.positions, whole.index.positions)
    assert pieces.documents == 1


def test_the_hash_knows_what_is_credited_and_not_how_it_is_packed(
    tokenizer: Tokenizer, tmp_path: Path
) -> None:
    a = lines(tmp_path / "a.jsonl", {"text": "one"}, {"text": "two"})
    (tmp_path / "1.txt").write_text("one")
    (tmp_path / "2.txt").write_text("two")
    (tmp_path / "12.txt").write_text("onetwo")
    b = lines(tmp_path / "b.jsonl", {"prompt": "on", "completion": "e"}, {"text": "two"})
    hashes = [
        read(tokenizer, *files).sha256
        for files in ([a], [tmp_path / "1.txt", tmp_path / "2.txt"], [tmp_path / "12.txt"], [b])
    ]
    assert hashes[0] == hashes[1]
    assert len(set(hashes)) == 3


def test_a_long_file_never_lies_in_memory_as_a_whole(
    tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(documents_module, "PIECE_BYTES", 1 << 14)
    (tmp_path / "a.txt").write_text("a line like every other one\n" * 40_000)
    tracemalloc.start()
    corpus = read(tokenizer, tmp_path / "a.txt", max_length=256)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert corpus.targets > 1_000_000
    assert peak < 3 << 20  # as a list of tokens it would take nine megabytes


def test_where_nothing_can_be_spooled_the_directory_is_named(
    tokenizer: Tokenizer, tmp_path: Path
) -> None:
    file = lines(tmp_path / "a.jsonl", {"text": "one two"})
    with pytest.raises(OutputError, match="missing: cannot be written"):
        read(tokenizer, file, spool=tmp_path / "missing")
