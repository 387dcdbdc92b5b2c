"""The examples run as they stand, on the demo's model with a memory built of a few sentences."""

from __future__ import annotations

import io
import json
import runpy
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from knnmoe.calibration.build import build_memory
from knnmoe.calibration.settings import BuildSettings
from knnmoe.calibration.sources import Sources
from knnmoe.runtime import Model
from knnmoe.runtime.errors import InputError, MemoryPackError
from knnmoe.runtime.memory import MemoryPack

ROOT = Path(__file__).resolve().parents[2]
CHECKPOINT = ROOT / "examples" / "demo" / "model"
SENTENCES = (
    "In the beginning the heaven and the earth were without form, and void.",
    "And the evening and the morning were the first day, and there was light upon the waters.",
    "And the LORD spake unto Moses, saying, Speak unto the children of Israel.",
)


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from knnmoe.export.exporter import export

    return export(CHECKPOINT, tmp_path_factory.mktemp("demo") / "bundle").bundle


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "reference.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in SENTENCES))
    return path


@pytest.fixture(scope="module")
def other(reference: Path) -> Path:
    path = reference.with_name("general.txt")
    path.write_text("The function returns a list of the names that it was given, in order.")
    return path


@pytest.fixture(scope="module")
def pack(reference: Path, other: Path) -> Path:
    settings = BuildSettings(steps=1)
    target = reference.with_name("memory")
    return build_memory(
        CHECKPOINT, [reference], target, settings=settings, background=[other]
    ).pack.path


@pytest.fixture
def example(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Any:
    """Runs an example as a program of its own and returns what it printed."""

    def run(name: str, *arguments: object, stdin: str = "") -> str:
        monkeypatch.setattr(sys, "argv", [name, *map(str, arguments)])
        monkeypatch.setattr(sys, "stdin", io.StringIO(stdin))
        capsys.readouterr()
        runpy.run_path(str(ROOT / "examples" / f"{name}.py"), run_name="__main__")
        return capsys.readouterr().out

    return run


def test_chat_replies_line_by_line(example: Any, bundle: Path, pack: Path) -> None:
    model = Model.load(bundle, memory=pack)
    session, messages = model.session(), []
    expected = ""
    for question in ("In the beginning", "And then"):
        messages.append({"role": "user", "content": question})
        reply = session.chat(messages, max_new_tokens=40, seed=1).text
        messages.append({"role": "assistant", "content": reply})
        expected += f"> {reply}\n"
    assert model.metrics.reused_tokens > 0
    assert example("chat", bundle, pack, stdin="In the beginning\nAnd then\n\n") == expected + "> "


def test_embed_writes_and_counts(example: Any, bundle: Path, pack: Path) -> None:
    text = Model.load(bundle, memory=pack).generate("And it", max_new_tokens=20, seed=1).text
    shown = example("embed", bundle, pack, "And it")
    assert shown.startswith(f"And it{text} [length]\n20 tokens in ")


def test_hot_swap_takes_the_memory_of_each_line(example: Any, bundle: Path, pack: Path) -> None:
    lines = [f"bible: {SENTENCES[0]}", f"code: {SENTENCES[0]}", f"bible: {SENTENCES[0]}"]
    first, code, again = example(
        "hot_swap", bundle, f"bible={pack}", stdin="\n".join(lines)
    ).splitlines()
    assert first == again
    assert first.endswith("memory")
    assert code.endswith("frozen")
    assert float(first.split()[1]) > float(code.split()[1])  # of text that it knows


def test_the_inspector_shows_the_sentence_that_a_token_was_routed_by(
    example: Any, bundle: Path, pack: Path, reference: Path
) -> None:
    shown = example("routing_inspector", bundle, pack, reference, SENTENCES[2])
    assert shown.count("\n  gate ") > 20
    # A text that is in the memory finds itself, token for token.
    passage = "'And the LORD spake' [' unto'] ' Moses, saying, Speak"
    assert shown.count(f"s 1.00: document 2, token 5:\n    {passage}") == 4


# --- what the inspector stands on -----------------------------------------------------------


def test_a_passage_is_found_for_every_entry(
    bundle: Path, pack: Path, reference: Path, other: Path
) -> None:
    opened = MemoryPack.open(pack)
    sources = Sources.open(opened, [reference], bundle, background=[other])
    origins = opened.read_origins()
    assert origins is not None
    seen = set()
    for entry in range(opened.entries):
        found = sources.passage(0, entry, width=500)
        whole = other.read_text() if found.background else SENTENCES[found.document]
        assert found.before + found.token + found.after == whole
        assert found.token == sources.tokenizer.token_text(int(origins.token_ids[entry]))
        seen.add((found.background, found.document))
    assert seen == {(False, 0), (False, 1), (False, 2), (True, 0)}
    narrow = sources.passage(1, 10, width=2)
    assert len(sources.tokenizer.encode(narrow.before)) == 2
    without = Sources.open(opened, [reference], bundle).passage(0, opened.entries - 1)
    assert (without.background, without.before, without.after) == (True, "", "")
    assert without.token


def test_files_may_be_named_as_they_were_when_the_memory_was_built(
    bundle: Path, pack: Path, reference: Path, tmp_path: Path
) -> None:
    opened = MemoryPack.open(pack)
    lines = reference.read_text().splitlines(keepends=True)
    parts = [tmp_path / "one.jsonl", tmp_path / "more.jsonl"]
    for part, some in zip(parts, (lines[:1], lines[1:]), strict=True):
        part.write_text("".join(some))
    sources = Sources.open(opened, [parts[0], f"{parts[1]}@0.5"], bundle)
    whole = Sources.open(opened, [reference], bundle)
    entries = range(int((whole.origins.documents >= 0).sum()))
    assert [sources.passage(0, i) for i in entries] == [whole.passage(0, i) for i in entries]


def test_an_entry_that_stands_for_several_shows_its_first(
    bundle: Path, pack: Path, reference: Path
) -> None:
    import numpy as np

    sources = Sources.open(MemoryPack.open(pack), [reference], bundle)
    rows = np.array([4, 9], np.int32)
    merged = replace(sources.origins, merged={1: rows}, counts={1: rows})
    assert replace(sources, origins=merged).passage(1, 1) == sources.passage(1, 9)


def test_another_text_and_other_entries_are_refused(
    bundle: Path, pack: Path, reference: Path, other: Path, tiny_pack: Path
) -> None:
    opened = MemoryPack.open(pack)
    with pytest.raises(InputError, match=r"general\.txt: is not the reference text of this memory"):
        Sources.open(opened, [other], bundle)
    sources = Sources.open(opened, [reference], bundle)
    for gate, entry in ((0, opened.entries), (9, 0), (0, -1)):
        with pytest.raises(InputError, match=f"entry {entry} of gate {gate}: is not in the pack"):
            sources.passage(gate, entry)
    silent: Any = replace(opened, origins=None)
    with pytest.raises(MemoryPackError, match="does not say where its entries came from"):
        Sources.open(silent, [reference], bundle)
