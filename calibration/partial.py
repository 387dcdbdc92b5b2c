"""The work directory of a build: what is done already, so that an interrupted build goes on.

    PACK.partial/
        job.json                    what is being built, in full
        batch-00000.safetensors …   one a finished batch

A batch appears whole or not at all, and every batch is a function of the job alone, so that a build
that went on gives the same numbers as one that never stopped.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from knnmoe.runtime.errors import OutputError
from knnmoe.runtime.jobs import discard_work, open_work, work_directory

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
        if restart:
            partial.remove()
        open_work(partial.path, job, what="build of other text or settings", fix=RESTART)
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
        discard_work(self.path)

    def _file(self, batch: int) -> Path:
        return self.path / f"batch-{batch:05d}.safetensors"
