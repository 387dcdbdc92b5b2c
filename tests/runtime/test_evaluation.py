from __future__ import annotations

import json
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from knnmoe.runtime.chat import ChatTemplate
from knnmoe.runtime.documents import read_documents
from knnmoe.runtime.errors import InputError, SettingError
from knnmoe.runtime.evaluation import Evaluation, Scores, read_for, score_sequences
from knnmoe.runtime.texts import TokenSequence
from knnmoe.runtime.tokenizer import Tokenizer


class Table:
    """A model whose logits depend on the last token only."""

    def __init__(self, table: NDArray[np.float32]) -> None:
        self.table = table

    def logits(self, token_ids: Sequence[int]) -> NDArray[np.float32]:
        return self.table[np.asarray(token_ids)]


def model_with(tokenizer: Tokenizer, template: str | None = None, positions: int = 32) -> Any:
    """As much of a model as reading text for it takes."""
    return SimpleNamespace(
        tokenizer=tokenizer,
        chat_template=ChatTemplate(Path("bundle"), template, {}),
        pipeline=SimpleNamespace(max_positions=positions, vocab_size=272),
    )


@pytest.fixture(scope="module")
def tokenizer(tiny_checkpoint: Path) -> Tokenizer:
    return Tokenizer.load(tiny_checkpoint)


