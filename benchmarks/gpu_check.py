"""Everything to know of a CUDA device in one call: is it right, and is it fast.

    python3 benchmarks/gpu_check.py              # ten minutes
    python3 benchmarks/gpu_check.py --quick      # two

Runs from a checkout; needs NumPy, CuPy and a device. What else it finds (torch, Triton, TensorRT,
TensorRT for RTX, faiss with GPU support, cuVS, ONNX Runtime with CUDA) is measured beside our
kernels or named; what it does not find is reported as absent. Every stage is a process of its own,
so that one that crashes the device or hangs is a line in the report and the others still run. The
report is written after every stage.

Exit code: 0, or 1 if a stage that checks results failed, or there is no device (then nothing is
written).
"""

from __future__ import annotations

import argparse
import json
import os
import re
import secrets
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
for folder in (HERE, ROOT / "src"):
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))

import gpu_report as reporting  # noqa: E402 - from a checkout, without being installed
from gpu_cases import SMALL, WIDE  # noqa: E402
from gpu_correctness import check_all  # noqa: E402
from gpu_environment import current_commit, describe_machine  # noqa: E402
from gpu_plugin import PREPARED, check_plugin, prepare  # noqa: E402
from gpu_rivals import Cuvs, Faiss, Torch, measure_rival  # noqa: E402
from gpu_sanitizer import sanitize  # noqa: E402
from gpu_tensorrt import check_engines, library_path  # noqa: E402
from gpu_timing import (  # noqa: E402
    PREFILL_TOKENS,
    QUICK,
    Effort,
    Shape,
    measure_bandwidth,
    measure_ours,
    shapes,
)
from gpu_timing import SOURCE as TIMING_SOURCE  # noqa: E402

from knnmoe.runtime.errors import BackendError, KnnMoeError  # noqa: E402
from knnmoe.trt_plugins.cupy_prototype import NVRTC_OPTIONS, import_cupy  # noqa: E402
from knnmoe.trt_plugins.library import source_hash  # noqa: E402
from knnmoe.trt_plugins.plan import SOURCE  # noqa: E402
from knnmoe.trt_plugins.step_kernels import SOURCE as STEP_SOURCE  # noqa: E402

SECONDS, QUICK_SECONDS = 540.0, 110.0
LEAST_SECONDS, GRACE_SECONDS = 12.0, 20.0  # of a stage; until it is ended by force
ROUNDS = 3  # over every number of tokens, key type and similarity
SUBSET_CASES = 6  # under compute-sanitizer, which slows kernels a hundred times
KERNEL_NAME = re.compile(r"[(\s](knnmoe_[a-z0-9_]+)[,(]")
RESULTS = HERE / "results"

Records = dict[str, Any]


@dataclass(frozen=True)
class Job:
    """What a stage works with."""

    cupy: Any
    seed: int
    quick: bool
    deadline: float
    commit: str | None
    save: Callable[[Records], None]

    @property
    def effort(self) -> Effort:
        """How long each figure is measured."""
        return QUICK if self.quick else Effort()


def environment(job: Job) -> Records:
    """Device, driver, versions, commit."""
    return describe_machine(job.cupy, job.commit)


def compilation(job: Job) -> Records:
    """Compile all kernels; later stages find them in CuPy's cache."""
    files: Records = {}
    for source in (SOURCE, STEP_SOURCE, TIMING_SOURCE):
        start = time.monotonic()
        text = source.read_text()
        options = ("-std=c++17",) if source == TIMING_SOURCE else NVRTC_OPTIONS
        module = job.cupy.RawModule(code=text, options=options)
        names = [name for name in dict.fromkeys(KERNEL_NAME.findall(text)) if name in text]
        kernels = {name: _resources(module.get_function(name)) for name in names}
        files[source.name] = {"seconds": time.monotonic() - start, "kernels": kernels}
        job.save({"files": files})
    return {"files": files}


def _resources(kernel: Any) -> Records:
    """Registers, spilled bytes and static shared memory, as the driver sees them."""
    names = ("num_regs", "local_size_bytes", "shared_size_bytes", "max_threads_per_block")
    return {name: getattr(kernel, name, None) for name in names}


def bandwidth(job: Job) -> Records:
    """What the memory gives."""
    return measure_bandwidth(job.cupy, job.effort)


def correctness(job: Job) -> Records:
    """Every host against NumPy float64."""

    def save(hosts: Records) -> None:
        job.save({"status": "not finished", "hosts": hosts})

    rounds = 1 if job.quick else ROUNDS
    found = check_all(job.cupy, job.seed, WIDE, job.deadline, rounds=rounds, save=save)
    failed = any(host["status"] == "failed" for host in found.values())
    return {"status": "failed" if failed else "passed", "hosts": found}


def decode(job: Job) -> Records:
    """Our kernels at 1, 4 and 16 tokens."""
    return measure_ours(job.cupy, job.effort, job.deadline, job.save, which=_shapes(job))


