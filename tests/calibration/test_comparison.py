"""`knnmoe compare` on a tiny random model: figures mean nothing here, relations between them do."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

from knnmoe.calibration.build import build_memory
from knnmoe.calibration.comparison import explain, finetune, knn_lm, laser, oracle, rerouting
from knnmoe.calibration.comparison.bench import Bench, Inputs, open_bench
from knnmoe.calibration.comparison.cli import compare as command
from knnmoe.calibration.comparison.compare import Comparison, compare
from knnmoe.calibration.comparison.controls import constant, shuffled
from knnmoe.calibration.comparison.laser import LoadAwareGate, Thresholds, choose
from knnmoe.calibration.comparison.measured import change, clusters
from knnmoe.calibration.comparison.page import comparison_page
from knnmoe.calibration.comparison.rerouting import Settings, adapted_nll
from knnmoe.calibration.comparison.rows import NAMES, ROWS, Row, choose_rows
from knnmoe.calibration.comparison.torch_model import sequence_nll
from knnmoe.calibration.settings import BuildSettings
from knnmoe.calibration.teacher import Teacher
from knnmoe.runtime.errors import (
    CheckpointError,
    InputError,
    KnnMoeError,
    MemoryPackError,
    SettingError,
)
from knnmoe.runtime.memory import MemoryPack
from knnmoe.runtime.routing import RoutingRule
from knnmoe.runtime.texts import TokenSequence, TokenText
from tiny import make_tiny_olmoe

WORDS = {
    "domain": "and it came to pass that the king said unto his servants go ye into the",
    "general": "return count of items raise an error if none remain call again later",
}
CONTEXT = 64


def write(path: Path, kind: str, seed: int, *, documents: int = 12, words: int = 15) -> Path:
    rng = random.Random(seed)
    texts = (" ".join(rng.choices(WORDS[kind].split(), k=words)) for _ in range(documents))
    lines = (json.dumps({"text": f"{text} <&{seed}>"}) for text in texts)
    path.write_text("\n".join(lines), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def inputs(
    tmp_path_factory: pytest.TempPathFactory, tiny_checkpoint: Path, tiny_bundle: Path
) -> Inputs:
    root = tmp_path_factory.mktemp("compare")
    reference = write(root / "reference.jsonl", "domain", 1)
    settings = BuildSettings(max_length=CONTEXT)
    build_memory(tiny_checkpoint, [reference], root / "pack", settings=settings)
    return Inputs(
        checkpoint=tiny_checkpoint,
        bundle=tiny_bundle,
        memory=root / "pack",
        reference=[reference],
        validation=[write(root / "validation.jsonl", "domain", 2)],
        text=[write(root / "test.jsonl", "domain", 3)],
        general=[write(root / "general.jsonl", "general", 4)],
    )


@pytest.fixture(scope="module")
def bench(inputs: Inputs, tmp_path_factory: pytest.TempPathFactory) -> Bench:
    return open_bench(inputs, tmp_path_factory.mktemp("scratch"), context=CONTEXT, threads=1)


@pytest.fixture(scope="module")
def found(inputs: Inputs) -> Comparison:
    """Every row, with few settings to choose from."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(finetune, "RATES", {"router": (1e-2,), "all": (1e-3,)})
        patch.setattr(finetune, "MAX_EPOCHS", 1)
        patch.setattr(laser, "CLEAR", (0.4,))
        patch.setattr(laser, "VIABLE", (0.5,))
        patch.setattr(oracle, "_PILOT_TOKENS", 100)
        patch.setattr(oracle, "STEPS", 2)
        patch.setattr(explain, "GATE_TOKENS", 300)
        patch.setattr(rerouting, "RATES", (0.01,))
        patch.setattr(rerouting, "INTERVAL", 32)
        return compare(inputs, context=CONTEXT, max_tokens=640, threads=1)


def changes(found: Comparison, name: str) -> Any:
    return next(row for row in found.rows if row.row.name == name).changes


def test_every_row_is_measured_on_both_texts(found: Comparison) -> None:
    assert [row.row.name for row in found.rows] == list(NAMES)
    assert [row.failed for row in found.rows] == [None] * len(NAMES)
    assert all(set(row.changes) == {"domain", "general"} for row in found.rows)
    assert found.clusters == {"domain": "documents", "general": "documents"}


def test_the_frozen_router_changes_nothing_and_the_oracle_gains(found: Comparison) -> None:
    frozen, bound = changes(found, "frozen"), changes(found, "oracle")
    assert all((one.mean, one.low, one.high) == (0, 0, 0) for one in frozen.values())
    assert all(one.high < 0 for one in bound.values())


