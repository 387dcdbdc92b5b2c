"""Directories appear whole or not at all."""

from __future__ import annotations

import contextlib
import errno
import os
import stat
import time
from pathlib import Path
from typing import Any

import pytest

from knnmoe.runtime import atomic
from knnmoe.runtime.atomic import new_directory, readable_size
from knnmoe.runtime.errors import OutputError

OURS = '{"schema": "knnmoe.memory/1"}'


def names(path: Path) -> set[str]:
    return {entry.name for entry in path.iterdir()}


def make(path: Path, content: str, **options: bool) -> None:
    with new_directory(path, **options) as directory:
        (directory / "memory.json").write_text(OURS)
        (directory / "data").write_text(content)


def fail(path: Path, error: BaseException, **options: Any) -> None:
    with new_directory(path, **options) as directory:
        (directory / "data").write_text("new")
        raise error


def test_nothing_bears_the_name_before_the_end(tmp_path):
    with new_directory(tmp_path / "pack") as directory:
        assert directory.parent == tmp_path
        assert not (tmp_path / "pack").exists()
        (directory / "sub").mkdir()
        (directory / "sub" / "data").write_text("content")
    assert (tmp_path / "pack" / "sub" / "data").read_text() == "content"
    assert names(tmp_path) == {"pack"}


def test_permissions_are_those_of_any_new_directory(tmp_path):
    (tmp_path / "plain").mkdir()
    make(tmp_path / "pack", "")
    modes = {stat.S_IMODE((tmp_path / name).stat().st_mode) for name in ("plain", "pack")}
    assert len(modes) == 1


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit])
def test_a_failure_leaves_what_was_there_before(tmp_path, error):
    make(tmp_path / "pack", "old")
    with pytest.raises(error):
        fail(tmp_path / "pack", error(), overwrite=True)
    assert (tmp_path / "pack" / "data").read_text() == "old"
    assert names(tmp_path) == {"pack"}


def test_overwriting_replaces_the_whole(tmp_path):
    make(tmp_path / "pack", "old")
    (tmp_path / "pack" / "stale").touch()
    make(tmp_path / "pack", "new", overwrite=True)
    assert (tmp_path / "pack" / "data").read_text() == "new"
    assert names(tmp_path / "pack") == {"memory.json", "data"}
    assert names(tmp_path) == {"pack"}


def test_an_empty_directory_is_taken(tmp_path):
    (tmp_path / "pack").mkdir()
    make(tmp_path / "pack", "new")
    assert (tmp_path / "pack" / "data").read_text() == "new"


def test_what_is_in_the_way_is_refused(tmp_path):
    (tmp_path / "file").touch()
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "photo").touch()
    (tmp_path / "link").symlink_to(tmp_path / "full")
    for name, options, problem in (
        ("nowhere/pack", {}, "parent directory does not exist"),
        ("file", {"overwrite": True}, "not a directory"),
        ("link", {"overwrite": True}, "symbolic link"),
        ("full", {}, "not empty"),
        ("full", {"overwrite": True}, "no bundle, memory pack or engine set"),
    ):
        with pytest.raises(OutputError, match=problem) as caught:
            make(tmp_path / name, "", **options)
        assert caught.value.fix
    assert names(tmp_path / "full") == {"photo"}
    assert names(tmp_path) == {"file", "full", "link"}


@pytest.mark.parametrize(
    "error",
    [OSError(errno.ENOSPC, "No space left on device"), OSError(errno.EDQUOT, "Quota exceeded"),
     RuntimeError("Io error: No space left on device (os error 28)")],
)  # fmt: skip
def test_a_full_disk_is_a_stated_failure(tmp_path, error):
    with pytest.raises(OutputError, match=r"disk is full; expected 5\.0 KiB in all"):
        fail(tmp_path / "pack", error, needed_bytes=5120)
    assert not names(tmp_path)


def test_an_error_about_other_files_stays_what_it_is(tmp_path):
    with pytest.raises(PermissionError), new_directory(tmp_path / "pack"):
        raise PermissionError(errno.EACCES, "Permission denied", "/elsewhere/file")


def test_an_unwritable_output_is_a_stated_failure(tmp_path):
    with pytest.raises(OutputError, match="cannot be written"), new_directory(tmp_path / "p") as d:
        raise PermissionError(errno.EACCES, "Permission denied", str(d / "file"))
    assert not names(tmp_path)


def test_a_parent_that_cannot_be_written_to_is_a_stated_failure(tmp_path, monkeypatch):
    def refuse(self: Path, *_: object) -> None:
        raise PermissionError(errno.EACCES, "Permission denied", str(self))

    monkeypatch.setattr(Path, "mkdir", refuse)
    with pytest.raises(OutputError, match=r"cannot be written \(Permission denied\)"):
        make(tmp_path / "pack", "")


