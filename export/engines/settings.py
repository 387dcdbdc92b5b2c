"""What engines are built for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal

from knnmoe.runtime.bundle import ModelShape, TensorSpec
from knnmoe.runtime.engines.engine_set import BACKENDS, KEYS, LAYOUTS, PRECISIONS, Backend, Limits
from knnmoe.runtime.errors import SettingError

from ..lowering.std_ops import Experts

Plugin = Literal["auto", "require", "none"]
PLUGINS: tuple[Plugin, ...] = ("auto", "require", "none")
OPERATORS = ("primitive", "modern")
EXPERTS: tuple[Experts | Literal["auto"], ...] = ("auto", "gathered", "dense", "moe")
MOE_CAPABILITIES = (10, 11)  # major numbers of those that TensorRT's MoE layer is made for
MOE_SINCE = 11  # the major version whose parser reads it
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
        experts: `gathered`, `dense` or `moe` as in `StdOptions`; `auto` is `moe` where the target
            has it, and else gathers the experts of single tokens and runs all of them on prompts.
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
    experts: Experts | Literal["auto"] = "auto"
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
            ("experts", EXPERTS),
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

    def for_target(
        self, capabilities: tuple[str, ...], version: str, *, in_blocks: bool = False
    ) -> BuildSettings:
        """These settings, where `auto` experts are `moe` if the target has it.

        Args:
            capabilities: Of all the devices that engines are built for, as `86`.
            version: Of the backend.
            in_blocks: Whether the bundle's weights are blocks of integers, which `moe` is not for.

        Raises:
            SettingError: If `moe` was asked for and the target lacks it, or it is not for the
                bundle.
        """
        if self.experts not in ("auto", "moe") or (in_blocks and self.experts == "auto"):
            return self
        if in_blocks:
            raise SettingError(
                "experts", "TensorRT's layer takes no weights in blocks of integers",
                expected="a bundle in fp16 or fp32", found=self.experts,
                fix="Use --experts auto, gathered or dense.",
            )  # fmt: skip
        lacking = self._lacks_moe(capabilities, version)
        if lacking is None:
            return replace(self, experts="moe")
        if self.experts == "auto":
            return self
        expected, found = lacking
        raise SettingError(
            "experts", "the target has no mixture-of-experts layer", expected=expected, found=found,
            fix="Use --experts auto, gathered or dense.",
        )  # fmt: skip

    def experts_of(self, phase: str) -> Experts:
        """How a phase runs the experts; of the settings `for_target`."""
        if self.experts == "auto":
            return "gathered" if phase == "decode" else "dense"
        return self.experts

    def _lacks_moe(self, capabilities: tuple[str, ...], version: str) -> tuple[str, str] | None:
        """What it takes for `moe` and what is there instead; None where there is what it takes."""
        if self.backend != "tensorrt":
            return "backend tensorrt", self.backend
        if not all(int(capability) // 10 in MOE_CAPABILITIES for capability in capabilities):
            return "compute capability 10.x or 11.x", ", ".join(capabilities)
        if int(version.split(".")[0]) < MOE_SINCE:
            return f"TensorRT {MOE_SINCE} or newer", version
        return None

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
    return ranges[name] if name in ranges else ranges[without_gate(name)]


def without_gate(name: str) -> str:
    """A name without the `_{gate}` that the fused graph adds."""
    return name.rstrip("0123456789").rstrip("_")
