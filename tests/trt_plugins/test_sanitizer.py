"""No kernel reads or writes outside of what it was given, uninitialised or not."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from emulated import SANITIZERS, compile_emulation

SCRIPT = Path(__file__).parent / "sanitized.py"


def test_random_calls_are_clean_under_the_sanitizers() -> None:
    run = subprocess.run(
        ["g++", "-print-file-name=libasan.so"], capture_output=True, text=True, check=True
    )
    runtime = Path(run.stdout.strip())
    if not runtime.is_absolute():
        pytest.skip("g++ comes without the address sanitizer")
    compile_emulation(flags=SANITIZERS)  # here, where no sanitizer slows the compiler down
    environment = {
        **os.environ,
        "LD_PRELOAD": str(runtime),
        "ASAN_OPTIONS": "detect_leaks=0:detect_stack_use_after_return=0:abort_on_error=0",
        "UBSAN_OPTIONS": "halt_on_error=1:print_stacktrace=1",
    }
    done = subprocess.run(
        [sys.executable, SCRIPT, "25"], capture_output=True, text=True, check=False,
        env=environment, timeout=300,
    )  # fmt: skip
    assert done.stdout.endswith("clean\n"), done.stderr[-6000:]
