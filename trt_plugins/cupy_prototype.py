"""The blend from Python on a CUDA device: the kernels through CuPy's `RawModule`.

The memory stays on the device; a call launches kernels on CuPy's current stream and does nothing
else, so it can be captured in a CUDA graph. Arrays of torch and of anything else that speaks DLPack
are used where they are.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache, partial
from importlib import import_module
from typing import Any, Literal

import numpy as np

from knnmoe.runtime.errors import BackendError, SettingError

from .plan import (
    KERNELS,
    KEY_DTYPES,
    MAX_DECODE_TOKENS,
    MAX_NEIGHBORS,
    PARAMS,
    SOURCE,
    Device,
    KeyType,
    Problem,
    make_plan,
    most_tokens,
    sources_hash,
)

Array = Any  # cupy.ndarray, or whatever `CupyBlend.array` makes one of
# CuPy keeps what it compiles by the source it is given and these options, and not by the headers.
NVRTC_OPTIONS = ("-std=c++17", f"-I{KERNELS}", f"-DKNNMOE_SOURCES={sources_hash()}")


def import_cupy() -> Any:
    """CuPy, with a device to run on.

    Raises:
        BackendError: If CuPy is not installed or finds no device.
    """
    try:
        cupy = import_module("cupy")
    except ImportError as error:
        raise BackendError(
            "cupy",
            "is not installed",
            fix="Run `pip install cupy-cuda13x` (`cupy-cuda12x` for a driver older than 580).",
        ) from error
    try:
        count = cupy.cuda.runtime.getDeviceCount()
    except cupy.cuda.runtime.CUDARuntimeError as error:
        raise BackendError(
            "CUDA driver",
            "missing, or too old for this CuPy",
            found=str(error),
            fix="Install an NVIDIA driver, or use the CPU backends.",
        ) from error
    if count == 0:
        raise BackendError("CUDA", "has no device", fix="Use the CPU backends.")
    return cupy


@dataclass(frozen=True)
class MemoryArrays:
    """One gate's memory; shapes as in docs/design.md, on the host or on the device.

    Keys are fp32, fp16, or int8 with their scale in column 0 of `key_scales`; values fp32 or fp16.
    With `scan_keys` int8 [N, D] and `scan_scales` fp32 [N, 2] (runtime/two_stage.py makes them) the
    search has two stages: those are scanned for that many candidates, which are scored again with
    the keys, then fp32 or fp16.
    """

    keys: Array
    key_scales: Array
    values: Array
    center: Array
    calibration: Array
    n_valid: int
    k: int
    similarity: Literal["cosine", "rbf"]
    scan_keys: Array | None = None
    scan_scales: Array | None = None
    candidates: int = MAX_NEIGHBORS
    evidence_weights: Array | None = None  # [N] fp32; None: every entry 1


@dataclass(frozen=True)
class BoundBlend:
    """A call whose arrays are fixed: `run` launches it, the rest is where its results will be.

    `launches` are the kernels that `run` launches, one after another, by their names.
    """

    run: Callable[[], None]
    rows: Array
    state: Array
    confidence: Array
    neighbors: Array
    similarities: Array
    launches: tuple[tuple[str, Callable[[], None]], ...]


class CupyBlend:
    """A memory resident on the device, blended into the rows of its gate.

    Args:
        memory: What to search; copied to the device once where it is not there yet.
        max_tokens: The most tokens of a call; sizes the scratch memory, allocated once.
        max_neighbors: The most K may become later; K itself if not given.
        beside: Another blend on the same stream, whose compiled kernels and, if there is enough of
            it, scratch memory are used: calls on one stream run one after another.
        cupy: The CuPy module; imported if not given.

    Raises:
        BackendError: If CuPy or a device is missing.
        SettingError: If the memory's arrays do not fit together.
    """

    def __init__(
        self,
        memory: MemoryArrays,
        *,
        max_tokens: int,
        max_neighbors: int | None = None,
        beside: CupyBlend | None = None,
        cupy: Any = None,
    ) -> None:
        self._cupy = import_cupy() if cupy is None else cupy
        self.key_type = _key_type(memory.keys)
        values_type = np.float16 if memory.values.dtype == np.float16 else np.float32
        self.keys = self.array(memory.keys, KEY_DTYPES[self.key_type])
        self.key_scales = self.array(memory.key_scales, np.float32)
        self.values = self.array(memory.values, values_type)
        evidence_weights = memory.evidence_weights
        if evidence_weights is None:
            evidence_weights = np.ones(len(memory.keys), np.float32)
        self.evidence_weights = self.array(evidence_weights, np.float32)
        self.center = self.array(memory.center, np.float32)
        self.calibration = self.array(memory.calibration, np.float32)
        self.n_valid = self.array(np.array([memory.n_valid]), np.int64)
        self.k = self.array(np.array([memory.k]), np.int64)
        self.similarity = memory.similarity
        entries, hidden = self.keys.shape
        columns = min(max_neighbors or memory.k, entries)
        if not 1 <= columns <= MAX_NEIGHBORS or memory.k > MAX_NEIGHBORS:
            raise SettingError(
                "neighbors", "out of range", expected=f"1 to {MAX_NEIGHBORS}", found=memory.k
            )
        _expect("key_scales", self.key_scales, (entries, 2))
        _expect("values", self.values, (entries, self.values.shape[-1]))
        _expect("center", self.center, (hidden,))
        _expect("evidence_weights", self.evidence_weights, (entries,))
        _expect("calibration", self.calibration, (12,))
        self.scan_keys, self.scan_scales, candidates = self.keys, self.key_scales, 0
        if memory.scan_keys is not None or memory.scan_scales is not None:
            self.scan_keys, self.scan_scales = self._scanned(memory)
            candidates = memory.candidates
            if not columns <= candidates <= MAX_NEIGHBORS:
                raise SettingError(
                    "candidates", "out of range", found=candidates,
                    expected=f"{columns} (the most neighbours) to {MAX_NEIGHBORS}",
                )  # fmt: skip
        for name in ("keys", "scan_keys", "values"):
            if getattr(self, name).data.ptr % 16:
                raise SettingError(name, "does not begin at a multiple of 16 bytes")
        attributes = self._cupy.cuda.Device().attributes
        self._device = Device(
            attributes["MultiProcessorCount"], attributes["MaxSharedMemoryPerBlockOptin"]
        )
        self._problem = Problem(
            self.key_type, 1, 1, hidden, self.values.shape[1], columns, entries, candidates
        )
        most = most_tokens(self._problem.scan_type)
        if not 1 <= max_tokens <= most:
            raise SettingError(
                "max_tokens", "out of range", expected=f"1 to {most}", found=max_tokens
            )
        self.max_tokens = max_tokens
        needed = _most_workspace(self._problem, self._device, max_tokens)
        self.workspace: Array = None if beside is None else beside.workspace
        if self.workspace is None or self.workspace.nbytes < needed:
            self.workspace = self._cupy.empty(needed, np.uint8)
        self.ticket = self._cupy.zeros(1, np.uint32)
        self._module: Any = None if beside is None else beside._module
        if self._module is None:
            self._module = self._cupy.RawModule(code=SOURCE.read_text(), options=NVRTC_OPTIONS)

    def array(self, source: Any, dtype: Any) -> Array:
        """The source as an array on the device, contiguous; without a copy where it is one."""
        if not isinstance(source, np.ndarray) and hasattr(source, "__dlpack__"):
            source = self._cupy.from_dlpack(source)
        return self._cupy.ascontiguousarray(self._cupy.asarray(source, dtype=dtype))

    def update(self, **arrays: Any) -> None:
        """Write into the resident arrays, by name: `n_valid`, `k`, `calibration`, `keys` …

        In place and on the current stream, so that a captured graph sees it at its next replay.
        """
        for name, source in arrays.items():
            resident = getattr(self, name)
            fresh = self.array(np.atleast_1d(source) if np.isscalar(source) else source, None)
            _expect(name, fresh, resident.shape)
            resident[...] = fresh

    def bind(
        self,
        x: Any,
        r: Any,
        state: Any,
        lengths: Any,
        *,
        rows: Any = None,
        state_out: Any = None,
    ) -> BoundBlend:
        """Fix a call's arrays: x [T, D], r [T, E], state [B, 2] fp32 and lengths [B] int64.

        Where r' and the new state go may be given; they may be `r` and `state` themselves.

        Raises:
            SettingError: If an array does not fit.
        """
        x, r = self.array(x, np.float32), self.array(r, np.float32)
        state, lengths = self.array(state, np.float32), self.array(lengths, np.int64)
        tokens, sequences = x.shape[0], lengths.shape[0]
        if not 1 <= tokens <= self.max_tokens:
            raise SettingError("x", "too many tokens", expected=self.max_tokens, found=tokens)
        if sequences < 1 or tokens % sequences:
            raise SettingError(
                "lengths", "do not divide the tokens", expected=f"a divisor of {tokens}",
                found=sequences,
            )  # fmt: skip
        problem, empty = self._problem, self._cupy.empty
        results = {
            "rows": empty(r.shape, np.float32) if rows is None else self._target(rows),
            "state_out": (
                empty(state.shape, np.float32) if state_out is None else self._target(state_out)
            ),
            "confidence": empty((tokens,), np.float32),
            "neighbors": empty((tokens, problem.columns), np.int64),
            "similarities": empty((tokens, problem.columns), np.float32),
        }
        for name, array, shape in (
            ("x", x, (tokens, problem.hidden)),
            ("r", r, (tokens, problem.experts)),
            ("state", state, (sequences, 2)),
            ("rows", results["rows"], r.shape),
            ("state_out", results["state_out"], state.shape),
        ):
            _expect(name, array, shape)
        plan = self._plan(tokens, sequences)
        arrays = {
            "x": x, "r": r, "keys": self.keys, "key_scales": self.key_scales,
            "scan_keys": self.scan_keys, "scan_scales": self.scan_scales,
            "values": self.values, "evidence_weights": self.evidence_weights,
            "n_valid": self.n_valid, "k": self.k, "center": self.center,
            "calibration": self.calibration, "state": state, "lengths": lengths,
            "workspace": self.workspace, "ticket": self.ticket,
            **results,
        }  # fmt: skip
        params = np.zeros((), PARAMS)
        for name, array in arrays.items():
            params[name] = array.data.ptr
        numbers = {
            "capacity": problem.capacity, "tokens": tokens, "sequences": sequences,
            "hidden": problem.hidden, "experts": problem.experts, "columns": problem.columns,
            "candidates": problem.candidates, "splits": plan.splits,
            "rbf": self.similarity == "rbf", "half_values": self.values.dtype == np.float16,
        }  # fmt: skip
        for name, number in numbers.items():
            params[name] = number
        launches = []
        for launch in plan.launches:
            kernel = self._module.get_function(launch.kernel)
            # Raised once for all calls that are bound, whatever their sizes.
            kernel.max_dynamic_shared_size_bytes = self._device.shared_bytes
            launches.append((kernel, launch))

        def launch_one(kernel: Any, launch: Any, _keep_alive: Any = arrays) -> None:
            kernel(launch.grid, (launch.threads,), (params,), shared_mem=launch.shared_bytes)

        def run() -> None:
            for kernel, launch in launches:
                launch_one(kernel, launch)

        single = tuple((launch.kernel, partial(launch_one, k, launch)) for k, launch in launches)
        outputs = {**results, "state": results["state_out"]}
        del outputs["state_out"]
        return BoundBlend(run, **outputs, launches=single)

    def __call__(self, x: Any, r: Any, state: Any, lengths: Any) -> BoundBlend:
        """Bind and run once."""
        bound = self.bind(x, r, state, lengths)
        bound.run()
        return bound

    def _scanned(self, memory: MemoryArrays) -> tuple[Array, Array]:
        """What is scanned in the place of the keys, on the device."""
        if memory.scan_keys is None or memory.scan_scales is None:
            raise SettingError(
                "scan_keys" if memory.scan_keys is None else "scan_scales", "missing",
                expected="both scan_keys and scan_scales",
            )  # fmt: skip
        if self.key_type == "i8":
            raise SettingError(
                "keys", "cannot be int8 if scan_keys are given", expected="fp32 or fp16"
            )
        if _key_type(memory.scan_keys, "scan_keys") != "i8":
            raise SettingError(
                "scan_keys", "of another type", expected="int8", found=memory.scan_keys.dtype
            )
        scan_keys = self.array(memory.scan_keys, np.int8)
        scan_scales = self.array(memory.scan_scales, np.float32)
        _expect("scan_keys", scan_keys, self.keys.shape)
        _expect("scan_scales", scan_scales, self.key_scales.shape)
        return scan_keys, scan_scales

    def _plan(self, tokens: int, sequences: int) -> Any:
        return make_plan(replace(self._problem, tokens=tokens, sequences=sequences), self._device)

    def _target(self, array: Any) -> Array:
        """An array to write to: never a copy of it."""
        target = array
        if not isinstance(array, self._cupy.ndarray) and hasattr(array, "__dlpack__"):
            target = self._cupy.from_dlpack(array)
        if target.dtype != np.float32 or not target.flags.c_contiguous:
            raise SettingError(
                "rows or state_out", "cannot be written to", expected="contiguous fp32",
                found=target.dtype,
            )  # fmt: skip
        return target


@cache
def _most_workspace(problem: Problem, device: Device, max_tokens: int) -> int:
    """Scratch bytes for up to so many tokens; once for all gates of a model, whose sizes are alike.

    Fewer tokens may need more, being split in more parts: every number of tiles is asked about.
    """
    few = range(1, min(MAX_DECODE_TOKENS, max_tokens) + 1)
    plans = (
        make_plan(replace(problem, tokens=tokens), device)
        for tokens in (*few, *range(MAX_DECODE_TOKENS, max_tokens, 8), max_tokens)
    )
    return max(plan.workspace_bytes for plan in plans)


def _key_type(keys: Any, name: str = "keys") -> KeyType:
    names = {"torch.float32": "float32", "torch.float16": "float16", "torch.int8": "int8"}
    found = names.get(str(keys.dtype), str(keys.dtype))
    for key_type, dtype in KEY_DTYPES.items():
        if np.dtype(dtype).name == found:
            return key_type
    raise SettingError(name, "of an unknown type", expected="fp32, fp16 or int8", found=found)


def _expect(name: str, array: Any, shape: tuple[int, ...]) -> None:
    if tuple(array.shape) != tuple(shape):
        raise SettingError(name, "of another shape", expected=list(shape), found=list(array.shape))
