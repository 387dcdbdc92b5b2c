"""Killed, cut from power, or out of room at any operation on files: the old one or the new one.

`driver.py` forks a writer for each point; `shim.c` ends it there, or lets the operation fail. What
must hold afterwards is `driver._examine`.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from safetensors.numpy import load_file

from knnmoe.runtime.memory import MemoryPack
from tiny import make_tiny

HERE = Path(__file__).parent
TESTS = HERE.parent
FULL_DISK, BROKEN_DISK = ("full", "ENOSPC"), ("fail", "EIO")
ALL = (
    ("kill", ""), ("power", ""), FULL_DISK, BROKEN_DISK,
    ("fail", "ENOSPC"), ("fail", "EROFS"), ("fail", "EACCES"), ("full", "EDQUOT"),
)  # fmt: skip


@pytest.fixture(scope="session")
def shim(tmp_path_factory: pytest.TempPathFactory) -> Path:
    compiler = shutil.which("cc")
    if compiler is None or not sys.platform.startswith("linux"):
        pytest.skip("faults are injected with a preloaded C library, on Linux")
    library = tmp_path_factory.mktemp("shim") / "shim.so"
    command = [compiler, "-shared", "-fPIC", "-O1", "-o", library, HERE / "shim.c", "-ldl"]
    subprocess.run(command, check=True)
    return library


def drive(shim: Path, work: Path, scenario: str, faults: list[tuple[str, str, int, int]]) -> None:
    """Try the faults, and raise if anything was not as it must be."""
    import knnmoe

    source = Path(knnmoe.__file__).parents[1]
    paths = os.pathsep.join(map(str, (source, TESTS, HERE)))
    done = subprocess.run(
        [sys.executable, str(HERE / "driver.py"), scenario, json.dumps(faults), str(work)],
        env={**os.environ, "LD_PRELOAD": str(shim), "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    found: list[dict[str, Any]] = json.loads(done.stdout.splitlines()[-1])
    for (mode, error, *_), one in zip(faults, found, strict=True):
        assert one["wrong"] == [], f"{scenario}, {mode} {error}"
        assert one["points"] >= 2, f"{scenario}, {mode} {error}: nothing was interrupted"


@pytest.fixture
def work(tmp_path: Path) -> Iterator[Path]:
    """An empty directory, in memory where that is to be had: flushing costs nothing there."""
    memory = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=memory if memory.is_dir() else tmp_path) as name:
        yield Path(name)


@pytest.mark.parametrize("scenario", ["a pack over another", "the settings of a pack"])
def test_a_pack_is_the_old_or_the_new_one_whatever_interrupts_its_writer(
    shim: Path, work: Path, scenario: str
) -> None:
    faults = [(*ALL[0], 0, 1), (*ALL[1], 0, 2), (*FULL_DISK, 1, 3), (*BROKEN_DISK, 2, 3)]
    drive(shim, work, scenario, faults)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("scenario", "stride"),
    [("a new pack", 1), ("a pack over another", 1), ("the settings of a pack", 1),
     ("a compressed pack over another", 1), ("a page over another", 1), ("a new bundle", 9),
     ("a bundle over another", 11), ("a new memory", 17), ("a memory over another", 23),
     ("engines over others", 1)],
)  # fmt: skip
def test_every_writer_leaves_the_old_or_the_new_one_whatever_interrupts_it(
    shim: Path, work: Path, scenario: str, stride: int
) -> None:
    faults = [(*fault, index % stride, stride) for index, fault in enumerate(ALL)]
    drive(shim, work, scenario, faults)


@pytest.mark.slow
def test_a_build_that_is_killed_at_any_time_goes_on_to_the_same_memory(
    tmp_path: Path,
) -> None:
    checkpoint = make_tiny(tmp_path / "checkpoint", num_hidden_layers=1)
    text = "The spring was late that year, and the river stood high. " * 20
    (tmp_path / "text.txt").write_text(text)
    command = [
        sys.executable, "-m", "knnmoe.runtime.cli", "memory", "build", str(checkpoint),
        str(tmp_path / "text.txt"),
    ]  # fmt: skip
    options = ["--max-length", "32", "--overwrite"]
    begun = time.monotonic()
    subprocess.run([*command, str(tmp_path / "whole"), *options], check=True, capture_output=True)
    lasts = time.monotonic() - begun
    draw = random.Random(0)
    for _ in range(6):
        process = subprocess.Popen(
            [*command, str(tmp_path / "pack"), *options],
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        time.sleep(draw.uniform(0.3, 1.0) * lasts)
        process.send_signal(signal.SIGKILL)
        process.wait()
        if (tmp_path / "pack").exists():
            MemoryPack.open(tmp_path / "pack")
    subprocess.run([*command, str(tmp_path / "pack"), *options], check=True, capture_output=True)
    for one in MemoryPack.open(tmp_path / "whole").gates:
        whole = load_file(tmp_path / "whole" / one.stored.file)
        found = load_file(tmp_path / "pack" / one.stored.file)
        assert all((whole[name] == found[name]).all() for name in whole)
    assert not (tmp_path / "pack.partial").exists()