def test_the_variant_in_the_pack_is_the_memory_as_calibrated(found: Comparison) -> None:
    assert found.memory["variant"] == "residual"
    assert changes(found, "residual") == changes(found, "memory")
    assert changes(found, "logits") != changes(found, "memory")


def test_settings_chosen_on_validation_text_are_no_worse_there(found: Comparison) -> None:
    for name in ("router", "full", "knn-lm"):
        (row,) = (row for row in found.rows if row.row.name == name)
        assert row.measured is not None
        chosen = row.measured.chosen
        assert chosen["validation_nll"] <= chosen["validation_nll_before"]


def test_extra_bytes_are_what_would_be_stored(found: Comparison, inputs: Inputs) -> None:
    bytes_of = {row.row.name: row.measured.extra_bytes for row in found.rows if row.measured}
    gates, hidden, experts = 3, 64, 8
    entries = found.texts["reference"]["tokens"]
    assert bytes_of["router"] == gates * hidden * experts * 4
    assert bytes_of["knn-lm"] == entries * (2 * hidden + 4)
    assert bytes_of["memory"] == MemoryPack.open(inputs.memory).bytes
    assert bytes_of["full"] > bytes_of["router"]
    assert (bytes_of["frozen"], bytes_of["oracle"]) == (0, None)


def test_the_explanation_adds_up(found: Comparison) -> None:
    why = found.explanation
    assert why is not None
    assert found.not_explained is None
    assert [gate.gate for gate in why.gates] == [0, 1, 2]
    for text in why.texts.values():
        for spread in text.confidence.values():
            assert sum(spread.histogram) == pytest.approx(1)
            assert list(spread.quantiles) == sorted(spread.quantiles)
        for load in (*text.frozen_load.values(), *text.memory_load.values()):
            assert sum(load.shares) == pytest.approx(1)
            assert 0 < load.entropy <= 1 <= load.imbalance
        assert 0 < text.moved < 1
        gained, lost = [t.change for t in text.gained], [t.change for t in text.lost]
        assert gained == sorted(gained)
        assert lost == sorted(lost, reverse=True)
        assert max(gained) < 0 < min(lost)


def test_the_result_is_json_without_nan(found: Comparison) -> None:
    again = json.loads(json.dumps(found.to_json(), allow_nan=False))
    assert [row["row"] for row in again["rows"]] == list(NAMES)
    assert again["explanation"]["gates"][0]["alone"]["domain"]["mean"] is not None


def test_the_page_holds_every_row_and_fetches_and_runs_nothing(found: Comparison) -> None:
    document = comparison_page(found)
    assert all(row.label in document for row in ROWS)
    assert "<script" not in document
    assert "http" not in document.replace('http-equiv="Content-Security-Policy"', "")
    assert document.count("<svg") == document.count("</svg>") > 2 * len(NAMES)


def test_text_of_strangers_is_escaped_in_the_page(found: Comparison) -> None:
    texts = {**found.texts, "domain": {**found.texts["domain"], "files": ["<script>x</script>"]}}
    document = comparison_page(replace(found, texts=texts))
    assert "&lt;script&gt;x&lt;/script&gt;" in document
    assert "<script" not in document


def test_a_row_that_fails_says_why_and_the_others_go_on(inputs: Inputs) -> None:
    broken = Row("broken", "no such thing", "alternative", "nothing", "no_such_module:run")
    found = compare(
        inputs, rows=(broken, ROWS[0]), context=CONTEXT, max_tokens=200, explained=False, threads=1
    )
    assert found.rows[0].failed is not None
    assert "no_such_module" in found.rows[0].failed
    assert (found.rows[1].failed, found.not_explained) == (None, "not asked for")
    document = comparison_page(found)
    assert "not measured: ModuleNotFoundError" in document


def test_the_command_prints_json_and_writes_the_page(inputs: Inputs, tmp_path: Path) -> None:
    files = [
        *("--reference", inputs.reference[0], "--validation", inputs.validation[0]),
        *("--text", inputs.text[0], "--memory", inputs.memory),
    ]
    html = tmp_path / "report.html"
    arguments = [
        inputs.checkpoint,
        inputs.bundle,
        *files,
        "--rows",
        "frozen,memory",
        "--html",
        html,
    ]
    words = [
        str(a) for a in (*arguments, "--max-tokens", 200, "--context", CONTEXT, "--no-explain")
    ]
    plain = CliRunner().invoke(command, words)
    assert plain.exit_code == 0, plain.output
    assert "memory as calibrated" in plain.stdout
    result = CliRunner().invoke(command, [*words, "--json"])
    figures = json.loads(result.stdout)
    assert [row["row"] for row in figures["rows"]] == ["frozen", "memory"]
    assert list(figures["rows"][1]["changes"]) == ["domain"]
    assert html.read_text(encoding="utf-8").startswith("<!doctype html>")


