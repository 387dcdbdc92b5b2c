"""What this machine can do with knnmoe, what it lacks for the rest, and which command adds it.

`examine` asks the machine (probes.py), `features` draws the conclusions; nothing here prints.
"""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from .errors import BackendError
from .probes import (
    QUESTIONS,
    Driver,
    Module,
    ask_driver,
    ask_modules,
    jetson_release,
    memory_bytes,
    usable_cores,
)
from .profiling.environment import cpu_model

SCHEMA = "knnmoe.doctor/1"
FLAVORS = ("tensorrt", "tensorrt_rtx", "tensorrt_lean")
IMPORTED = ("cupy", "cuvs", "faiss", "onnxruntime", *FLAVORS)
# Packages that need not be imported to know that they are there; some take seconds.
LISTED = (
    "ml-dtypes",
    "onnx",
    "onnx-ir",
    "safetensors",
    "tokenizers",
    "torch",
    "transformers",
)
# What a module of TensorRT is asked beside its version: whether it takes the plugin.
_TAKES_PLUGIN = (
    "if argument:\n"
    "    from pathlib import Path\n"
    "    from knnmoe.trt_plugins import library\n"
    "    try:\n"
    "        library.load(m, Path(argument))\n"
    "        facts['plugin'] = 'loads'\n"
    "    except Exception as error:\n"
    "        facts['plugin'] = 'refused: ' + str(error)\n"
)


@dataclass(frozen=True)
class Plugin:
    """The TensorRT plugin library, as far as it can be known without a TensorRT."""

    path: Path | None
    error: str | None = None  # why there is none, or why it cannot be used
    current: bool | None = None  # built from these sources; None: it does not say
    built_for: str | None = None  # version of TensorRT's headers


@dataclass(frozen=True)
class Tool:
    """A program or a folder of headers, with its version."""

    path: Path | None
    version: str | None = None


@dataclass(frozen=True)
class Machine:
    """What was found."""

    cpu: str
    cores: float
    memory_bytes: int | None
    jetson: str | None
    driver: Driver
    nvcc: Tool
    headers: Tool
    plugin: Plugin
    modules: Mapping[str, Module]
    packages: Mapping[str, str | None]


def installed_packages() -> dict[str, str | None]:
    """Versions of the packages that are not imported."""
    return {name: _installed(name) for name in LISTED}


