"""The CuPy host: its launches run on the emulated device, and what NVRTC says to the sources.

No GPU is needed: a stand-in for the few things asked of CuPy keeps arrays in NumPy and runs each
launch on the emulation.
"""

from __future__ import annotations

import ctypes
import sys
from dataclasses import replace
from types import SimpleNamespace
from typing import Any, ClassVar

import numpy as np
import pytest
from blend_cases import Case, check, in_two_stages
from emulated import aligned, library, store
from nvrtc import compiled

from knnmoe.runtime.blend import Blended
from knnmoe.runtime.errors import BackendError, SettingError
from knnmoe.trt_plugins.cupy_prototype import (
    CupyBlend,
    MemoryArrays,
    import_cupy,
)
from knnmoe.trt_plugins.plan import KEY_TYPES, MAX_TILES, SOURCE, KeyType
from memories import random_calibration, random_memory


class FakeArray(np.ndarray):
    """A NumPy array that says where it is as CuPy's do."""

    @property
    def data(self) -> Any:  # type: ignore[override]
        return SimpleNamespace(ptr=self.ctypes.data)


class FakeKernel:
    limits: ClassVar[dict[str, int]] = {}  # of the function, whatever object stands for it

    def __init__(self, name: str) -> None:
        self.name = name

    @property
    def max_dynamic_shared_size_bytes(self) -> int:
        return self.limits.get(self.name, 48 * 1024)

    @max_dynamic_shared_size_bytes.setter
    def max_dynamic_shared_size_bytes(self, limit: int) -> None:
        self.limits[self.name] = limit

    def __call__(
        self, grid: tuple[int, int], block: tuple[int], args: tuple[Any], *, shared_mem: int
    ) -> None:
        assert shared_mem <= self.max_dynamic_shared_size_bytes
        (params,) = args
        assert params.size == 1  # CuPy passes NumPy arrays of one element by value
        error = library().knnmoe_launch(
            self.name.encode(), ctypes.c_void_p(params.ctypes.data), *grid, *block,
            ctypes.c_longlong(shared_mem),
        )  # fmt: skip
        assert error is None, error


def fake_cupy() -> Any:
    def asarray(source: Any, dtype: Any = None) -> FakeArray:
        if isinstance(source, FakeArray) and dtype in (None, source.dtype):
            return source
        array: FakeArray = aligned(np.asarray(source, dtype)).view(FakeArray)
        return array

    def empty(shape: Any, dtype: Any) -> FakeArray:
        poisoned = asarray(np.zeros(shape, dtype))
        poisoned.view(np.uint8)[...] = 0xFF
        return poisoned

    attributes = {"MultiProcessorCount": 2, "MaxSharedMemoryPerBlockOptin": 99 * 1024}
    return SimpleNamespace(
        ndarray=FakeArray,
        asarray=asarray,
        ascontiguousarray=asarray,
        from_dlpack=lambda x: asarray(x.numpy()),
        zeros=lambda shape, dtype: asarray(np.zeros(shape, dtype)),
        empty=empty,
        cuda=SimpleNamespace(Device=lambda: SimpleNamespace(attributes=attributes)),
        RawModule=lambda code, options: SimpleNamespace(get_function=FakeKernel),
    )


def make_case(key_type: KeyType, tokens: int, similarity: Any = "cosine") -> Case:
    memory = random_memory(
        tokens, entries=70, hidden_size=24, k=5, similarity=similarity, n_valid=60,
        calibration=random_calibration(tokens),
    )  # fmt: skip
    rng = np.random.default_rng(tokens)
    return Case(
        store(memory, key_type, half_values=key_type != "f32"),
        rng.normal(size=(tokens, 24)).astype(np.float32),
        rng.normal(size=(tokens, 6)).astype(np.float32),
        np.ones((1, 2), np.float32),
        np.array([tokens]),
        {},
    )


