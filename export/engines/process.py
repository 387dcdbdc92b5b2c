"""The process that builds engines, seen from the one that waits for it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from knnmoe.runtime.errors import BackendError, EngineError, KnnMoeError

# (engine, phase of TensorRT's builder, step, steps)
Progress = Callable[[str, str, int, int], None]


def run_worker(
    jobs: Path, backend: str, temporary: Path, progress: Progress
) -> dict[str, dict[str, Any]]:
    """Build the jobs of a file; what the worker says of each, by name.

    Args:
        jobs: As `worker` reads it.
        backend: Of the jobs.
        temporary: A directory to write into.
        progress: Called as TensorRT goes on.

    Raises:
        BackendError: If TensorRT or the plugin cannot be loaded.
        EngineError: If TensorRT refuses a graph, or its process ends.
    """
    command = [sys.executable, "-m", "knnmoe.export.engines.worker", str(jobs)]
    built: dict[str, dict[str, Any]] = {}
    failure: KnnMoeError | None = None
    log = temporary / "worker.log"
    with (
        log.open("w") as errors,
        subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=errors, text=True,
            env=environment(backend, temporary),
        ) as worker,
    ):  # fmt: skip
        assert worker.stdout is not None
        try:
            for line in worker.stdout:
                event = _event(line)
                if event["event"] == "progress":
                    progress(event["name"], event["phase"], event["step"], event["steps"])
                elif event["event"] == "built":
                    built[event["name"]] = event
                    progress(event["name"], "built", 1, 1)
                elif event["event"] == "failed":
                    failure = _failure(event, backend)
        except BaseException:
            worker.kill()
            raise
    if failure is not None:
        raise failure
    if worker.returncode != 0:
        last = log.read_text(errors="replace").strip().splitlines()[-3:]
        raise EngineError(
            f"{backend} builder", f"ended with code {worker.returncode}",
            found=" / ".join(last) or "no message",
            fix="Killed (-9) means that the machine ran out of memory: build with smaller "
            "--max-context, --prefill or --workspace.",
        )  # fmt: skip
    return built


def _event(line: str) -> dict[str, Any]:
    """A line of the worker; what a library printed is no event."""
    try:
        event = json.loads(line)
    except ValueError:
        return {"event": "noise"}
    return event if isinstance(event, dict) and "event" in event else {"event": "noise"}


def _failure(event: Mapping[str, Any], backend: str) -> KnnMoeError:
    if "error" in event:
        stated = event["error"]
        return BackendError(
            stated["where"], stated["problem"], expected=stated["expected"],
            found=stated["found"], fix=stated["fix"],
        )  # fmt: skip
    return EngineError(
        f"{backend}: {event['name']}",
        event["problem"],
        found=event["found"],
        fix="A larger --workspace, smaller --max-context or --prefill, or other --experts, may do.",
    )


def environment(backend: str, temporary: Path) -> dict[str, str]:
    """The worker's environment: here is how it finds knnmoe and the libraries of TensorRT-RTX.

    The parser of TensorRT-RTX opens its library by a name without a version, which the wheel does
    not have.
    """
    environment = dict(os.environ)
    paths = [path for path in sys.path if path]
    environment["PYTHONPATH"] = os.pathsep.join(paths)
    if backend != "tensorrt_rtx":
        return environment
    from importlib.util import find_spec

    spec = find_spec("tensorrt_rtx_libs")
    if spec is None or spec.origin is None:
        return environment
    folder = Path(spec.origin).parent
    named = folder / "libtensorrt_rtx.so"
    versions = sorted(folder.glob("libtensorrt_rtx.so.?"))
    if not named.exists() and versions:
        (temporary / named.name).symlink_to(versions[-1])
    known = environment.get("LD_LIBRARY_PATH")
    environment["LD_LIBRARY_PATH"] = os.pathsep.join(
        [str(temporary), str(folder), *([known] if known else [])]
    )
    return environment
