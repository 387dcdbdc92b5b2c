"""`knnmoe memory compress --budget`: a smaller memory that keeps its gain, or none."""

from __future__ import annotations

import json
import random
from dataclasses import replace
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
from click.testing import CliRunner

from knnmoe.calibration import budget_search
from knnmoe.calibration.budget import Budget, compress_to_budget
from knnmoe.calibration.budget_search import BudgetSettings, halves, token_nll
from knnmoe.calibration.build import build_memory
from knnmoe.calibration.cli import memory as memory_commands
from knnmoe.calibration.confidence import Interval
from knnmoe.calibration.costs import FEATURES, Costs
from knnmoe.calibration.recipes import Probed, Recipe, fitted, recipes, short_list, smallest
from knnmoe.calibration.recorded import record_inputs
from knnmoe.calibration.settings import BuildSettings
from knnmoe.runtime.calibration import preset
from knnmoe.runtime.errors import InputError, MemoryPackError, SettingError, VerificationError
from knnmoe.runtime.evaluation import score_sequences
from knnmoe.runtime.memory import MemoryPack
from knnmoe.runtime.model import Model
from knnmoe.runtime.pack_parts import GateEntries
from knnmoe.runtime.pack_writing import write_pack
from knnmoe.runtime.texts import read_text

STORY = [
    "the spring ", "was late ", "that year ", "a heron ", "waited ", "by the river ", "till May ",
    "nobody crossed ", "the water ", "stood high ",
]  # fmt: skip
CODE = ["RETURN 1; ", "IF x>0 ", "RAISE ", "CALL f(y) ", "[0,1] ", "{} "]
SETTINGS = BudgetSettings(
    candidates=16, max_general_loss=0.05, max_switch_loss=50, max_tokens=None, threads=1
)
Texts = dict[str, Path]


def write_documents(
    path: Path, words: list[str], seed: int, count: int, words_each: int = 5
) -> Path:
    rng = random.Random(seed)
    texts = ["".join(rng.choices(words, k=words_each)) for _ in range(count)]
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Texts:
    root = tmp_path_factory.mktemp("texts")
    return {
        "reference": write_documents(root / "reference.jsonl", STORY, 0, 14, 9),
        "domain": write_documents(root / "domain.jsonl", STORY, 1, 10),
        "general": write_documents(root / "general.jsonl", CODE, 2, 10),
        "test": write_documents(root / "test.jsonl", STORY, 3, 8),
    }


@pytest.fixture(scope="module")
def pack(tmp_path_factory: pytest.TempPathFactory, tiny_checkpoint: Path, texts: Texts) -> Path:
    """A memory that gains, even for a random model; do not write into it."""
    target = tmp_path_factory.mktemp("learned") / "pack"
    built = build_memory(tiny_checkpoint, [texts["reference"]], target, settings=BuildSettings())
    return built.pack.path


