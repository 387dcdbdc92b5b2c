"""The Python plan, the C++ plan and the argument of the kernels are one thing."""

from __future__ import annotations

import ctypes

import pytest
from emulated import library, plan_in_c
from hypothesis import given, settings
from hypothesis import strategies as st

from knnmoe.trt_plugins.plan import (
    KEY_TYPES,
    NUMBERS,
    PARAMS,
    POINTERS,
    SOURCE,
    Device,
    Problem,
    make_plan,
)

problems = st.builds(
    Problem,
    key_type=st.sampled_from(KEY_TYPES),
    tokens=st.one_of(st.integers(1, 16), st.integers(17, 5000)),
    sequences=st.integers(1, 16),
    hidden=st.sampled_from([1, 7, 256, 2048, 2880, 7168, 16384]),
    experts=st.integers(1, 512),
    columns=st.integers(1, 64),
    capacity=st.integers(1, 2_000_000),
)
devices = st.builds(
    Device,
    multiprocessors=st.integers(1, 160),
    shared_bytes=st.sampled_from([48, 99, 163, 227]).map(lambda kib: kib * 1024),
)


@settings(max_examples=500, deadline=None)
@given(problem=problems, device=devices)
def test_both_plans_say_the_same(problem: Problem, device: Device) -> None:
    assert make_plan(problem, device) == plan_in_c(problem, device)


@settings(max_examples=500, deadline=None)
@given(problem=problems, device=devices)
def test_a_plan_names_kernels_that_exist_and_fits_the_device(
    problem: Problem, device: Device
) -> None:
    source = SOURCE.read_text()
    for launch in make_plan(problem, device).launches:
        assert f"X({launch.kernel}, " in source
        assert min(launch.grid) >= 1
        if problem.hidden <= 7168 and device.shared_bytes > 64 * 1024:
            assert launch.shared_bytes <= device.shared_bytes


def test_the_argument_has_the_same_layout_in_both_languages() -> None:
    offsets = (ctypes.c_longlong * 64)()
    count = library().knnmoe_params_layout(offsets)
    fields = (*POINTERS, "capacity", *NUMBERS)
    expected = [PARAMS.fields[name][1] for name in fields] + [PARAMS.itemsize]  # type: ignore[index]
    assert list(offsets[:count]) == expected


@pytest.mark.parametrize(
    ("tokens", "kib", "kernel", "groups", "shared_bytes"),
    [
        (1, 99, "f16_1", 1, 8_800),
        (2, 99, "f16_2", 1, 17_504),
        (4, 99, "f16_4", 1, 34_928),
        (8, 99, "f16_8", 1, 69_776),
        (16, 99, "f16_8", 2, 69_776),  # the widest tile does not fit: two reads of the keys
        (16, 227, "f16_16", 1, 139_536),
    ],
)
def test_the_shared_memory_of_decode_is_what_it_was(
    tokens: int, kib: int, kernel: str, groups: int, shared_bytes: int
) -> None:
    problem = Problem("f16", tokens, 1, 2048, 64, 8, 100_000)
    (launch,) = make_plan(problem, Device(132, kib * 1024)).launches
    assert launch.kernel == f"knnmoe_decode_{kernel}"
    assert launch.grid[1] == groups
    assert launch.shared_bytes == shared_bytes