def test_text_is_cut_to_what_the_model_can_hold(tokenizer: Tokenizer, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("x" * 70)
    text = read_for(model_with(tokenizer), [tmp_path / "a.txt"])
    assert [len(sequence.tokens) for sequence in text.sequences] == [32, 32, 6]


@pytest.mark.parametrize("context", [1, 33])
def test_a_context_out_of_range_is_refused(
    tokenizer: Tokenizer, tmp_path: Path, context: int
) -> None:
    (tmp_path / "a.txt").write_text("abc")
    with pytest.raises(SettingError, match="context: out of range; expected 2 to 32 tokens"):
        read_for(model_with(tokenizer), [tmp_path / "a.txt"], context=context)


def test_of_a_conversation_the_replies_are_predicted(tokenizer: Tokenizer, tmp_path: Path) -> None:
    messages = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes"}]
    (tmp_path / "a.jsonl").write_text(json.dumps({"messages": messages}))
    template = (
        "{% for m in messages %}{{ m.role[0] }}:{{ m.content }}|{% endfor %}"
        "{% if add_generation_prompt %}a:{% endif %}"
    )
    text = read_for(model_with(tokenizer, template), [tmp_path / "a.jsonl"])
    (sequence,) = text.sequences
    assert tokenizer.decode(sequence.tokens.tolist()) == "u:hi|a:yes|"
    assert tokenizer.decode(sequence.tokens[1:][sequence.credited].tolist()) == "yes|"


def test_only_what_is_credited_is_scored() -> None:
    odds = np.array([[2, 1, 1], [1, 1, 6], [1, 1, 1]], np.float32)
    some = TokenSequence(np.array([0, 1, 2, 0]), np.array([False, True, True]))
    scores = score_sequences(Table(np.log(odds)), [some])
    assert scores.nll == pytest.approx([-np.log(3 / 4 * 1 / 3)], abs=1e-5)
    assert (scores.tokens.tolist(), scores.correct.tolist()) == ([2], [2])


def test_scores_are_those_of_a_hand_computation() -> None:
    # after token 0: probabilities ½ ¼ ¼, after 1: ⅛ ⅛ ¾, after 2: uniform
    odds = np.array([[2, 1, 1], [1, 1, 6], [1, 1, 1]], np.float32)
    model = Table(np.log(odds) + 100)
    scored: list[int] = []
    scores = score_sequences(
        model, [TokenSequence.of([0, 1, 2, 0]), TokenSequence.of([0, 0])], scored.append
    )
    np.testing.assert_allclose(
        scores.nll, [-np.log(1 / 4 * 3 / 4 * 1 / 3), -np.log(1 / 2)], atol=1e-5
    )
    assert scores.correct.tolist() == [2, 1]
    assert scores.tokens.tolist() == scored == [3, 1]
    assert scores.mean_nll == pytest.approx(-np.log(1 / 32) / 4, abs=1e-5)
    assert scores.accuracy == 3 / 4


def test_long_sequences_are_scored_in_blocks_without_a_seam() -> None:
    random = np.random.default_rng(0)
    table = random.normal(0, 2, (9, 9)).astype(np.float32)
    ids = random.integers(9, size=200).tolist()
    (nll,) = score_sequences(Table(table), [TokenSequence.of(ids)]).nll
    wide = table.astype(np.float64)
    normalized = wide - np.log(np.exp(wide).sum(axis=1, keepdims=True))
    assert nll == pytest.approx(-sum(normalized[a, b] for a, b in pairwise(ids)), abs=1e-4)


def scores_of(nll: list[float], tokens: list[int]) -> Scores:
    return Scores(np.array(nll), np.zeros(len(nll), np.int64), np.array(tokens))


def test_the_difference_is_a_tokens_mean_with_an_interval_around_it() -> None:
    frozen = scores_of([20.0, 40.0, 12.0], [10, 20, 5])
    memory = scores_of([19.0, 36.0, 12.5], [10, 20, 5])
    figures = Evaluation(frozen, memory).to_json()
    assert figures["tokens"] == 35
    assert figures["sequences"] == 3
    assert figures["nll_frozen"] == pytest.approx(72 / 35)
    assert figures["nll_memory"] == pytest.approx(67.5 / 35)
    assert figures["perplexity_frozen"] == pytest.approx(np.exp(72 / 35))
    assert figures["delta"] == pytest.approx(-4.5 / 35)
    assert figures["delta_low"] < figures["delta"] < figures["delta_high"]
    assert figures["delta_low"] >= -4 / 20
    assert figures["delta_high"] <= 0.5 / 5


def test_the_interval_holds_the_true_difference_as_often_as_it_says() -> None:
    random = np.random.default_rng(1)
    held = 0
    for _ in range(100):
        tokens = random.integers(20, 200, size=60)
        change = tokens * random.normal(-0.05, 0.2, size=60)
        _, low, high = Evaluation(
            scores_of([0.0] * 60, tokens.tolist()), scores_of(change.tolist(), tokens.tolist())
        ).delta(samples=400)
        held += low < -0.05 < high
    assert 85 <= held <= 100


def test_one_sequence_has_no_interval() -> None:
    figures = Evaluation(scores_of([2.0], [2]), scores_of([1.0], [2])).to_json()
    assert figures["delta"] == -0.5
    assert figures["delta_low"] is None
    assert figures["delta_high"] is None


def test_without_a_memory_only_the_frozen_figures_are_given() -> None:
    figures = Evaluation(scores_of([2e6], [2])).to_json()
    assert set(figures) == {
        "sequences", "tokens", "nll_frozen", "perplexity_frozen", "accuracy_frozen",
    }  # fmt: skip
    json.dumps(figures, allow_nan=False)


def texts_of(path: Path) -> list[str]:
    return ["".join(span.text for span in document.spans) for document in read_documents(path)]


def test_a_text_file_is_one_document(tmp_path: Path) -> None:
    path = tmp_path / "notes.TXT"
    path.write_bytes(b"\xef\xbb\xbfone\r\n\xc3\xa9\n")
    assert texts_of(path) == ["one\n\xe9\n"]


def test_a_json_lines_file_is_one_document_a_line(tmp_path: Path) -> None:
    path = tmp_path / "notes.jsonl"
    lines = ['{"text": "one\u2028two", "id": 1}', "", '{"text": " "}', '{"text": "three"}']
    path.write_text("\r\n".join(lines), encoding="utf-8", newline="")
    assert texts_of(path) == ["one\u2028two", "three"]


@pytest.mark.parametrize(
    ("name", "content", "problem"),
    [
        ("a.csv", b"x", "unknown kind of text file; expected .txt or .jsonl; found .csv"),
        ("a", b"x", "unknown kind of text file"),
        ("a.txt", b" \n", "has no text"),
        ("a.txt", b"x\ny\xff", r"a\.txt, line 2: not UTF-8; found byte 0xFF at offset 3"),
        ("a.jsonl", b"\n\n", "has no text"),
        ("a.jsonl", b'{"text": "x"}\n{', r"a\.jsonl, line 2: not valid JSON"),
        ("a.jsonl", b'{"text": "x"}\n{"body": "x"}', r"a\.jsonl, line 2: malformed"),
        ("a.jsonl", b'{"text": 3}', r"a\.jsonl, line 1: malformed"),
        ("a.jsonl", b'"x"', r"a\.jsonl, line 1: malformed"),
        ("a.jsonl", b'{"text": "\\ud800"}', r"a\.jsonl, line 1: not valid Unicode.*U\+D800"),
        ("a.jsonl", b"[" * 100_000, r"a\.jsonl, line 1: not valid JSON"),
    ],
)
def test_an_unusable_file_is_refused_by_name_and_line(
    tmp_path: Path, name: str, content: bytes, problem: str
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=problem):
        texts_of(tmp_path / name)


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"none\.txt: cannot be read; found No such file"):
        texts_of(tmp_path / "none.txt")
