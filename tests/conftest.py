"""Fixtures shared by all tests: a tiny random model, its bundle, a memory for it.

Where the exporter cannot run (the runtime's tests on a Python without onnx), the bundle is the one
in the directory KNNMOE_TEST_BUNDLE, which `tests/other_python.py` prepares.
"""

from __future__ import annotations

import os
import shutil
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest

from knnmoe.runtime.bundle import Bundle
from knnmoe.runtime.calibration import preset
from knnmoe.runtime.memory import MemoryPack
from knnmoe.runtime.pack_parts import EntryOrigins, GateEntries, ModelIdentity
from knnmoe.runtime.pack_writing import write_pack
from tiny import make_tiny_olmoe

ENTRIES = 300


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random OLMoE checkpoint."""
    return make_tiny_olmoe(tmp_path_factory.mktemp("checkpoint"))


@pytest.fixture(scope="session")
def tiny_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bundle of `tiny_checkpoint`; do not write into it."""
    prepared = os.environ.get("KNNMOE_TEST_BUNDLE")
    target = tmp_path_factory.mktemp("bundle") / "tiny"
    if find_spec("onnx_ir") is None:
        assert prepared, "no exporter here: set KNNMOE_TEST_BUNDLE to the bundle of a tiny model"
        shutil.copytree(prepared, target)
        return target
    from knnmoe.export.exporter import export

    export(make_tiny_olmoe(tmp_path_factory.mktemp("source")), target)
    return target


def make_entries(identity: ModelIdentity, gate: int, *, entries: int = ENTRIES) -> GateEntries:
    """Random entries for one gate, of the size of the model's own numbers."""
    rng = np.random.default_rng(1000 + gate)
    keys = rng.normal(size=(entries, identity.hidden_size)).astype(np.float32)
    logits = rng.normal(size=(entries, identity.num_experts)).astype(np.float32)
    residuals = rng.normal(size=(entries, identity.num_experts)).astype(np.float32)
    return GateEntries(keys, logits, residuals, keys.mean(axis=0))


def make_identity(bundle: Path) -> ModelIdentity:
    """Whose memory it has to be."""
    manifest = Bundle.open(bundle, verify=False).manifest
    shape = manifest.architecture
    return ModelIdentity(
        manifest.fingerprint,
        manifest.model_type,
        shape.num_gates,
        shape.hidden_size,
        shape.num_experts,
    )


def write_tiny_pack(path: Path, bundle: Path) -> MemoryPack:
    """A random memory of every gate of the tiny model."""
    identity = make_identity(bundle)
    numbers = np.arange(ENTRIES, dtype=np.int32)
    return write_pack(
        path,
        model=identity,
        gates={gate: make_entries(identity, gate) for gate in range(identity.num_gates)},
        variant="residual",
        neighbors=8,
        similarity="cosine",
        calibration=preset(
            "residual", weighting="softmax", midpoint=0.2, sharpness=3.0, sequence=1.0
        ),
        origins=EntryOrigins(numbers % 256, numbers // 100, numbers % 100),
        provenance={"made": "at random"},
    )


@pytest.fixture(scope="session")
def tiny_pack(tmp_path_factory: pytest.TempPathFactory, tiny_bundle: Path) -> Path:
    """A random memory of `tiny_bundle`; do not write into it."""
    return write_tiny_pack(tmp_path_factory.mktemp("pack") / "random", tiny_bundle).path
