"""The work directory of a build: what is done already, so that an interrupted build goes on.

    PACK.partial/
        job.json                    what is being built, in full
        batch-00000.safetensors …   one a finished batch

A batch appears whole or not at all, and every batch is a function of the job alone, so that a build
that went on gives the same numbers as one that never stopped.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from knnmoe.runtime.atomic import new_directory
from knnmoe.runtime.errors import OutputError

JOB = "job.json"
RESTART = "Build with the same text and settings as before, or pass --restart to start afresh."

Tensors = dict[str, NDArray[Any]]


@dataclass(frozen=True)
class PartialBuild:
    """An open work directory; use `PartialBuild.open`."""

    path: Path

    @staticmethod
    def open(pack: Path, job: Mapping[str, Any], *, restart: bool = False) -> PartialBuild:
        """Go on with the work directory beside `pack`, or start one.

        Args:
            pack: Where the memory pack will be.
            job: All that the result depends on, as JSON.
            restart: Discard what is there.

        Raises:
            OutputError: If there is one of another job, or the directory cannot be made.
        """
        partial = PartialBuild(work_directory(pack))
        if partial.path.is_symlink() or (partial.path.exists() and not partial.path.is_dir()):
            raise OutputError(partial.path, "is not a directory", fix="Move it out of the way.")
        if restart:
            partial.remove()
        if partial.path.exists():
            partial._check(dict(job))
            return partial
        with new_directory(partial.path) as directory:
            text = json.dumps(dict(job), indent=2) + "\n"
            (directory / JOB).write_text(text, encoding="utf-8")
        return partial

    def has(self, batch: int) -> bool:
        """Whether a batch is finished."""
        return self._file(batch).exists()

    @property
    def finished(self) -> int:
        """Batches that are finished."""
        return sum(1 for _ in self.path.glob("batch-*.safetensors"))

    def write(self, batch: int, tensors: Tensors) -> None:
        """Store a finished batch.

        Raises:
            OutputError: If it cannot be written; what is finished stays.
        """
        final = self._file(batch)
        temporary = final.with_suffix(".tmp")
        try:
            save_file(tensors, temporary)
            with temporary.open("rb") as stream:
                os.fsync(stream.fileno())
            temporary.replace(final)
        except (OSError, SafetensorError) as error:
            temporary.unlink(missing_ok=True)
            raise OutputError(
                self.path,
                f"cannot be written ({error})",
                fix="Free some room, then run the same command to go on.",
            ) from error

    def read(self, batch: int) -> Tensors:
        """A finished batch."""
        try:
            tensors: Tensors = load_file(self._file(batch))
        except (OSError, SafetensorError) as error:
            raise OutputError(self._file(batch), "damaged", found=error,
                              fix="Pass --restart to start afresh.") from error  # fmt: skip
        return tensors

    def remove(self) -> None:
        """Remove the directory with all that is in it."""
        if self.path.exists():
            shutil.rmtree(self.path)

    def _file(self, batch: int) -> Path:
        return self.path / f"batch-{batch:05d}.safetensors"

    def _check(self, job: dict[str, Any]) -> None:
        try:
            found = json.loads((self.path / JOB).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise OutputError(
                self.path / JOB, "cannot be read", found=error, fix=RESTART
            ) from error
        expected = json.loads(json.dumps(job))  # as the other one went
        if found == expected:
            return
        other = found if isinstance(found, dict) else {}
        differing = [name for name in expected if other.get(name) != expected[name]]
        raise OutputError(
            self.path,
            "an interrupted build of other text or settings is here",
            expected=", ".join(f"{name} {expected[name]}" for name in differing),
            found=", ".join(f"{name} {other.get(name)}" for name in differing),
            fix=RESTART,
        )


def work_directory(pack: Path) -> Path:
    """The work directory of a build of `pack`."""
    return pack.with_name(pack.name + ".partial")
