"""The work directory of an export: what is written already, so that an interrupted export goes on.

    BUNDLE.partial/
        job.json         what the files that are kept depend on
        finished.jsonl   a line a finished file: its hash, its size, and what storing changed
        writing/         the file that is being written
        bundle/          becomes the bundle

A file of weights moves from `writing` to `bundle` when it is whole and on the disk, and has its
line after that. Whoever goes on hashes what has a line, and writes again what has none or another
hash. Graphs, gates and the manifest take no time, and are always written anew.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from knnmoe.runtime.atomic import (
    as_output_error,
    check_free_space,
    check_replaceable,
    move_into_place,
    remove_stale,
    sync,
    sync_tree,
)
from knnmoe.runtime.bundle import FileSpec, describe_file
from knnmoe.runtime.errors import KnnMoeError, OutputError
from knnmoe.runtime.jobs import (
    Kind,
    discard_work,
    locked_work,
    open_work,
    refuse_foreign,
    work_directory,
)

from .quantize import TensorError
from .weights import PlannedFile, write_file

FINISHED, WRITING, BUNDLE, OLD = "finished.jsonl", "writing", "bundle", "bundle.old"
KIND: Kind = "export"
RESTART = "Export with the same settings as before, or pass --restart to start afresh."


@dataclass(frozen=True)
class Finished:
    """A finished file: what it must be, and what storing changed of its weights."""

    spec: FileSpec
    errors: tuple[TensorError, ...]


@dataclass(frozen=True)
class PartialExport:
    """An open work directory; use `partial_export`.

    Attributes:
        path: The directory.
        found: What was finished when it was opened, by path in the bundle.
    """

    path: Path
    found: Mapping[str, Finished]

    @property
    def bundle(self) -> Path:
        """The directory that becomes the bundle."""
        return self.path / BUNDLE

    def write(
        self,
        file: PlannedFile,
        folder: str,
        progress: Callable[[int], None],
        errors: Callable[[], tuple[TensorError, ...]],
    ) -> Finished:
        """Write a file of weights, or take the one that is there.

        Args:
            file: What to write.
            folder: Of the bundle.
            progress: Called with the number of bytes just written.
            errors: Asked, when the file is written, what that changed of its weights.
        """
        name = f"{folder}/{file.name}"
        written, final = self.path / WRITING / file.name, self.bundle / name
        known = self.found.get(name)
        if known is not None and final.is_file():
            if describe_file(final, progress) == known.spec:
                return known
            final.unlink()
        spec = write_file(file, self.path / WRITING, progress)
        sync(written)
        written.rename(final)
        sync(final.parent)
        done = Finished(spec, errors())
        with (self.path / FINISHED).open("a", encoding="utf-8") as stream:
            stream.write(_line(name, done))
            stream.flush()
            os.fsync(stream.fileno())
        return done


@contextmanager
def partial_export(
    target: Path,
    job: Callable[[], Mapping[str, Any]],
    *,
    overwrite: bool,
    restart: bool,
    needed_bytes: int,
) -> Iterator[PartialExport]:
    """Yield the work directory of `target`, whose `bundle` takes its name when the block succeeds.

    If the block is interrupted, finished files stay, for the next time with the same job. If it
    fails for a reason that would be there again, or nothing is finished, nothing stays.

    Args:
        target: The bundle to create.
        job: Makes what the files depend on, as JSON; called once there is enough room.
        overwrite: Replace a bundle that is there.
        restart: Discard what is finished.
        needed_bytes: Of the whole bundle.

    Raises:
        OutputError: As `new_directory` does, and if another export of `target` is at work, or one
            with another job has been interrupted.
    """
    path = work_directory(target)
    _tidy(path, target)
    check_replaceable(target, overwrite=overwrite)
    if restart:
        with locked_work(path, KIND):
            discard_work(path, KIND)
    kept = _read_finished(path)
    check_free_space(target.parent, needed_bytes - sum(f.spec.size for f in kept.values()))
    open_work(path, KIND, job(), what="export with other settings", fix=RESTART)
    with locked_work(path, KIND):
        try:
            partial = _prepared(path)
            yield partial
            sync_tree(partial.bundle)
            # Once more: somebody may have written there meanwhile.
            check_replaceable(target, overwrite=overwrite)
            move_into_place(partial.bundle, target)
        except BaseException as error:
            hopeless = isinstance(error, KnnMoeError) and not isinstance(error, OutputError)
            if hopeless or not _read_finished(path):
                discard_work(path, KIND)
            left = "what is finished was kept" if path.exists() else "nothing was left behind"
            stated = as_output_error(error, target, path, needed_bytes, left)
            if stated is None:
                raise
            raise stated from error
        discard_work(path, KIND)


def _tidy(path: Path, target: Path) -> None:
    """Clear away what killed exports of `target` left that is of no use, and undo half a move."""
    remove_stale(target)
    remove_stale(path)
    refuse_foreign(path, KIND)
    if not path.exists():
        return
    with locked_work(path, KIND):
        if (path / OLD).exists() and not target.exists():
            (path / OLD).rename(target)
        if not (path / BUNDLE).exists() and target.exists() and (path / FINISHED).exists():
            discard_work(path, KIND)  # killed behind the move


def _prepared(path: Path) -> PartialExport:
    """Keep the files that are finished, and nothing else."""
    partial = PartialExport(path, _read_finished(path))
    for directory, _, files in os.walk(partial.bundle):
        for file in files:
            kept = Path(directory, file).relative_to(partial.bundle).as_posix() in partial.found
            if not kept:
                Path(directory, file).unlink()
    shutil.rmtree(path / WRITING, ignore_errors=True)
    (path / WRITING).mkdir()
    for folder in (BUNDLE, f"{BUNDLE}/segments", f"{BUNDLE}/gates"):
        (path / folder).mkdir(exist_ok=True)
    # Without a line that was not written to its end, so that further ones can follow.
    lines = path / WRITING / FINISHED
    lines.write_text("".join(_line(*item) for item in partial.found.items()), encoding="utf-8")
    sync(lines)
    lines.replace(path / FINISHED)
    return partial


def _line(name: str, done: Finished) -> str:
    errors = [asdict(error) for error in done.errors]
    return json.dumps({"file": name, **asdict(done.spec), "errors": errors}) + "\n"


def _read_finished(path: Path) -> dict[str, Finished]:
    """The lines of the journal, up to one that was not written to its end."""
    found: dict[str, Finished] = {}
    try:
        text = (path / FINISHED).read_text(encoding="utf-8")
    except (FileNotFoundError, UnicodeDecodeError):
        return found
    for line in text.splitlines():
        entry = _entry(line)
        if entry is None:
            break
        found[entry[0]] = entry[1]
    return found


def _entry(line: str) -> tuple[str, Finished] | None:
    try:
        entry = json.loads(line)
        spec = FileSpec(str(entry["sha256"]), int(entry["size"]))
        errors = tuple(TensorError(**error) for error in entry["errors"])
        return str(entry["file"]), Finished(spec, errors)
    except (ValueError, KeyError, TypeError):
        return None
