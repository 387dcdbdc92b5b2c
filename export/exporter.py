"""checkpoint → bundle."""

from __future__ import annotations

import hashlib
import json
import platform
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from knnmoe import __version__
from knnmoe.runtime.bundle import (
    GATE_GRAPHS,
    QUANTIZED_ONNXRUNTIME,
    SELECTION_BIAS,
    TOKENIZER,
    WINDOWED_ONNXRUNTIME,
    Bundle,
    FileSpec,
    FusedSpec,
    GraphSpec,
    Manifest,
    SegmentSpec,
    describe_file,
    write_manifest,
)
from knnmoe.runtime.chat import TEMPLATE, TOKENIZER_CONFIG, TOOL_TEMPLATE, ChatTemplate
from knnmoe.runtime.checkpoint import CONFIG, Checkpoint
from knnmoe.runtime.errors import BackendError, CheckpointError, OutputError, SettingError

from .described import Described
from .exportable import Exportable, Graphs
from .frontends import DESCRIPTION, FRONTENDS, TORCH, TRACED_PRECISIONS
from .gate_graphs import GateShape, gate_functions, gate_graph
from .graph import GraphBuilder, save
from .links import Links, make_links, plan_links
from .partial import partial_export
from .quantize import TensorError
from .refusals import refuse_packed, refuse_remote_code
from .storage import QuantizeOptions, Storage, storage_for
from .weights import PlannedFile, plan_file

FUSED_GATE = "cosine"  # the gate graph inside the fused layout
GENERATION_CONFIG = "generation_config.json"

# A bound on what is not weights: graphs, tokenizer, manifest.
_REST_BYTES = 32 << 20

# (stage, bytes done, bytes in all); the stages are "fingerprint" and "weights", in this order.
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class ExportReport:
    """What an export did.

    Attributes:
        bundle: Where it is.
        gates: Number of gates.
        segments: Number of segments.
        fused: Whether the fused layout is in it.
        files: Every file with its size, in the order of the manifest.
        seconds: How long it took, without the check.
        storage: In what form the weights are.
        left_out: Tensors of layers that predict more tokens; the bundle has none of them.
        linked_bytes: Of weights that are used in the checkpoint's own files.
    """

    bundle: Path
    gates: int
    segments: int
    fused: bool
    files: Mapping[str, FileSpec]
    seconds: float
    storage: Storage
    left_out: tuple[str, ...] = ()
    linked_bytes: int = 0

    @property
    def errors(self) -> tuple[TensorError, ...]:
        """What storing changed, for each weight that is not stored as fp32."""
        return self.storage.errors

    @property
    def total_bytes(self) -> int:
        """Bytes of all files except the manifest."""
        return sum(spec.size for spec in self.files.values())


@dataclass(frozen=True)
class ExportPlan:
    """What an export would write; nothing but headers has been read, if it was not traced.

    Attributes:
        source: The checkpoint.
        model: What it turned out to be.
        experts_per_token: k of the seam.
        storage: How weights are stored.
        weights: Their files, one a segment.
        biases: The file of the gates' selection biases, if they have any.
        links: What is used of the checkpoint's own files, and therefore in none of those.
        copies: Small files that go into the bundle as they are.
        left_out: Tensors of layers that predict more tokens, which no bundle has.
    """

    source: Checkpoint
    model: Exportable
    experts_per_token: int
    storage: Storage
    weights: tuple[PlannedFile, ...]
    biases: tuple[PlannedFile, ...]
    links: Links
    copies: Mapping[str, bytes]
    left_out: tuple[str, ...]

    @property
    def weight_bytes(self) -> int:
        """Bytes of all weights, wherever they lie."""
        return self.written_weight_bytes + self.links.nbytes

    @property
    def written_weight_bytes(self) -> int:
        """Bytes of the weights' files that are written."""
        return sum(file.nbytes for file in (*self.weights, *self.biases))

    @property
    def nbytes(self) -> int:
        """Bytes of all that is written, without graphs and manifest."""
        return self.written_weight_bytes + sum(map(len, self.copies.values()))


