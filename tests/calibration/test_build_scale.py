"""Workers, near-identical entries, memory: what building much text depends on."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from knnmoe.calibration import deduplicate as deduplicate_module
from knnmoe.calibration.build import BuildReport, build_memory
from knnmoe.calibration.learners import resolved
from knnmoe.calibration.plan import plan
from knnmoe.calibration.settings import BuildSettings, Workers
from knnmoe.calibration.summary import summarize
from knnmoe.calibration.tensor_file import TensorFile
from knnmoe.runtime.blend import unit_rows
from knnmoe.runtime.errors import (
    BackendError,
    CheckpointError,
    InputError,
    MemoryPackError,
    OutputError,
    SettingError,
)
from knnmoe.runtime.memory import MemoryPack
from knnmoe.runtime.model import Model
from knnmoe.runtime.pack_writing import write_pack
from tiny import make_tiny_olmoe

SMALL: dict[str, Any] = {"max_length": 32, "batch_tokens": 96, "learning_rate": 0.2}
Build = Callable[..., BuildReport]


@pytest.fixture
def build(tiny_checkpoint: Path, reference: Path, background: Path) -> Build:
    def call(pack: Path, references: Any = None, **options: Any) -> BuildReport:
        workers = options.pop("workers", None)
        checkpoint = options.pop("checkpoint", tiny_checkpoint)
        backdrop = options.pop("background", [background])
        return build_memory(
            checkpoint,
            references or [reference],
            pack,
            settings=BuildSettings(**(SMALL | options)),
            background=backdrop,
            workers=workers,
        )

    return call


def files(pack: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(pack.glob("*.safetensors"))}


# --- workers --------------------------------------------------------------------------------


@pytest.mark.slow
def test_any_number_of_workers_gives_the_same_bytes(build: Build, tmp_path: Path) -> None:
    alone = build(tmp_path / "alone", workers=Workers(None, 1))
    for count in (1, 3):
        report = build(tmp_path / str(count), workers=Workers(count, 1))
        assert files(report.pack.path) == files(alone.pack.path)
        assert report.nll_after == alone.nll_after
        assert report.pack.provenance["rates"] == alone.pack.provenance["rates"]


@pytest.mark.slow
def test_a_worker_passes_its_error_on_and_leaves_nothing_behind(
    build: Build, tmp_path: Path
) -> None:
    from safetensors.numpy import load_file, save_file

    broken = make_tiny_olmoe(tmp_path / "broken")
    tensors = load_file(broken / "model.safetensors")
    del tensors["model.norm.weight"]
    save_file(tensors, broken / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"weights are missing.*model\.norm"):
        build(tmp_path / "pack", checkpoint=broken, workers=Workers(1, 1))
    assert [path.name for path in tmp_path.iterdir()] == ["broken"]


def test_ray_is_asked_for_where_it_is_not_installed(
    build: Build, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(BackendError, match=r"knnmoe\[ray\]"):
        build(tmp_path / "pack", workers=Workers(2, 1, ray=True))
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_ray_gives_the_same_bytes(build: Build, tmp_path: Path) -> None:
    pytest.importorskip("ray")
    alone = build(tmp_path / "alone", workers=Workers(None, 1))
    report = build(tmp_path / "ray", workers=Workers(2, 1, ray=True))
    assert files(report.pack.path) == files(alone.pack.path)


@pytest.mark.parametrize("number", [0, -1])
def test_workers_and_threads_are_at_least_one(number: int) -> None:
    with pytest.raises(SettingError, match="workers"):
        Workers(number)
    with pytest.raises(SettingError, match="threads"):
        Workers(1, number)
    assert Workers.of(2, None, ray=False) == Workers(2, 1)
    assert Workers.of(None, None, ray=False) == Workers()


# --- devices --------------------------------------------------------------------------------


def test_a_device_that_is_not_there_is_refused(build: Build, tmp_path: Path) -> None:
    with pytest.raises(BackendError, match=r"cuda:77.*not there.*--device cpu"):
        build(tmp_path / "pack", device="cuda:77")
    with pytest.raises(SettingError, match=r"device.*nonsense"):
        build(tmp_path / "pack", device="nonsense")
    assert not list(tmp_path.iterdir())


def test_a_cpu_computes_in_fp32_and_a_gpu_in_bf16(monkeypatch: pytest.MonkeyPatch) -> None:
    settings = BuildSettings()
    assert resolved(replace(settings, device="cpu")) == ("cpu", "fp32")
    assert resolved(replace(settings, device="cpu", dtype="bf16")) == ("cpu", "bf16")
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    assert resolved(settings) == ("cuda", "bf16")
    assert resolved(replace(settings, dtype="fp16")) == ("cuda", "fp16")


@pytest.mark.parametrize("dtype", ["bf16", pytest.param("fp16", marks=pytest.mark.slow)])
def test_half_precision_learns_about_the_same(build: Build, tmp_path: Path, dtype: str) -> None:
    exact = build(tmp_path / "fp32").pack
    report = build(tmp_path / dtype, dtype=dtype)
    assert report.pack.provenance["computed"] == f"{dtype} on cpu"
    assert report.nll_after < report.nll_before - 0.05
    for gate in exact.gates:
        a, b = (pack.read(gate).residuals.astype(float) for pack in (exact, report.pack))
        # Some tokens choose other experts where logits are rounded; most do not.
        assert (a * b).sum() / np.sqrt((a**2).sum() * (b**2).sum()) > 0.8


# --- prompts --------------------------------------------------------------------------------


def test_prompts_make_no_entries_and_their_logits_stay(build: Build, tmp_path: Path) -> None:
    record = {"prompt": "The river stood ", "completion": "high, and nobody crossed it."}
    (tmp_path / "a.jsonl").write_text(json.dumps(record) + "\n")
    report = build(tmp_path / "pack", [tmp_path / "a.jsonl"], background=[], max_length=64)
    origins = report.pack.read_origins()
    assert origins is not None
    # The last token of the prompt predicts the first of the completion.
    first = len(record["prompt"]) - 1
    assert origins.positions.tolist() == list(range(first, first + report.tokens))
    assert report.tokens == len(record["completion"]) + 1  # the end is predicted too
    assert report.nll_after < report.nll_before


# --- near-identical entries -----------------------------------------------------------------


@pytest.fixture(scope="module")
def merged(
    tmp_path_factory: pytest.TempPathFactory,
    tiny_checkpoint: Path,
    reference: Path,
    background: Path,
) -> tuple[MemoryPack, MemoryPack]:
    """A memory of a text with repetitions, whole and with near-identical entries merged."""
    root = tmp_path_factory.mktemp("merged")

    def one(name: str, cosine: float | None) -> MemoryPack:
        return build_memory(
            tiny_checkpoint,
            [reference, reference],
            root / name,
            settings=BuildSettings(**SMALL, precision="fp32", deduplicate=cosine),
            background=[background],
        ).pack

    return one("whole", None), one("merged", 0.97)


def expected_merging(
    pack: MemoryPack, gate: int, cosine: float
) -> tuple[list[int], dict[int, list[int]]]:
    """Of each kept row the rows that it stands for, found one pair at a time."""
    entries, origins = pack.read(pack.gates[gate]), pack.read_origins()
    assert origins is not None
    keys = unit_rows(entries.keys - entries.center)
    members: dict[int, list[int]] = {}
    for row, key in enumerate(keys):
        for kept in members:
            if (
                origins.token_ids[kept] == origins.token_ids[row]
                and (origins.documents[kept] < 0) == (origins.documents[row] < 0)
                and keys[kept] @ key >= cosine
            ):
                members[kept].append(row)
                break
        else:
            members[row] = [row]
    return list(members), members


def test_near_identical_entries_of_a_token_become_their_mean(
    merged: tuple[MemoryPack, MemoryPack],
) -> None:
    whole, less = merged
    origins = less.read_origins()
    assert origins is not None
    for gate in range(3):
        kept, members = expected_merging(whole, gate, 0.97)
        assert len(kept) < whole.entries / 2 + 40  # the text was given twice
        assert origins.merged[gate].tolist() == kept
        before, after = whole.read(whole.gates[gate]), less.read(less.gates[gate])
        for name in ("keys", "router_logits", "residuals"):
            means = [getattr(before, name)[rows].mean(0) for rows in members.values()]
            np.testing.assert_allclose(getattr(after, name), means, atol=1e-5)
        np.testing.assert_array_equal(before.center, after.center)
        documents = origins.documents_of(gate)
        assert not after.residuals[documents < 0].any()
    assert less.provenance["deduplicated"]["merged"]["0"] == whole.entries - len(origins.merged[0])


def test_a_pack_with_merged_entries_still_says_where_all_of_its_text_is(
    merged: tuple[MemoryPack, MemoryPack], tiny_bundle: Path
) -> None:
    whole, less = merged
    before, after = whole.read_origins(), less.read_origins()
    assert before is not None
    assert after is not None
    for name in ("token_ids", "documents", "positions"):
        np.testing.assert_array_equal(getattr(before, name), getattr(after, name))
    summary = summarize(less)
    assert [gate.entries for gate in summary.gates] == [gate.entries for gate in less.gates]
    assert all(gate.background > 0 for gate in summary.gates)
    for gate in range(3):
        assert after.counts[gate].sum() == whole.entries
    model = Model.load(tiny_bundle, memory=less, threads=1)
    assert np.isfinite(model.score(list(range(20)))).all()


def test_tokens_with_many_entries_are_compared_block_by_block(
    build: Build, reference: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = {"deduplicate": 0.97, "background": []}
    all_at_once = build(tmp_path / "a", [reference, reference], **settings)
    monkeypatch.setattr(deduplicate_module, "BLOCK", 4)
    blocks = build(tmp_path / "b", [reference, reference], **settings)
    assert all_at_once.entries[0] < blocks.entries[0] < blocks.tokens
    alone = build(tmp_path / "c", deduplicate=1.0)
    assert set(alone.entries.values()) == {alone.tokens + alone.background_tokens}


def test_a_copy_of_a_pack_with_merged_entries_keeps_its_origins(
    merged: tuple[MemoryPack, MemoryPack], tmp_path: Path
) -> None:
    less = merged[1]
    origins = less.read_origins()
    copy = write_pack(
        tmp_path / "copy",
        model=less.model,
        gates={gate.gate: less.read(gate) for gate in less.gates},
        variant=less.variant,
        neighbors=less.neighbors,
        similarity=less.similarity,
        calibration={gate.gate: gate.calibration for gate in less.gates},
        origins=origins,
        provenance=less.provenance,
    )
    found = copy.read_origins()
    assert origins is not None
    assert found is not None
    for gate in range(3):
        np.testing.assert_array_equal(found.merged[gate], origins.merged[gate])
        np.testing.assert_array_equal(found.counts[gate], origins.counts[gate])


def test_rows_that_are_not_there_are_refused(
    merged: tuple[MemoryPack, MemoryPack], tmp_path: Path
) -> None:
    import hashlib
    import shutil

    from safetensors.numpy import load_file, save_file

    shutil.copytree(merged[1].path, tmp_path / "p")
    path = tmp_path / "p" / "entries.safetensors"
    tensors = load_file(path)
    tensors["rows_01"][0] = -1
    save_file(tensors, path)
    manifest = json.loads((tmp_path / "p" / "memory.json").read_text())
    manifest["entries"] |= {
        "size": path.stat().st_size,
        "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
    }
    (tmp_path / "p" / "memory.json").write_text(json.dumps(manifest))
    with pytest.raises(MemoryPackError, match="rows_01 names rows"):
        MemoryPack.open(tmp_path / "p").read_origins()


@pytest.mark.parametrize("cosine", [0.3, 1.1, float("nan")])
def test_a_cosine_to_merge_at_is_near_one(cosine: float) -> None:
    with pytest.raises(SettingError, match="deduplicate"):
        BuildSettings(deduplicate=cosine)


# --- memory ---------------------------------------------------------------------------------

# A model of next to nothing, so that the entries are what could take room.
STREAMED = """
import sys, threading, time
from pathlib import Path
import torch
from knnmoe.calibration.build import build_memory
from knnmoe.calibration.settings import BuildSettings
torch.set_num_threads(1)
checkpoint, text, pack, peaks = sys.argv[1:]

