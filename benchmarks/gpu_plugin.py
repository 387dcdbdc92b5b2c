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

import numpy as np
from gpu_cases import Case, Limits, every_case, in_two_stages
from gpu_correctness import POISONED_ID, Host, check_host, node_answer, node_inputs, node_outputs
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
    chosen = plugin_hosts(cupy, libraries)
    hosts: Records = {}
    for position, host in enumerate(chosen):
        now = time.monotonic()
        share = max(0.0, deadline - now) / (len(chosen) - position)
        hosts[host.name] = check_host(host, every_case(seed, limits), now + share)
    failed = any(host["status"] == "failed" for host in hosts.values())
    return {
        "status": "failed" if failed else "passed",
        "library": str(libraries.plugin),
        "hosts": hosts,
    }


def plugin_hosts(cupy: Any, libraries: Libraries) -> list[Host]:
    """The plugin as it is called, captured, and with its two-stage search."""
    run = partial(drive, cupy, libraries)
    return [
        Host("plugin", run),
        Host("plugin, CUDA graph", partial(run, captured=True)),
        Host("plugin, two stages", run, ("f16", "f32"), in_two_stages),
    ]


def drive(cupy: Any, libraries: Libraries, case: Case, *, captured: bool = False) -> Blended:
    """One case in a plugin and a context of its own; its outputs are poisoned."""
    fields: dict[str, Any] = {
        "similarity": case.memory.similarity,
        "max_neighbors": np.int32(case.max_neighbors),
    }
    arrays = list(node_inputs(case).values())
    if case.scan is not None:
        # At least as many as the neighbours there is room for, although there may be fewer entries.
        fields["candidates"] = np.int32(max(case.candidates, case.max_neighbors))
        arrays += [case.scan.keys, case.scan.scales]
    plugin = PluginHarness(libraries.plugin, fields=fields, harness=libraries.harness, cupy=cupy)
    stream = cupy.cuda.Stream(non_blocking=True)
    with stream:
        outputs = node_outputs(cupy, case, case.max_neighbors)
        inputs = [cupy.asarray(array) for array in arrays]
        bound = plugin.bind(inputs, list(outputs.values()))
        stream.synchronize()
        bound.run()  # loads the kernels, which a capture may not
        if captured:
            for array in outputs.values():
                array.fill(POISONED_ID)
            stream.synchronize()
            stream.begin_capture()
            bound.run()
            stream.end_capture().launch(stream)
        stream.synchronize()
        return node_answer(cupy, outputs)
