"""Drives the built plugin library on a GPU without TensorRT: its real `enqueue`, for tests.

plugin/harness.cpp does what TensorRT would: it loads the library, asks its creator for a plugin,
gives it a context and shapes, and enqueues on a stream, also while the stream is captured. What is
tested is the library that is shipped, not another compilation of its sources.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from knnmoe.runtime.errors import BackendError, SettingError

from . import library as plugin_library
from .toolchain import link_library

Array = Any  # cupy.ndarray
SOURCE = plugin_library.PLUGIN / "harness.cpp"
# As TensorRT numbers them.
TENSOR_TYPES = {
    "float32": 0, "float16": 1, "int8": 2, "int32": 3, "bool": 4, "uint8": 5, "int64": 8,
}  # fmt: skip
FIELD_TYPES = {"float16": 0, "float32": 1, "float64": 2, "int8": 3, "int32": 5, "int64": 10}
TEXT_FIELD = 6  # kCHAR
MOST_DIMENSIONS = 8


class _Tensor(ctypes.Structure):
    _fields_ = (
        ("sizes", ctypes.c_int64 * MOST_DIMENSIONS),
        ("dimensions", ctypes.c_int32),
        ("type", ctypes.c_int32),
    )


class _Field(ctypes.Structure):
    _fields_ = (
        ("name", ctypes.c_char_p),
        ("data", ctypes.c_void_p),
        ("type", ctypes.c_int32),
        ("length", ctypes.c_int32),
    )


def build_harness(output: Path | None = None, *, headers: Path | None = None) -> Path:
    """Build the harness with nvcc, once for each state of its source; returns where it is.

    Args:
        output: The library to write; beside the plugin's in the user's cache if not given.
        headers: Folder of the TensorRT headers that the plugin library was built with.

    Raises:
        BackendError: If nvcc or the headers are missing, or nvcc refuses.
        OutputError: If the library cannot be written there.
    """
    headers = headers or plugin_library.find_tensorrt_headers()
    if output is None:
        digest = hashlib.sha256(SOURCE.read_bytes()).hexdigest()[:16]
        version = plugin_library.header_version(headers)
        output = plugin_library.default_folder().parent / f"harness-{version}-{digest}.so"
        if output.is_file():
            return output
    arguments = [
        "-std=c++17", "-O2", "-shared", "-x", "c++", "-cudart=none",
        "-Xcompiler=-fPIC,-fvisibility=hidden", "-Xlinker=-z,defs", "-isystem", str(headers),
        str(SOURCE), "-ldl",
    ]  # fmt: skip
    link_library(SOURCE, output, arguments)
    return output


@dataclass(frozen=True)
class BoundPlugin:
    """A call whose arrays are fixed: `run` enqueues it on CuPy's current stream.

    Attributes:
        run: May be called while that stream is captured.
        workspace_bytes: Scratch memory that the plugin asked for.
    """

    run: Callable[[], None]
    workspace_bytes: int


class PluginHarness:
    """One plugin of a library, as an engine would hold it.

    Args:
        library: The plugin library; the installed one if not given.
        fields: The plugin's fields: text, or NumPy scalars and arrays.
        harness: The library of `build_harness`; built if not given.
        runtime: Created as when an engine is loaded, else as when one is built.
        cupy: The CuPy module; imported by `bind` if not given.

    Raises:
        BackendError: If a library cannot be loaded or the plugin refuses the fields; with what the
            plugin said.
    """

    def __init__(
        self,
        library: Path | None = None,
        *,
        fields: Mapping[str, Any],
        harness: Path | None = None,
        runtime: bool = True,
        cupy: Any = None,
    ) -> None:
        self.library = plugin_library.find_library() if library is None else library
        self._cupy = cupy
        self._driver = _load(build_harness() if harness is None else harness)
        info = plugin_library.build_info(self.library)
        compiled = self._driver.knnmoe_harness_tensorrt()
        if info is not None and info.tensorrt_major != compiled:
            raise BackendError(
                self.library, "built for another major version of TensorRT than the harness",
                expected=compiled, found=info.tensorrt_major,
                fix="Build the harness with the headers that the library was built with.",
            )  # fmt: skip
        opened = self._driver.knnmoe_harness_open(os.fsencode(self.library))
        self._expect(bool(opened), "cannot be loaded as a plugin library")
        kept = [_field(name, value) for name, value in fields.items()]
        self._plugin = self._driver.knnmoe_harness_create(
            opened, plugin_library.NAME.encode(), plugin_library.VERSION.encode(),
            plugin_library.NAMESPACE.encode(), (_Field * len(kept))(*(f for f, _ in kept)),
            len(kept), int(runtime),
        )  # fmt: skip
        self._expect(bool(self._plugin), "creates no plugin with these fields")

    def __del__(self) -> None:
        if getattr(self, "_plugin", None):
            self._driver.knnmoe_harness_destroy(self._plugin)

    def serialized(self) -> dict[str, Any]:
        """The fields that an engine would store: text, or NumPy arrays."""
        field = _Field()
        count = self._driver.knnmoe_harness_serialized(self._plugin, -1, ctypes.byref(field))
        self._expect(count >= 0, "serialises no fields")
        kinds = {number: name for name, number in FIELD_TYPES.items()}
        result: dict[str, Any] = {}
        for index in range(count):
            self._driver.knnmoe_harness_serialized(self._plugin, index, ctypes.byref(field))
            name = (field.name or b"").decode()
            if field.type == TEXT_FIELD:
                result[name] = ctypes.string_at(field.data, field.length).decode()
                continue
            if field.type not in kinds:
                raise BackendError(self.library, f"field {name} has a type of no use here")
            dtype = np.dtype(kinds[field.type])
            raw = ctypes.string_at(field.data, field.length * dtype.itemsize)
            result[name] = np.frombuffer(raw, dtype).copy()
        return result

    def workspace_bytes(self, inputs: Sequence[Array], outputs: Sequence[Array]) -> int:
        """Scratch memory for arrays of these shapes and types, as asked for an engine's build.

        Raises:
            BackendError: If the plugin does not take them; with what it said.
        """
        size = self._driver.knnmoe_harness_configure(
            self._plugin, *_tensors(inputs), *_tensors(outputs)
        )
        self._expect(size >= 0, "does not take these inputs and outputs")
        return int(size)

    def bind(self, inputs: Sequence[Array], outputs: Sequence[Array]) -> BoundPlugin:
        """Give the plugin a context of these arrays; each call is a context of its own.

        Args:
            inputs: CuPy arrays, as the node has its inputs (docs/design.md).
            outputs: Arrays of the shapes that the node's outputs have.

        Raises:
            BackendError: If the plugin does not take them, or the device cannot be asked.
            SettingError: If an array is not contiguous device memory.
        """
        driver, described = self._driver, (*_tensors(inputs), *_tensors(outputs))
        size = self.workspace_bytes(inputs, outputs)
        attached = driver.knnmoe_harness_attach(self._plugin)
        self._expect(bool(attached), "gives no plugin for a context")
        context = _Context(driver, attached)
        failed = driver.knnmoe_harness_shapes(attached, *described)
        self._expect(not failed, "does not accept these shapes on this device")
        addresses = [
            (ctypes.c_void_p * len(arrays))(
                *(_address(f"{side} {i}", array) for i, array in enumerate(arrays))
            )
            for side, arrays in (("input", inputs), ("output", outputs))
        ]
        if self._cupy is None:
            from .cupy_prototype import import_cupy

            self._cupy = import_cupy()
        cupy = self._cupy
        workspace = cupy.empty(max(size, 1), np.uint8)
        kept = (context, tuple(inputs), tuple(outputs), workspace)
        scratch = ctypes.c_void_p(workspace.data.ptr)

        def run(_keep_alive: Any = kept) -> None:
            stream = ctypes.c_void_p(cupy.cuda.get_current_stream().ptr)
            failed = driver.knnmoe_harness_enqueue(
                attached, *described, *addresses, scratch, stream
            )
            self._expect(not failed, "fails to enqueue")

        return BoundPlugin(run, size)

    def _expect(self, fulfilled: bool, problem: str) -> None:
        said = self._driver.knnmoe_harness_messages().decode(errors="replace")
        if not fulfilled:
            raise BackendError(self.library, problem, found=said or None)


class _Context:
    """A plugin attached to a context, destroyed with its last user."""

    def __init__(self, driver: ctypes.CDLL, plugin: int) -> None:
        self._driver, self._plugin = driver, plugin

    def __del__(self) -> None:
        self._driver.knnmoe_harness_destroy(self._plugin)


def _load(harness: Path) -> ctypes.CDLL:
    try:
        driver = ctypes.CDLL(str(harness))
    except OSError as error:
        raise BackendError(harness, "cannot be loaded", found=error) from error
    pointer, number, text = ctypes.c_void_p, ctypes.c_int, ctypes.c_char_p
    tensors = (ctypes.POINTER(_Tensor), number) * 2
    for name, result, arguments in (
        ("tensorrt", number, ()),
        ("messages", text, ()),
        ("open", pointer, (text,)),
        ("create", pointer, (pointer, text, text, text, ctypes.POINTER(_Field), number, number)),
        ("destroy", None, (pointer,)),
        ("serialized", number, (pointer, number, ctypes.POINTER(_Field))),
        ("attach", pointer, (pointer,)),
        ("configure", ctypes.c_int64, (pointer, *tensors)),
        ("shapes", number, (pointer, *tensors)),
        (
            "enqueue",
            number,
            (pointer, *tensors, *(ctypes.POINTER(pointer),) * 2, pointer, pointer),
        ),
    ):
        function = getattr(driver, f"knnmoe_harness_{name}")
        function.restype, function.argtypes = result, arguments
    return driver


def _field(name: str, value: Any) -> tuple[_Field, Any]:
    """A field, and what must live as long as it."""
    if isinstance(value, str):
        content: Any = value.encode()
        return _Field(name.encode(), ctypes.cast(content, ctypes.c_void_p), TEXT_FIELD,
                      len(content)), content  # fmt: skip
    array = np.atleast_1d(np.asarray(value)).copy()
    if array.dtype.name not in FIELD_TYPES:
        raise SettingError(
            name, "of a type that no field has", expected=sorted(FIELD_TYPES), found=array.dtype
        )
    field = _Field(name.encode(), array.ctypes.data, FIELD_TYPES[array.dtype.name], array.size)
    return field, array


def _tensors(arrays: Sequence[Array]) -> tuple[Any, int]:
    result = (_Tensor * len(arrays))()
    for i, (tensor, array) in enumerate(zip(result, arrays, strict=True)):
        if array.dtype.name not in TENSOR_TYPES or array.ndim > MOST_DIMENSIONS:
            raise SettingError(
                f"array {i}", "of a type or rank that no tensor has",
                expected=sorted(TENSOR_TYPES), found=f"{array.dtype} {list(array.shape)}",
            )  # fmt: skip
        tensor.sizes[: array.ndim] = array.shape
        tensor.dimensions, tensor.type = array.ndim, TENSOR_TYPES[array.dtype.name]
    return result, len(arrays)


def _address(name: str, array: Array) -> int:
    pointer = getattr(array.data, "ptr", None)
    if pointer is None:
        raise SettingError(
            name, "not on the device", expected="a CuPy array", found=type(array).__name__
        )
    if not array.flags.c_contiguous:
        raise SettingError(name, "not contiguous", fix="Pass a contiguous array.")
    return int(pointer)
