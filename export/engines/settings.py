"""What engines are built for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from knnmoe.runtime.bundle import ModelShape, TensorSpec
from knnmoe.runtime.engines.engine_set import BACKENDS, KEYS, LAYOUTS, PRECISIONS, Backend, Limits
from knnmoe.runtime.errors import SettingError

Plugin = Literal["auto", "require", "none"]
PLUGINS: tuple[Plugin, ...] = ("auto", "require", "none")
OPERATORS = ("primitive", "modern")
TYPICAL_ENTRIES = 10_000  # what kernels are tuned for, where more are allowed

DEFAULT_LIMITS = Limits(batch=1, context=4096, prefill=128, entries=1 << 17)

Range = tuple[int, int, int]  # least, typical, most


@dataclass(frozen=True)
class BuildSettings:
    """What to build.

    Attributes:
        backend: `tensorrt`, `tensorrt_rtx`, or `onnxruntime` (graphs for its CUDA provider).
        layout: `split` or `fused`.
        precision: Of matrix products and the key-value cache.
        operators: `primitive` for every TensorRT from 10.3 on, `modern` for 10.15 and newer.
        keys: dtype of the memories' keys where a gate is inside an engine with the plugin.
        capabilities: Compute capabilities to build ahead for, as `86`; empty: this device.
        limits: The largest shapes.
        prefill: Whether to build engines for prompts; without them a prompt runs token by token.
        neighbors: K of gates inside engines without the plugin, to whose function it is fixed.
        plugin: `auto` takes the plugin where it is built, `require` insists, `none` does without.
        workspace: Bytes that TensorRT may use while it builds and runs a layer; None: all there is.
    """

    backend: Backend
    layout: str = "split"
    precision: str = "float16"
    operators: str = "primitive"
    keys: str = "float16"
    capabilities: tuple[str, ...] = ()
    limits: Limits = DEFAULT_LIMITS
    prefill: bool = True
    neighbors: int = 8
    plugin: Plugin = "auto"
    workspace: int | None = None

    def check(self, shape: ModelShape) -> None:
        """Raise `SettingError` for what no engine can be built of."""
        for name, choices in (
            ("backend", BACKENDS),
            ("layout", LAYOUTS),
            ("precision", PRECISIONS),
            ("operators", OPERATORS),
            ("keys", KEYS),
            ("plugin", PLUGINS),
        ):
            found = getattr(self, name)
            if found not in choices:
                raise SettingError(name, "unknown", expected=" or ".join(choices), found=found)
        limits = self.limits
        for name, low, high in (
            ("batch", 1, 1024),
            ("context", 1, shape.max_positions),
            ("prefill", 1, limits.context),
            ("entries", 1, (1 << 31) - 1),
        ):
            found = getattr(limits, name)
            if not low <= found <= high:
                raise SettingError(name, "out of range", expected=f"{low} to {high}", found=found)
        if not 1 <= self.neighbors <= limits.entries:
            raise SettingError(
                "neighbors", "out of range", expected=f"1 to {limits.entries}", found=self.neighbors
            )
        primitive = self.operators == "primitive" or self.backend == "onnxruntime"
        if not primitive and self.precision != "float16":
            raise SettingError(
                "precision", "TensorRT's attention takes no other", expected="float16",
                found=self.precision, fix="Use --precision float16, or --operators primitive.",
            )  # fmt: skip
        if self.capabilities and self.backend != "tensorrt_rtx":
            raise SettingError(
                "sm", f"{self.backend} builds for the device it runs on",
                found=", ".join(self.capabilities),
                fix="Build on the target, or ahead with --backend tensorrt_rtx.",
            )  # fmt: skip

    @property
    def phases(self) -> tuple[str, ...]:
        """The phases that get engines of their own."""
        return ("decode", "prefill") if self.prefill else ("decode",)


def limits_for(
    shape: ModelShape,
    *,
    batch: int | None = None,
    context: int | None = None,
    prefill: int | None = None,
    entries: int | None = None,
) -> Limits:
    """Limits where what is not given is the default, or less if the model has fewer positions."""
    usual = DEFAULT_LIMITS
    room = min(usual.context, shape.max_positions) if context is None else context
    return Limits(
        usual.batch if batch is None else batch,
        room,
        min(usual.prefill, room) if prefill is None else prefill,
        usual.entries if entries is None else entries,
    )


def dimension_ranges(limits: Limits, phase: str) -> Mapping[str, Range]:
    """How large each free dimension of a phase's graphs may be, by its name."""
    batch = limits.batch
    length = 1 if phase == "decode" else limits.prefill
    tokens = batch * length
    return {
        "batch": (1, 1, batch),
        "sequence": (1, length, length),
        "tokens": (1, length, tokens),
        "rows": (1, 1, tokens),
        "capacity": (1, limits.context, limits.context),
        "entries": (1, min(TYPICAL_ENTRIES, limits.entries), limits.entries),
    }


def profile(
    inputs: tuple[TensorSpec, ...], ranges: Mapping[str, Range]
) -> dict[str, list[list[int]]]:
    """Least, typical and largest shape of every input that has a free dimension."""
    shapes = {}
    for spec in inputs:
        if any(isinstance(size, str) for size in spec.shape):
            shapes[spec.name] = [
                [size if isinstance(size, int) else _range(size, ranges)[i] for size in spec.shape]
                for i in range(3)
            ]
    return shapes


def _range(name: str, ranges: Mapping[str, Range]) -> Range:
    """Memories of several gates have dimensions of their own: `entries_3` is as `entries`."""
    return ranges[name] if name in ranges else ranges[name.rstrip("0123456789").rstrip("_")]