def test_a_report_that_cannot_be_written_is_a_stated_failure(
    inputs: Inputs, tmp_path: Path
) -> None:
    from knnmoe.runtime.errors import OutputError
    from knnmoe.runtime.reports.page import write_html

    with pytest.raises(OutputError, match="cannot be written"):
        write_html(tmp_path / "nowhere" / "report.html", "")


Break = Callable[[Inputs, Path], Inputs]


def shorter(inputs: Inputs, tmp: Path) -> Inputs:
    file = tmp / "short.jsonl"
    file.write_text('{"text": "a"}\n', encoding="utf-8")
    return replace(inputs, text=[file])


def empty(inputs: Inputs, tmp: Path) -> Inputs:
    file = tmp / "empty.jsonl"
    file.write_text('{"text": "  "}\n{"text": ""}\n', encoding="utf-8")
    return replace(inputs, validation=[file])


def overlapping(inputs: Inputs, tmp: Path) -> Inputs:
    """Half of it new, half of it the reference."""
    lines = inputs.reference[0].read_text(encoding="utf-8").splitlines()
    own = inputs.text[0].read_text(encoding="utf-8").splitlines()
    file = tmp / "overlapping.jsonl"
    file.write_text("\n".join(lines[:4] + own[:4]), encoding="utf-8")
    return replace(inputs, text=[file])


def other_checkpoint(inputs: Inputs, tmp: Path) -> Inputs:
    return replace(inputs, checkpoint=make_tiny_olmoe(tmp / "other", seed=7))


def other_memory(inputs: Inputs, tmp: Path) -> Inputs:
    other = make_tiny_olmoe(tmp / "other", seed=7)
    build_memory(other, inputs.reference, tmp / "pack", settings=BuildSettings(max_tokens=60))
    return replace(inputs, memory=tmp / "pack")


@pytest.mark.parametrize(
    ("spoil", "error", "named"),
    [
        (shorter, InputError, "short.jsonl: too short"),
        (empty, InputError, "empty.jsonl: has no text"),
        (overlapping, InputError, "--text overlapping.jsonl: is in --reference as well"),
        (lambda i, _: replace(i, text=i.reference), InputError, "is in --reference as well"),
        (lambda i, _: replace(i, text=i.validation), InputError, "is in --validation as well"),
        (lambda i, _: replace(i, validation=i.reference), InputError, "is in --reference as well"),
        (lambda i, _: replace(i, general=i.text), InputError, "is in --text as well"),
        (lambda i, _: replace(i, reference=i.general), InputError, "not the text that the memory"),
        (other_checkpoint, CheckpointError, "not the checkpoint that the bundle"),
        (other_memory, MemoryPackError, "belongs to another model"),
    ],
)
def test_what_may_not_be_compared_is_refused(
    spoil: Break, error: type[KnnMoeError], named: str, inputs: Inputs, tmp_path: Path
) -> None:
    with pytest.raises(error, match=named):
        open_bench(spoil(inputs, tmp_path), tmp_path, context=CONTEXT, threads=1)


@pytest.mark.parametrize("context", [1, 10_000])
def test_a_context_the_model_does_not_have_is_refused(
    context: int, inputs: Inputs, tmp_path: Path
) -> None:
    with pytest.raises(SettingError, match="context: out of range"):
        open_bench(inputs, tmp_path, context=context, threads=1)


def test_rows_are_chosen_by_name_or_by_leaving_out() -> None:
    assert [row.name for row in choose_rows("memory, frozen")] == ["frozen", "memory"]
    assert {row.name for row in choose_rows("all,-full,-oracle")} == {*NAMES} - {"full", "oracle"}
    assert choose_rows("-oracle") == ROWS[:-1]
    for wrong in ("memory,nonsense", "", "memory,-memory"):
        with pytest.raises(SettingError, match="rows"):
            choose_rows(wrong)


def text_of(documents: list[int], targets: int = 9) -> TokenText:
    sequences = tuple(
        TokenSequence.of(np.arange(targets + 1), document=number) for number in documents
    )
    return TokenText(sequences, ("a.txt",), len(set(documents)), "0" * 64)