def test_too_little_room_is_noticed_at_once(tmp_path):
    with (
        pytest.raises(OutputError, match="not enough free disk space"),
        new_directory(tmp_path / "pack", needed_bytes=1 << 60),
    ):
        raise AssertionError("the block must not run")
    assert not names(tmp_path)


def test_the_old_one_comes_back_if_the_new_one_cannot_be_moved(tmp_path, monkeypatch):
    make(tmp_path / "pack", "old")
    rename = Path.rename

    def refuse(self: Path, target: Path) -> Path:
        if self.name.endswith(".partial"):
            raise OSError(errno.EIO, "Input/output error")
        return rename(self, target)

    monkeypatch.setattr(atomic, "exchange", lambda one, other: False)
    monkeypatch.setattr(Path, "rename", refuse)
    with pytest.raises(OutputError, match="Input/output"):
        make(tmp_path / "pack", "new", overwrite=True)
    assert (tmp_path / "pack" / "data").read_text() == "old"
    assert names(tmp_path) == {"pack"}


def test_where_names_cannot_change_places_the_next_writer_brings_the_old_one_back(
    tmp_path, monkeypatch
):
    make(tmp_path / "pack", "old")
    rename = Path.rename

    def die(self: Path, target: Path) -> Path:
        if self.name.endswith(".partial"):
            os._exit(9)
        return rename(self, target)

    monkeypatch.setattr(atomic, "exchange", lambda one, other: False)
    monkeypatch.setattr(Path, "rename", die)
    child = os.fork()
    if not child:
        make(tmp_path / "pack", "new", overwrite=True)
        os._exit(0)
    assert os.waitpid(child, 0)[1] != 0
    monkeypatch.undo()
    assert not (tmp_path / "pack").exists()
    monkeypatch.setattr(atomic, "STALE_AFTER_SECONDS", 0.0)
    atomic.remove_stale(tmp_path / "pack")
    assert (tmp_path / "pack" / "data").read_text() == "old"
    assert names(tmp_path) == {"pack"}


def test_a_write_that_failed_while_names_changed_places_is_not_taken_for_another_system(
    tmp_path,
):
    (tmp_path / "one").mkdir()
    with pytest.raises(FileNotFoundError):
        atomic.exchange(tmp_path / "one", tmp_path / "two")


def test_remains_of_a_killed_writer_of_a_file_are_removed(tmp_path):
    left = tmp_path / ".report.html.0123abcd.partial"
    left.touch()
    age(left)
    atomic.write_file(tmp_path / "report.html", b"new")
    assert names(tmp_path) == {"report.html"}


def age(path: Path) -> None:
    old = time.time() - 2 * atomic.STALE_AFTER_SECONDS
    os.utime(path, (old, old))


def test_remains_of_a_killed_writer_are_removed_and_nothing_else(tmp_path):
    for name in (".pack.0123abcd.partial", ".pack.notours.partial.x", ".other.0123abcd.partial"):
        (tmp_path / name).mkdir()
        age(tmp_path / name)
    make(tmp_path / "pack", "new")
    assert names(tmp_path) == {"pack", ".pack.notours.partial.x", ".other.0123abcd.partial"}


@pytest.mark.parametrize("left", [".pack.0123abcd.old", ".pack.0123abcd.partial"])
def test_remains_that_another_writer_removes_first_are_no_failure(tmp_path, monkeypatch, left):
    found = atomic._siblings

    def gone(target: Path, form: str) -> list[Path]:
        there = found(target, form)
        return [*there, tmp_path / left] if left.endswith(form[-4:]) else there

    monkeypatch.setattr(atomic, "_siblings", gone)
    make(tmp_path / "pack", "new")
    assert names(tmp_path) == {"pack"}


def test_a_writer_that_is_alive_is_left_alone(tmp_path):
    with new_directory(tmp_path / "pack", overwrite=True) as directory:
        age(directory)
        make(tmp_path / "pack", "the other was faster")
        assert directory.is_dir()
    assert not names(tmp_path / "pack")


def test_what_another_writer_finished_meanwhile_is_kept(tmp_path):
    race = contextlib.ExitStack()
    race.enter_context(new_directory(tmp_path / "pack"))
    make(tmp_path / "pack", "the other was faster")
    with pytest.raises(OutputError, match="not empty"):
        race.close()
    assert (tmp_path / "pack" / "data").read_text() == "the other was faster"
    assert names(tmp_path) == {"pack"}


@pytest.mark.parametrize(
    ("count", "text"), [(0, "0 B"), (1023, "1023 B"), (1536, "1.5 KiB"), (27 << 30, "27.0 GiB"),
                        (3 << 40, "3.0 TiB")],
)  # fmt: skip
def test_sizes_are_readable(count, text):
    assert readable_size(count) == text