def anonymous():
    for line in open("/proc/self/status"):
        if line.startswith("RssAnon"):
            return int(line.split()[1]) >> 10
    return 0

found = []
def progress(done, total):
    found.append(anonymous())
settings = BuildSettings(
    steps=0, rate="absolute", max_length=128, batch_tokens=2048, precision="fp32"
)
report = build_memory(checkpoint, [text], pack, settings=settings, progress=progress)
found.append(anonymous())
print(report.pack.entries, report.pack.bytes >> 20, max(found) - found[1])
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux's /proc")
def test_entries_of_a_long_text_never_lie_in_memory_together(tmp_path: Path) -> None:
    checkpoint = make_tiny_olmoe(tmp_path / "model", hidden_size=256, num_hidden_layers=2)
    rng = np.random.default_rng(0)
    text = tmp_path / "text.txt"
    text.write_text("\n".join("".join(map(chr, rng.integers(97, 123, 79))) for _ in range(1250)))
    process = subprocess.run(
        [sys.executable, "-c", STREAMED, *map(str, (checkpoint, text, tmp_path / "pack", ""))],
        capture_output=True,
        text=True,
        check=True,
    )
    entries, size, growth = map(int, process.stdout.split())
    assert entries > 99_000
    assert size > 200
    assert growth < 40


