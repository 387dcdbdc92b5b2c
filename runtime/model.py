"""The public face: a bundle, perhaps with a memory, that generates, scores and explains itself."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .batch import generate_batch
from .bundle import EXPORT_AGAIN, Bundle
from .calibration import Similarity, Variant
from .chat import ChatTemplate, Message
from .compressed import Memory, first_entries
from .devices import Device, open_backend
from .entries import NewEntries, with_entries
from .errors import BackendError, BundleError, InputError, SettingError
from .generation import Completion, Event, check_prompt, check_tokens
from .host import LayoutName, ModelBackend
from .layouts import GateRecord, Layout
from .manifest import parse_object
from .memory import MemoryPack
from .metrics import Meter, Metrics
from .pack_parts import ModelIdentity
from .pipeline import Pipeline
from .routing import RoutingRule
from .run_config import RunConfig, limited
from .sampling import GenerationConfig
from .selection_bias import read_selection_biases
from .session import Hooks, Overflow, Session
from .shortage import memory_for
from .tokenizer import Tokenizer


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

    One model may serve several threads: each call that runs tokens uses a cache of its own, and
    weights and memory are shared. As a context manager, or with `close`, it is given up.
    """

    def __init__(self, bundle: Bundle, backend: ModelBackend) -> None:
        self.bundle = bundle
        self.layout: LayoutName = backend.layout_name
        self.tokenizer = Tokenizer.load(bundle.path)
        self.generation_config = _generation_config(bundle)
        self.chat_template = ChatTemplate.load(bundle.path, listed=bundle.manifest.files)
        self.memory: MemoryPack | None = None
        self._backend: ModelBackend | None = backend
        self._meter = Meter()
        self._swapping = threading.Lock()
        self._closing = threading.Event()
        self._selection_biases = read_selection_biases(bundle)
        layout, self._memories = self._layout(None)
        self._pipeline: Pipeline | None = Pipeline(layout)

    @staticmethod
    def load(
        bundle: str | Path | Bundle,
        *,
        memory: str | Path | MemoryPack | None = None,
        device: Device = "cpu",
        layout: LayoutName | None = None,
        gate: str | None = None,
        engines: str | Path | None = None,
        keys: str | None = None,
        cuda_graph: bool | None = None,
        variant: Variant | None = None,
        neighbors: int | None = None,
        similarity: Similarity | None = None,
        scale: float | None = None,
        threads: int | None = None,
        run_config: str | Path | RunConfig | None = None,
    ) -> Model:
        """Open a bundle and get it ready to run.

        Args:
            bundle: A directory written by `knnmoe-export`.
            memory: A memory pack built for the same model; None routes by the frozen router.
            device: `cpu` runs the bundle as it is, `cuda` the engines built of it.
            layout: `split` has the gates between engines (the default on the CPU), `fused` inside
                one engine. On a device, the engines say which; None takes either.
            gate: Backend of the gates in the split layout. CPU: `auto`, the default, takes the
                graphs of the bundle, `two-stage` for memories that scan faster as int8 keys with
                the best scored again, and faiss for those too large to scan at every token.
                CUDA: `cuda`, the default, or `plugin`.
            engines: CUDA: directory written by `knnmoe engines build`; None takes the newest of
                this bundle in the cache.
            keys: CUDA: dtype of the memory's keys on the device, `float16` by default; with
                `int8+float16` int8 keys are scanned, and the best scored again in fp16.
            cuda_graph: CUDA: capture decode steps in a CUDA graph, as is the default.
            variant, neighbors, similarity, scale: Replace the memory's own settings. A pack that
                is not calibrated and replaces logits is used if its variant is asked for.
            threads: Of one operator; None takes the physical cores, or one thread for a model so
                small that sharing the work costs more than it saves.
            run_config: How much of this memory is used: a file that `knnmoe profile --budget-ms`
                wrote. It says nothing of memories that take its place later.

        Raises:
            BundleError, MemoryPackError: If a directory is damaged, unsafe, or of another model.
            SettingError: If a setting is out of its range, the device does not have it, or the run
                configuration is of another model or memory.
            BackendError: If a backend is missing or does not fit.
            EngineError: If engines are damaged, or of another bundle, device or version.
            DeviceError: If the device, or this machine, has too little memory.
        """
        if not isinstance(bundle, Bundle):
            with memory_for(f"checking {bundle}"):
                bundle = Bundle.open(bundle)
        opened = bundle
        with memory_for(f"the model of {opened.path}", opened.total_bytes):
            backend = open_backend(
                opened,
                device,
                layout=layout,
                gate=gate,
                threads=threads,
                engines=engines,
                keys=keys,
                cuda_graph=cuda_graph,
            )
            model = Model(opened, backend)
        pack = memory
        if pack is not None and not isinstance(pack, MemoryPack):
            with memory_for(f"checking {pack}"):
                pack = MemoryPack.open(pack)
            if variant is None:
                pack.check_calibrated()
        if run_config is not None:
            where: object = run_config
            if isinstance(run_config, RunConfig):
                where = "run configuration"
            else:
                run_config = RunConfig.read(run_config)
            precision = opened.manifest.precision
            pack = run_config.applied(pack, model.identity, precision, where)
        own = {"variant": variant, "neighbors": neighbors, "similarity": similarity, "scale": scale}
        for name, given in own.items():
            if pack is None and given is not None:
                raise SettingError(
                    name, "replaces the memory's own, and there is none", found=given,
                    fix="Give the memory too, or leave it out.",
                )  # fmt: skip
        if pack is not None:
            pack = pack.with_settings(variant=variant, neighbors=neighbors, similarity=similarity)
            model.swap_memory(pack if scale is None else _with_scale(pack, scale))
        return model

    @staticmethod
    async def aload(bundle: str | Path | Bundle, **options: Any) -> Model:
        """As `load`, on a thread of its own, so that the event loop goes on."""
        return await asyncio.to_thread(Model.load, bundle, **options)

    def close(self) -> None:
        """Give the model up: texts being written end as `cancelled`, later calls are refused.

        A step that runs is finished. Weights and memory are free once no session is held any more.
        """
        self._closing.set()
        with self._swapping:
            self._backend = self._pipeline = self.memory = None
            self._memories = ()

    @property
    def pipeline(self) -> Pipeline:
        """What runs the steps.

        Raises:
            BackendError: If the model was closed.
        """
        if self._pipeline is None:
            raise self._closed()
        return self._pipeline

    def __enter__(self) -> Model:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    @property
    def metrics(self) -> Metrics:
        """What the model has done since it was loaded."""
        return self._meter.read()

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
            MemoryPackError: If the pack is damaged or belongs to another model, or is given by its
                path, replaces logits and is not calibrated.
            BackendError: If the backend does not fit.
            DeviceError: If there is not enough memory for it.
        """
        if memory is not None and not isinstance(memory, MemoryPack):
            with memory_for(f"checking {memory}"):
                memory = MemoryPack.open(memory)
            memory.check_calibrated()
        with self._swapping:
            layout, memories = self._layout(memory)
            self.pipeline.layout = layout
            self.memory, self._memories = memory, memories
        self._meter.swapped()

    def add_entries(self, entries: Mapping[int, NewEntries], *, variant: Variant) -> None:
        """Put entries into the memory that serves; all of them count from the next step on.

        No step sees some of them, and texts that are being written go on with what their gates and
        caches know. The entries of the pack keep their numbers, the new ones follow. They live in
        this model alone: nothing is written to the pack, and a swap forgets them. A gate has room
        for up to a quarter more than it needed at last; where that is used up, its memory is copied
        into a larger one. Gates `two-stage` and `faiss` make what they search anew each time.

        Args:
            entries: By gate; gates that are not named stay as they are.
            variant: What the values are; it must be that of the memory.

        Raises:
            SettingError: If there is no such gate, it is left to the frozen router, the variant is
                another, or engines were built for fewer entries.
            BackendError: If there is no memory, or it is compressed.
            InputError: If an array has another shape, NaN or infinite numbers.
            DeviceError: If the device has too little memory.
        """
        with self._swapping:
            pipeline = self.pipeline
            memories = with_entries(
                self._memories,
                entries,
                variant=variant,
                of_memory=self.memory.variant if self.memory else None,
            )
            assert self._backend is not None  # as there is a pipeline
            pipeline.layout = self._backend.extended(memories, tuple(entries), pipeline.layout)
            self._memories = memories
        self._meter.added(sum(len(new.keys) for new in entries.values()))

    def disable_memory(self) -> None:
        """Route by the frozen router from the next step on."""
        self.swap_memory(None)

    def beside(self, entries: int | None = None) -> Pipeline:
        """A pipeline over the same engines with a smaller memory, beside the model's own.

        For measuring what a memory's size costs: each gate has its first `entries` entries, none
        with 0, all with None. Swaps do not touch it.

        Raises:
            BackendError, DeviceError: As `swap_memory` does.
        """
        memories = self._memories
        if entries is not None:
            memories = tuple(first_entries(memory, entries) for memory in memories)
        return Pipeline(self.backend.beside(memories))

    @property
    def backend(self) -> ModelBackend:
        """Where the model runs.

        Raises:
            BackendError: If the model was closed.
        """
        if self._backend is None:
            raise self._closed()
        return self._backend

    def session(
        self,
        config: GenerationConfig | None = None,
        *,
        capacity: int | None = None,
        overflow: Overflow = "refuse",
        keep: int = 0,
        hooks: Hooks | None = None,
    ) -> Session:
        """A text that is continued call by call and keeps its cache between them; see `Session`.

        Raises:
            SettingError: If an argument is out of its range.
        """
        return Session(
            self.pipeline,
            self.tokenizer,
            config or self.generation_config,
            capacity=capacity,
            overflow=overflow,
            keep=keep,
            hooks=hooks,
            template=self.chat_template,
            meter=self._meter,
            closing=self._closing,
        )

    def render_chat(
        self,
        messages: Sequence[Message],
        add_generation_prompt: bool = True,
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        variables: Mapping[str, Any] | None = None,
    ) -> str:
        """A conversation as text, by the chat template of the bundle.

        Its special tokens are in it: `tokenizer.encode_rendered` makes tokens of it. To reply to
        it use `Session.chat`.

        Args:
            messages: `[{"role": "user", "content": "…"}, …]`.
            add_generation_prompt: End with what begins a reply.
            tools, variables: As in `Session.chat`.

        Raises:
            InputError: If messages are malformed, or the template refuses them.
            BackendError: If the bundle has no chat template, or jinja2 is not installed.
        """
        return self.chat_template.render(
            messages,
            add_generation_prompt=add_generation_prompt,
            tools=tools,
            variables=variables,
        )

    def generate(
        self, prompt: str | Sequence[int], config: GenerationConfig | None = None, **options: Any
    ) -> Completion:
        """Continue a prompt.

        Args:
            prompt: Text or token ids.
            config: Instead of the bundle's own.
            options: `cancel` and `deadline_s` as in `Session.stream`; others replace fields of the
                configuration.

        Raises:
            InputError: If the prompt is empty or longer than the context.
            SettingError: If an option is unknown or out of its range.
        """
        ids = self._prompt(prompt)
        return self._once(ids, config, options).generate(ids, config, **options)

    def stream(
        self, prompt: str | Sequence[int], config: GenerationConfig | None = None, **options: Any
    ) -> Iterator[Event]:
        """As `generate`, one `Event` a token as it comes."""
        ids = self._prompt(prompt)
        return self._once(ids, config, options).stream(ids, config, **options)

    async def agenerate(
        self, prompt: str | Sequence[int], config: GenerationConfig | None = None, **options: Any
    ) -> Completion:
        """As `generate`, off the event loop."""
        ids = self._prompt(prompt)
        return await self._once(ids, config, options).agenerate(ids, config, **options)

    async def astream(
        self, prompt: str | Sequence[int], config: GenerationConfig | None = None, **options: Any
    ) -> AsyncIterator[Event]:
        """As `stream`, off the event loop; see `Session.astream`."""
        ids = self._prompt(prompt)
        async for event in self._once(ids, config, options).astream(ids, config, **options):
            yield event

    def generate_batch(
        self,
        prompts: Sequence[str | Sequence[int]],
        config: GenerationConfig | None = None,
        **overrides: object,
    ) -> list[Completion]:
        """Continue several prompts side by side, one step for all; each as it would be alone.

        Raises:
            InputError: If there is none, or one is empty or longer than the context.
            SettingError: If an option is unknown or out of its range.
        """
        if not prompts:
            raise InputError("prompts", "none given", expected="at least one")
        return generate_batch(
            self.pipeline,
            self.tokenizer,
            [self._prompt(prompt) for prompt in prompts],
            (config or self.generation_config).with_overrides(**overrides),
            self._meter,
            self._closing,
        )

    def logits(self, token_ids: Sequence[int] | NDArray[np.int64]) -> NDArray[np.float32]:
        """Logits after every token of one sequence: [T] → fp32 [T, V].

        Raises:
            InputError: If the sequence is empty, too long, or outside the vocabulary.
        """
        self._check_length(len(token_ids))
        ids = check_tokens(token_ids, self.pipeline.vocab_size, where="token_ids")
        cache = self.pipeline.new_cache(capacity=ids.size)
        return self.pipeline.step(cache, ids[None], rows="all")

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
        ids: list[int] = check_tokens(prompt, self.pipeline.vocab_size).tolist()
        return ids

    def _once(
        self, ids: list[int], config: GenerationConfig | None, options: dict[str, Any]
    ) -> Session:
        """A session with room for this one text."""
        pipeline = self.pipeline
        positions = pipeline.max_positions
        check_prompt(ids, pipeline.vocab_size, positions)
        asked = options.get("max_new_tokens")
        chosen = (config or self.generation_config).with_overrides(max_new_tokens=asked)
        return self.session(capacity=min(len(ids) + chosen.max_new_tokens, positions))

    def _closed(self) -> BackendError:
        return BackendError(
            self.bundle.path, "the model was closed", fix="Load it again with `Model.load`."
        )

    def _check_length(self, tokens: int) -> None:
        if not 1 <= tokens <= self.pipeline.max_positions:
            raise InputError(
                "token_ids",
                "empty or longer than the context",
                expected=f"1 to {self.pipeline.max_positions} tokens",
                found=tokens,
                fix="Cut the text into shorter sequences.",
            )

    def _layout(self, memory: MemoryPack | None) -> tuple[Layout, tuple[Memory | None, ...]]:
        if self._backend is None:
            raise self._closed()
        if memory is not None:
            memory.check_belongs_to(self.identity)
        rule = self.bundle.manifest.routing
        what = "routing" if memory is None else f"the memory of {memory.path}"
        with memory_for(what, None if memory is None else memory.loaded_bytes):
            memories = _memories(memory, rule, self._selection_biases)
            return self._backend.layout(memories), memories


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
    pack: MemoryPack | None,
    rule: RoutingRule,
    biases: Sequence[NDArray[np.float32] | None],
) -> tuple[Memory | None, ...]:
    """One memory a gate, compressed where the pack is; None for gates it has none for or leaves."""
    covered = {gate.gate: gate for gate in pack.gates if gate.used} if pack else {}
    return tuple(
        limited(pack.memory_of(covered[gate], rule, bias), pack.most_entries)
        if pack and gate in covered
        else None
        for gate, bias in enumerate(biases)
    )