def test_whole_documents_are_resampled_where_there_are_enough() -> None:
    # Sequences of one document change alike: taking them one by one would overstate the evidence.
    documents = np.repeat(np.arange(10), 20)
    nll = np.random.default_rng(0).normal(size=10)[documents] * 9
    by_document = change(nll, np.zeros(200), text_of(documents.tolist()))
    by_sequence = change(nll, np.zeros(200), text_of(list(range(200))))
    assert by_document.mean == pytest.approx(by_sequence.mean)
    assert by_document.high - by_document.low > 3 * (by_sequence.high - by_sequence.low)


def test_sequences_are_resampled_where_documents_are_few() -> None:
    numbers, unit = clusters(text_of([0] * 5 + [1] * 5))
    assert (numbers.tolist(), unit) == (list(range(10)), "sequences")
    assert clusters(text_of(list(range(10))))[1] == "documents"


def test_the_controls_keep_the_keys_and_lose_the_match(bench: Bench) -> None:
    entries = bench.pack.read(bench.pack.gates[0])
    rng = np.random.default_rng(0)
    moved, same = shuffled(entries, rng), constant(entries, rng)
    assert np.array_equal(moved.keys, entries.keys)
    assert not np.array_equal(moved.residuals, entries.residuals)
    order = np.lexsort(entries.residuals.T), np.lexsort(moved.residuals.T)
    assert np.array_equal(entries.residuals[order[0]], moved.residuals[order[1]])
    assert np.ptp(same.residuals, axis=0).max() == 0
    expected = entries.residuals.astype(np.float64).mean(axis=0)
    assert np.allclose(same.residuals[0], expected, atol=1e-3)


def test_a_clear_preference_is_followed_and_an_unclear_one_balanced() -> None:
    load = np.array([9.0, 9.0, 0.0, 0.0])
    limits = Thresholds(clear=0.8, viable=0.5)
    assert choose(np.array([0.6, 0.3, 0.05, 0.05]), load, 2, limits).tolist() == [0, 1]
    assert choose(np.array([0.28, 0.26, 0.24, 0.22]), load, 2, limits).tolist() == [2, 3]
    # What a group rule leaves out stays out, however idle.
    outside = np.array([0.28, 0.26, 0.24, -np.inf])
    assert choose(outside, load, 2, limits).tolist() == [2, 0]


@pytest.mark.parametrize("score", ["softmax", "softmax-topk", "sigmoid"])
def test_the_rule_weighs_what_load_awareness_chose(score: str) -> None:
    rule = RoutingRule(top_k=2, score=score)
    logits = np.array([[0.04, 0.03, 0.02, 0.01]], np.float32)
    gate = LoadAwareGate(rule, 2, np.array([9.0, 9, 0, 0]), thresholds=Thresholds(0.99, 0.1))
    ids, weights = gate.route(logits)
    assert sorted(ids[0].tolist()) == [2, 3]
    assert gate.load.tolist() == [9, 9, 1, 1]
    alone = replace(rule, selection_bias=True).apply(logits, np.array([0, 0, 9, 9], np.float32))
    assert np.allclose(weights, alone[1])


@pytest.fixture
def short_intervals(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rerouting, "INTERVAL", 20)


@pytest.mark.usefixtures("short_intervals")
def test_re_routing_with_a_rate_of_zero_is_the_frozen_router(bench: Bench) -> None:
    teacher = Teacher.load(bench.checkpoint)
    text = bench.validation.limited(300)
    frozen = sequence_nll(teacher, text)
    assert np.allclose(adapted_nll(teacher, text, Settings(0.0, (0, 1, 2))), frozen, atol=1e-3)
    adapted = adapted_nll(teacher, text, Settings(0.05, (0, 1, 2)))
    assert not np.allclose(adapted, frozen, atol=1e-2)


@pytest.mark.usefixtures("short_intervals")
def test_re_routing_learns_nothing_before_its_first_interval_is_over(bench: Bench) -> None:
    teacher = Teacher.load(bench.checkpoint)
    cut = [TokenSequence.of(s.tokens[:20]) for s in bench.validation.limited(300).sequences]
    text = replace(bench.validation, sequences=tuple(cut))
    adapted = adapted_nll(teacher, text, Settings(0.05, (0, 1, 2)))
    assert np.allclose(adapted, sequence_nll(teacher, text), atol=1e-3)


def test_knn_lm_is_certain_of_what_it_has_stored(bench: Bench) -> None:
    teacher = Teacher.load(bench.checkpoint)
    states = knn_lm._states(teacher, bench.reference)
    found = knn_lm._search(states, states)
    assert found.right[:, 0].float().mean() > 0.95
    sure = knn_lm._mixed(states, found, 0.9, 1e-4)
    assert float(sure.mean()) < 0.2 < float(states.nll.mean())
    assert np.allclose(knn_lm._mixed(states, found, 0.0, 1.0), states.nll)
