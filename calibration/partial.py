"""The work directory of a build: what is done already, so that an interrupted build goes on.

    PACK.partial/
        job.json                 what is being built, in full
        gate-00.safetensors …    a gate's tensors at their final size, zero where not learned yet
        done.jsonl               a line a finished batch: its number, likelihoods and checksum

Rows go to their final place as they are learned, so nothing is assembled at the end. A batch
counts when its line is there and its rows have the checksum of the line: whatever a crash left
unwritten is learned again, and every batch is a function of the job alone, so that a build that
went on gives the same numbers as one that never stopped.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from knnmoe.runtime.atomic import output_error
from knnmoe.runtime.errors import OutputError
from knnmoe.runtime.jobs import Kind, discard_work, locked_work, open_work, work_directory

from .plan import Batch
from .tensor_file import DAMAGED, TensorFile

DONE = "done.jsonl"
KIND: Kind = "memory build"
RESTART = "Build with the same text and settings as before, or pass --restart to start afresh."
ROW_TENSORS = ("keys", "router_logits", "residuals")

# gate → name of a tensor → rows
GateTensors = Mapping[int, Mapping[str, NDArray[Any]]]


@dataclass(frozen=True)
class _Done:
    """A line of `done.jsonl`."""

    batch: int
    nll: tuple[float, float]
    crc: int


@dataclass(frozen=True)
class PartialBuild:
    """An open work directory; use `PartialBuild.open`, then `prepare`.

    Attributes:
        path: The directory.
        files: By gate.
    """

    path: Path
    files: dict[int, TensorFile] = field(default_factory=dict)
    _done: dict[int, _Done] = field(default_factory=dict)

    @staticmethod
    @contextmanager
    def open(
        pack: Path, job: Mapping[str, Any], *, restart: bool = False
    ) -> Iterator[PartialBuild]:
        """Yield the work directory beside `pack`, the one that is there or a new one.

        It is this process's alone while the block runs, and gone when that succeeds. If the block
        fails, what is finished stays for the next time with the same job.

        Args:
            pack: Where the memory pack will be.
            job: All that the result depends on, as JSON.
            restart: Discard what is there.

        Raises:
            OutputError: If there is one of another job, another build is at work there, or the
                directory cannot be made.
        """
        path = work_directory(pack)
        if restart:
            with locked_work(path, KIND):
                discard_work(path, KIND)
        open_work(path, KIND, job, what="build of other text or settings", fix=RESTART)
        with locked_work(path, KIND):
            partial = PartialBuild(path)
            try:
                yield partial
            except BaseException:
                partial._close()
                if not partial._done:
                    discard_work(path, KIND)
                raise
            partial._close()
            discard_work(path, KIND)

    def prepare(
        self,
        gates: Sequence[int],
        entries: int,
        widths: tuple[int, int],
        dtype: type[np.floating[Any]],
        batches: Sequence[Batch],
    ) -> None:
        """Open the gates' files, made if they are not there, and find out which batches are done.

        Args:
            gates: Whose entries are built.
            entries: Rows of each.
            widths: D and E.
            dtype: Of the rows.
            batches: Of the plan.

        Raises:
            OutputError: If something in the directory is damaged.
        """
        hidden, experts = widths
        for gate in gates:
            path = self.path / gate_file(gate)
            if not path.exists():
                columns = dict(zip(ROW_TENSORS, (hidden, experts, experts), strict=True))
                shapes = {name: (dtype, (entries, width)) for name, width in columns.items()}
                center = {"center": (np.float32, (hidden,))}
                temporary = path.with_suffix(".tmp")
                TensorFile.create(temporary, {**shapes, **center}).close()
                temporary.replace(path)
            self.files[gate] = TensorFile.open(path)
        for done in self._lines():
            if not 0 <= done.batch < len(batches):
                raise OutputError(self.path / DONE, "damaged", found=f"batch {done.batch}",
                                  fix=DAMAGED)  # fmt: skip
            if self._checksum(batches[done.batch]) == done.crc:
                self._done[done.batch] = done

    def has(self, batch: int) -> bool:
        """Whether a batch is finished."""
        return batch in self._done

    def write(self, batch: Batch, tensors: GateTensors, nll: tuple[float, float]) -> None:
        """Store a finished batch: its rows at their places, then its line.

        Args:
            batch: The batch.
            tensors: By gate and name, rows in the order of the batch's sequences.
            nll: Summed negative log-likelihood of its predicted tokens, before and after.

        Raises:
            OutputError: If it cannot be written; what is finished stays.
        """
        crc = 0
        try:
            for gate, file in self.files.items():
                for name in ROW_TENSORS:
                    rows = np.ascontiguousarray(tensors[gate][name])
                    for row, part in batch.slices():
                        file.write(name, row, rows[part])
                    crc = zlib.crc32(rows.data.cast("B") if rows.size else b"", crc)
            done = _Done(batch.number, nll, crc)
            with (self.path / DONE).open("a", encoding="utf-8") as stream:
                stream.write(json.dumps(vars(done)) + "\n")
        except OSError as error:
            left = "the same command goes on from here"
            raise output_error(self.path, error, left=left) from error
        self._done[batch.number] = done

    def nll(self, batches: Sequence[Batch]) -> tuple[float, float]:
        """Summed over some finished batches, before and after; in order, whoever came first."""
        lines = [self._done[batch.number].nll for batch in batches]
        return sum(before for before, _ in lines), sum(after for _, after in lines)

    def _close(self) -> None:
        for file in self.files.values():
            file.close()
        self.files.clear()

    def _checksum(self, batch: Batch) -> int:
        crc = 0
        for file in self.files.values():
            for name in ROW_TENSORS:
                for row, part in batch.slices():
                    rows = file.read(name, row, part.stop - part.start)
                    crc = zlib.crc32(rows.tobytes(), crc)
        return crc

    def _lines(self) -> Iterator[_Done]:
        path = self.path / DONE
        if not path.exists():
            return
        text = path.read_text(encoding="utf-8", errors="replace")
        whole = text[: text.rfind("\n") + 1]
        if whole != text:  # the last line was being written
            path.write_text(whole, encoding="utf-8")
        yield from (_parse(path, line) for line in whole.splitlines())


def _parse(path: Path, line: str) -> _Done:
    try:
        found = json.loads(line)
        before, after = map(float, found["nll"])
        return _Done(int(found["batch"]), (before, after), int(found["crc"]))
    except (ValueError, KeyError, TypeError) as error:
        raise OutputError(path, "damaged", found=line[:60], fix=DAMAGED) from error


def gate_file(gate: int) -> str:
    """Name of a gate's file."""
    return f"gate-{gate:02d}.safetensors"
