"""Unfinished work is gone on with, or discarded, only by the command whose work it is."""

from __future__ import annotations

import errno
from pathlib import Path

import pytest

from knnmoe.runtime import jobs
from knnmoe.runtime.atomic import lock_directory
from knnmoe.runtime.errors import OutputError
from knnmoe.runtime.jobs import (
    Kind,
    discard_work,
    locked_work,
    open_work,
    refuse_foreign,
    work_directory,
)

FIX = "Pass --restart."


def begun(target: Path, kind: Kind, **job: object) -> Path:
    work = work_directory(target)
    open_work(work, kind, job, what="thing", fix=FIX)
    (work / "finished").write_text("hours of work")
    return work


def test_the_same_job_goes_on(tmp_path: Path) -> None:
    work = begun(tmp_path / "x", "export", seed=1)
    open_work(work, "export", {"seed": 1}, what="thing", fix=FIX)
    assert (work / "finished").read_text() == "hours of work"


def test_another_job_is_told_what_differs(tmp_path: Path) -> None:
    work = begun(tmp_path / "x", "export", seed=1, layers=2)
    with pytest.raises(OutputError, match=r"expected seed 2; found seed 1\..*--restart"):
        open_work(work, "export", {"seed": 2, "layers": 2}, what="thing", fix=FIX)


@pytest.mark.parametrize(
    ("ours", "others"), [("export", "memory build"), ("memory build", "export")]
)
def test_the_work_of_another_kind_is_neither_taken_nor_discarded(
    tmp_path: Path, ours: Kind, others: Kind
) -> None:
    work = begun(tmp_path / "x", others, seed=1)
    for use in (
        lambda: open_work(work, ours, {"seed": 1}, what="thing", fix=FIX),
        lambda: discard_work(work, ours),
        lambda: refuse_foreign(work, ours),
    ):
        with pytest.raises(OutputError, match=rf"another command.*\({ours}\).*found {others}\."):
            use()
    assert (work / "finished").read_text() == "hours of work"
    discard_work(work, others)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("damaged", ["{", "[]", '{"seed": 1}', "\xff"])
def test_work_that_does_not_say_whose_it_is_can_be_discarded(tmp_path: Path, damaged: str) -> None:
    work = begun(tmp_path / "x", "export", seed=1)
    (work / "job.json").write_bytes(damaged.encode("latin-1"))
    with pytest.raises(OutputError, match="--restart"):
        open_work(work, "export", {"seed": 1}, what="thing", fix=FIX)
    discard_work(work, "export")
    assert not work.exists()


def test_work_that_was_discarded_while_its_lock_was_awaited_is_not_written_into(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    work = begun(tmp_path / "x", "export", seed=1)

    def late(directory: Path) -> int | None:
        lock = lock_directory(directory)
        discard_work(directory, "export")
        begun(tmp_path / "x", "export", seed=2)
        return lock

    monkeypatch.setattr(jobs, "lock_directory", late)
    with (
        pytest.raises(OutputError, match="another export is writing there"),
        locked_work(work, "export"),
    ):
        pytest.fail("two writers")


def test_work_that_cannot_be_renamed_is_a_stated_failure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    work = begun(tmp_path / "x", "export", seed=1)

    def full(path: Path, target: Path) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", str(path), None, str(target))

    monkeypatch.setattr(Path, "rename", full)
    with pytest.raises(OutputError, match=r"x\.partial: the disk is full.*removed by hand"):
        discard_work(work, "export")
    assert (work / "finished").read_text() == "hours of work"
