"""An interrupted export goes on where it was, and gives the bundle it would have given."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from knnmoe.export import partial
from knnmoe.export.exporter import ExportReport, export
from knnmoe.runtime import atomic
from knnmoe.runtime.bundle import Bundle
from knnmoe.runtime.errors import CheckpointError, OutputError, VerificationError
from knnmoe.runtime.jobs import open_work, work_directory
from tiny import make_tiny

LAYERS = 2  # so there are three files of weights


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    return make_tiny(tmp_path_factory.mktemp("source"), num_hidden_layers=LAYERS)


@pytest.fixture(scope="module")
def whole(checkpoint, tmp_path_factory) -> dict[str, bytes]:
    """The files of an export that nothing interrupted."""
    bundle = tmp_path_factory.mktemp("whole") / "b"
    export(checkpoint, bundle)
    return content(bundle)


def content(root: Path) -> dict[str, bytes]:
    return {str(p.relative_to(root)): p.read_bytes() for p in root.rglob("*") if p.is_file()}


def names(path: Path) -> set[str]:
    return {entry.name for entry in path.iterdir()}


def interrupt(
    monkeypatch, after: int, error: BaseException | type[BaseException] = KeyboardInterrupt
) -> None:
    """Let so many files be written, and half of another."""
    write, left = partial.write_file, after

    def some(plan, directory, progress):
        nonlocal left
        if not left:
            (directory / plan.name).write_bytes(plan.header)
            raise error
        left -= 1
        return write(plan, directory, progress)

    monkeypatch.setattr(partial, "write_file", some)


def interrupted(monkeypatch, checkpoint: Path, bundle: Path, after: int = 2, **options) -> Path:
    with monkeypatch.context() as patch:
        interrupt(patch, after)
        with pytest.raises(KeyboardInterrupt):
            export(checkpoint, bundle, **options)
    return work_directory(bundle)


def counted(monkeypatch, run: Callable[[], ExportReport]) -> tuple[list[str], ExportReport]:
    """The files of weights that an export writes."""
    seen: list[str] = []
    write = partial.write_file

    def counting(plan, directory, progress):
        seen.append(plan.name)
        return write(plan, directory, progress)

    with monkeypatch.context() as patch:
        patch.setattr(partial, "write_file", counting)
        return seen, run()


@pytest.mark.parametrize("after", [0, 1, 2])
def test_finished_files_are_kept_and_not_written_again(
    checkpoint, whole, tmp_path, monkeypatch, after
):
    work = interrupted(monkeypatch, checkpoint, tmp_path / "b", after)
    assert work.exists() == (after > 0)  # nothing finished, nothing left behind
    assert not (tmp_path / "b").exists()
    wrote, _ = counted(monkeypatch, lambda: export(checkpoint, tmp_path / "b"))
    assert wrote == [f"{index:02d}.safetensors" for index in range(after, LAYERS + 1)]
    assert content(tmp_path / "b") == whole
    assert names(tmp_path) == {"b"}


def test_an_export_may_be_interrupted_again_and_again(checkpoint, whole, tmp_path, monkeypatch):
    for _ in range(LAYERS):
        interrupted(monkeypatch, checkpoint, tmp_path / "b", after=1)
    wrote, _ = counted(monkeypatch, lambda: export(checkpoint, tmp_path / "b"))
    assert wrote == ["02.safetensors"]
    assert content(tmp_path / "b") == whole


@pytest.mark.skipif(not hasattr(os, "fork"), reason="the killed process is a fork")
@pytest.mark.parametrize("stride", [29, pytest.param(1, marks=pytest.mark.slow)])
@pytest.mark.parametrize("overwrite", [False, True])
def test_killed_at_any_file_operation_it_goes_on_to_the_same_bundle(
    checkpoint, whole, tmp_path, overwrite, stride
):
    """A child dies, without any clean-up, before its n-th operation on the output."""
    old = tmp_path / "old"
    export(checkpoint, old, fused=False)
    step, survived = 0, False
    while not survived:
        bundle = tmp_path / str(step) / "b"
        bundle.parent.mkdir()
        if overwrite:
            shutil.copytree(old, bundle)
        survived = _die_at(step, bundle, lambda at: export(checkpoint, at, overwrite=overwrite))
        if bundle.exists():  # the whole of the old one or of the new one
            assert content(bundle) in ([content(old), whole] if overwrite else [whole])
        if overwrite or not bundle.exists():
            export(checkpoint, bundle, overwrite=overwrite)
        assert content(bundle) == whole
        step += stride
    assert step > 30


def _die_at(step: int, bundle: Path, run: Callable[[Path], object]) -> bool:
    """Whether a child lived through it, because it did no more than `step` operations."""
    child = os.fork()
    if child:
        return os.waitpid(child, 0)[1] == 0
    left = step

    def hook(event: str, arguments: tuple[object, ...]) -> None:
        nonlocal left
        if event not in ("open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.link"):
            return
        if not str(arguments[0]).startswith(str(bundle.parent)):
            return
        if event == "open" and not int(arguments[2]) & (os.O_WRONLY | os.O_RDWR):
            return
        left -= 1
        if left < 0:
            os._exit(9)

    sys.addaudithook(hook)
    try:
        run(bundle)
        os._exit(0)
    except BaseException:
        os._exit(1)


COMMAND = """
import signal, sys, time
# What runs in the background of a script inherits that it is not to be interrupted.
signal.signal(signal.SIGINT, signal.default_int_handler)
from knnmoe.export import partial
write, left = partial.write_file, int(sys.argv[3])
def some(plan, directory, progress):
    global left
    if not left:
        (directory / plan.name).write_bytes(plan.header)
        print("writing", flush=True)
        time.sleep(60)
    left -= 1
    return write(plan, directory, progress)
