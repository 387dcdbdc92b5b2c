"""The plugin library in TensorRT's lean runtime: a second real registry."""

from __future__ import annotations

import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
from plugin_library import built_harness, built_plugin

SCRIPT = Path(__file__).parent / "plugin_in_lean.py"


def test_the_lean_runtime_takes_the_plugin_and_refuses_bad_fields() -> None:
    if find_spec("tensorrt_lean_bindings") is None or find_spec("tensorrt_lean_libs") is None:
        pytest.skip("tensorrt-lean-cu13-libs and tensorrt-lean-cu13-bindings are not installed")
    done = subprocess.run(
        [sys.executable, SCRIPT, built_plugin(), built_harness()],
        capture_output=True, text=True, check=False, timeout=300,
    )  # fmt: skip
    assert "taken by 1" in done.stdout, done.stdout[-2000:] + done.stderr[-4000:]
    # Through TensorRT's logger where there is one of the major version it was built for.
    said = done.stdout + done.stderr
    assert 'similarity must be "cosine" or "rbf", is "dot"' in said
    assert 'takes no field "unheard_of"' in said
