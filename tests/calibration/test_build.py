from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import transformers

from knnmoe.calibration.build import BuildReport, build_memory, median_gamma
from knnmoe.calibration.optimize import learn
from knnmoe.calibration.settings import BuildSettings, UseSettings, parse_gates
from knnmoe.calibration.teacher import Teacher
from knnmoe.export.exporter import export
from knnmoe.runtime.bundle import Bundle
from knnmoe.runtime.errors import (
    CheckpointError,
    InputError,
    KnnMoeError,
    OutputError,
    SettingError,
)
from knnmoe.runtime.jobs import open_work, work_directory
from knnmoe.runtime.memory import MemoryPack
from knnmoe.runtime.model import Model
from knnmoe.runtime.pack_parts import GateEntries
from knnmoe.runtime.tokenizer import Tokenizer
from tiny import make_tiny, make_tiny_olmoe, write_tiny_tokenizer

Build = Callable[..., BuildReport]
SMALL: dict[str, Any] = {"max_length": 32, "batch_tokens": 96, "learning_rate": 0.2}


@pytest.fixture
def build(tiny_checkpoint: Path, reference: Path) -> Build:
    def call(pack: Path, settings: dict[str, Any] | None = None, **options: Any) -> BuildReport:
        options = {"checkpoint": tiny_checkpoint, "references": [reference]} | options
        return build_memory(
            options.pop("checkpoint"),
            options.pop("references"),
            pack,
            settings=BuildSettings(**(SMALL | (settings or {}))),
            **options,
        )

    return call


@pytest.fixture(scope="module")
def built(
    tmp_path_factory: pytest.TempPathFactory,
    tiny_checkpoint: Path,
    reference: Path,
    background: Path,
) -> BuildReport:
    return build_memory(
        tiny_checkpoint,
        [reference],
        tmp_path_factory.mktemp("built") / "pack",
        settings=BuildSettings(**SMALL),
        background=[background],
    )


def entries(pack: MemoryPack) -> dict[int, GateEntries]:
    return {gate.gate: pack.read(gate) for gate in pack.gates}


def files(pack: Path) -> dict[str, bytes]:
    """The tensor files of a pack; `memory.json` has the date."""
    return {path.name: path.read_bytes() for path in sorted(pack.glob("*.safetensors"))}


def test_entries_follow_the_text_and_can_be_traced_back_to_it(
    built: BuildReport, tiny_checkpoint: Path, reference: Path, background: Path
) -> None:
    origins = built.pack.read_origins()
    assert origins is not None
    tokenizer = Tokenizer.load(tiny_checkpoint)
    documents = [json.loads(line)["text"] for line in reference.read_text().splitlines()]
    sources = {0: documents[0], 1: documents[1], -1: background.read_text()}
    order = list(dict.fromkeys(origins.documents.tolist()))
    assert order == [0, 1, -1]
    for document, text in sources.items():
        ids = tokenizer.encode(text)
        mine = origins.documents == document
        positions = origins.positions[mine]
        assert positions.tolist() == sorted(positions)
        assert [ids[p] for p in positions] == origins.token_ids[mine].tolist()
        # The last of every 32 tokens, and of the document, predicts nothing.
        assert set(range(len(ids))) - set(positions) <= {*range(31, len(ids), 32), len(ids) - 1}


@pytest.mark.parametrize(
    ("family", "kind"),
    [
        pytest.param(
            *("qwen3_moe", "first and last layers dense, two in a row"), marks=pytest.mark.slow
        ),
        ("mixtral", "a window of 5, wide heads, many experts"),
        ("qwen2_moe", "windows of 6 in every other layer, last layer dense"),
        pytest.param(*("gpt_oss", "plain"), marks=pytest.mark.slow),
        ("gpt_oss", "experts in MXFP4"),
        ("deepseek_v2", "plain"),
        ("deepseek_v3", "plain"),
        pytest.param(*("glm4_moe", "plain"), marks=pytest.mark.slow),
    ],
)
def test_a_memory_of_any_family_belongs_to_its_bundle(
    build: Build, tmp_path: Path, family: str, kind: str
) -> None:
    """Its keys are what the gates of the bundle read, and it makes the text more likely."""
    text = tmp_path / "text.txt"
    text.write_text("A heron waited.")
    checkpoint = make_tiny(tmp_path / "checkpoint", family, kind, seed=1)
    report = build(tmp_path / "pack", checkpoint=checkpoint, references=[text])
    export(checkpoint, tmp_path / "bundle")
    bundle = Bundle.open(tmp_path / "bundle")
    assert report.pack.model.num_gates == bundle.manifest.architecture.num_gates
    frozen = Model.load(bundle, threads=1)
    routed = Model.load(bundle, memory=report.pack, neighbors=1, threads=1)
    ids = routed.tokenizer.encode(text.read_text())
    (first, *_) = routed.routing_trace(ids).gates
    np.testing.assert_allclose(first.trace.similarities[:-1, 0], 1, atol=1e-3)
    np.testing.assert_array_equal(first.trace.neighbors[:-1, 0], np.arange(len(ids) - 1))
    assert routed.score(ids).mean() > frozen.score(ids).mean()


