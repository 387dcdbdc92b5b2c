"""The public face: a bundle, perhaps with a memory, that generates, scores and explains itself."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, get_args

import numpy as np
from numpy.typing import NDArray

from .blend import GateMemory
from .bundle import EXPORT_AGAIN, Bundle, FusedSpec
from .calibration import Similarity, Variant
from .engines.onnxruntime import OrtEngine
from .errors import BackendError, BundleError, InputError
from .gates.onnx import graph_name
from .gates.select import Backend, EngineOf, make_gate
from .generation import Completion, Event, collect, stream
from .layouts import FusedWiring, GateRecord, HostLayout, Layout, SplitWiring
from .manifest import parse_object
from .memory import MemoryPack, ModelIdentity
from .pipeline import Pipeline
from .routing import RoutingRule
from .sampling import GenerationConfig
from .tokenizer import Tokenizer

LayoutName = Literal["split", "fused"]
LAYOUTS: tuple[LayoutName, ...] = get_args(LayoutName)
SMALL_SEGMENT = 16 << 20


@dataclass(frozen=True)
class RoutingTrace:
    """What every gate decided for every token of a text.

    Attributes:
        token_ids: [T] int64.
        gates: One `GateRecord` a gate: expert ids and weights [T, k], λ [T], neighbours [T, K'].
    """

    token_ids: NDArray[np.int64]
    gates: tuple[GateRecord, ...]


class Model:
    """A loaded bundle. Make one with `Model.load`.

    One model may serve several threads: each call that runs tokens uses a cache of its own.
    """

    def __init__(
        self,
        bundle: Bundle,
        *,
        layout: LayoutName = "split",
        gate: Backend = "auto",
        threads: int | None = None,
    ) -> None:
        if layout not in LAYOUTS:
            raise BackendError("layout", "unknown", expected=LAYOUTS, found=layout)
        self.bundle = bundle
        self.layout: LayoutName = layout
        self.tokenizer = Tokenizer.load(bundle.path)
        self.generation_config = _generation_config(bundle)
        self.memory: MemoryPack | None = None
        self._backend: Backend = gate
        self._threads = threads if threads is not None else _sensible_threads(bundle)
        self._engines: dict[str, OrtEngine] = {}
        manifest = bundle.manifest
        files = [_fused(bundle).file] if layout == "fused" else [s.file for s in manifest.segments]
        self._segments = tuple(self._engine(file) for file in files)
        self.pipeline = Pipeline(self._layout(None))

    @staticmethod
    def load(
        bundle: str | Path | Bundle,
        *,
        memory: str | Path | MemoryPack | None = None,
        layout: LayoutName = "split",
        gate: Backend = "auto",
        variant: Variant | None = None,
        neighbors: int | None = None,
        similarity: Similarity | None = None,
        scale: float | None = None,
        threads: int | None = None,
    ) -> Model:
        """Open a bundle and get it ready to run.

        Args:
            bundle: A directory written by `knnmoe-export`.
            memory: A memory pack built for the same model; None routes by the frozen router.
            layout: `split` has the gates between engines; `fused` inside one engine.
            gate: Backend of the gates in the split layout; `auto` takes the graphs of the bundle,
                and faiss for memories too large to scan at every token.
            variant, neighbors, similarity, scale: Replace the memory's own settings.
            threads: Of one operator; None takes the physical cores, or one thread for a model so
                small that sharing the work costs more than it saves.

        Raises:
            BundleError, MemoryPackError: If a directory is damaged, unsafe, or of another model.
            SettingError: If a setting is out of its range.
            BackendError: If a backend is missing or does not fit.
        """
        opened = bundle if isinstance(bundle, Bundle) else Bundle.open(bundle)
        model = Model(opened, layout=layout, gate=gate, threads=threads)
        if memory is not None:
            pack = memory if isinstance(memory, MemoryPack) else MemoryPack.open(memory)
            pack = pack.with_settings(variant=variant, neighbors=neighbors, similarity=similarity)
            model.swap_memory(pack if scale is None else _with_scale(pack, scale))
        return model

    @property
    def identity(self) -> ModelIdentity:
        """What a memory for this model must state."""
        manifest = self.bundle.manifest
        shape = manifest.architecture
        return ModelIdentity(
            manifest.fingerprint,
            manifest.model_type,
            shape.num_gates,
            shape.hidden_size,
            shape.num_experts,
        )

    def swap_memory(self, memory: str | Path | MemoryPack | None) -> None:
        """Put another memory in place, or none; running sequences use it from their next step.

        The new memory is read and bound completely before it takes over: if that fails, the old one
        keeps serving.

        Raises:
            MemoryPackError: If the pack is damaged or belongs to another model.
            BackendError: If the backend does not fit.
        """
        if memory is not None and not isinstance(memory, MemoryPack):
            memory = MemoryPack.open(memory)
        layout = self._layout(memory)
        self.pipeline.layout = layout
        self.memory = memory

    def disable_memory(self) -> None:
        """Route by the frozen router from the next step on."""
        self.swap_memory(None)

    def generate(
        self,
        prompt: str | Sequence[int],
        config: GenerationConfig | None = None,
        **overrides: object,
    ) -> Completion:
        """Continue a prompt; `overrides` replace fields of the configuration.

        Raises:
            InputError: If the prompt is empty or longer than the context.
            SettingError: If an option is unknown or out of its range.
        """
        ids, options = self._prompt(prompt), self._options(config, overrides)
        return collect(stream(self.pipeline, self.tokenizer, ids, options), len(ids))

    def stream(
        self,
        prompt: str | Sequence[int],
        config: GenerationConfig | None = None,
        **overrides: object,
    ) -> Iterator[Event]:
        """As `generate`, one `Event` a token as it comes."""
        ids, options = self._prompt(prompt), self._options(config, overrides)
        return stream(self.pipeline, self.tokenizer, ids, options)

    def logits(self, token_ids: Sequence[int] | NDArray[np.int64]) -> NDArray[np.float32]:
        """Logits after every token of one sequence: [T] → fp32 [T, V].

        Raises:
            InputError: If the sequence is empty, too long, or outside the vocabulary.
        """
        ids = np.asarray(token_ids, np.int64).reshape(1, -1)
        self._check_length(ids.size)
        cache = self.pipeline.new_cache(capacity=ids.size)
        return self.pipeline.step(cache, ids, rows="all")

    def score(self, token_ids: Sequence[int] | NDArray[np.int64]) -> NDArray[np.float32]:
        """Log-probability of each token given those before it: [T] → fp32 [T-1], in nats."""
        logits = self.logits(token_ids)[:-1].astype(np.float64)
        logits -= logits.max(axis=1, keepdims=True)
        normalizer = np.log(np.exp(logits).sum(axis=1))
        targets = np.asarray(token_ids, np.int64)[1:]
        scores: NDArray[np.float64] = logits[np.arange(len(targets)), targets] - normalizer
        return scores.astype(np.float32)

    def routing_trace(self, prompt: str | Sequence[int]) -> RoutingTrace:
        """What every gate decides for every token of a text.

        Raises:
            InputError: If the text is empty or longer than the context.
        """
        ids = np.asarray(self._prompt(prompt), np.int64).reshape(1, -1)
        self._check_length(ids.size)
        cache = self.pipeline.new_cache(capacity=ids.size)
        _, records = self.pipeline.traced_step(cache, ids)
        return RoutingTrace(ids[0], records)

    def _prompt(self, prompt: str | Sequence[int]) -> list[int]:
        if isinstance(prompt, str | bytes):
            return list(self.tokenizer.encode(prompt))
        return [int(token) for token in prompt]

    def _options(
        self, config: GenerationConfig | None, overrides: dict[str, object]
    ) -> GenerationConfig:
        return (config or self.generation_config).with_overrides(**overrides)

    def _check_length(self, tokens: int) -> None:
        if not 1 <= tokens <= self.pipeline.max_positions:
            raise InputError(
                "token_ids",
                "empty or longer than the context",
                expected=f"1 to {self.pipeline.max_positions} tokens",
                found=tokens,
                fix="Cut the text into shorter sequences.",
            )

    def _engine(self, file: str) -> OrtEngine:
        """The engine of a graph of the bundle, loaded once."""
        if file not in self._engines:
            self._engines[file] = OrtEngine(self.bundle.file(file), threads=self._threads)
        return self._engines[file]

    def _layout(self, memory: MemoryPack | None) -> Layout:
        manifest = self.bundle.manifest
        shape = manifest.architecture
        if memory is not None:
            memory.check_belongs_to(self.identity)
        memories = _memories(memory, manifest.routing, shape.num_gates)
        if self.layout == "fused":
            wanted = _fused(self.bundle).gate
            ready = tuple(_fitting(m, wanted, self.identity) for m in memories)
            return HostLayout(
                FusedWiring.over(shape, manifest.experts_per_token, self._segments[0], ready)
            )
        engine: EngineOf = lambda name: self._engine(manifest.gates[name].file)  # noqa: E731
        wiring = SplitWiring(
            architecture=shape,
            experts_per_token=manifest.experts_per_token,
            segments=self._segments,
            layers=tuple(segment.layers for segment in manifest.segments),
            gates=tuple(
                make_gate(self._backend, m, manifest.routing, manifest.experts_per_token, engine)
                for m in memories
            ),
        )
        return HostLayout(wiring)


def _sensible_threads(bundle: Bundle) -> int | None:
    """One for segments below `SMALL_SEGMENT` bytes of weights, else what ONNX Runtime takes.

    An operator of some microseconds gains nothing from a second thread, and waits a whole time
    slice for it when another program holds the core.
    """
    sizes = (spec.size for name, spec in bundle.manifest.files.items() if "segments/" in name)
    return 1 if max(sizes) < SMALL_SEGMENT else None


def _generation_config(bundle: Bundle) -> GenerationConfig:
    """The bundle's own; a checkpoint may state its end token only in `config.json`."""
    config = bundle.path / "config.json"
    stated = None
    if config.is_file():
        try:
            stated = parse_object(config.read_bytes()).get("eos_token_id")
        except ValueError as error:
            raise BundleError(config, f"is not valid JSON ({error})", fix=EXPORT_AGAIN) from error
    ends = stated if isinstance(stated, list) else [] if stated is None else [stated]
    return GenerationConfig.from_json(bundle.path / "generation_config.json", eos_token_ids=ends)


def _with_scale(pack: MemoryPack, scale: float) -> MemoryPack:
    return pack.with_settings(
        calibration={gate.gate: replace(gate.calibration, scale=scale) for gate in pack.gates}
    )


def _memories(
    pack: MemoryPack | None, rule: RoutingRule, num_gates: int
) -> tuple[GateMemory | None, ...]:
    """One memory a gate; None for gates the pack does not cover."""
    covered = {gate.gate: gate for gate in pack.gates} if pack else {}
    return tuple(
        pack.gate_memory(covered[gate], rule) if pack and gate in covered else None
        for gate in range(num_gates)
    )


def _fused(bundle: Bundle) -> FusedSpec:
    if bundle.manifest.fused is None:
        raise BackendError(
            bundle.path,
            "this bundle has no fused graph",
            fix="Export it again without --no-fused, or load it with layout='split'.",
        )
    return bundle.manifest.fused


def _fitting(memory: GateMemory | None, wanted: str, model: ModelIdentity) -> GateMemory:
    """A memory that the fused graph can take; an empty one stands for the frozen router."""
    if memory is None:
        return GateMemory.empty(model.hidden_size, model.num_experts)
    if graph_name(memory) != wanted:
        raise BackendError(
            "layout 'fused'",
            "its gates are of another kind than this memory",
            expected=wanted,
            found=graph_name(memory),
            fix="Load the model with layout='split', which takes every kind.",
        )
    return memory