def _installed(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def find_compiler() -> Tool:
    """nvcc and its release."""
    from knnmoe.trt_plugins.toolchain import find_nvcc

    try:
        path = find_nvcc()
    except BackendError:
        return Tool(None)
    try:
        said = subprocess.run(
            [path, "--version"], capture_output=True, text=True, timeout=10, check=False
        ).stdout
    except (OSError, subprocess.TimeoutExpired):
        return Tool(path)
    release = re.search(r"release (\d+\.\d+)", said)
    return Tool(path, release[1] if release else None)


def find_headers() -> Tool:
    """The headers of TensorRT and their version."""
    from knnmoe.trt_plugins import library

    try:
        folder = library.find_tensorrt_headers()
        return Tool(folder, library.header_version(folder))
    except BackendError:
        return Tool(None)


def find_plugin() -> Plugin:
    """The plugin library that would be loaded, and what it was built from."""
    from knnmoe.trt_plugins import library

    try:
        path = library.find_library()
    except BackendError as error:
        if "KNNMOE_PLUGIN" in os.environ:
            return Plugin(None, f"no file {error.where}, which KNNMOE_PLUGIN names")
        if any(library.default_folder().parent.glob(f"*/{library.LIBRARY}")):
            return Plugin(None, "built from other sources than these", current=False)
        return Plugin(None, "not built")
    try:
        info = library.build_info(path)
    except BackendError as error:
        return Plugin(path, str(error))
    if info is None:
        return Plugin(path, "does not say what it was built from")
    current = info.source == library.source_hash()
    problem = None if current else "built from other sources than these"
    return Plugin(path, problem, current, info.tensorrt)


@dataclass(frozen=True)
class Probes:
    """Where the answers come from; tests give others."""

    driver: Callable[[], Driver] = ask_driver
    modules: Callable[..., dict[str, Module]] = ask_modules
    packages: Callable[[], Mapping[str, str | None]] = installed_packages
    nvcc: Callable[[], Tool] = find_compiler
    headers: Callable[[], Tool] = find_headers
    plugin: Callable[[], Plugin] = find_plugin


def examine(probes: Probes | None = None) -> Machine:
    """Ask the machine; takes about a second."""
    probes = probes or Probes()
    plugin = probes.plugin()
    questions = {name: QUESTIONS[name] for name in IMPORTED}
    questions |= dict.fromkeys(FLAVORS, _TAKES_PLUGIN)
    library = "" if plugin.path is None else str(plugin.path)
    return Machine(
        cpu=cpu_model(),
        cores=usable_cores(),
        memory_bytes=memory_bytes(),
        jetson=jetson_release(),
        driver=probes.driver(),
        nvcc=probes.nvcc(),
        headers=probes.headers(),
        plugin=plugin,
        modules=probes.modules(questions, argument=library),
        packages=probes.packages(),
    )


@dataclass(frozen=True)
class Lack:
    """Something that is missing, and the command or step that adds it."""

    what: str
    fix: str


@dataclass(frozen=True)
class Feature:
    """Something knnmoe does; ready if nothing is missing."""

    name: str
    title: str
    missing: tuple[Lack, ...] = ()

    @property
    def ready(self) -> bool:
        """Whether this machine can do it."""
        return not self.missing


DRIVER_FIX = "install an NVIDIA driver, 580 or newer"
INSTALL = {
    "tensorrt": "install TensorRT 10 or newer: part of JetPack, else from its vendor",
    "tensorrt_rtx": "pip install tensorrt-rtx-cu13-bindings tensorrt-rtx-cu13-libs",
}


def features(machine: Machine) -> tuple[Feature, ...]:
    """Everything knnmoe can do, and what this machine lacks for it, in the order to add it."""
    return tuple(
        Feature(name, title, tuple(lacks(machine))) for name, (title, lacks) in _FEATURES.items()
    )


def _cpu(machine: Machine) -> Iterator[Lack]:
    yield from _module(machine, "onnxruntime", "pip install knnmoe")
    yield from _packages(machine, ("safetensors", "tokenizers"), "pip install knnmoe")


def _export(machine: Machine) -> Iterator[Lack]:
    packages = ("onnx", "onnx-ir", "ml-dtypes")
    yield from _packages(machine, packages, "pip install 'knnmoe[export]'")


def _memory(machine: Machine) -> Iterator[Lack]:
    yield from _packages(machine, ("torch", "transformers"), "pip install 'knnmoe[train]'")


def _faiss(machine: Machine) -> Iterator[Lack]:
    yield from _module(machine, "faiss", "pip install 'knnmoe[faiss]'")


def _faiss_gpu(machine: Machine) -> Iterator[Lack]:
    yield from _device(machine)
    fix = "install a faiss built with CUDA in place of faiss-cpu"
    faiss = machine.modules["faiss"]
    if not faiss.works:
        yield from _module(machine, "faiss", fix)
    elif not faiss.facts.get("gpu_support"):
        yield Lack(f"GPU support in faiss {faiss.version}", fix)
    elif not faiss.facts.get("gpus"):
        yield Lack("a GPU that faiss sees", "check CUDA_VISIBLE_DEVICES")


def _cupy(machine: Machine) -> Iterator[Lack]:
    yield from _device(machine)
    cupy, supported = machine.modules["cupy"], machine.driver.cuda
    if not cupy.found:
        older = supported is not None and supported < (13, 0)
        yield Lack("cupy", "pip install cupy-cuda12x" if older else "pip install 'knnmoe[cupy]'")
        return
    package = str(cupy.facts.get("package") or "")
    built = re.fullmatch(r"cupy-cuda(\d+)x", package)
    if supported is not None and built and supported[0] < int(built[1]):
        says = ".".join(map(str, supported))
        yield Lack(
            f"a driver for CUDA {built[1]}, which {package} needs (this one supports {says})",
            f"pip uninstall {package} && pip install cupy-cuda{supported[0]}x",
        )
    elif cupy.error and not any(_device(machine)):
        yield Lack(f"a working cupy: {cupy.error}", "pip install --force-reinstall 'knnmoe[cupy]'")


def _build(machine: Machine) -> Iterator[Lack]:
    yield from _tensorrt(machine)
    works = [flavor for flavor in INSTALL if machine.modules[flavor].works]
    if works == ["tensorrt"]:  # the one for RTX builds without a device
        yield from _device(machine)
    yield from _export(machine)


def _run(machine: Machine) -> Iterator[Lack]:
    yield from _cupy(machine)
    yield from _tensorrt(machine)


def _plugin(machine: Machine) -> Iterator[Lack]:
    plugin = machine.plugin
    if plugin.path is None or plugin.error:
        if machine.nvcc.path is None:
            yield Lack("nvcc", "install the CUDA toolkit 12.8 or newer")
        if machine.headers.path is None:
            yield Lack("headers of TensorRT", "set TENSORRT_ROOT to an SDK of TensorRT")
        yield Lack(f"a plugin library of this version ({plugin.error})", "knnmoe plugin build")
        return
    flavors = {name: machine.modules[name] for name in FLAVORS if machine.modules[name].works}
    if not flavors:
        yield from _tensorrt(machine)
        return
    answers = {name: str(module.facts.get("plugin", "")) for name, module in flavors.items()}
    if "loads" not in answers.values():
        for name, said in answers.items():
            version = flavors[name].version
            yield Lack(
                f"a plugin library that {name} {version} takes ({said or 'this one: no answer'})",
                "knnmoe plugin build --tensorrt-root SDK",
            )


def _ort_cuda(machine: Machine) -> Iterator[Lack]:
    yield from _cupy(machine)
    fix = "pip uninstall onnxruntime && pip install onnxruntime-gpu"
    module = machine.modules["onnxruntime"]
    if not module.works:
        yield from _module(machine, "onnxruntime", "pip install onnxruntime-gpu")
    elif "CUDAExecutionProvider" not in module.facts.get("providers", ()):
        yield Lack(f"CUDAExecutionProvider in onnxruntime {module.version}", fix)


_FEATURES: dict[str, tuple[str, Callable[[Machine], Iterator[Lack]]]] = {
    "cpu": ("Run bundles on the CPU", _cpu),
    "export": ("Export checkpoints", _export),
    "memory": ("Build and calibrate memories", _memory),
    "faiss": ("Retrieval with faiss", _faiss),
    "faiss-gpu": ("Retrieval with faiss on a GPU", _faiss_gpu),
    "cupy": ("Gates on a GPU (CuPy)", _cupy),
    "tensorrt-build": ("Build TensorRT engines", _build),
    "tensorrt-run": ("Run TensorRT engines", _run),
    "tensorrt-plugin": ("The TensorRT plugin", _plugin),
    "onnxruntime-cuda": ("ONNX Runtime on a GPU", _ort_cuda),
}
FEATURES = tuple(_FEATURES)


def _module(machine: Machine, name: str, fix: str) -> Iterator[Lack]:
    module = machine.modules[name]
    if not module.found:
        yield Lack(name, fix)
    elif module.error:
        yield Lack(f"a working {name}: {module.error}", fix)


def _packages(machine: Machine, names: tuple[str, ...], fix: str) -> Iterator[Lack]:
    for name in names:
        if machine.packages.get(name) is None:
            yield Lack(name, fix)


def _device(machine: Machine) -> Iterator[Lack]:
    driver = machine.driver
    if not driver.found:
        yield Lack("an NVIDIA driver", "flash JetPack" if machine.jetson else DRIVER_FIX)
    elif driver.error:
        yield Lack(f"a working driver: {driver.error}", DRIVER_FIX)
    elif not driver.devices:
        yield Lack("a device", "check CUDA_VISIBLE_DEVICES")


def _tensorrt(machine: Machine) -> Iterator[Lack]:
    if any(machine.modules[flavor].works for flavor in INSTALL):
        return
    broken = [machine.modules[f] for f in INSTALL if machine.modules[f].error]
    fix = "install TensorRT of JetPack" if machine.jetson else INSTALL["tensorrt_rtx"]
    if broken:
        yield Lack(f"a working {broken[0].name}: {broken[0].error}", fix)
    else:
        yield Lack("tensorrt or tensorrt_rtx", fix)


def to_json(machine: Machine, required: tuple[str, ...] = ()) -> dict[str, Any]:
    """One object for scripts.

    Keys: `schema`; `cpu` (`model`, `cores` usable, `memory_bytes`); `jetson` (release or null);
    `driver` (`found`, `version`, `cuda` as "13.0", `devices` with `name`, `compute_capability`,
    `memory_bytes`; `error`); `nvcc` and `headers` (`path`, `version`); `plugin` (`path`, `error`,
    `current`, `built_for`); `modules` by import name (`found`, `version`, `facts`, `error`);
    `packages` (version or null); `features` by name (`ready`, `title`, `missing`: a list
    of `what` and `fix`);
    `required` (those asked for, by name: ready or not).
    """
    driver = asdict(machine.driver)
    driver["cuda"] = _version(machine.driver.cuda)
    found = {feature.name: feature for feature in features(machine)}
    return {
        "schema": SCHEMA,
        "cpu": {
            "model": machine.cpu,
            "cores": machine.cores,
            "memory_bytes": machine.memory_bytes,
        },
        "jetson": machine.jetson,
        "driver": driver,
        "nvcc": _paths(asdict(machine.nvcc)),
        "headers": _paths(asdict(machine.headers)),
        "plugin": _paths(asdict(machine.plugin)),
        "modules": {name: _module_json(module) for name, module in machine.modules.items()},
        "packages": dict(machine.packages),
        "features": {
            name: {
                "ready": feature.ready,
                "title": feature.title,
                "missing": [asdict(lack) for lack in feature.missing],
            }
            for name, feature in found.items()
        },
        "required": {name: found[name].ready for name in required},
    }


def _module_json(module: Module) -> dict[str, Any]:
    return {
        "found": module.found,
        "version": module.version,
        "facts": dict(module.facts),
        "error": module.error,
    }


def _paths(values: dict[str, Any]) -> dict[str, Any]:
    return {k: str(v) if isinstance(v, Path) else v for k, v in values.items()}


def _version(numbers: tuple[int, int] | None) -> str | None:
    return None if numbers is None else ".".join(map(str, numbers))