def test_keys_and_logits_are_what_the_frozen_routers_read_and_say(
    built: BuildReport, tiny_checkpoint: Path
) -> None:
    teacher = Teacher.load(tiny_checkpoint)
    routers = [layer.mlp.gate.weight.numpy() for layer in teacher.model.model.layers]
    for gate, found in entries(built.pack).items():
        logits = found.keys.astype(np.float32) @ routers[gate].T
        np.testing.assert_allclose(found.router_logits, logits, atol=0.02)
        assert found.keys.dtype == found.router_logits.dtype == found.residuals.dtype == np.float16
        np.testing.assert_allclose(found.center, found.keys.astype(np.float64).mean(0), atol=1e-6)


def test_keys_stand_beside_the_tokens_they_were_read_at(
    built: BuildReport, tiny_checkpoint: Path, reference: Path
) -> None:
    teacher, tokenizer = Teacher.load(tiny_checkpoint), Tokenizer.load(tiny_checkpoint)
    text = json.loads(reference.read_text().splitlines()[0])["text"]
    ids = np.array(tokenizer.encode(text))
    learned = learn(teacher, [ids[32:64]], {1: 1.0}, steps=0).gates[1]
    origins = built.pack.read_origins()
    assert origins is not None
    mine = (origins.documents == 0) & (origins.positions >= 32) & (origins.positions < 63)
    keys = entries(built.pack)[1].keys[mine]
    np.testing.assert_allclose(keys, learned.router_inputs, atol=0.01)


def test_background_entries_change_nothing(built: BuildReport) -> None:
    origins = built.pack.read_origins()
    assert origins is not None
    assert built.background_tokens == (origins.documents < 0).sum() > 20
    for found in entries(built.pack).values():
        assert not found.residuals[origins.documents < 0].any()
        assert found.residuals[origins.documents >= 0].any(axis=1).all()


def test_background_is_limited_by_its_ratio(build: Build, background: Path, tmp_path: Path) -> None:
    report = build(tmp_path / "p", {"background_ratio": 0.1}, background=[background])
    assert 0 < report.background_tokens <= 0.1 * report.tokens
    none = build(tmp_path / "q", {"background_ratio": 0}, background=[background])
    assert none.background_tokens == 0
    # The figures are about the reference text alone.
    assert none.nll_before == pytest.approx(report.nll_before, abs=1e-9)


def test_the_reference_becomes_more_likely_and_the_pack_says_by_how_much(
    built: BuildReport,
) -> None:
    assert built.nll_after < built.nll_before - 0.05
    said = MemoryPack.open(built.pack.path).provenance
    assert (said["nll_before"], said["nll_after"]) == (built.nll_before, built.nll_after)
    assert said["reference"]["files"] == ["reference.jsonl"]
    assert said["reference"]["documents"] == 2
    assert said["reference"]["tokens"] == built.tokens
    assert len(said["reference"]["sha256"]) == 64
    assert said["background"]["tokens"] == built.background_tokens
    assert (said["steps"], said["learning_rate"]) == (3, 0.2)
    assert set(said["versions"]) == {"knnmoe", "torch", "transformers"}
    assert "T" in said["date"]


def test_nothing_but_the_pack_remains(built: BuildReport) -> None:
    assert [path.name for path in built.pack.path.parent.iterdir()] == ["pack"]


def test_the_defaults_are_the_safe_ones(built: BuildReport) -> None:
    pack = built.pack
    assert (pack.variant, pack.neighbors, pack.similarity) == ("residual", 8, "cosine")
    numbers = pack.gates[0].calibration
    assert (numbers.interpolate, numbers.scale, numbers.power) == (0, 0.25, 2)
    assert (numbers.weight_power, numbers.inverse_temperature) == (0, pytest.approx(20))