def plan_export(
    checkpoint: Checkpoint | str | Path,
    *,
    precision: str = "fp32",
    options: QuantizeOptions | None = None,
    experts_per_token: int | None = None,
    link: bool = False,
    frontend: str = DESCRIPTION,
) -> ExportPlan:
    """Check a checkpoint and say what its bundle would hold; arguments and errors of `export`."""
    if frontend not in FRONTENDS:
        raise SettingError("frontend", "unknown", expected=" or ".join(FRONTENDS), found=frontend)
    if frontend == TORCH:
        _check_traceable(precision, link)
    source = checkpoint if isinstance(checkpoint, Checkpoint) else Checkpoint.open(checkpoint)
    refuse_remote_code(source, traced=frontend == TORCH)
    refuse_packed(source)
    model = _traced(source) if frontend == TORCH else Described.of(source)
    room = _experts_per_token(model, experts_per_token)
    planned = {
        f"{index:02d}.safetensors": model.weights(index)
        for index in range(model.shape.num_gates + 1)
    }
    storage = storage_for(
        precision,
        options or QuantizeOptions(),
        [tensor for tensors in planned.values() for tensor in tensors],
        tied_head=model.tied_head,
    )
    stored = {name: storage.of(tensors) for name, tensors in planned.items()}
    links = Links()
    if link:
        links = plan_links(source, [tensor for tensors in stored.values() for tensor in tensors])
    return ExportPlan(
        source=source,
        model=model,
        experts_per_token=room,
        storage=storage,
        weights=tuple(
            plan_file(name, [tensor for tensor in tensors if tensor.name not in links.stored])
            for name, tensors in stored.items()
        ),
        biases=_plan_selection_biases(model),
        links=links,
        copies=_copied_files(source),
        left_out=model.left_out,
    )


