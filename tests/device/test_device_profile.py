"""Profiles of a model on the emulated device: what its events tell."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from knnmoe.runtime.device.backend import DeviceSettings
from knnmoe.runtime.gates.cuda import kernel_stage
from knnmoe.runtime.pipeline import Pipeline
from knnmoe.runtime.profiling.bounds import measure_device_bounds
from knnmoe.runtime.profiling.inside import look_inside
from knnmoe.runtime.profiling.measure import Bench, Target, points_of
from knnmoe.runtime.profiling.plan import fit_grid
from knnmoe.trt_plugins.plan import Device, Problem, make_plan

IDS = np.arange(9)[None]


def test_launched_steps_are_timed_part_by_part_by_the_device(load: Any, tiny_pack: Any) -> None:
    model = load(memory=tiny_pack).model
    pipeline = Pipeline(model.pipeline.layout.launching())
    cache = pipeline.new_cache(capacity=20)
    expected = model.pipeline.step(model.pipeline.new_cache(capacity=20), IDS)
    times = pipeline.timed_step(cache, IDS)
    names = list(times.host)
    assert names[:3] == ["upload", "segment 0", "gate 0"]
    assert names[-2:] == ["state", "download"]
    assert times.device is not None
    assert list(times.device) == names
    assert min(times.device.values()) >= 0
    assert max(times.device.values()) > 0
    plan = next(iter(cache.plans.values()))
    np.testing.assert_allclose(plan.buffers.logits, expected, atol=2e-4)


@pytest.mark.parametrize("layout", ["split", "fused"])
def test_a_captured_step_is_one_part_and_its_launches_are_measured_beside_it(
    load: Any, tiny_pack: Any, layout: str
) -> None:
    model = load(memory=tiny_pack, layout=layout).model
    captured = model.pipeline.layout
    assert captured.captures
    assert not captured.launching().captures
    grid = fit_grid(40, contexts=(6,), steps=2, warmup=0, phases=("decode",))
    targets = [
        Target(model.pipeline, layout, 300, True),
        Target(Pipeline(captured.launching()), layout, 300, False),
    ]
    bench = Bench(points_of(targets, grid), grid)
    bench.measure()
    graph, launched = (point.point() for point in bench.points)
    assert [part.name for part in graph.parts] == ["graph", "runtime"]
    assert len(launched.parts) > 4
    for point in (graph, launched):
        assert all(part.device_ms is not None for part in point.parts[:-1])
        total = np.sum([part.ms for part in point.parts], axis=0)
        assert total == pytest.approx(np.array(point.whole_ms))


def test_gates_are_looked_into_kernel_by_kernel(load: Any, tiny_pack: Any) -> None:
    setup = load(memory=tiny_pack)
    pipeline = setup.model.pipeline
    cache = pipeline.new_cache(capacity=20)
    pipeline.step(cache, IDS[:, :1])
    parts = pipeline.bound_parts(cache, 1)
    found = look_inside(parts, samples=1, cuda=setup.model.backend.cuda)
    assert list(found) == ["gate 0", "gate 1", "gate 2"]
    assert set(found["gate 0"]) == {"scan and blend", "rule"}


@pytest.mark.parametrize("candidates", [0, 64])
def test_every_kernel_of_a_long_prompt_is_a_stage(candidates: int) -> None:
    keys: Any = "f16"
    problem = Problem(keys, 512, 1, 2048, 64, 16, 10_000, candidates)
    launches = make_plan(problem, Device(80, 96 << 10)).launches
    stages = [kernel_stage(launch.kernel) for launch in launches]
    assert stages == ["prepare", "scan", "select", "blend", "blend"]


def test_a_smaller_memory_serves_beside_the_whole_one(load: Any, tiny_pack: Any) -> None:
    model = load(memory=tiny_pack, settings=DeviceSettings(keys="float32")).model
    before = model.logits(IDS[0])
    part = model.beside(100)
    assert part.layout is not model.pipeline.layout
    _, records = part.traced_step(part.new_cache(1, 9), IDS)
    assert max(record.trace.neighbors.max() for record in records) < 100
    np.testing.assert_array_equal(model.logits(IDS[0]), before)


def test_bounds_are_those_of_the_device(load: Any) -> None:
    cuda = load().model.backend.cuda
    found = measure_device_bounds(cuda, size=1 << 16, side=16)
    assert found.copy_gb_s > 0
    assert found.gemm_gflop_s > 0
