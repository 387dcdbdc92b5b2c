"""Unfinished work, kept in a directory beside its result and bound to one job.

    RESULT.partial/
        job.json    all that the work depends on; the rest is whoever's who does the work

A directory is gone on with only if its job is the same, entry by entry.
"""

from __future__ import annotations

import json
import secrets
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .atomic import STALE_FORM, new_directory
from .errors import OutputError

JOB = "job.json"


def work_directory(target: Path) -> Path:
    """Where the unfinished work of `target` lies."""
    return target.with_name(target.name + ".partial")


def open_work(path: Path, job: Mapping[str, Any], *, what: str, fix: str) -> None:
    """Start a work directory, or go on with the one that is there.

    Args:
        path: The work directory.
        job: All that the result depends on, as JSON.
        what: Has been interrupted if there is one of another job, for the message.
        fix: What to do then.

    Raises:
        OutputError: If there is one of another job, or the directory cannot be made.
    """
    refuse_foreign(path)
    if path.exists():
        _check(path, dict(job), what, fix)
        return
    with new_directory(path) as directory:
        text = json.dumps(dict(job), indent=2) + "\n"
        (directory / JOB).write_text(text, encoding="utf-8")


def discard_work(path: Path) -> None:
    """Remove a work directory with all that is in it, if there is one.

    It loses its name first, so that what a killed removal leaves is not taken for work: the next
    `new_directory` of that name clears it away.

    Raises:
        OutputError: If what is there is no work directory.
    """
    refuse_foreign(path)
    if not path.exists():
        return
    doomed = path.with_name(STALE_FORM.format(name=path.name, token=secrets.token_hex(4)))
    path.rename(doomed)
    shutil.rmtree(doomed, ignore_errors=True)


def refuse_foreign(path: Path) -> None:
    """Raise `OutputError` if something other than a work directory is at `path`."""
    if path.is_symlink() or (path.exists() and not (path / JOB).is_file()):
        raise OutputError(
            path,
            "is in the way: unfinished work is kept there",
            expected=f"a directory with {JOB}, or nothing",
            fix="Move it out of the way.",
        )


def _check(path: Path, job: dict[str, Any], what: str, fix: str) -> None:
    try:
        found = json.loads((path / JOB).read_text(encoding="utf-8"))
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
