"""The flavours of TensorRT that this Python has, and whether each takes the plugin library.

Each is tried in a process of its own: the flavours bring libraries that do not share one, and what
crashes there is a finding here: `python -m knnmoe.trt_plugins.flavours NAME LIBRARY`.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import asdict, dataclass
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from knnmoe.runtime.errors import BackendError, KnnMoeError

from . import library as plugin_library

FLAVOURS = ("tensorrt", "tensorrt_lean", "tensorrt_rtx")
TIMEOUT_SECONDS = 120


@dataclass(frozen=True)
class Trial:
    """Whether one flavour takes the library.

    Attributes:
        flavour: Name of its Python module.
        version: Its version; empty if it could not be imported.
        loads: Whether it loaded the library and created the plugin.
        problem: Why not.
    """

    flavour: str
    version: str
    loads: bool
    problem: str | None = None


def installed() -> list[str]:
    """The flavours that can be imported, without importing them."""
    return [name for name in FLAVOURS if find_spec(name) or find_spec(f"{name}_bindings")]


def import_flavour(name: str) -> Any:
    """The module of a flavour: the package, else the bindings of its wheels.

    Raises:
        BackendError: If it is not installed, or its libraries do not load.
    """
    try:
        if find_spec(name):
            return import_module(name)
        if find_spec(f"{name}_libs"):
            import_module(f"{name}_libs")  # loads what the bindings need
        return import_module(f"{name}_bindings")
    except ImportError as error:
        raise BackendError(name, "cannot be imported", found=error) from error


def create_plugin(tensorrt: Any, creator: Any, **fields: Any) -> Any:
    """A plugin of these fields, text as bytes and numbers as NumPy arrays; None if refused."""
    kinds = {"bytes": "CHAR", "int32": "INT32", "int64": "INT64", "float32": "FLOAT32"}

    def field(name: str, value: Any) -> Any:
        kind = "bytes" if isinstance(value, bytes) else value.dtype.name
        return tensorrt.PluginField(name, value, getattr(tensorrt.PluginFieldType, kinds[kind]))

    collection = tensorrt.PluginFieldCollection([field(*item) for item in fields.items()])
    return creator.create_plugin("blend", collection, tensorrt.TensorRTPhase.RUNTIME)


def attempt(name: str, library: Path) -> Trial:
    """Load the library into a flavour in this process."""
    version = ""
    try:
        tensorrt = import_flavour(name)
        version = tensorrt.__version__
        creator = plugin_library.load(tensorrt, library)
        if create_plugin(tensorrt, creator, similarity=b"cosine") is None:
            raise BackendError(library, "creates no plugin")
    except KnnMoeError as error:
        return Trial(name, version, loads=False, problem=str(error))
    return Trial(name, version, loads=True)


def try_flavour(name: str, library: Path) -> Trial:
    """Load the library into a flavour in a process of its own."""
    command = [sys.executable, "-m", __name__, name, str(library)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, check=False, timeout=TIMEOUT_SECONDS,
            env=environment,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        return Trial(name, "", loads=False, problem=f"no answer in {TIMEOUT_SECONDS} s")
    try:
        return Trial(**json.loads(done.stdout.splitlines()[-1]))
    except (IndexError, TypeError, ValueError):
        last = (done.stderr.strip().splitlines() or ["nothing was said"])[-1]
        return Trial(name, "", loads=False, problem=f"exit status {done.returncode}: {last}")


if __name__ == "__main__":
    print(json.dumps(asdict(attempt(sys.argv[1], Path(sys.argv[2])))), flush=True)
    # At once: some versions crash when their modules are taken down with a plugin loaded.
    os._exit(0)
