"""The plugin library, driven by the harness without TensorRT: eagerly, and captured in a graph.

Both libraries are compiled by nvcc against TensorRT's headers. A machine with a device may lack
the headers: `gpu_check.py --prepare` compiles them elsewhere, into a folder to be taken along.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from gpu_cases import Case, Limits, every_case
from gpu_correctness import Host, check_host, node_answer, node_inputs, node_outputs
from gpu_tally import Absent, Records

from knnmoe.runtime.blend import Blended
from knnmoe.runtime.errors import KnnMoeError
from knnmoe.trt_plugins import library
from knnmoe.trt_plugins.harness import PluginHarness, build_harness

ROOT = Path(__file__).resolve().parent.parent
PREPARED = ROOT / "build" / "gpu"
HARNESS = "libknnmoe_harness.so"


@dataclass(frozen=True)
class Libraries:
    """What is driven, and what drives it."""

    plugin: Path
    harness: Path


def find_headers() -> Path:
    """TensorRT's headers: of an SDK, else of a package that carries them.

    Raises:
        BackendError: If there are none.
    """
    carrier = find_spec("kernel_lens")
    if carrier is not None and carrier.origin is not None:
        folder = Path(carrier.origin).parent / "include" / "tensorrt"
        if (folder / "NvInferRuntime.h").is_file():
            return folder
    return library.find_tensorrt_headers()


def prepare(folder: Path, architectures: Sequence[str]) -> Libraries:
    """Compile both libraries into a folder.

    Raises:
        KnnMoeError: If nvcc or headers are missing, or nvcc refuses.
    """
    headers = find_headers()
    plugin = library.build(
        folder / library.LIBRARY, headers=headers, architectures=architectures, ptx=None
    )
    return Libraries(plugin, build_harness(folder / HARNESS, headers=headers))


def find_libraries(folder: Path, architecture: str) -> Libraries:
    """Those prepared in a folder, of these sources; compiled now if there are none.

    Raises:
        Absent: If there are none and none can be compiled.
    """
    found = Libraries(folder / library.LIBRARY, folder / HARNESS)
    if found.plugin.is_file() and found.harness.is_file():
        info = library.build_info(found.plugin)
        if info is not None and info.source == library.source_hash():
            return found
    try:
        return prepare(folder, (architecture,))
    except KnnMoeError as error:
        raise Absent(
            f"no library of these sources in {folder}, and none can be compiled here: {error} "
            "Run `gpu_check.py --prepare` where TensorRT's headers are, and bring that folder."
        ) from error


def check_plugin(
    cupy: Any, seed: int, limits: Limits, deadline: float, *, folder: Path = PREPARED
) -> Records:
    """The plugin over random cases, called and captured."""
    try:
        libraries = find_libraries(folder, str(cupy.cuda.Device().compute_capability))
    except Absent as reason:
        return {"status": "absent", "why": str(reason)}
    driven = Driven(cupy, libraries)
    hosts: Records = {}
    kinds = {"plugin": False, "plugin, CUDA graph": True}
    for position, (name, captured) in enumerate(kinds.items()):
        now = time.monotonic()
        share = max(0.0, deadline - now) / (len(kinds) - position)
        host = Host(name, partial(driven.run, captured=captured))
        hosts[name] = check_host(host, every_case(seed, limits), now + share)
    failed = any(host["status"] == "failed" for host in hosts.values())
    return {
        "status": "failed" if failed else "passed",
        "library": str(libraries.plugin),
        "hosts": hosts,
    }


class Driven:
    """Two plugins of the library, one for each similarity, and their calls."""

    def __init__(self, cupy: Any, libraries: Libraries) -> None:
        self.cupy = cupy
        self.plugins = {
            similarity: PluginHarness(
                libraries.plugin,
                fields={"similarity": similarity},
                harness=libraries.harness,
                cupy=cupy,
            )
            for similarity in ("cosine", "rbf")
        }

    def run(self, case: Case, *, captured: bool) -> Blended:
        """One case in a context of its own; its outputs are poisoned."""
        cupy = self.cupy
        stream = cupy.cuda.Stream(non_blocking=True)
        with stream:
            outputs = node_outputs(cupy, case)
            inputs = [cupy.asarray(array) for array in node_inputs(case).values()]
            plugin = self.plugins[case.memory.similarity]
            bound = plugin.bind(inputs, list(outputs.values()))
            stream.synchronize()
            bound.run()  # loads the kernels, which a capture may not
            if captured:
                stream.synchronize()
                for array in outputs.values():
                    array.fill(-7)
                stream.synchronize()
                stream.begin_capture()
                bound.run()
                stream.end_capture().launch(stream)
            stream.synchronize()
            return node_answer(cupy, outputs)