def export(
    checkpoint: Checkpoint | str | Path,
    bundle: str | Path,
    *,
    precision: str = "fp32",
    options: QuantizeOptions | None = None,
    experts_per_token: int | None = None,
    fused: bool = True,
    link: bool = False,
    frontend: str = DESCRIPTION,
    overwrite: bool = False,
    restart: bool = False,
    progress: Progress | None = None,
    check: Callable[[Bundle], None] | None = None,
) -> ExportReport:
    """Export a checkpoint as a bundle.

    Interrupted, by whatever, it leaves the files of weights that are finished in `BUNDLE.partial`,
    and the same call goes on from there; the bundle is the same, byte by byte.

    Args:
        checkpoint: Opened, or its directory.
        bundle: The directory to create.
        precision: Of the weights: `fp32`; `fp16`, which is as exact as the checkpoint where that is
            fp16, and computed in fp32; `int8` or `int4` for experts and projections, `fp16` for the
            rest. The router stays fp32.
        options: Of `int8` and `int4`.
        experts_per_token: k of the seam; by default what the routing rule selects. More leaves room
            for the `assignment` variant to mix further experts in.
        fused: Also write the fused layout; it shares the weights, so it costs no space.
        link: Use what the checkpoint stores as the bundle would where it is, by hard links to the
            checkpoint's files.
        frontend: `description`, or `torch`: trace the model that transformers has, whatever family
            it is of. The model is then in memory, in fp32; precisions are `fp32` and `fp16`.
        overwrite: Replace a bundle that is there.
        restart: Discard what an interrupted export of this bundle has finished, instead of going
            on with it.
        progress: Called with the stage, bytes done and bytes in all.
        check: Called with the whole bundle before it takes its name; raising discards it.

    Raises:
        CheckpointError: If the checkpoint cannot be read or exported.
        SettingError: If precision or experts_per_token is out of range, an option does not fit, or
            there is nothing to link.
        BackendError: If the frontend needs a package that is not installed.
        OutputError: If the bundle cannot be written, or what an interrupted export left is of other
            settings.
    """
    started = time.perf_counter()
    source = checkpoint if isinstance(checkpoint, Checkpoint) else Checkpoint.open(checkpoint)
    target = Path(bundle).absolute()
    _check_apart(source, target)
    planned = plan_export(
        source,
        precision=precision,
        options=options,
        experts_per_token=experts_per_token,
        link=link,
        frontend=frontend,
    )
    planned.model.check()
    model, storage = planned.model, planned.storage
    weights, biases, room = planned.weights, planned.biases, planned.experts_per_token
    fingerprint = ""

    def job() -> dict[str, Any]:
        nonlocal fingerprint
        fingerprint = source.fingerprint(_counter("fingerprint", source.total_bytes, progress))
        return _job(planned, fingerprint, link)

    with partial_export(
        target,
        job,
        overwrite=overwrite,
        restart=restart,
        needed_bytes=planned.nbytes + _REST_BYTES,
    ) as work:
        directory = work.bundle
        linked = make_links(source, planned.links.shards, directory / "segments") if link else []
        files: dict[str, FileSpec] = {}
        stored = {name: tensor for plan in weights for name, tensor in plan.stored.items()}
        gate = GateShape(model.shape.hidden_size, model.shape.num_experts, room, model.routing)
        graphs = model.graphs(stored | dict(planned.links.stored), gate, storage)
        segments = []
        for index in range(model.shape.num_gates + 1):
            g = graphs.segment(index)
            spec = _write_graph(directory, f"segments/{index:02d}.onnx", g, files)
            segments.append(
                SegmentSpec(spec.file, spec.inputs, spec.outputs, model.segment_layers(index))
            )
        fused_spec = _write_fused(directory, model, graphs, files) if fused else None
        gates = {}
        for name in GATE_GRAPHS:
            g = gate_graph(name, gate)
            gates[name] = _write_graph(
                directory, f"gates/{name}.onnx", g, files, gate_functions(name)
            )
        count = _counter("weights", planned.weight_bytes, progress)
        for folder, file in (
            *(("gates", file) for file in biases),
            *(("segments", file) for file in weights),
        ):
            done = work.write(file, folder, count, storage.new_errors)
            storage.known.update({error.name: error for error in done.errors})
            files[f"{folder}/{file.name}"] = done.spec
        for tensor in planned.links.tensors:
            for chunk in tensor.chunks():  # only to see that the dtype holds what is there
                count(chunk.nbytes)
        for shard in linked:
            files[shard.relative_to(directory).as_posix()] = describe_file(shard)
        for name, content in planned.copies.items():
            (directory / name).parent.mkdir(exist_ok=True)
            (directory / name).write_bytes(content)
            files[name] = describe_file(directory / name)
        manifest = Manifest(
            family=model.name,
            model_type=source.model_type,
            fingerprint=fingerprint,
            architecture=model.shape,
            routing=model.routing,
            experts_per_token=room,
            precision=precision,
            segments=tuple(segments),
            fused=fused_spec,
            gates=gates,
            files=files,
            producer=_producer(),
            quantization=storage.quantization,
            minimum_onnxruntime=_minimum_onnxruntime(model, storage),
            linked=tuple(shard.relative_to(directory).as_posix() for shard in linked) or None,
        )
        write_manifest(directory, manifest)
        seconds = time.perf_counter() - started
        if check is not None:
            check(Bundle.open(directory, verify=False))
    return ExportReport(
        bundle=target,
        gates=model.shape.num_gates,
        segments=len(segments),
        fused=fused,
        files=files,
        seconds=seconds,
        storage=storage,
        left_out=planned.left_out,
        linked_bytes=planned.links.nbytes,
    )


def _producer() -> dict[str, str]:
    return {
        "knnmoe": __version__,
        "onnx_ir": ir.__version__,
        "numpy": np.__version__,
        "python": platform.python_version(),
    }


def _job(planned: ExportPlan, fingerprint: str, link: bool) -> dict[str, Any]:
    """All that the weights' files depend on."""
    quantization, layout = planned.storage.quantization, hashlib.sha256()
    for file in (*planned.biases, *planned.weights):
        layout.update(file.header)
    return {
        "fingerprint": fingerprint,
        "config": hashlib.sha256(planned.copies[CONFIG]).hexdigest(),
        "precision": planned.storage.precision,
        "quantization": None if quantization is None else asdict(quantization),
        "link": link,
        "layout": layout.hexdigest(),
        "producer": _producer(),
    }


def _check_apart(source: Checkpoint, target: Path) -> None:
    """A bundle inside its checkpoint, or the other way round, could replace what it is made of."""
    resolved, origin = target.resolve(), source.path.resolve()
    if resolved == origin or resolved in origin.parents:
        raise OutputError(
            target, "is or contains the checkpoint itself", fix="Choose another directory."
        )