def prefill(job: Job) -> Records:
    """Our kernels at 64 and 512 tokens."""
    return measure_ours(
        job.cupy, job.effort, job.deadline, job.save, tokens=PREFILL_TOKENS,
        which=[s for s in _shapes(job) if s.hidden == 2048 and s.entries <= 100_000],
        types=("f16", "i8"),
    )  # fmt: skip


def torch(job: Job) -> Records:
    """The same blend in torch."""
    return measure_rival(
        job.cupy, lambda: Torch(job.effort), job.effort, job.deadline, job.save, which=_shapes(job)
    )


def faiss(job: Job) -> Records:
    """The search in faiss."""
    return measure_rival(job.cupy, Faiss, job.effort, job.deadline, job.save, which=_shapes(job))


def cuvs(job: Job) -> Records:
    """The search in cuVS."""
    return measure_rival(job.cupy, Cuvs, job.effort, job.deadline, job.save, which=_shapes(job))


def sanitizer(job: Job) -> Records:
    """A few cases under compute-sanitizer."""
    subset = [str(Path(__file__).resolve()), "--subset", "--seed", str(job.seed)]
    return sanitize(subset, job.deadline)


def plugin(job: Job) -> Records:
    """The TensorRT plugin, driven without TensorRT."""
    return check_plugin(job.cupy, job.seed, WIDE, job.deadline)


def tensorrt(job: Job) -> Records:
    """Engines of the one node, in every TensorRT there is."""
    return check_engines(job.cupy, job.seed, job.deadline)


def _shapes(job: Job) -> list[Shape]:
    return shapes(hidden=(2048,)) if job.quick else shapes()


@dataclass(frozen=True)
class Stage:
    """A stage, and its part of the time."""

    run: Callable[[Job], Records]
    weight: float


STAGES = {
    "environment": Stage(environment, 8),
    "compile": Stage(compilation, 30),
    "bandwidth": Stage(bandwidth, 2),
    "correctness": Stage(correctness, 22),
    "plugin": Stage(plugin, 14),
    "decode": Stage(decode, 26),
    "torch": Stage(torch, 14),
    "prefill": Stage(prefill, 4),
    "faiss-gpu": Stage(faiss, 6),
    "cuvs": Stage(cuvs, 6),
    "sanitizer": Stage(sanitizer, 16),
    "tensorrt": Stage(tensorrt, 8),
}
OPTIONAL = "tensorrt"


def run_stage(name: str, job: Job) -> Records:
    """One stage in this process; what it raises becomes its record."""
    start = time.monotonic()
    try:
        record = {"status": "done", **STAGES[name].run(job)}
    except Exception as error:
        record = {
            "status": "failed",
            "why": f"{type(error).__name__}: {error}"[:1000],
            "traceback": traceback.format_exc(),
        }
    return {**record, "seconds": time.monotonic() - start}


Runner = Callable[[str, float], Records]


def run_in_process(options: argparse.Namespace, seed: int) -> Runner:
    """Runs a stage by name and seconds in a process of its own."""

    def run(name: str, seconds: float) -> Records:
        with tempfile.TemporaryDirectory() as folder:
            records, log = Path(folder) / "records.json", Path(folder) / "log"
            command = [
                sys.executable, str(Path(__file__).resolve()), "--child", name, "--records",
                str(records), "--seed", str(seed), "--seconds", str(seconds),
                *(["--quick"] if options.quick else []),
                *(["--commit", options.commit] if options.commit else []),
            ]  # fmt: skip
            start = time.monotonic()
            with log.open("wb") as output:
                child = subprocess.Popen(
                    command, stdout=output, stderr=subprocess.STDOUT,
                    env=library_path(Path(folder)) if name == OPTIONAL else None,
                )  # fmt: skip
                try:
                    child.wait(seconds + GRACE_SECONDS)
                except subprocess.TimeoutExpired:
                    child.kill()
                    child.wait()
            said = log.read_text(errors="replace")[-3000:]
            return read_records(records, child.returncode, said, time.monotonic() - start)

    return run


def read_records(file: Path, code: int, output: str, seconds: float) -> Records:
    """What a stage's process has left; with how it ended, if that was not well."""
    try:
        left: Records = json.loads(file.read_text())
    except (OSError, ValueError):
        left = {}
    if code == 0 and left.get("status") not in (None, "not finished"):
        return left
    if code == -9:
        why = f"ended by force after {seconds:.0f} seconds"
        wrong = any(host["status"] == "failed" for host in left.get("hosts", {}).values())
        status = "failed" if wrong else "not finished"
    else:
        how = f"signal {-code}" if code < 0 else f"exit code {code}"
        status, why = "failed", f"its process ended with {how}"
    return {**left, "status": status, "why": why, "output": output, "seconds": seconds}


def run_stages(
    names: Sequence[str],
    run: Runner,
    report: Records,
    seconds: float,
    publish: Callable[[Records], None],
) -> Records:
    """Run stages in order; each has its weight's share of the time that is left."""
    end = time.monotonic() + seconds
    stages: Records = report["stages"]
    for position, name in enumerate(names):
        left = end - time.monotonic()
        weights = [STAGES[other].weight for other in names[position:]]
        if left < LEAST_SECONDS / 2:
            stages[name] = {"status": "not finished", "why": "out of time", "seconds": 0.0}
        else:
            share = max(LEAST_SECONDS, left * STAGES[name].weight / sum(weights))
            stages[name] = run(name, min(share, left))
        report = reporting.finish(report)
        publish(report)
        print(reporting.describe_stage(name, stages[name]), flush=True)
    return report


