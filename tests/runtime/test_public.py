"""The names a program may rely on, and what importing them costs."""

from __future__ import annotations

import subprocess
import sys

import knnmoe.runtime as runtime

PUBLIC = (
    "Bundle",
    "Calibration",
    "Completion",
    "Event",
    "GenerationConfig",
    "Hooks",
    "KnnMoeError",
    "MemoryPack",
    "Metrics",
    "Model",
    "NewEntries",
    "RoutingTrace",
    "Session",
    "StepRecord",
)


def test_the_public_names_are_these() -> None:
    assert runtime.__all__ == PUBLIC
    for name in PUBLIC:
        assert getattr(runtime, name).__name__ == name
    assert not hasattr(runtime, "torch")


def test_the_runtime_imports_neither_torch_nor_transformers_nor_onnx() -> None:
    code = (
        "import sys, knnmoe.runtime as r; [getattr(r, n) for n in r.__all__];"
        "import knnmoe.runtime.cli, knnmoe.runtime.gates.select, knnmoe.runtime.profiling.report;"
        "heavy = ('torch', 'transformers', 'onnx', 'onnx_ir', 'faiss');"
        "print([m for m in heavy if m in sys.modules])"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"
