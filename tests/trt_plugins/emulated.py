"""The kernels on a CPU: builds the emulation, and calls it with NumPy arrays."""

from __future__ import annotations

import ctypes
import fcntl
import hashlib
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from knnmoe.runtime.blend import Blended, GateMemory
from knnmoe.runtime.errors import BackendError
from knnmoe.runtime.two_stage import ScanKeys
from knnmoe.trt_plugins.library import PLUGIN
from knnmoe.trt_plugins.plan import (
    KERNELS,
    KEY_DTYPES,
    KEY_TYPES,
    PARAMS,
    Device,
    KeyType,
    Launch,
    Plan,
    Problem,
    make_plan,
)
from knnmoe.trt_plugins.toolchain import find_cuda_headers

EMULATION = Path(__file__).parent / "emulation"
BUILD = Path(__file__).parents[2] / "build" / "emulation"
SCHEDULES = ("greedy", "forward", "backward", "random")
SANITIZERS = ("-O1", "-g1", "-fsanitize=address,undefined", "-fno-sanitize-recover=all")
SMALL_DEVICE = Device(multiprocessors=1, shared_bytes=99 * 1024)


class CLaunch(ctypes.Structure):
    _fields_ = (
        ("kernel", ctypes.c_char * 40), ("grid_x", ctypes.c_int), ("grid_y", ctypes.c_int),
        ("threads", ctypes.c_int), ("shared_bytes", ctypes.c_longlong),
    )  # fmt: skip


class CPlan(ctypes.Structure):
    _fields_ = (
        ("launches", CLaunch * 5), ("launch_count", ctypes.c_int), ("splits", ctypes.c_int),
        ("workspace_bytes", ctypes.c_longlong),
    )  # fmt: skip


class CProblem(ctypes.Structure):
    _fields_ = (
        ("key_type", ctypes.c_int), ("tokens", ctypes.c_int), ("sequences", ctypes.c_int),
        ("hidden", ctypes.c_int), ("experts", ctypes.c_int), ("columns", ctypes.c_int),
        ("candidates", ctypes.c_int), ("capacity", ctypes.c_longlong),
    )  # fmt: skip


class CDevice(ctypes.Structure):
    _fields_ = (("multiprocessors", ctypes.c_int), ("shared_bytes", ctypes.c_longlong))


def build(kernels: Path = KERNELS, flags: Sequence[str] = ()) -> ctypes.CDLL:
    """The emulation of the kernels in a folder."""
    loaded = ctypes.CDLL(str(compile_emulation(kernels, flags)))
    loaded.knnmoe_run.restype = ctypes.c_char_p
    loaded.knnmoe_launch.restype = ctypes.c_char_p
    loaded.knnmoe_streamed_bytes.restype = ctypes.c_long
    return loaded


def compile_emulation(
    kernels: Path = KERNELS, flags: Sequence[str] = (), source: str = "blend.cpp"
) -> Path:
    """Compile the emulation of the kernels in a folder, once for each content."""
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("g++ is not installed: the kernels cannot be emulated")
    try:
        headers = find_cuda_headers()
    except BackendError as error:
        pytest.skip(str(error))
    digest = hashlib.sha256(repr((flags, headers, source)).encode())
    for file in (
        *sorted(EMULATION.iterdir()),
        *sorted(kernels.iterdir()),
        *sorted(PLUGIN.iterdir()),
    ):
        digest.update(file.read_bytes())
    library = BUILD / f"{digest.hexdigest()[:16]}.so"
    with alone(library):
        if library.exists():
            return library
        partial = library.with_suffix(".partial")
        command = [
            compiler, "-std=c++17", "-O2", "-fPIC", "-shared", "-fno-strict-aliasing",
            "-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas", "-Wno-unused-variable",
            f"-I{EMULATION}", f"-I{kernels}", "-isystem", str(headers), *flags,
            "-o", str(partial), str(EMULATION / source),
        ]  # fmt: skip
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr[-4000:]
        partial.replace(library)
    return library