def check(options: argparse.Namespace, cupy: Any, run: Runner | None = None) -> int:
    """Run the stages asked for, print and write the report; returns the exit code."""
    seed = secrets.randbelow(2**31) if options.seed is None else options.seed
    device = cupy.cuda.runtime.getDeviceProperties(cupy.cuda.Device().id)["name"]
    name = device.decode() if isinstance(device, bytes) else str(device)
    target = options.output or reporting.default_path(RESULTS, name)
    report: Records = {
        "schema": reporting.SCHEMA,
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "device": name,
        "commit": options.commit or current_commit(),
        "seed": seed,
        "quick": options.quick,
        "stages": {},
    }
    print(f"{name}: seed {seed}, stages {', '.join(options.stages)}", flush=True)
    report = run_stages(
        options.stages,
        run or run_in_process(options, seed),
        report,
        options.seconds,
        lambda current: reporting.write(current, target),
    )
    print("\n" + reporting.summarize(report))
    print(f"\nWritten to {target}")
    return reporting.exit_code(report)


def run_child(options: argparse.Namespace, cupy: Any) -> int:
    """One stage for `run_in_process`: its record goes to a file, again and again as it grows."""
    file: Path = options.records

    def save(record: Records) -> None:
        reporting.write({"status": "not finished", **record}, file)

    deadline = time.monotonic() + options.seconds
    job = Job(cupy, options.seed, options.quick, deadline, options.commit, save)
    reporting.write(run_stage(options.child, job), file)
    return 0


def run_subset(options: argparse.Namespace, cupy: Any) -> int:
    """A few small cases, for compute-sanitizer: every array an allocation of its own."""
    if hasattr(cupy.cuda, "set_allocator"):
        cupy.cuda.set_allocator(None)
    found = check_all(cupy, options.seed, SMALL, float("inf"), most_cases=SUBSET_CASES)
    failed = [name for name, host in found.items() if host["status"] == "failed"]
    for name in failed:
        print(found[name]["failures"][0]["traceback"])
    print(f"subset: {sum(host.get('cases', 0) for host in found.values())} cases", flush=True)
    return 1 if failed else 0


def run_prepare(architecture: str) -> int:
    """Compile what the stage `plugin` takes."""
    try:
        libraries = prepare(PREPARED, (architecture,))
    except KnnMoeError as error:
        print(f"gpu_check: {error}", file=sys.stderr)
        return 1
    print(f"{libraries.plugin}\n{libraries.harness}")
    return 0


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    known = ", ".join(STAGES)
    parser.add_argument("--stages", metavar="A,B", help=f"only these, of: {known}")
    parser.add_argument("--quick", action="store_true", help="fewer shapes and repetitions")
    parser.add_argument("--seconds", type=float, help=f"time in all (default {SECONDS:.0f})")
    parser.add_argument("--output", type=Path, metavar="FILE", help="where the report goes")
    parser.add_argument("--commit", help="of the checkout, where git does not say")
    parser.add_argument("--seed", type=int, help="of the random cases; drawn if not given")
    parser.add_argument(
        "--tensorrt", action="store_true", help="build and run engines of the plugin, too"
    )
    for hidden in ("--child", "--records"):
        parser.add_argument(hidden, help=argparse.SUPPRESS)
    parser.add_argument(
        "--prepare", metavar="SM", nargs="?", const="90",
        help="compile the plugin and its harness for a compute capability (default 90) into "
        "build/gpu, for a machine without TensorRT's headers; needs no device",
    )  # fmt: skip
    parser.add_argument("--subset", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.seconds is None:
        options.seconds = QUICK_SECONDS if options.quick else SECONDS
    if options.stages:
        options.stages = options.stages.split(",")
        unknown = [name for name in options.stages if name not in STAGES]
        if unknown:
            parser.error(f"unknown stage {', '.join(unknown)}; known are {known}")
    else:
        options.stages = [name for name in STAGES if name != OPTIONAL]
    if options.tensorrt and OPTIONAL not in options.stages:
        options.stages.append(OPTIONAL)
    if options.records:
        options.records = Path(options.records)
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    """Run from the command line; returns the exit code."""
    options = parse(arguments)
    if options.prepare:
        return run_prepare(options.prepare)
    # CuPy's cache knows the text it compiles, not the headers that this includes: a cache for each
    # state of the sources.
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "knnmoe" / "cupy"
    os.environ["CUPY_CACHE_DIR"] = str(cache / source_hash())
    try:
        cupy = import_cupy()
    except BackendError as error:
        print(f"gpu_check: {error}", file=sys.stderr)
        return 1
    if options.child:
        return run_child(options, cupy)
    if options.subset:
        return run_subset(options, cupy)
    return check(options, cupy)


if __name__ == "__main__":
    sys.exit(main())