def test_a_tensor_file_is_written_in_any_order_and_read_in_chunks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from safetensors.numpy import load_file

    path = tmp_path / "a.safetensors"
    file = TensorFile.create(path, {"a": (np.float16, (10, 3)), "b": (np.float32, (2,))})
    rows = np.arange(30, dtype=np.float16).reshape(10, 3)
    file.write("a", 7, rows[7:])
    file.write("a", 0, rows[:4])
    file.write("b", 1, np.float32([5]))
    np.testing.assert_array_equal(file.read("a", 5, 3), [[0] * 3, [0] * 3, rows[7]])
    monkeypatch.setattr("knnmoe.calibration.tensor_file.CHUNK_BYTES", 13)
    chunks = dict(file.chunks("a"))
    assert list(chunks) == [0, 2, 4, 6, 8]
    np.testing.assert_array_equal(chunks[8], rows[8:])
    file.close()
    found = load_file(path)
    np.testing.assert_array_equal(found["a"][:4], rows[:4])
    np.testing.assert_array_equal(found["b"], [0, 5])
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(OutputError, match=r"damaged.*--restart"):
        TensorFile.open(path)


def test_the_plan_gives_every_entry_one_row_whatever_the_batches(
    tiny_checkpoint: Path, reference: Path, background: Path
) -> None:
    from knnmoe.calibration.corpus import Corpus
    from knnmoe.calibration.references import Reference
    from knnmoe.runtime.tokenizer import Tokenizer

    tokenizer = Tokenizer.load(tiny_checkpoint)
    corpora = [
        Corpus.read([Reference(path)], tokenizer, vocab_size=272, max_length=16)
        for path in (reference, background)
    ]
    for room in (16, 50, 10_000):
        found = plan(corpora[0], corpora[1], room)
        rows = np.concatenate(
            [np.arange(row, row + part.stop - part.start)
             for batch in found.batches for row, part in batch.slices()]
        )  # fmt: skip
        assert sorted(rows) == list(range(found.entries))
        for batch in found.batches:
            longest = batch.corpus.index.lengths[batch.sequences].max()
            assert len(batch.sequences) * longest <= max(room, longest)
            assert batch.background == (batch.corpus is corpora[1])


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.jsonl", '{"text": "fine"}\n{"text": '),
        ("a.jsonl", '{"messages": [{"role": "user", "content": "hi"}]}\n'),
        ("a.txt", "x"),
        ("a.txt", "caf\xe9"),
    ],
)
def test_text_that_cannot_be_used_leaves_a_pack_as_it_was(
    build: Build, tmp_path: Path, name: str, content: str
) -> None:
    build(tmp_path / "pack", gates="0")
    before = files(tmp_path / "pack")
    (tmp_path / name).write_bytes(content.encode("latin-1"))
    with pytest.raises(InputError, match=name):
        build_memory(
            make_tiny_olmoe(tmp_path / "model"),
            [tmp_path / name],
            tmp_path / "pack",
            overwrite=True,
        )
    assert files(tmp_path / "pack") == before
    assert not (tmp_path / "pack.partial").exists()