@pytest.fixture(scope="module")
def costs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A device on which every code that is scanned takes time."""
    path = tmp_path_factory.mktemp("costs") / "costs.json"
    units = {"constant": 0.1, "codes_4": 1.0, "codes_8": 2.0}
    numbers = tuple(units.get(name, 0.0) for name in FEATURES)
    Costs("a board", 1, 64, 8, 8, 1.0, numbers).write(path)
    return path


def run(pack: Path, target: Path, budget: str, tiny: Path, texts: Texts, **more: Any) -> Any:
    named = {"domain": [texts["domain"]], "general": [texts["general"]], "bundle": tiny}
    settings = more.pop("settings", SETTINGS)
    return compress_to_budget(pack, target, Budget.parse(budget), settings, **{**named, **more})


@pytest.fixture(scope="module")
def report(
    pack: Path, tiny_bundle: Path, texts: Texts, costs: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Any:  # fmt: skip
    target = tmp_path_factory.mktemp("small") / "pack"
    return run(pack, target, "40%", tiny_bundle, texts, costs=costs)


def test_the_budget_is_kept_and_most_of_the_gain(
    report: Any, pack: Path, tiny_bundle: Path, texts: Texts
) -> None:
    whole, chosen = report.points[0], report.chosen
    assert chosen.bytes <= report.limit < 0.41 * whole.bytes
    assert chosen.bytes == sum(chosen.by_gate.values())
    assert chosen.kept.mean > 0.8
    assert chosen.general.high <= 0.05
    assert chosen.domain.high < 0
    others = [p for p in report.points[1:] if p.bytes <= report.limit and p is not chosen]
    # Others gain more only if that is not sure, and if their corrections are farther off.
    assert all(p.error > chosen.error for p in others if p.domain.mean < chosen.domain.mean)
    # The file is what was measured: on text that chose nothing it gains as well.
    model = Model.load(tiny_bundle, threads=1)
    test = read_text([texts["test"]], model.tokenizer, vocab_size=256)
    sequences = test.sequences
    nll = []
    for memory in (None, MemoryPack.open(pack), MemoryPack.open(report.pack.path)):
        model.swap_memory(memory)
        nll.append(score_sequences(model, sequences).mean_nll)
    assert nll[2] - nll[0] < 0.7 * (nll[1] - nll[0]) < 0


def test_the_pack_says_what_was_done_and_the_costs_are_those_of_the_record(
    report: Any, costs: Path
) -> None:
    stated = MemoryPack.open(report.pack.path).provenance["compressed"]["budget"]
    assert stated["judged_by"] == "likelihood"
    assert stated["gain_kept"] == pytest.approx(report.chosen.kept.mean)
    assert stated["bytes"] == report.chosen.bytes
    # 4-bit codes cost 1 ms a million, 8-bit codes 2.
    chosen, gates = report.chosen, report.pack.gates
    codes = sum(gate.entries * chosen.recipe.width for gate in gates) / 1e6
    unit = 1.0 if chosen.recipe.bits == 4 else 2.0
    assert chosen.ms == pytest.approx(1.0 + len(gates) * 0.1 + codes * unit)
    assert set(report.gates) == {0, 1, 2}


def test_without_text_recall_chooses_and_that_is_said(pack: Path, tmp_path: Path) -> None:
    result = CliRunner().invoke(
        memory_commands, ["compress", str(pack), str(tmp_path / "small"), "--budget", "30%"]
    )
    assert result.exit_code == 0, result.output
    assert "without text: what it keeps of the gain is not known" in " ".join(result.output.split())
    small = MemoryPack.open(tmp_path / "small")
    assert small.provenance["compressed"]["budget"]["judged_by"] == "recall"
    assert small.provenance["compressed"]["budget"]["gain_kept"] is None
    assert sorted(path.name for path in tmp_path.iterdir()) == ["small"]


def test_a_small_budget_leaves_entries_out_and_origins_follow(pack: Path, tmp_path: Path) -> None:
    whole = MemoryPack.open(pack)
    report = compress_to_budget(pack, tmp_path / "small", Budget(share=0.06), SETTINGS)
    assert report.chosen.recipe.reduction is not None
    small, origins = report.pack, report.pack.read_origins()
    before = whole.read_origins()
    assert origins is not None
    assert before is not None
    np.testing.assert_array_equal(origins.token_ids, before.token_ids)
    for gate in small.gates:
        assert gate.entries < whole.gates[0].entries
        assert len(origins.merged[gate.gate]) == len(origins.counts[gate.gate]) == gate.entries
        assert origins.counts[gate.gate].sum() <= len(before.token_ids)


def test_the_command_draws_the_front_and_prints_one_json_object(
    pack: Path, tiny_bundle: Path, texts: Texts, costs: Path, tmp_path: Path
) -> None:
    arguments = [
        "compress", pack, tmp_path / "small", "--budget", "30%", "--bundle", tiny_bundle,
        "--domain", texts["domain"], "--max-tokens", 500, "--threads", 1, "--costs", costs,
        "--candidates", 16, "--front", tmp_path / "front.svg", "--json",
    ]  # fmt: skip
    result = CliRunner().invoke(memory_commands, [str(each) for each in arguments])
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    points = found["points"]
    assert [point["chosen"] for point in points].count(True) == 1
    assert points[0]["recipe"] is None
    assert points[0]["gain_kept"] == 1.0
    assert len({point["bytes"] for point in points}) >= 4  # other sizes too
    assert all(point["general"] is None for point in points)
    tree = ElementTree.fromstring((tmp_path / "front.svg").read_text(encoding="utf-8"))
    marks = [e for e in tree.iter() if e.tag.endswith("circle")]
    assert len(marks) == len(points)
    assert [e.get("class") for e in marks].count("mark gain") == 1


# --- what is refused ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "bytes_", "share"),
    [
        ("64MB", 64_000_000, None), ("1.5 KiB", 1536, None), ("25%", None, 0.25),
        ("4096", 4096, None),
    ],
)  # fmt: skip
def test_budgets_are_read(text: str, bytes_: int | None, share: float | None) -> None:
    assert Budget.parse(text) == Budget(bytes_, share)


@pytest.mark.parametrize("text", ["", "lots", "0", "-5MB", "12 parsecs", "25 % of it", "nan"])
def test_what_is_no_budget_is_refused(text: str) -> None:
    with pytest.raises(SettingError, match="budget: is no size"):
        Budget.parse(text)


@pytest.mark.parametrize(
    ("budget", "says"),
    [
        ("1KB", r"too small for any memory .* at least [\d,]+ bytes, 64 entries for each of 3"),
        ("100%", "there is nothing to do"),
        ("1GB", "there is nothing to do"),
    ],
)
def test_impossible_and_needless_budgets_are_refused(
    pack: Path, tmp_path: Path, budget: str, says: str
) -> None:
    with pytest.raises(SettingError, match=says):
        compress_to_budget(pack, tmp_path / "small", Budget.parse(budget))
    assert not list(tmp_path.iterdir())


def test_the_smallest_budget_is_one_that_works(pack: Path, tmp_path: Path) -> None:
    opened = MemoryPack.open(pack)
    least = smallest(opened, opened.gates, 16)
    report = compress_to_budget(pack, tmp_path / "least", Budget(least), SETTINGS)
    assert {gate.entries for gate in report.pack.gates} == {64}
    with pytest.raises(SettingError, match="too small"):
        compress_to_budget(pack, tmp_path / "less", Budget(least - 1), SETTINGS)


def test_packs_and_texts_that_do_not_fit_are_refused_and_nothing_is_written(
    pack: Path, tiny_bundle: Path, texts: Texts, report: Any, costs: Path, tmp_path: Path
) -> None:
    def refused(kind: Any, says: str, source: Path = pack, **more: Any) -> None:
        more = {"costs": costs, **more}
        with pytest.raises(kind, match=says):
            run(source, tmp_path / "out" / "small", "30%", tiny_bundle, texts, **more)
        assert not list((tmp_path / "out").iterdir())

    (tmp_path / "out").mkdir()
    refused(MemoryPackError, "is compressed already", report.pack.path)
    refused(InputError, "is in the memory already", domain=[texts["reference"]])
    refused(InputError, "given as domain and as general text", general=[texts["domain"]])
    refused(SettingError, "bundle: missing", bundle=None)
    refused(SettingError, "domain: missing", domain=[])
    other = copied(pack, tmp_path / "other", fingerprint="sha256:" + "0" * 64)
    refused(MemoryPackError, "belongs to another model", other)
    Costs("elsewhere", 1, 128, 8, 8, 1.0, (0.0,) * len(FEATURES)).write(tmp_path / "c.json")
    refused(SettingError, "is a record of other gates", costs=tmp_path / "c.json")


def test_a_memory_that_gains_nothing_or_costs_too_much_is_refused(
    pack: Path, tiny_bundle: Path, texts: Texts, costs: Path, tmp_path: Path
) -> None:
    (tmp_path / "out").mkdir()
    against = copied(pack, tmp_path / "against", sign=-1)
    with pytest.raises(VerificationError, match="gains nothing on this text"):
        run(against, tmp_path / "out" / "a", "40%", tiny_bundle, texts, costs=costs)
    strict = replace(SETTINGS, max_general_loss=0.0)
    loud = copied(pack, tmp_path / "loud", scale=1.0)
    with pytest.raises(VerificationError, match="costs this general text too much as it is"):
        run(loud, tmp_path / "out" / "b", "40%", tiny_bundle, texts, costs=costs, settings=strict)
    assert not list((tmp_path / "out").iterdir())


@pytest.mark.parametrize("harm", ["general", pytest.param("domain", marks=pytest.mark.slow)])
def test_a_compression_that_loses_the_gain_or_harms_other_text_is_refused(
    pack: Path, tiny_bundle: Path, texts: Texts, costs: Path, tmp_path: Path, harm: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    honest = budget_search.Search._measured

    def measured(self: Any, point: Any, memory: MemoryPack, *names: Any) -> Any:
        found = honest(self, point, memory, *names)
        bad = Interval(0.5, 0.4, 0.6) if harm == "general" else Interval(-0.01, -0.05, 0.03)
        return found if point.recipe is None else replace(found, **{harm: bad})

    monkeypatch.setattr(budget_search.Search, "_measured", measured)
    monkeypatch.setattr(budget_search, "SHORT", 1)
    (tmp_path / "out").mkdir()
    with pytest.raises(VerificationError, match="nothing within this budget both gains and spares"):
        run(pack, tmp_path / "out" / "a", "40%", tiny_bundle, texts, costs=costs)
    assert not list((tmp_path / "out").iterdir())


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("--budget", "30%", "--keys", "int8"), "--keys: says how, where --budget chooses"),
        (("--domain", "x.txt"), "--domain: needs --budget"),
        (("--budget", "12 parsecs"), "budget: is no size"),
    ],
)
def test_options_that_contradict_each_other_are_refused(
    pack: Path, tmp_path: Path, arguments: Any, says: str
) -> None:
    command = ["compress", str(pack), str(tmp_path / "small"), *arguments]
    result = CliRunner().invoke(memory_commands, command)
    assert result.exit_code == 1
    assert says in " ".join(result.output.split())
    assert not list(tmp_path.iterdir())


def copied(
    pack: Path, target: Path, *, sign: int = 1, scale: float = 0.25, fingerprint: str | None = None
) -> Path:
    opened = MemoryPack.open(pack)
    gates = {}
    for gate in opened.gates:
        found = opened.read(gate)
        gates[gate.gate] = GateEntries(
            found.keys, found.router_logits, sign * found.residuals, found.center
        )
    model = opened.model if fingerprint is None else replace(opened.model, fingerprint=fingerprint)
    return write_pack(
        target, model=model, gates=gates, variant="residual", neighbors=8, similarity="cosine",
        calibration=preset("residual", weighting="softmax", scale=scale, power=1.0),
        origins=None, provenance={},
    ).path  # fmt: skip


# --- the search --------------------------------------------------------------------------------


def test_recipes_take_as_many_entries_as_the_budget_has_room_for(pack: Path) -> None:
    opened = MemoryPack.open(pack)
    limit = 60_000
    found = [fitted(r, opened, opened.gates, 16, limit) for r in recipes(opened)]
    kept = [recipe for recipe in found if recipe is not None]
    assert kept
    for recipe in kept:
        assert recipe.bytes(opened, opened.gates, 16) <= limit
        if recipe.reduction is not None:
            more = replace(recipe, share=recipe.share * 1.05)
            assert more.bytes(opened, opened.gates, 16) > limit
            whole = replace(recipe, share=1.0, reduction=None)
            assert whole.bytes(opened, opened.gates, 16) > limit


def test_the_short_list_is_of_the_likeliest_but_not_all_alike() -> None:
    errors = {
        Recipe("projected", 64, 4, "int4"): 0.02,
        Recipe("projected", 96, 4, "int4"): 0.01,
        Recipe("projected", 96, 4, "int8"): 0.011,
        Recipe("int8", 32, 4, "int4", 0.6, "credit"): 0.06,
        Recipe("int8", 32, 4, "int4", 0.6, "merge"): 0.9,
    }
    found = short_list(list(errors), lambda recipe: Probed(errors[recipe], 1.0), 3)
    assert [errors[recipe] for recipe in found] == [0.01, 0.06, 0.011]


def test_recorded_inputs_are_what_building_stores_as_keys(
    pack: Path, tiny_bundle: Path, texts: Texts
) -> None:
    opened = MemoryPack.open(pack)
    model = Model.load(tiny_bundle, threads=1)
    text = read_text([texts["reference"]], model.tokenizer, vocab_size=256, max_length=256)
    asked = record_inputs(model, [s.tokens for s in text.sequences], lambda _: None)
    ends = np.cumsum([len(s.tokens) for s in text.sequences]) - 1
    inner = np.setdiff1d(np.arange(ends[-1] + 1), ends)  # a last token has no entry
    for gate in opened.gates:
        entries = opened.read(gate)
        np.testing.assert_allclose(asked[gate.gate].x[inner], entries.keys, atol=5e-3)
        np.testing.assert_allclose(
            asked[gate.gate].router_logits[inner], entries.router_logits, atol=5e-3
        )


def test_halves_share_no_document_and_token_nll_adds_up(tiny_bundle: Path, texts: Texts) -> None:
    model = Model.load(tiny_bundle, threads=1)
    text = read_text([texts["domain"]], model.tokenizer, vocab_size=256, max_length=64)
    first, second = halves(text)
    documents = [{s.document for s in part.sequences} for part in (first, second)]
    assert not documents[0] & documents[1]
    assert documents[0] | documents[1] == {s.document for s in text.sequences}
    sequences = first.sequences
    summed = score_sequences(model, sequences).nll.sum()
    nll = token_nll(model, sequences)
    assert nll.sum() == pytest.approx(summed, rel=1e-6)
    assert len(nll) == sum(len(s.tokens) for s in sequences)