def test_a_build_may_be_used_in_any_variant(build: Build, tmp_path: Path) -> None:
    use = UseSettings(
        variant="assignment", similarity="rbf", confidence="sum", weighting="similarity",
        neighbors=3, scale=1.0, power=1.0,
    )  # fmt: skip
    pack = build(tmp_path / "p", use=use).pack
    assert (pack.variant, pack.similarity, pack.neighbors) == ("assignment", "rbf", 3)
    for gate, found in zip(pack.gates, entries(pack).values(), strict=True):
        numbers = gate.calibration
        assert (numbers.interpolate, numbers.mean, numbers.weight_power) == (1, 0, 1)
        assert numbers.gamma == pytest.approx(gamma(found.keys))


def gamma(keys: np.ndarray) -> float:
    return median_gamma(len(keys), keys.__getitem__)


def test_gamma_makes_two_unrelated_entries_similar_by_one_over_e() -> None:
    keys = np.random.default_rng(0).normal(size=(400, 10)).astype(np.float16)
    squares = ((keys[:200].astype(float) - keys[200:].astype(float)) ** 2).sum(1)
    assert np.median(np.exp(-gamma(keys) * squares)) == pytest.approx(np.exp(-1), abs=0.03)
    assert gamma(np.ones((5, 3), np.float16)) == 1
    assert gamma(np.ones((1, 3), np.float16)) == 1


@pytest.mark.parametrize(
    ("text", "expected"),
    [("all", (0, 1, 2)), ("last:2", (1, 2)), ("last:3", (0, 1, 2)), ("2,0", (0, 2)), ("1", (1,))],
)
def test_gates_are_chosen_by_words_or_numbers(text: str, expected: tuple[int, ...]) -> None:
    assert parse_gates(text, 3) == expected


def test_no_sequence_is_longer_than_the_models_positions(build: Build, tmp_path: Path) -> None:
    report = build(tmp_path / "pack", {"max_length": 1000, "gates": "0"}, background=[])
    assert report.pack.provenance["max_length"] == 128


@pytest.mark.parametrize("text", ["", "last", "last:0", "last:4", "3", "-1", "0;1", "first:1"])
def test_gates_that_are_not_there_are_refused(text: str) -> None:
    with pytest.raises(SettingError, match="gates"):
        parse_gates(text, 3)


def test_a_first_relative_step_moves_each_gate_by_its_share(build: Build, tmp_path: Path) -> None:
    # All of this text is less than the sample that the rates are measured on.
    pack = build(tmp_path / "p", {"steps": 1, "learning_rate": 0.25, "precision": "fp32"}).pack
    for found in entries(pack).values():
        sizes = [np.sqrt(np.mean(rows**2)) for rows in (found.residuals, found.router_logits)]
        assert sizes[0] / sizes[1] == pytest.approx(0.25, rel=1e-4)
    rates = pack.provenance["rates"]
    assert list(rates) == ["0", "1", "2"]
    assert len(set(rates.values())) == 3


def test_an_absolute_rate_is_the_same_for_all_gates(
    build: Build, tiny_checkpoint: Path, reference: Path, tmp_path: Path
) -> None:
    settings = {"steps": 1, "learning_rate": 0.7, "rate": "absolute", "precision": "fp32"}
    pack = build(tmp_path / "p", settings).pack
    assert pack.provenance["rates"] == {"0": 0.7, "1": 0.7, "2": 0.7}
    teacher, tokenizer = Teacher.load(tiny_checkpoint), Tokenizer.load(tiny_checkpoint)
    text = json.loads(reference.read_text().splitlines()[1])["text"]
    ids = np.array(tokenizer.encode(text))[:32]
    learned = learn(teacher, [ids], dict.fromkeys(range(3), 0.7), steps=1)
    origins = pack.read_origins()
    assert origins is not None
    mine = (origins.documents == 1) & (origins.positions < 31)
    for gate, found in entries(pack).items():
        expected = learned.gates[gate].residuals
        np.testing.assert_allclose(found.residuals[mine], expected, rtol=1e-3, atol=1e-5)