def make_blend(case: Case, max_tokens: int = 40, **changed: Any) -> CupyBlend:
    memory = case.stored.memory
    arrays: dict[str, Any] = {
        "keys": case.stored.keys, "key_scales": case.stored.key_scales,
        "values": case.stored.values, "center": memory.center,
        "calibration": memory.calibration.vector(), "n_valid": memory.n_valid, "k": memory.k,
        "similarity": memory.similarity,
    }  # fmt: skip
    if scan := case.stored.scan:
        arrays |= {"scan_keys": scan.keys, "scan_scales": scan.scales}
        arrays |= {"candidates": case.stored.candidates}
    return CupyBlend(MemoryArrays(**{**arrays, **changed}), max_tokens=max_tokens, cupy=fake_cupy())


@pytest.mark.parametrize("key_type", KEY_TYPES)
@pytest.mark.parametrize("similarity", ["cosine", "rbf"])
@pytest.mark.parametrize("tokens", [1, 6, 16, 33])
def test_the_launches_blend(key_type: KeyType, similarity: Any, tokens: int) -> None:
    case = make_case(key_type, tokens, similarity)
    got = make_blend(case)(case.x, case.r, case.state, case.lengths)
    outputs = (got.rows, got.confidence, got.neighbors, got.similarities, got.state)
    check(case, Blended(*(np.asarray(x) for x in outputs)))


@pytest.mark.parametrize("key_type", ["f32", "f16"])
@pytest.mark.parametrize("similarity", ["cosine", "rbf"])
@pytest.mark.parametrize("tokens", [1, 6, 16, 33])
def test_the_launches_blend_in_two_stages(key_type: KeyType, similarity: Any, tokens: int) -> None:
    case = make_case(key_type, tokens, similarity)
    case = replace(case, stored=in_two_stages(case.stored, 12))
    got = make_blend(case)(case.x, case.r, case.state, case.lengths)
    outputs = (got.rows, got.confidence, got.neighbors, got.similarities, got.state)
    check(case, Blended(*(np.asarray(x) for x in outputs)))


def test_a_bound_call_in_two_stages_sees_new_keys_of_both_stages() -> None:
    case, other = (
        replace(case, stored=in_two_stages(case.stored, 6))
        for case in (make_case("f16", 3), make_case("f16", 4))
    )
    blend = make_blend(case)
    bound = blend.bind(case.x, case.r, case.state, case.lengths)
    stored = other.stored
    assert stored.scan is not None
    blend.update(
        keys=stored.keys, key_scales=stored.key_scales, scan_keys=stored.scan.keys,
        scan_scales=stored.scan.scales, values=stored.values, center=stored.memory.center,
        calibration=stored.memory.calibration.vector(),
    )  # fmt: skip
    bound.run()
    fresh = make_blend(other)(case.x, case.r, case.state, case.lengths)
    np.testing.assert_array_equal(bound.rows, fresh.rows)
    np.testing.assert_array_equal(bound.neighbors, fresh.neighbors)


def test_what_does_not_fit_two_stages_is_refused_by_name() -> None:
    case = make_case("f16", 2)
    case = replace(case, stored=in_two_stages(case.stored, 12))
    scan = case.stored.scan
    assert scan is not None
    for changed, problem in (
        ({"scan_keys": None}, "scan_keys: missing"),
        ({"scan_scales": None}, "scan_scales: missing"),
        ({"scan_keys": scan.keys[:-1]}, "scan_keys: of another shape"),
        ({"scan_scales": scan.scales[:, :1]}, "scan_scales: of another shape"),
        ({"scan_keys": case.stored.keys}, "scan_keys: of another type"),
        ({"keys": scan.keys}, "keys: cannot be int8"),
        ({"candidates": 4}, "candidates: out of range"),
        ({"candidates": 65}, "candidates: out of range"),
    ):
        with pytest.raises(SettingError, match=f"^{problem}"):
            make_blend(case, **changed)


