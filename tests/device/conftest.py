"""The model on a stand-in of a CUDA device: emulated kernels, engines run by ONNX Runtime."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
from fake_cupy import fake_cupy

from fake_tensorrt import engine_file, fake_tensorrt
from knnmoe.runtime.bundle import Bundle, describe_file
from knnmoe.runtime.device.backend import DeviceBackend, DeviceSettings
from knnmoe.runtime.device.cuda import Cuda
from knnmoe.runtime.engines.engine_set import EngineSet, Limits
from knnmoe.runtime.engines.tensorrt import Scratch, TensorRT, TensorRTEngine
from knnmoe.runtime.model import Model

LIMITS = Limits(batch=3, context=96, prefill=24, entries=512)


@dataclass
class Setup:
    """A model on the stand-in, and what it stands on."""

    model: Model
    cupy: Any
    cuda: Cuda
    backend: DeviceBackend


Load = Callable[..., Setup]


@pytest.fixture(scope="session")
def engine_sets(tmp_path_factory: pytest.TempPathFactory, tiny_bundle: Path) -> Callable[..., Path]:
    """Engine sets of the tiny bundle, or another, by options, built once each."""
    pytest.importorskip("onnx_ir")
    import onnx

    from knnmoe.export.engines.build import build
    from knnmoe.export.engines.settings import BuildSettings, dimension_ranges, profile
    from knnmoe.export.std import StdModel, StdOptions
    from knnmoe.runtime.bundle import TensorSpec

    def _shape(value: Any) -> tuple[int | str, ...]:
        return tuple(d.dim_param or d.dim_value for d in value.type.tensor_type.shape.dim)

    made: dict[Any, Path] = {}

    def make(*, bundle_path: Path = tiny_bundle, gates: bool = False, **options: Any) -> Path:
        key = (bundle_path, gates, *sorted(options.items()))
        if key in made:
            return made[key]
        bundle = Bundle.open(bundle_path)
        folder = tmp_path_factory.mktemp("engines") / "set"
        settings = BuildSettings(backend="onnxruntime", limits=LIMITS, **options)
        engines = build(bundle, settings, output=folder).engine_set
        model = StdModel.of(bundle, StdOptions())
        more = {f"gate-{name}.onnx": name for name in bundle.manifest.gates if gates}
        for file, name in more.items():
            (folder / file).write_bytes(model.gate(name).content)
        files = {}
        for file in (*engines.files, *more):
            graph = (folder / file).read_bytes()
            inputs = onnx.load_model_from_string(graph).graph.input
            specs = tuple(TensorSpec(i.name, "", _shape(i)) for i in inputs)
            phase = "decode" if file.startswith("decode") else "prefill"
            content = engine_file(
                graph,
                weights=bundle_path / "segments",
                profile=profile(specs, dimension_ranges(LIMITS, phase)),
                neighbors=64 if file in more else 8,
            )
            (folder / file).write_bytes(content)
            files[file] = describe_file(folder / file)
        if gates:  # as if the plugin were inside; the function stands for it
            engines = replace(
                engines, gates={name: file for file, name in more.items()}, plugin="0" * 64
            )
        replace(engines, backend="tensorrt", backend_version="10.9", files=files).write()
        made[key] = folder
        return folder

    return make


@pytest.fixture
def load(tiny_bundle: Path, engine_sets: Callable[..., Path]) -> Load:
    """Load the tiny model on a fresh stand-in."""

    def load(
        *, memory: Any = None, settings: DeviceSettings | None = None, cupy: Any = None,
        pack: dict[str, Any] | None = None, bundle_path: Path = tiny_bundle, **options: Any,
    ) -> Setup:  # fmt: skip
        options = {"precision": "float32", "bundle_path": bundle_path, **options}
        bundle = Bundle.open(bundle_path)
        cupy = fake_cupy() if cupy is None else cupy
        cuda = Cuda(cupy=cupy, cupyx=cupy.cupyx)
        scratch = Scratch(cuda)
        tensorrt = TensorRT("tensorrt", fake_tensorrt(cupy), "10.9")
        backend = DeviceBackend(
            bundle,
            EngineSet.open(engine_sets(**options), bundle),
            settings or DeviceSettings(keys="float32"),
            cuda=cuda,
            load=lambda path: TensorRTEngine(tensorrt, path, cuda, scratch),
        )
        model = Model(bundle, backend)
        if memory is not None:
            model.swap_memory(memory)
        return Setup(model, cupy, cuda, backend)

    return load