def test_a_pack_covers_the_gates_asked_for(build: Build, tmp_path: Path) -> None:
    pack = build(tmp_path / "p", {"gates": "last:1"}).pack
    assert [gate.gate for gate in pack.gates] == [2]
    assert pack.model.num_gates == 3


def test_a_relative_rate_moves_every_gate_by_that_share_of_its_logits(
    build: Build, tmp_path: Path
) -> None:
    one = {"steps": 1, "learning_rate": 0.05, "rate": "relative", "precision": "fp32"}
    pack = build(tmp_path / "relative", settings=one).pack
    for gate in pack.gates:
        entries = pack.read(gate)
        moved = np.sqrt(
            np.square(entries.residuals).mean() / np.square(entries.router_logits).mean()
        )
        assert moved == pytest.approx(0.05, rel=1e-3)
    absolute = build(tmp_path / "absolute", settings={**one, "rate": "absolute"})
    assert set(absolute.pack.provenance["rates"].values()) == {0.05}
    assert len(set(pack.provenance["rates"].values())) == len(pack.gates)


def test_fp32_keeps_what_fp16_rounds(build: Build, built: BuildReport, tmp_path: Path) -> None:
    exact = entries(build(tmp_path / "p", {"precision": "fp32"}).pack)[1]
    rounded = entries(built.pack)[1]
    count = len(exact.keys)
    assert exact.keys.dtype == np.float32
    np.testing.assert_array_equal(exact.keys.astype(np.float16), rounded.keys[:count])
    np.testing.assert_array_equal(exact.residuals.astype(np.float16), rounded.residuals[:count])


def test_another_family_builds_the_same_way(build: Build, tmp_path: Path) -> None:
    config = transformers.Qwen3MoeConfig(
        vocab_size=272, hidden_size=32, moe_intermediate_size=16, intermediate_size=16, head_dim=8,
        num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, num_experts=8,
        num_experts_per_tok=2, initializer_range=0.3, mlp_only_layers=[0],
    )  # fmt: skip
    transformers.Qwen3MoeForCausalLM(config).save_pretrained(tmp_path / "qwen")
    write_tiny_tokenizer(tmp_path / "qwen")
    report = build(tmp_path / "p", checkpoint=tmp_path / "qwen")
    # The first layer is dense: its router is none.
    assert (report.pack.model.model_type, report.pack.model.num_gates) == ("qwen3_moe", 1)
    assert report.nll_after < report.nll_before


# --- interruptions --------------------------------------------------------------------------


def test_an_interrupted_build_goes_on_to_the_same_bits(
    build: Build, background: Path, built: BuildReport, tmp_path: Path
) -> None:
    pack = tmp_path / "pack"
    reports: list[int] = []

    def interrupt(done: int, total: int) -> None:
        reports.append(done)
        if len(reports) == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build(pack, background=[background], progress=interrupt)
    assert not pack.exists()
    assert len((work_directory(pack) / "done.jsonl").read_text().splitlines()) == 2
    again: list[int] = []
    build(pack, background=[background], progress=lambda done, total: again.append(done))
    assert again[0] == reports[-1] > 0  # it did not start over
    assert files(pack) == files(built.pack.path)
    assert not work_directory(pack).exists()


KILLED = """
import os, signal, sys
import torch
from knnmoe.calibration.build import build_memory
from knnmoe.calibration.settings import BuildSettings
torch.set_num_threads(1)
calls = []
def kill(done, total):
    calls.append(done)
    if len(calls) == 4:
        os.kill(os.getpid(), signal.SIGKILL)
checkpoint, reference, background, pack = sys.argv[1:]
settings = BuildSettings(max_length=32, batch_tokens=96, learning_rate=0.2)
build_memory(
    checkpoint, [reference], pack, settings=settings, background=[background], progress=kill
)
"""


def test_a_killed_build_goes_on_to_the_same_bits(
    build: Build, tiny_checkpoint: Path, reference: Path, background: Path, built: BuildReport,
    tmp_path: Path,
) -> None:  # fmt: skip
    pack = tmp_path / "pack"
    paths = [tiny_checkpoint, reference, background, pack]
    process = subprocess.run(
        [sys.executable, "-c", KILLED, *map(str, paths)], env=os.environ, check=False
    )
    assert process.returncode == -signal.SIGKILL
    assert not pack.exists()
    first: list[int] = []
    build(pack, background=[background], progress=lambda done, total: first.append(done))
    assert first[0] > 0
    assert files(pack) == files(built.pack.path)


