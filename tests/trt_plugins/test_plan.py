"""The Python plan, the C++ plan and the argument of the kernels are one thing."""

from __future__ import annotations

import ctypes
from dataclasses import replace

import pytest
from emulated import library, plan_in_c
from hypothesis import given, settings
from hypothesis import strategies as st

from knnmoe.trt_plugins.cupy_prototype import _most_workspace
from knnmoe.trt_plugins.plan import (
    KEY_TYPES,
    NUMBERS,
    PARAMS,
    POINTERS,
    SOURCE,
    Device,
    KeyType,
    Problem,
    make_plan,
)


def in_two_stages(problem: Problem, more: int) -> Problem:
    """Half of the problems that can be are searched in two stages."""
    if problem.key_type == "i8" or more < 0:
        return problem
    return replace(problem, candidates=min(64, problem.columns + more))


problems = st.builds(
    in_two_stages,
    st.builds(
        Problem,
        key_type=st.sampled_from(KEY_TYPES),
        tokens=st.one_of(st.integers(1, 16), st.integers(17, 5000)),
        sequences=st.integers(1, 16),
        hidden=st.sampled_from([1, 7, 256, 2048, 2880, 7168, 16384]),
        experts=st.integers(1, 512),
        columns=st.integers(1, 64),
        capacity=st.integers(1, 2_000_000),
    ),
    st.integers(-60, 60),
)
devices = st.builds(
    Device,
    multiprocessors=st.integers(1, 160),
    shared_bytes=st.sampled_from([48, 99, 163, 227]).map(lambda kib: kib * 1024),
)


@settings(max_examples=30, deadline=None)
@given(problem=problems, device=devices)
def test_scratch_memory_suffices_for_every_number_of_tokens(
    problem: Problem, device: Device
) -> None:
    most = min(problem.tokens, 300)
    reserved = _most_workspace(problem, device, most)
    asked = [make_plan(replace(problem, tokens=n), device) for n in range(1, most + 1)]
    assert reserved == max(plan.workspace_bytes for plan in asked)


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
        if problem.hidden <= 7168 and device.shared_bytes > 65 * 1024:
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


@pytest.mark.parametrize(
    ("tokens", "kib", "hidden", "kernels", "groups", "shared_bytes"),
    [
        (1, 99, 2048, ("decode_two_stage_f16",), 1, 12_896),
        (2, 99, 2048, ("decode_i8_2", "decode_rescore_f16"), 1, 24_672),
        (8, 99, 2048, ("decode_i8_8", "decode_rescore_f16"), 1, 98_448),
        (16, 227, 2048, ("decode_i8_16", "decode_rescore_f16"), 1, 196_880),
        (4, 99, 2880, ("decode_i8_2", "decode_rescore_f16"), 2, 31_328),
    ],
)
def test_the_launches_of_two_stages_are_what_they_were(
    tokens: int, kib: int, hidden: int, kernels: tuple[str, ...], groups: int, shared_bytes: int
) -> None:
    problem = Problem("f16", tokens, 1, hidden, 64, 8, 100_000, candidates=64)
    launches = make_plan(problem, Device(132, kib * 1024)).launches
    assert tuple(launch.kernel for launch in launches) == tuple(f"knnmoe_{k}" for k in kernels)
    assert launches[0].grid[1] == groups
    assert launches[0].shared_bytes == shared_bytes
    assert all(launch.grid == (tokens, 1) for launch in launches[1:])


@pytest.mark.parametrize(
    ("key_type", "hidden", "candidates", "columns"),
    [("f16", 2880, 64, 8), ("f16", 5120, 0, 8), ("i8", 2880, 0, 64)],
)
def test_a_few_tokens_prefill_where_decode_would_read_the_keys_again_and_again(
    key_type: KeyType, hidden: int, candidates: int, columns: int
) -> None:
    problem = Problem(key_type, 16, 1, hidden, 64, columns, 100_000, candidates=candidates)
    for kib, decodes in ((99, False), (227, True)):
        launches = make_plan(problem, Device(46, kib * 1024)).launches
        assert ("decode" in launches[0].kernel) == decodes
        assert launches[0 if decodes else 1].grid[1] <= 2
        assert max(launch.shared_bytes for launch in launches) <= kib * 1024


@pytest.mark.parametrize("hidden", [2048, 2880, 7168, 16384])
@pytest.mark.parametrize("candidates", [0, 64])
@pytest.mark.parametrize("key_type", ["f32", "f16"])
def test_prefill_of_any_hidden_size_fits_a_device_with_99_kib(
    hidden: int, candidates: int, key_type: KeyType
) -> None:
    problem = Problem(key_type, 2000, 1, hidden, 128, 64, 100_000, candidates=candidates)
    launches = make_plan(problem, Device(46, 99 * 1024)).launches
    assert len(launches) == 5
    assert max(launch.shared_bytes for launch in launches) <= 99 * 1024