def test_a_bound_call_sees_a_swapped_memory_and_new_numbers() -> None:
    case, other = make_case("f16", 3), make_case("f16", 4)
    blend = make_blend(case)
    bound = blend.bind(case.x, case.r, case.state, case.lengths)
    bound.run()
    first = np.array(bound.rows)
    blend.update(
        keys=other.stored.keys, key_scales=other.stored.key_scales, values=other.stored.values,
        center=other.stored.memory.center, n_valid=60, k=4,
        calibration=other.stored.memory.calibration.vector(),
    )  # fmt: skip
    bound.run()
    fresh = make_blend(other, k=4)(case.x, case.r, case.state, case.lengths)
    np.testing.assert_array_equal(bound.rows, fresh.rows)
    assert (first != fresh.rows).any()


def test_calls_of_several_sizes_may_be_bound_at_the_same_time() -> None:
    wide, narrow = make_case("f16", 4), make_case("f16", 3)
    blend = make_blend(wide, k=64)
    first = blend.bind(wide.x, wide.r, wide.state, wide.lengths)
    second = blend.bind(narrow.x, narrow.r, narrow.state, narrow.lengths)
    for bound in (first, second, first):
        bound.run()
    alone = make_blend(wide, k=64)(wide.x, wide.r, wide.state, wide.lengths)
    np.testing.assert_array_equal(first.rows, alone.rows)


def test_rows_and_state_may_be_written_in_place() -> None:
    case = make_case("f16", 6)
    blend = make_blend(case)
    expected = blend(case.x, case.r, case.state, case.lengths)
    r, state = blend.array(case.r, np.float32), blend.array(case.state, np.float32)
    bound = blend.bind(case.x, r, state, case.lengths, rows=r, state_out=state)
    bound.run()
    np.testing.assert_array_equal(r, expected.rows)
    np.testing.assert_array_equal(state, expected.state)


def test_what_does_not_fit_is_refused_by_name() -> None:
    case = make_case("f16", 2)
    blend = make_blend(case)
    for x, r, state, lengths, name in (
        (case.x[:, :-1], case.r, case.state, case.lengths, "x"),
        (case.x, case.r[:1], case.state, case.lengths, "r"),
        (case.x, case.r, case.state[:, :1], case.lengths, "state"),
        (case.x, case.r, case.state, np.array([1, 1, 1]), "lengths"),
        (np.tile(case.x, (40, 1)), case.r, case.state, case.lengths, "x"),
    ):
        with pytest.raises(SettingError, match=f"^{name}: "):
            blend.bind(x, r, state, lengths)
    with pytest.raises(SettingError, match=r"^key_scales: "):
        make_blend(case, key_scales=case.stored.key_scales[:-1])
    with pytest.raises(SettingError, match=r"^keys: of an unknown type"):
        make_blend(case, keys=case.stored.keys.astype(np.int32))
    with pytest.raises(SettingError, match=r"^neighbors: "):
        make_blend(case, k=65)
    for most in (0, 32 * MAX_TILES + 1):
        with pytest.raises(SettingError, match=r"^max_tokens: .*1 to 2097120"):
            make_blend(case, max_tokens=most)


def test_without_cupy_the_error_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cupy", None)
    with pytest.raises(BackendError, match="pip install cupy-cuda13x"):
        import_cupy()


def test_without_a_driver_the_error_says_so() -> None:
    cupy = pytest.importorskip("cupy")
    try:
        cupy.cuda.runtime.getDeviceCount()
    except cupy.cuda.runtime.CUDARuntimeError:
        with pytest.raises(BackendError, match="CUDA driver"):
            import_cupy()
    else:
        pytest.skip("there is a driver")


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ["87", "90", "120"])
def test_nvrtc_compiles_the_sources_as_cupy_asks_it_to(architecture: str) -> None:
    assert b"knnmoe_decode_f16_1" in compiled(SOURCE, architecture)