def interrupted(build: Build, pack: Path, **options: Any) -> Path:
    def interrupt(done: int, total: int) -> None:
        if done:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build(pack, progress=interrupt, **options)
    return work_directory(pack)


def test_an_interrupted_build_of_other_settings_is_refused_and_kept(
    build: Build, tmp_path: Path
) -> None:
    partial = interrupted(build, tmp_path / "pack")
    before = files(partial)
    with pytest.raises(OutputError, match=r"steps 2; found steps 3\..*--restart"):
        build(tmp_path / "pack", {"steps": 2})
    assert files(partial) == before


def test_an_interrupted_build_of_other_text_is_refused(build: Build, tmp_path: Path) -> None:
    interrupted(build, tmp_path / "pack")
    other = tmp_path / "other.txt"
    other.write_text("Something else entirely was written here.")
    with pytest.raises(OutputError, match="reference"):
        build(tmp_path / "pack", references=[other])


def test_an_interrupted_build_of_another_model_is_refused(build: Build, tmp_path: Path) -> None:
    interrupted(build, tmp_path / "pack")
    other = make_tiny_olmoe(tmp_path / "other", seed=1)
    with pytest.raises(OutputError, match="model sha256"):
        build(tmp_path / "pack", checkpoint=other)


@pytest.mark.parametrize("restart", [False, True])
def test_two_builds_of_one_pack_do_not_meet(
    build: Build, background: Path, built: BuildReport, tmp_path: Path, restart: bool
) -> None:
    met: list[int] = []

    def second(done: int, total: int) -> None:
        if 0 < done < total:
            with pytest.raises(
                OutputError, match=r"pack\.partial: another memory build is writing"
            ):
                build(tmp_path / "pack", background=[background], restart=restart)
            met.append(done)

    build(tmp_path / "pack", background=[background], progress=second)
    assert met
    assert files(tmp_path / "pack") == files(built.pack.path)
    assert not work_directory(tmp_path / "pack").exists()


def test_an_interrupted_export_of_that_name_is_not_discarded(build: Build, tmp_path: Path) -> None:
    partial = work_directory(tmp_path / "pack")
    open_work(partial, "export", {}, what="export", fix="")
    for restart in (False, True):
        with pytest.raises(OutputError, match=r"pack\.partial: .*another command.*found export"):
            build(tmp_path / "pack", restart=restart)
    assert partial.exists()


def test_restart_discards_what_was_interrupted(build: Build, tmp_path: Path) -> None:
    interrupted(build, tmp_path / "pack")
    fresh = build(tmp_path / "fresh", {"steps": 2})
    again = build(tmp_path / "pack", {"steps": 2}, restart=True)
    assert files(again.pack.path) == files(fresh.pack.path)


def test_a_batch_whose_rows_were_damaged_is_learned_again(
    build: Build, background: Path, built: BuildReport, tmp_path: Path
) -> None:
    partial = interrupted(build, tmp_path / "pack", background=[background])
    gate = partial / "gate-01.safetensors"
    content = gate.read_bytes()
    written = max(at for at, byte in enumerate(content) if byte)
    gate.write_bytes(content[: written - 1] + b"\x55" + content[written:])
    reports: list[int] = []
    build(
        tmp_path / "pack",
        background=[background],
        progress=lambda done, total: reports.append(done),
    )
    assert reports[0] == 0
    assert files(tmp_path / "pack") == files(built.pack.path)


def test_a_line_that_was_being_written_does_not_count(
    build: Build, background: Path, built: BuildReport, tmp_path: Path
) -> None:
    partial = interrupted(build, tmp_path / "pack", background=[background])
    done = partial / "done.jsonl"
    done.write_text(done.read_text() + done.read_text()[:-2])
    build(tmp_path / "pack", background=[background])
    assert files(tmp_path / "pack") == files(built.pack.path)


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("gate-01.safetensors", "nonsense", r"gate-01.*damaged.*--restart"),
        ("done.jsonl", "nonsense\n", r"done\.jsonl.*damaged.*--restart"),
        ("done.jsonl", '{"batch": 999, "nll": [1, 1], "crc": 0}\n', r"damaged.*999.*--restart"),
        ("job.json", "{", r"job\.json.*--restart"),
    ],
)
def test_a_damaged_work_directory_is_refused(
    build: Build, tmp_path: Path, file: str, content: str, message: str
) -> None:
    partial = interrupted(build, tmp_path / "pack")
    (partial / file).write_text(content)
    with pytest.raises(OutputError, match=message):
        build(tmp_path / "pack")
    assert not (tmp_path / "pack").exists()