partial.write_file = some
from knnmoe.export.cli import main
main([sys.argv[1], sys.argv[2]])
"""


@pytest.mark.skipif(os.name == "nt", reason="signals")
@pytest.mark.parametrize(
    ("number", "after"),
    [pytest.param(signal.SIGTERM, 1, marks=pytest.mark.slow), (signal.SIGINT, 2),
     (signal.SIGKILL, 1)],
)  # fmt: skip
def test_a_killed_command_goes_on_when_it_is_given_again(
    checkpoint, whole, tmp_path, monkeypatch, number, after
):
    process = subprocess.Popen(
        [sys.executable, "-c", COMMAND, str(checkpoint), str(tmp_path / "b"), str(after)],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert process.stdout is not None
    assert process.stdout.readline() == "writing\n"
    process.send_signal(number)
    said = process.communicate(timeout=20)[1]
    assert process.returncode != 0
    assert ("same command again" in said) == (number != signal.SIGKILL)
    assert names(tmp_path) == {"b.partial"}
    wrote, _ = counted(monkeypatch, lambda: export(checkpoint, tmp_path / "b"))
    assert len(wrote) == LAYERS + 1 - after
    assert content(tmp_path / "b") == whole
    assert names(tmp_path) == {"b"}


def test_the_report_of_a_resumed_export_is_that_of_a_whole_one(tmp_path, monkeypatch):
    source = make_tiny(tmp_path / "c", num_hidden_layers=LAYERS)
    plain = export(source, tmp_path / "plain", precision="int4")
    interrupted(monkeypatch, source, tmp_path / "b", precision="int4")
    resumed = export(source, tmp_path / "b", precision="int4")
    assert len(plain.errors) > 8
    assert resumed.errors == plain.errors
    assert resumed.files == plain.files


def test_a_linked_export_goes_on(checkpoint, tmp_path, monkeypatch):
    export(checkpoint, tmp_path / "plain", link=True)
    interrupted(monkeypatch, checkpoint, tmp_path / "b", link=True)
    wrote, report = counted(monkeypatch, lambda: export(checkpoint, tmp_path / "b", link=True))
    assert len(wrote) == 1
    assert content(tmp_path / "b") == content(tmp_path / "plain")
    file = "segments/checkpoint/model.safetensors"
    assert (report.bundle / file).samefile(checkpoint / "model.safetensors")


@pytest.mark.parametrize(
    ("options", "message"),
    [({"precision": "fp16"}, "expected precision fp16, .*found precision fp32, "),
     ({"precision": "int4"}, "quantization {.*found .*quantization None"),
     ({"link": True}, "expected link True.*found link False")],
)  # fmt: skip
def test_other_settings_do_not_go_on_with_it(checkpoint, tmp_path, monkeypatch, options, message):
    work = interrupted(monkeypatch, checkpoint, tmp_path / "b")
    before = content(work)
    with pytest.raises(
        OutputError, match=f"partial: an interrupted export .* is here; .*{message}.*--restart"
    ):
        export(checkpoint, tmp_path / "b", **options)
    assert content(work) == before
    export(checkpoint, tmp_path / "b", restart=True, **options)
    assert names(tmp_path) == {"b"}


def test_another_checkpoint_config_or_version_does_not_go_on_with_it(tmp_path, monkeypatch):
    source = make_tiny(tmp_path / "c", num_hidden_layers=LAYERS)
    whole_tensors = load_file(source / "model.safetensors")
    config = (source / "config.json").read_text()
    interrupted(monkeypatch, source, tmp_path / "b")

    def refused(entry: str) -> None:
        with pytest.raises(OutputError, match=f"expected {entry} .*; found {entry} "):
            export(source, tmp_path / "b")

    changed = whole_tensors | {"model.norm.weight": whole_tensors["model.norm.weight"] * 2}
    save_file(changed, source / "model.safetensors")
    refused("fingerprint")
    save_file(whole_tensors, source / "model.safetensors")
    (source / "config.json").write_text(json.dumps(json.loads(config) | {"rope_theta": 500.0}))
    refused("config")
    (source / "config.json").write_text(config)
    with monkeypatch.context() as patch:
        patch.setattr("knnmoe.export.exporter.__version__", "0.0.1")
        refused("producer")
    wrote, _ = counted(monkeypatch, lambda: export(source, tmp_path / "b"))
    assert wrote == ["02.safetensors"]


def test_restart_writes_everything_anew(checkpoint, whole, tmp_path, monkeypatch):
    interrupted(monkeypatch, checkpoint, tmp_path / "b")
    wrote, _ = counted(monkeypatch, lambda: export(checkpoint, tmp_path / "b", restart=True))
    assert len(wrote) == LAYERS + 1
    assert content(tmp_path / "b") == whole


def test_what_was_damaged_meanwhile_is_written_again(checkpoint, whole, tmp_path, monkeypatch):
    work = interrupted(monkeypatch, checkpoint, tmp_path / "b")
    file = work / "bundle" / "segments" / "00.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    wrote, _ = counted(monkeypatch, lambda: export(checkpoint, tmp_path / "b"))
    assert wrote == ["00.safetensors", "02.safetensors"]
    assert content(tmp_path / "b") == whole


@pytest.mark.parametrize("torn", ['{"file": "segm', "[]\n", '{"file": 1}\n', "\xff"])
def test_a_line_that_was_not_written_to_its_end_does_not_count(
    checkpoint, whole, tmp_path, monkeypatch, torn
):
    work = interrupted(monkeypatch, checkpoint, tmp_path / "b")
    journal = work / "finished.jsonl"
    lines = journal.read_text().splitlines(keepends=True)
    journal.write_text(lines[0] + torn, encoding="latin-1" if torn == "\xff" else "utf-8")
    after = 0 if torn == "\xff" else 1  # a journal that is no text counts for nothing
    wrote, _ = counted(monkeypatch, lambda: export(checkpoint, tmp_path / "b"))
    assert wrote == [f"{index:02d}.safetensors" for index in range(after, LAYERS + 1)]
    assert content(tmp_path / "b") == whole


def test_something_else_of_that_name_is_never_touched(checkpoint, tmp_path):
    mine = tmp_path / "b.partial"
    mine.mkdir()
    (mine / "thesis.tex").write_text("years of work")
    for restart in (False, True):
        with pytest.raises(OutputError, match=r"b\.partial: is in the way.*Move it"):
            export(checkpoint, tmp_path / "b", restart=restart)
    assert content(tmp_path) == {"b.partial/thesis.tex": b"years of work"}


def test_an_interrupted_memory_build_of_that_name_is_not_discarded(checkpoint, tmp_path):
    open_work(work_directory(tmp_path / "b"), "memory build", {}, what="build", fix="")
    before = content(tmp_path)
    for restart in (False, True):
        with pytest.raises(OutputError, match=r"b\.partial: .*another command.*found memory build"):
            export(checkpoint, tmp_path / "b", restart=restart)
    assert content(tmp_path) == before


def test_two_exports_of_one_bundle_do_not_meet(checkpoint, whole, tmp_path, monkeypatch):
    def second(*_: object) -> None:
        with pytest.raises(OutputError, match="another export is writing there"):
            export(checkpoint, tmp_path / "b", restart=True)

    export(checkpoint, tmp_path / "b", check=second)
    assert content(tmp_path / "b") == whole


def test_the_old_bundle_stays_until_the_new_one_is_whole(checkpoint, tmp_path, monkeypatch):
    export(checkpoint, tmp_path / "b", fused=False)
    old = content(tmp_path / "b")
    interrupted(monkeypatch, checkpoint, tmp_path / "b", overwrite=True)
    assert content(tmp_path / "b") == old
    with pytest.raises(OutputError, match="--overwrite"):
        export(checkpoint, tmp_path / "b")
    export(checkpoint, tmp_path / "b", overwrite=True)
    assert Bundle.open(tmp_path / "b").manifest.fused is not None


def test_an_old_bundle_that_was_moved_away_comes_back(checkpoint, tmp_path, monkeypatch):
    export(checkpoint, tmp_path / "b", fused=False)
    old = content(tmp_path / "b")
    work = interrupted(monkeypatch, checkpoint, tmp_path / "b", overwrite=True)
    (tmp_path / "b").rename(work / "bundle.old")  # as if killed between two renames
    with pytest.raises(OutputError, match="--overwrite"):
        export(checkpoint, tmp_path / "b")
    assert content(tmp_path / "b") == old


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_on_a_full_disk_what_is_finished_is_kept(checkpoint, whole, tmp_path, monkeypatch, number):
    with monkeypatch.context() as patch:
        interrupt(patch, 1, OSError(number, os.strerror(number)))
        with pytest.raises(OutputError, match=r"disk is full.*what is finished was kept"):
            export(checkpoint, tmp_path / "b")
    wrote, _ = counted(monkeypatch, lambda: export(checkpoint, tmp_path / "b"))
    assert wrote == ["01.safetensors", "02.safetensors"]
    assert content(tmp_path / "b") == whole


def test_a_failure_that_would_be_there_again_leaves_nothing(checkpoint, tmp_path, monkeypatch):
    def refuse(_: Bundle) -> None:
        raise VerificationError("logits", "disagree")

    with pytest.raises(VerificationError):
        export(checkpoint, tmp_path / "b", check=refuse)
    assert not names(tmp_path)
    source = make_tiny(tmp_path / "c", dtype="float32")
    tensors = load_file(source / "model.safetensors")
    tensors["lm_head.weight"][0, 0] = np.inf
    save_file(tensors, source / "model.safetensors")
    with pytest.raises(CheckpointError, match="fp16 cannot hold"):
        export(source, tmp_path / "b", precision="fp16")
    assert names(tmp_path) == {"c"}


def test_only_what_is_missing_must_fit_on_the_disk(checkpoint, tmp_path, monkeypatch):
    work = interrupted(monkeypatch, checkpoint, tmp_path / "b")
    before = content(work)
    kept = sum((work / "bundle" / "segments" / f"0{n}.safetensors").stat().st_size for n in (0, 1))

    def room(free: int) -> None:
        monkeypatch.setattr(atomic.shutil, "disk_usage", lambda _: type("U", (), {"free": free})())

    room(1000)
    with pytest.raises(OutputError) as caught:
        export(checkpoint, tmp_path / "b")
    assert caught.value.problem == "not enough free disk space"
    assert caught.value.found == "1000 B"
    assert content(work) == before
    room(kept + (32 << 20) - 1)  # less than the whole with its graphs, more than the rest
    export(checkpoint, tmp_path / "b")
    assert names(tmp_path) == {"b"}
