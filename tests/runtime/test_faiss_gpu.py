"""faiss on a GPU: what is said where there is none, and which index goes to the device."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from knnmoe.runtime.blend import GateMemory, search
from knnmoe.runtime.errors import BackendError
from knnmoe.runtime.gates import faiss as gates_faiss
from knnmoe.runtime.gates.faiss import FaissGate, FaissGpuGate, build_index
from knnmoe.runtime.gates.select import make_gate
from knnmoe.runtime.routing import RoutingRule
from memories import random_memory

faiss = pytest.importorskip("faiss")

RULE = RoutingRule(2)


class FakeGpu:
    """A faiss with one GPU, on which an index stays the CPU's own."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, devices: int = 1) -> None:
        self.moved: list[Any] = []
        self.scratch = 0
        extras = {
            "StandardGpuResources": lambda: SimpleNamespace(setTempMemory=self._set_scratch),
            "get_num_gpus": lambda: devices,
            "index_cpu_to_gpu": self._move,
        }
        self.module = SimpleNamespace(**{**vars(faiss), **extras})
        monkeypatch.setattr(gates_faiss, "load_faiss", lambda: self.module)
        monkeypatch.setattr("knnmoe.runtime.gates.select.load_faiss", lambda: self.module)
        # A cache of the real function would keep this stand-in alive for other tests.
        monkeypatch.setattr(gates_faiss, "_gpu_resources", gates_faiss._gpu_resources.__wrapped__)

    def _set_scratch(self, size: int) -> None:
        self.scratch = size

    def _move(self, _resources: Any, device: int, index: Any) -> Any:
        self.moved.append((device, type(index).__name__, index.ntotal))
        return index


def gate(memory: GateMemory | None) -> Any:
    return make_gate("faiss-gpu", memory, RULE, 2, lambda name: pytest.fail(name))


def test_a_faiss_without_gpu_support_says_what_to_install() -> None:
    if hasattr(faiss, "StandardGpuResources"):
        pytest.skip("this faiss is built for GPUs")
    for memory in (random_memory(0), None):
        with pytest.raises(BackendError, match=r"built without GPU support.*faiss-cpu"):
            gate(memory)


def test_a_faiss_that_sees_no_device_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    FakeGpu(monkeypatch, devices=0)
    with pytest.raises(BackendError, match="faiss sees no GPU"):
        gate(random_memory(0))


def test_without_faiss_the_error_is_that_of_the_cpu_gate(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "faiss", None)
    with pytest.raises(BackendError, match="faiss is not installed"):
        gate(random_memory(0))


def test_only_the_valid_keys_go_to_the_first_device(monkeypatch: pytest.MonkeyPatch) -> None:
    fake = FakeGpu(monkeypatch)
    build_index(random_memory(1, entries=40, n_valid=30), gpu=True)
    assert fake.moved == [(0, "IndexFlat", 30)]
    assert 0 < fake.scratch < 1 << 30


def test_a_large_memory_goes_there_as_an_inverted_file(monkeypatch: pytest.MonkeyPatch) -> None:
    fake = FakeGpu(monkeypatch)
    memory = random_memory(2, entries=4000)
    index = build_index(memory, exact_entries=1000, gpu=True)
    assert fake.moved == [(0, "IndexIVFFlat", 4000)]
    assert not FaissGpuGate(RULE, 2, memory, index=index).exact


def test_nothing_goes_to_a_device_unasked(monkeypatch: pytest.MonkeyPatch) -> None:
    fake = FakeGpu(monkeypatch)
    made = make_gate("faiss", random_memory(3), RULE, 2, lambda name: pytest.fail(name))
    assert fake.moved == []
    assert isinstance(made, FaissGate)
    assert made.backend == "faiss"


@pytest.mark.parametrize("similarity", ["cosine", "rbf"])
def test_the_gate_on_the_device_finds_what_the_reference_finds(
    monkeypatch: pytest.MonkeyPatch, similarity: Any
) -> None:
    FakeGpu(monkeypatch)
    memory = random_memory(4, entries=200, similarity=similarity, n_valid=150)
    made = gate(memory)
    assert made.backend == "faiss-gpu"
    x = np.random.default_rng(0).normal(size=(7, 16)).astype(np.float32)
    ids, similarities, _ = made.find(memory, x)
    exact_ids, exact_similarities, _ = search(x, memory, np.float64)
    np.testing.assert_array_equal(ids, exact_ids)
    np.testing.assert_allclose(similarities, exact_similarities, atol=1e-5)