def test_a_file_in_the_way_of_the_work_directory_is_not_touched(
    build: Build, tmp_path: Path
) -> None:
    work_directory(tmp_path / "pack").write_text("mine")
    with pytest.raises(OutputError, match="is in the way"):
        build(tmp_path / "pack", restart=True)
    assert work_directory(tmp_path / "pack").read_text() == "mine"


# --- errors, with nothing left behind ---------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "kind", "message"),
    [
        ({"checkpoint": Path("nowhere")}, CheckpointError, "not a checkpoint"),
        ({"references": [Path("nowhere.txt")]}, InputError, "cannot be read"),
        ({"references": [Path("notes.pdf")]}, InputError, "unknown kind"),
        ({"settings": {"gates": "7"}}, SettingError, "gates"),
        (
            {"settings": {"learning_rate": 1e6, "rate": "absolute"}},
            SettingError,
            "smaller --learning-rate",
        ),
        ({"background": [Path("nowhere.txt")]}, InputError, "cannot be read"),
    ],
)
def test_what_cannot_be_built_leaves_nothing_behind(
    build: Build,
    tmp_path: Path,
    options: dict[str, Any],
    kind: type[KnnMoeError],
    message: str,
) -> None:
    with pytest.raises(kind, match=message):
        build(tmp_path / "pack", **options)
    assert not list(tmp_path.iterdir())


def test_inputs_beyond_fp16_ask_for_more_precision(build: Build, tmp_path: Path) -> None:
    from safetensors.numpy import load_file, save_file

    path = make_tiny_olmoe(tmp_path / "large")
    tensors = load_file(path / "model.safetensors")
    tensors["model.layers.0.post_attention_layernorm.weight"] *= 1e6
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(SettingError, match=r"router inputs of gate 0.*--precision fp32"):
        build(tmp_path / "pack", checkpoint=path)
    assert [entry.name for entry in tmp_path.iterdir()] == ["large"]
    report = build(tmp_path / "pack", {"precision": "fp32", "steps": 0}, checkpoint=path)
    assert np.isfinite(entries(report.pack)[0].keys).all()


def test_a_checkpoint_without_tokenizer_is_refused(build: Build, tmp_path: Path) -> None:
    path = make_tiny_olmoe(tmp_path / "bare")
    (path / "tokenizer.json").unlink()
    with pytest.raises(CheckpointError, match=r"tokenizer\.json.*beside its config"):
        build(tmp_path / "pack", checkpoint=path)


def test_a_pack_that_is_there_is_replaced_only_when_asked(
    build: Build, built: BuildReport, tmp_path: Path
) -> None:
    build(tmp_path / "pack", {"gates": "0"})
    before = files(tmp_path / "pack")
    calls: list[int] = []
    with pytest.raises(OutputError, match="not empty"):
        build(tmp_path / "pack", {"gates": "1"}, progress=lambda done, total: calls.append(done))
    assert not calls  # nobody waits for a build that cannot be kept
    assert files(tmp_path / "pack") == before
    build(tmp_path / "pack", {"gates": "1"}, overwrite=True)
    assert list(files(tmp_path / "pack")) == ["entries.safetensors", "gate-01.safetensors"]


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("steps", -1),
        ("learning_rate", float("nan")),
        ("max_length", 1),
        ("max_tokens", 0),
        ("batch_tokens", 0),
        ("background_ratio", -0.5),
        ("precision", "int8"),
        ("rate", "adaptive"),
    ],
)
def test_settings_out_of_range_are_refused(field: str, value: Any) -> None:
    with pytest.raises(SettingError, match=field.replace("_", " ")):
        BuildSettings(**{field: value})


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("neighbors", 0),
        ("neighbors", 65),
        ("variant", "other"),
        ("similarity", "dot"),
        ("confidence", "calibrated"),
        ("temperature", 0.0),
        ("scale", 1.5),
        ("power", -1.0),
    ],
)
def test_uses_out_of_range_are_refused(field: str, value: Any) -> None:
    with pytest.raises(SettingError, match=field):
        UseSettings(**{field: value})