def _experts_per_token(model: Exportable, asked: int | None) -> int:
    top_k, experts = model.routing.top_k, model.shape.num_experts
    if asked is None:
        return top_k
    if not top_k <= asked <= experts:
        raise SettingError(
            "experts_per_token",
            "out of range",
            expected=f"from {top_k}, what the routing rule selects, to {experts}, all experts",
            found=asked,
        )
    return asked


def _plan_selection_biases(model: Exportable) -> tuple[PlannedFile, ...]:
    """The file of the gates' selection biases [G, E], if the routing rule has them."""
    planned = model.selection_biases()
    return () if planned is None else (plan_file(Path(SELECTION_BIAS).name, [planned]),)


def _check_traceable(precision: str, link: bool) -> None:
    """Refuse what traces cannot have, before anything is loaded."""
    for package in ("torch", "transformers"):
        if find_spec(package) is None:
            raise BackendError(
                f"frontend {TORCH}",
                f"needs the package {package}, which is not installed",
                fix=f"Run `pip install 'knnmoe[train]'`, or leave --frontend {TORCH} out.",
            )
    if precision not in TRACED_PRECISIONS:
        raise SettingError(
            "precision",
            "is not to be had for a traced bundle: which weights are projections, no trace says",
            expected=" or ".join(TRACED_PRECISIONS),
            found=precision,
            fix="Take --precision fp16, or leave it out.",
        )
    if link:
        raise SettingError(
            "link",
            "does not go with a trace, whose weights are those that transformers makes of the "
            "checkpoint's",
            fix="Leave --link out.",
        )


def _traced(source: Checkpoint) -> Exportable:
    from .torch_frontend.frontend import Traced  # here, because it brings torch along

    return Traced.of(source)


def _minimum_onnxruntime(model: Exportable, storage: Storage) -> str | None:
    """The oldest version that computes what is meant; None for every version supported."""
    if storage.quantization is not None:
        return QUANTIZED_ONNXRUNTIME
    reach = model.shape.max_positions
    narrow = any(window is not None and window < reach for window in model.windows)
    return WINDOWED_ONNXRUNTIME if narrow else None


def _write_graph(
    directory: Path,
    file: str,
    g: GraphBuilder,
    files: dict[str, FileSpec],
    functions: list[ir.Function] | None = None,
) -> GraphSpec:
    save(g.model(functions or ()), directory / file)
    files[file] = describe_file(directory / file)
    return GraphSpec(file, tuple(g.input_specs), tuple(g.output_specs))


def _write_fused(
    directory: Path, model: Exportable, graphs: Graphs, files: dict[str, FileSpec]
) -> FusedSpec:
    g = graphs.fused(FUSED_GATE)
    spec = _write_graph(directory, "segments/fused.onnx", g, files, gate_functions(FUSED_GATE))
    layers = tuple(range(model.shape.num_layers))
    return FusedSpec(spec.file, spec.inputs, spec.outputs, layers, FUSED_GATE)


def _copied_files(source: Checkpoint) -> dict[str, bytes]:
    """The small files that go into the bundle as they are."""
    required = source.path / TOKENIZER
    if not required.is_file():
        raise CheckpointError(
            source.path,
            f"{TOKENIZER} is missing",
            expected="a tokenizer of the tokenizers library",
            fix="Save it there with AutoTokenizer.from_pretrained(…).save_pretrained(…).",
        )
    copies = {}
    for name in (TOKENIZER, TOKENIZER_CONFIG, CONFIG, GENERATION_CONFIG):
        path = source.path / name
        if path.is_file():
            copies[name] = path.read_bytes()
    chat = ChatTemplate.load(source.path, error=CheckpointError)
    for name, template in ((TEMPLATE, chat.source), (TOOL_TEMPLATE, chat.tool_source)):
        if template is not None:
            copies[name] = template.encode()
    if GENERATION_CONFIG not in copies:
        names = ("bos_token_id", "eos_token_id", "pad_token_id")
        stated = {name: source.config[name] for name in names if name in source.config}
        copies[GENERATION_CONFIG] = (json.dumps(stated, indent=2) + "\n").encode()
    return copies


def _counter(stage: str, total: int, progress: Progress | None) -> Callable[[int], None]:
    done = 0

    def count(more: int) -> None:
        nonlocal done
        done += more
        if progress is not None:
            progress(stage, done, total)

    return count
