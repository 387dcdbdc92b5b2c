"""Unfinished work, kept in a directory beside its result and bound to one job.

    RESULT.partial/
        job.json    whose work it is, and all that it depends on; the rest is theirs

A directory is gone on with only if its job is the same, entry by entry. A bundle and a memory pack
may bear the same name, and so does their work: neither goes on with the other's, or discards it.
"""

from __future__ import annotations

import json
import os
import secrets
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

from .atomic import STALE_FORM, lock_directory, new_directory, output_error
from .errors import OutputError

JOB = "job.json"
Kind = Literal["export", "memory build"]


def work_directory(target: Path) -> Path:
    """Where the unfinished work of `target` lies."""
    return target.with_name(target.name + ".partial")


def open_work(path: Path, kind: Kind, job: Mapping[str, Any], *, what: str, fix: str) -> None:
    """Start a work directory, or go on with the one that is there.

    Args:
        path: The work directory.
        kind: Whose work it is; goes into the job.
        job: All that the result depends on, as JSON.
        what: Has been interrupted if there is one of another job, for the message.
        fix: What to do then.

    Raises:
        OutputError: If there is one of another job, or the directory cannot be made.
    """
    refuse_foreign(path, kind)
    whole = {"kind": kind, **job}
    if path.exists():
        _check(path, whole, what, fix)
        return
    with new_directory(path) as directory:
        text = json.dumps(whole, indent=2) + "\n"
        (directory / JOB).write_text(text, encoding="utf-8")


@contextmanager
def locked_work(path: Path, kind: Kind) -> Iterator[None]:
    """Be the only one to write into a work directory, or discard it, while the block runs.

    Nothing is locked where nothing is there, nor on a system without such locks. A writer that is
    killed leaves no lock behind.

    Raises:
        OutputError: If another process is at work there, or what is there is not of this kind.
    """
    refuse_foreign(path, kind)
    if not path.exists():
        yield
        return
    taken = OutputError(
        path, f"another {kind} is writing there",
        fix="Wait until it has finished, or choose another name.",
    )  # fmt: skip
    try:
        lock = lock_directory(path)
    except BlockingIOError as error:
        raise taken from error
    if lock is None:
        yield
        return
    try:
        # It may have been discarded before the lock was ours, and another begun.
        if not (path.exists() and os.path.samestat(os.fstat(lock), path.stat())):
            raise taken
        yield
    finally:
        os.close(lock)


def discard_work(path: Path, kind: Kind) -> None:
    """Remove a work directory of this kind with all that is in it, if there is one.

    It loses its name first, so that what a killed removal leaves is not taken for work: the next
    `new_directory` of that name clears it away.

    Raises:
        OutputError: If what is there is no work directory, or one of another kind, or the system
            does not let it be renamed.
    """
    refuse_foreign(path, kind)
    if not path.exists():
        return
    doomed = path.with_name(STALE_FORM.format(name=path.name, token=secrets.token_hex(4)))
    try:
        path.rename(doomed)
    except OSError as error:
        raise output_error(path, error, left="it can be removed by hand") from error
    shutil.rmtree(doomed, ignore_errors=True)


def refuse_foreign(path: Path, kind: Kind) -> None:
    """Raise `OutputError` if something other than a work directory of this kind is at `path`.

    One whose job cannot be read, or does not say of what kind it is, is nobody else's.
    """
    if path.is_symlink() or (path.exists() and not (path / JOB).is_file()):
        raise OutputError(
            path,
            "is in the way: unfinished work is kept there",
            expected=f"a directory with {JOB}, or nothing",
            fix="Move it out of the way.",
        )
    try:
        job = _read_job(path)
    except (OSError, ValueError):
        return
    found = job.get("kind", kind) if isinstance(job, dict) else kind
    if found != kind:
        raise OutputError(
            path,
            "holds the unfinished work of another command",
            expected=f"that of this one ({kind}), or nothing",
            found=found,
            fix="Choose another name, or let the other command finish or discard it first.",
        )


def _read_job(path: Path) -> Any:
    return json.loads((path / JOB).read_text(encoding="utf-8"))


def _check(path: Path, job: dict[str, Any], what: str, fix: str) -> None:
    try:
        found = _read_job(path)
    except (OSError, ValueError) as error:
        raise OutputError(path / JOB, "cannot be read", found=error, fix=fix) from error
    expected = json.loads(json.dumps(job))  # as the other one went
    if found == expected:
        return
    other = found if isinstance(found, dict) else {}
    differing = [name for name in expected if other.get(name) != expected[name]]
    raise OutputError(
        path,
        f"an interrupted {what} is here",
        expected=", ".join(f"{name} {expected[name]}" for name in differing),
        found=", ".join(f"{name} {other.get(name)}" for name in differing),
        fix=fix,
    )
