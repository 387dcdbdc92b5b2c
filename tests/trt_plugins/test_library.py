"""Finding, building and loading the plugin library: what is said where something is missing."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from plugin_library import ARCHITECTURE, built_plugin, find_headers, need_nvcc

from knnmoe.runtime.errors import BackendError, OutputError
from knnmoe.trt_plugins import library, toolchain
from knnmoe.trt_plugins.library import BuildInfo


def marked(folder: Path, tensorrt: str) -> Path:
    """A file that says of itself what a library built for that TensorRT says."""
    file = folder / "libknnmoe_plugin.so"
    said = {"source": "00ff", "tensorrt": tensorrt, "cuda": 12080, "architectures": [800, 1200]}
    file.write_bytes(f"\x7fELF\0knnmoe-plugin-build:{json.dumps(said)}\0more".encode())
    return file


class Registry:
    """Of a TensorRT that may or may not take a library."""

    def __init__(self, takes: bool) -> None:
        self.takes = takes
        self.creator: Any = None

    def get_creator(self, name: str, version: str, space: str) -> Any:
        assert (name, version, space) == ("KnnBlend", "1", "knnmoe")
        return self.creator

    def load_library(self, path: str) -> None:
        self.creator = path if self.takes else None


def tensorrt(version: str, *, takes: bool = True, name: str = "tensorrt") -> Any:
    registry = Registry(takes)
    return SimpleNamespace(__name__=name, __version__=version, get_plugin_registry=lambda: registry)


def test_a_library_says_what_it_was_built_from(tmp_path: Path) -> None:
    said = library.build_info(marked(tmp_path, "10.14.1"))
    assert said == BuildInfo("00ff", "10.14.1", "12.8", ("80", "120"))
    assert said.tensorrt_major == 10
    other = tmp_path / "other.so"
    other.write_bytes(b"\x7fELF")
    assert library.build_info(other) is None
    other.write_bytes(b'knnmoe-plugin-build:{"source":\0')
    with pytest.raises(BackendError, match="in an unknown way"):
        library.build_info(other)
    with pytest.raises(BackendError, match="cannot be read"):
        library.build_info(tmp_path / "absent.so")


def test_a_library_for_another_major_version_is_refused_unless_asked_for(tmp_path: Path) -> None:
    path = marked(tmp_path, "10.14.1")
    with pytest.raises(BackendError, match=r"another major version.*11\.4\.0.*10\.14\.1.*build"):
        library.load(tensorrt("11.4.0.106"), path)
    assert library.load(tensorrt("11.4.0.106"), path, other_major=True) == str(path)
    assert library.load(tensorrt("10.3.0"), path) == str(path)
    # TensorRT-RTX counts its versions from 1.
    assert library.load(tensorrt("1.7.1", name="tensorrt_rtx_bindings"), path) == str(path)


def test_a_library_that_tensorrt_refuses_is_a_stated_failure(tmp_path: Path) -> None:
    path = marked(tmp_path, "11.1.0")
    with pytest.raises(BackendError, match=r"does not take the plugin.*11\.4\.0.*11\.1\.0"):
        library.load(tensorrt("11.4.0.106", takes=False), path)


def test_headers_say_their_version_in_either_way(tmp_path: Path) -> None:
    file = tmp_path / "NvInferVersion.h"
    with pytest.raises(BackendError, match="cannot be read"):
        library.header_version(tmp_path)
    file.write_text(
        "#define NV_TENSORRT_MAJOR 10 //!< major\n#define NV_TENSORRT_MINOR 3\n"
        "#define NV_TENSORRT_PATCH 0\n"
    )
    assert library.header_version(tmp_path) == "10.3.0"
    file.write_text(
        "#define TRT_MAJOR_ENTERPRISE 11\n#define TRT_MINOR_ENTERPRISE 1\n"
        "#define TRT_PATCH_ENTERPRISE 0\n"
        + "".join(
            f"#define NV_TENSORRT_{part} TRT_{part}_ENTERPRISE //!< it\n"
            for part in ("MAJOR", "MINOR", "PATCH")
        )
    )
    assert library.header_version(tmp_path) == "11.1.0"
    file.write_text("#define NV_TENSORRT_MAJOR 10\n")
    with pytest.raises(BackendError, match="does not say which version"):
        library.header_version(tmp_path)


def test_headers_are_looked_for_where_they_were_said_to_be(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for folder in (tmp_path / "sdk" / "include", tmp_path / "flat"):
        folder.mkdir(parents=True)
        (folder / "NvInferRuntime.h").write_text("")
    assert library.find_tensorrt_headers(tmp_path / "sdk") == tmp_path / "sdk" / "include"
    monkeypatch.setenv("TENSORRT_ROOT", str(tmp_path / "sdk"))
    assert library.find_tensorrt_headers() == tmp_path / "sdk" / "include"
    assert library.find_tensorrt_headers(tmp_path / "flat") == tmp_path / "flat"
    with pytest.raises(BackendError, match=r"NvInferRuntime\.h: not found.*absent"):
        library.find_tensorrt_headers(tmp_path / "absent")


def test_what_the_library_is_not_made_of_does_not_make_it_stale(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kernels, plugin = tmp_path / "kernels", tmp_path / "plugin"
    for folder, names in ((kernels, ("a.cuh", "step.cu")), (plugin, ("p.cpp", "harness.cpp"))):
        folder.mkdir()
        for name in names:
            (folder / name).write_text("one")
    monkeypatch.setattr(library, "KERNELS", kernels)
    monkeypatch.setattr(library, "PLUGIN", plugin)
    before = library.source_hash()
    for file in (kernels / "step.cu", plugin / "harness.cpp"):
        file.write_text("two")
    assert library.source_hash() == before
    (plugin / "p.cpp").write_text("two")
    assert library.source_hash() != before


def test_nothing_is_left_where_a_build_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    need_nvcc()
    headers = tmp_path / "headers"
    headers.mkdir()
    (headers / "NvInferRuntime.h").write_text("#error these are no headers\n")
    output = tmp_path / "out" / "library.so"
    with pytest.raises(BackendError, match=r"(?s)nvcc does not compile it.*are no headers"):
        library.build(output, headers=headers, architectures=("86",), ptx=None)
    assert not list(output.parent.iterdir())
    with pytest.raises(BackendError, match="nvcc does not compile it"):
        library.build(output, headers=headers, architectures=("11",), ptx=None)
    with pytest.raises(BackendError, match="architecture: not a compute capability"):
        library.build(output, headers=headers, architectures=("sm_86",))
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="cannot be written"):
        library.build(tmp_path / "file" / "library.so", headers=headers, architectures=("86",))
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    with pytest.raises(BackendError, match=r"nvcc: not found.*CUDA toolkit"):
        library.build(output, headers=headers)


def test_without_a_driver_nobody_knows_the_native_architecture(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def absent(name: str) -> Any:
        raise OSError(f"{name}: cannot open shared object file")

    monkeypatch.setattr(toolchain.ctypes, "CDLL", absent)
    with pytest.raises(BackendError, match=r"CUDA driver: not found.*--arch 87"):
        toolchain.native_architectures()


def test_the_driver_is_asked_for_the_native_architectures(monkeypatch: pytest.MonkeyPatch) -> None:
    capabilities = [(12, 0), (8, 7), (12, 0)]

    class Driver:
        def cuInit(self, flags: int) -> int:
            return 0

        def cuDeviceGetCount(self, value: Any) -> int:
            value._obj.value = len(capabilities)
            return 0

        def cuDeviceGet(self, value: Any, number: int) -> int:
            value._obj.value = number
            return 0

        def cuDeviceGetAttribute(self, value: Any, attribute: int, device: int) -> int:
            value._obj.value = capabilities[device][attribute - 75]
            return 0

    monkeypatch.setattr(toolchain.ctypes, "CDLL", lambda name: Driver())
    assert toolchain.native_architectures() == ["87", "120"]
    capabilities.clear()
    with pytest.raises(BackendError, match="finds no device"):
        toolchain.native_architectures()


@pytest.mark.slow
def test_the_built_library_says_what_it_was_built_from() -> None:
    said = library.build_info(built_plugin())
    assert said is not None
    assert said.source == library.source_hash()
    assert said.tensorrt == library.header_version(find_headers())
    assert said.architectures == (ARCHITECTURE,)