@contextmanager
def alone(target: Path) -> Iterator[None]:
    """While this process makes a file or folder, no other does."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with target.with_name(f".{target.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


@cache
def library() -> ctypes.CDLL:
    return build()


def plan_in_c(problem: Problem, device: Device) -> Plan:
    """The plan of plan.h."""
    plan = _c_plan(library(), problem, device)
    launches = plan.launches[: plan.launch_count]
    return Plan(
        tuple(
            Launch(x.kernel.decode(), (x.grid_x, x.grid_y), x.threads, x.shared_bytes)
            for x in launches
        ),
        plan.splits,
        plan.workspace_bytes,
    )


def _c_plan(emulation: ctypes.CDLL, problem: Problem, device: Device) -> CPlan:
    plan = CPlan()
    sizes = (
        problem.tokens, problem.sequences, problem.hidden, problem.experts, problem.columns,
        problem.candidates,
    )  # fmt: skip
    c_problem = CProblem(KEY_TYPES.index(problem.key_type), *sizes, problem.capacity)
    c_device = CDevice(device.multiprocessors, device.shared_bytes)
    emulation.knnmoe_plan(ctypes.byref(c_problem), ctypes.byref(c_device), ctypes.byref(plan))
    return plan


@dataclass(frozen=True)
class Stored:
    """A memory as a device holds it: keys and values in their types, capacity included."""

    memory: GateMemory  # the same in fp32, exactly: what the reference is run on
    keys: Any
    key_scales: Any
    values: Any
    key_type: KeyType
    scan: ScanKeys | None = None  # scanned in the place of the keys …
    candidates: int = 0  # … for that many candidates


def store(memory: GateMemory, key_type: KeyType, half_values: bool) -> Stored:
    """Round the keys and values to their types; the reference sees what was rounded."""
    scales = memory.key_scales.copy()
    values = memory.values.astype(np.float16 if half_values else np.float32)
    with np.errstate(invalid="ignore"):
        if key_type == "i8":
            largest = np.abs(memory.keys).max(axis=1)
            step = np.where(largest > 0, largest / 127, 1).astype(np.float32)
            keys = np.nan_to_num(np.rint(memory.keys / step[:, None])).astype(np.int8)
            scales[:, 0] = memory.key_scales[:, 0] * step
        else:
            keys = memory.keys.astype(KEY_DTYPES[key_type])
    same = replace(
        memory, keys=keys.astype(np.float32), key_scales=scales, values=values.astype(np.float32)
    )
    return Stored(same, keys, scales, values, key_type)


def aligned(array: Any) -> Any:
    """A copy that begins at a multiple of 16 bytes, in an allocation of its own."""
    array = np.ascontiguousarray(array)
    raw = np.empty(array.nbytes + 16, np.uint8)
    start = -raw.ctypes.data % 16
    copy = raw[start : start + array.nbytes].view(array.dtype).reshape(array.shape)
    copy[...] = array
    return copy


def blend(
    stored: Stored,
    x: Any,
    r: Any,
    state: Any,
    lengths: Any,
    *,
    schedule: str = "greedy",
    seed: int = 0,
    device: Device = SMALL_DEVICE,
    columns: int | None = None,
    emulation: ctypes.CDLL | None = None,
    ticket: Any = None,
    in_place: bool = False,
) -> Blended:
    """One call of the kernels; outputs are poisoned before.

    Raises:
        RuntimeError: If the emulated machine stopped: a barrier not met, lanes that diverged.
    """
    memory, entries = stored.memory, len(stored.keys)
    columns = min(memory.k, entries) if columns is None else columns
    tokens, hidden = x.shape
    experts = r.shape[1]
    problem = Problem(
        stored.key_type, tokens, len(lengths), hidden, experts, columns, entries, stored.candidates
    )
    plan = make_plan(problem, device)
    keys, key_scales = aligned(stored.keys), stored.key_scales.astype(np.float32)
    scan = stored.scan
    r, state = r.astype(np.float32), state.astype(np.float32)
    arrays = {
        "x": x.astype(np.float32), "r": r, "keys": keys, "key_scales": key_scales,
        "scan_keys": keys if scan is None else aligned(scan.keys),
        "scan_scales": key_scales if scan is None else scan.scales,
        "values": aligned(stored.values), "evidence_weights": memory.entry_evidence(),
        "n_valid": np.array([memory.n_valid], np.int64), "k": np.array([memory.k], np.int64),
        "center": memory.center, "calibration": memory.calibration.vector(), "state": state,
        "lengths": lengths.astype(np.int64),
        "rows": r if in_place else np.full((tokens, experts), np.nan, np.float32),
        "state_out": state if in_place else np.full((len(lengths), 2), np.nan, np.float32),
        "confidence": np.full(tokens, np.nan, np.float32),
        "neighbors": np.full((tokens, columns), -7, np.int64),
        "similarities": np.full((tokens, columns), np.nan, np.float32),
        "workspace": np.full(plan.workspace_bytes, 0xFF, np.uint8),
        "ticket": np.zeros(1, np.uint32) if ticket is None else ticket,
    }  # fmt: skip
    arrays = {name: np.ascontiguousarray(array) for name, array in arrays.items()}
    params = np.zeros((), PARAMS)
    for name, array in arrays.items():
        params[name] = array.ctypes.data
    numbers = {
        "capacity": entries, "tokens": tokens, "sequences": len(lengths), "hidden": hidden,
        "experts": experts, "columns": columns, "candidates": stored.candidates,
        "splits": plan.splits, "rbf": memory.similarity == "rbf",
        "half_values": stored.values.dtype == np.float16,
    }  # fmt: skip
    for name, number in numbers.items():
        params[name] = number
    emulation = emulation or library()
    error = emulation.knnmoe_run(
        ctypes.byref(_c_plan(emulation, problem, device)), ctypes.c_void_p(params.ctypes.data),
        SCHEDULES.index(schedule), seed,
    )  # fmt: skip
    if error is not None:
        raise RuntimeError(error.decode())
    return Blended(
        arrays["rows"], arrays["confidence"], arrays["neighbors"], arrays["similarities"],
        arrays["state_out"],
    )  # fmt: skip


def check_sanitized(script: str, calls: int, **compiled: str) -> None:
    """Run a script of this folder over a build with sanitizers; it must say that all was clean."""
    found = subprocess.run(
        ["g++", "-print-file-name=libasan.so"], capture_output=True, text=True, check=True
    )
    runtime = Path(found.stdout.strip())
    if not runtime.is_absolute():
        pytest.skip("g++ comes without the address sanitizer")
    compile_emulation(flags=SANITIZERS, **compiled)  # here, where no sanitizer slows it down
    environment = {
        **os.environ,
        "LD_PRELOAD": str(runtime),
        "ASAN_OPTIONS": "detect_leaks=0:detect_stack_use_after_return=0:abort_on_error=0",
        "UBSAN_OPTIONS": "halt_on_error=1:print_stacktrace=1",
    }
    done = subprocess.run(
        [sys.executable, Path(__file__).parent / script, str(calls)],
        capture_output=True, text=True, check=False, env=environment, timeout=300,
    )  # fmt: skip
    assert done.stdout.endswith("clean\n"), done.stderr[-6000:]
