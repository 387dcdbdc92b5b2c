"""Bundles: the exported directory, its manifest, and the checks before any of it is used.

The format is described in docs/formats.md.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from .errors import BundleError, SettingError
from .manifest import Fields, ManifestKind
from .routing import RoutingRule

SCHEMA = "knnmoe.bundle/2"
MANIFEST = "manifest.json"
MAX_DIRECTORY_ENTRIES = 100_000
MAX_GATES = 4096
MAX_DIMENSION = 1 << 31

DTYPES = ("float32", "int64", "int32")
PRECISIONS = ("fp32", "fp16", "int8", "int4")
QUANTIZED_BITS = {"int8": 8, "int4": 4}  # precisions whose weights are in blocks of integers
BLOCK_SIZES = (32, 64, 128)
ACTIVATIONS = ("int8", "fp32")
# QMoE takes the seam's weights as they are from here on. That of 1.23 takes them not at all, and
# returns wrong numbers where a row is one block.
QUANTIZED_ONNXRUNTIME = "1.31"
# The oldest with which sliding windows were tested: in 1.23 a query sees one token more.
WINDOWED_ONNXRUNTIME = "1.31"
FROZEN = "frozen"
GATE_GRAPHS = (FROZEN, "cosine", "rbf", "cosine-assignment", "rbf-assignment")
TOKENIZER = "tokenizer.json"
SELECTION_BIAS = "gates/selection_bias.safetensors"  # see selection_bias.py

EXPORT_AGAIN = "Export the checkpoint again with `knnmoe-export`, or copy the bundle again."
LINKED = (
    "It is the checkpoint's own file (--link), so the checkpoint was changed in place: put it back "
    "as it was, or export again."
)
KIND = ManifestKind(
    "a bundle",
    MANIFEST,
    SCHEMA,
    BundleError,
    EXPORT_AGAIN,
    "Use the version of knnmoe that wrote the bundle, or export again with this one.",
)

_OPTIONAL = ("quantization", "minimum_onnxruntime", "linked")
_BLOCK = 4 << 20
Progress = Callable[[int], None]


@dataclass(frozen=True)
class TensorSpec:
    """An input or output of a graph; dimensions are numbers, or names where they are free."""

    name: str
    dtype: str
    shape: tuple[int | str, ...]


@dataclass(frozen=True)
class GraphSpec:
    """A gate graph: its file and what goes in and out."""

    file: str
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]


@dataclass(frozen=True)
class SegmentSpec(GraphSpec):
    """A segment; `layers` are those whose key-value cache it holds."""

    layers: tuple[int, ...]


@dataclass(frozen=True)
class FusedSpec(SegmentSpec):
    """The fused graph; `gate` names the gate graph it contains at every gate."""

    gate: str


@dataclass(frozen=True)
class FileSpec:
    """What a file of the bundle must be."""

    sha256: str
    size: int


@dataclass(frozen=True)
class ModelShape:
    """The sizes of the model, as in the manifest's `architecture`.

    Attributes:
        num_kv_heads, head_size: Of the keys and values that are cached.
        latent_size: Where attention is latent: the last numbers of each key that are the value too,
            so that a layer's cache is one array. 0: values are cached apart.
    """

    hidden_size: int
    vocab_size: int
    num_layers: int
    num_gates: int
    num_experts: int
    num_heads: int
    num_kv_heads: int
    head_size: int
    max_positions: int
    latent_size: int = 0

    @property
    def cache_width(self) -> int:
        """Numbers that a token leaves in the cache of one layer."""
        return self.num_kv_heads * self.head_size * (1 if self.latent_size else 2)


@dataclass(frozen=True)
class Quantization:
    """How the experts and projections of a bundle are quantised, as in `quantization`.

    Attributes:
        bits: Of a weight, 4 or 8.
        block_size: Weights that share a scale, along a row.
        zero_points: Whether a block has a zero point of its own; without, it is 2^(bits-1).
        activations: `int8`: what these weights are multiplied with is rounded to 8 bits, in blocks
            of the same size; `fp32`: it is not.
        head_bits: Of the head's weights, None where the head is not quantised.
        search: Whether scales were searched for, or span each block's range.
    """

    bits: int
    block_size: int
    zero_points: bool
    activations: str
    head_bits: int | None
    search: bool

    @property
    def accuracy_level(self) -> int:
        """ONNX Runtime's number for it."""
        return 4 if self.activations == "int8" else 0


@dataclass(frozen=True)
class Manifest:
    """The content of `manifest.json`, checked; field by field as in docs/formats.md."""

    family: str
    model_type: str
    fingerprint: str
    architecture: ModelShape
    routing: RoutingRule
    experts_per_token: int
    precision: str
    segments: tuple[SegmentSpec, ...]
    fused: FusedSpec | None
    gates: Mapping[str, GraphSpec]
    files: Mapping[str, FileSpec]
    producer: Mapping[str, str]
    quantization: Quantization | None = None
    minimum_onnxruntime: str | None = None
    linked: tuple[str, ...] | None = None

    def to_json(self) -> dict[str, Any]:
        """The manifest as it is written."""
        content = {"schema": SCHEMA, **asdict(self), "routing": self.routing.to_json()}
        for name in _OPTIONAL:
            if content[name] is None:
                del content[name]
        if not self.architecture.latent_size:
            del content["architecture"]["latent_size"]
        return content


@dataclass(frozen=True)
class Bundle:
    """An opened bundle: a directory whose manifest has been checked."""

    path: Path
    manifest: Manifest

    @staticmethod
    def open(path: str | Path, *, verify: bool = True, progress: Progress | None = None) -> Bundle:
        """Check a bundle and open it.

        Args:
            verify: Hash every file. Without it, existence and sizes are still checked.
            progress: Called with the number of bytes just hashed.

        Raises:
            BundleError: If the directory is not a bundle, of another schema, incomplete, changed,
                or unsafe (a path that leaves it, a symbolic link).
        """
        root = Path(path)
        manifest = read_manifest(root)
        _refuse_links(root)
        for name, stated in manifest.files.items():
            _check_size(root, name, stated, _fix(manifest, name))
        if verify:
            for name, stated in manifest.files.items():
                _check_hash(root, name, stated, _fix(manifest, name), progress)
        return Bundle(root, manifest)

    def file(self, name: str) -> Path:
        """The path of a file of the bundle; `BundleError` if the manifest does not list it."""
        if name not in self.manifest.files:
            raise BundleError(
                self.path / MANIFEST, f"does not list the file {name}", fix=EXPORT_AGAIN
            )
        return self.path / name

    @property
    def total_bytes(self) -> int:
        """Bytes of all files except the manifest."""
        return sum(stated.size for stated in self.manifest.files.values())


def read_manifest(root: Path) -> Manifest:
    """Read and check `manifest.json` alone, no other file; raises as `Bundle.open`."""
    return _parse(KIND.read(root))


def write_manifest(directory: Path, manifest: Manifest) -> None:
    """Write `manifest.json`; the other files are already there."""
    text = json.dumps(manifest.to_json(), indent=1, allow_nan=False)
    (directory / MANIFEST).write_text(text + "\n", encoding="utf-8")


def describe_file(path: Path, progress: Progress | None = None) -> FileSpec:
    """Hash a file that has been written; `progress` is called with the bytes just hashed."""
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while block := stream.read(_BLOCK):
            digest.update(block)
            if progress is not None:
                progress(len(block))
    return FileSpec(digest.hexdigest(), path.stat().st_size)


def _parse(top: Fields) -> Manifest:
    top.only(
        "schema", "family", "model_type", "fingerprint", "architecture", "routing",
        "experts_per_token", "precision", "segments", "fused", "gates", "files", "producer",
        optional=_OPTIONAL,
    )  # fmt: skip
    files = {
        _file_name(top, name): _file_spec(entry) for name, entry in top.object("files").items()
    }
    shape = _model_shape(top.object("architecture"))
    rule = _routing(top.object("routing"), shape)
    manifest = Manifest(
        family=top.text("family"),
        model_type=top.text("model_type"),
        fingerprint=top.text("fingerprint", pattern=r"sha256:[0-9a-f]{64}"),
        architecture=shape,
        routing=rule,
        experts_per_token=top.integer("experts_per_token", rule.top_k, shape.num_experts),
        precision=top.text("precision", choices=PRECISIONS),
        segments=tuple(_segment(entry, files, shape) for entry in top.objects("segments")),
        fused=_fused(top.object("fused"), files, shape) if top.has("fused") else None,
        gates={name: _gate(entry, files) for name, entry in top.object("gates").items()},
        files=files,
        producer={name: top.object("producer").text(name) for name in top.object("producer").names},
        quantization=_quantization(top.object("quantization")) if top.has("quantization") else None,
        minimum_onnxruntime=top.text("minimum_onnxruntime", pattern=r"\d{1,4}\.\d{1,4}")
        if top.has("minimum_onnxruntime")
        else None,
        linked=top.texts("linked") if top.has("linked") else None,
    )
    _check_whole(top, manifest)
    return manifest


def _check_whole(top: Fields, manifest: Manifest) -> None:
    """What no field can tell alone."""
    shape = manifest.architecture
    bits = manifest.quantization.bits if manifest.quantization else None
    if bits != QUANTIZED_BITS.get(manifest.precision):
        raise top.wrong(
            "quantization",
            "is not that of the precision",
            expected=f"{QUANTIZED_BITS.get(manifest.precision)} bits for {manifest.precision}",
            found=bits,
        )
    if len(manifest.segments) != shape.num_gates + 1:
        raise top.wrong(
            "segments",
            "wrong number",
            expected=f"{shape.num_gates + 1}, one more than gates",
            found=len(manifest.segments),
        )
    layers = [layer for segment in manifest.segments for layer in segment.layers]
    if layers != list(range(shape.num_layers)):
        raise top.wrong(
            "segments",
            "their layers are not those of the model",
            expected=f"0 to {shape.num_layers - 1} in order",
            found=layers[:20],
        )
    for spec in manifest.segments[-1].outputs:
        if spec.name == "logits" and spec.shape[-1:] != (shape.vocab_size,):
            raise top.wrong(
                "architecture.vocab_size", "is not the width of the logits",
                expected=spec.shape[-1:], found=shape.vocab_size,
            )  # fmt: skip
    for name in manifest.gates:
        if name not in GATE_GRAPHS:
            raise top.wrong(f"gates.{name}", "unknown gate graph", expected=GATE_GRAPHS)
    for name in (FROZEN, *([manifest.fused.gate] if manifest.fused else [])):
        if name not in manifest.gates:
            raise top.wrong(f"gates.{name}", "missing", expected="a gate graph")
    if TOKENIZER not in manifest.files:
        raise top.wrong("files", f"{TOKENIZER} is missing")
    for name in manifest.linked or ():
        if name not in manifest.files:
            raise top.wrong("linked", "not among the manifest's files", found=name)
    if manifest.routing.selection_bias and SELECTION_BIAS not in manifest.files:
        raise top.wrong("files", f"{SELECTION_BIAS} is missing")


def _model_shape(entry: Fields) -> ModelShape:
    names = tuple(name for name in ModelShape.__dataclass_fields__ if name != "latent_size")
    entry.only(*names, optional=("latent_size",))
    sizes = {name: entry.integer(name, 1, MAX_DIMENSION) for name in names}
    if "latent_size" in entry.names:
        if sizes["num_kv_heads"] != 1:
            raise entry.wrong("latent_size", "is that of one key head", found=sizes["num_kv_heads"])
        sizes["latent_size"] = entry.integer("latent_size", 1, sizes["head_size"])
    shape = ModelShape(**sizes)
    if shape.num_layers > MAX_GATES or not shape.num_gates <= shape.num_layers:
        raise entry.wrong(
            "num_gates",
            "out of range",
            expected=f"num_gates <= num_layers <= {MAX_GATES}",
            found=f"{shape.num_gates} and {shape.num_layers}",
        )
    return shape


def _routing(entry: Fields, shape: ModelShape) -> RoutingRule:
    entry.only(
        "score", "top_k", "renormalize", "scale",
        optional=("groups", "top_groups", "group_score", "selection_bias"),
    )  # fmt: skip
    stated: dict[str, Any] = {}
    for name in ("groups", "top_groups"):
        if name in entry.names:
            stated[name] = entry.integer(name, 1, shape.num_experts)
    if "group_score" in entry.names:
        stated["group_score"] = entry.text("group_score")
    if "selection_bias" in entry.names:
        stated["selection_bias"] = entry.boolean("selection_bias")
    try:
        rule = RoutingRule(
            top_k=entry.integer("top_k", 1, shape.num_experts),
            score=entry.text("score"),
            renormalize=entry.boolean("renormalize"),
            scale=entry.number("scale"),
            **stated,
        )
        rule.check_experts(shape.num_experts)
    except SettingError as error:
        raise BundleError(
            f"{entry.where}.{error.where.removeprefix('routing.')}",
            error.problem,
            expected=error.expected,
            found=error.found,
            fix="Use the version of knnmoe that wrote the bundle.",
        ) from error
    return rule


def _quantization(entry: Fields) -> Quantization:
    entry.only("bits", "block_size", "zero_points", "activations", "head_bits", "search")
    block_size = entry.integer("block_size", min(BLOCK_SIZES), max(BLOCK_SIZES))
    if block_size not in BLOCK_SIZES:
        raise entry.wrong("block_size", "unknown", expected=BLOCK_SIZES, found=block_size)
    return Quantization(
        bits=entry.integer("bits", 4, 8),
        block_size=block_size,
        zero_points=entry.boolean("zero_points"),
        activations=entry.text("activations", choices=ACTIVATIONS),
        head_bits=entry.integer("head_bits", 4, 8) if entry.has("head_bits") else None,
        search=entry.boolean("search"),
    )


def _gate(entry: Fields, files: Mapping[str, FileSpec]) -> GraphSpec:
    entry.only("file", "inputs", "outputs")
    return GraphSpec(**_graph(entry, files))


def _segment(entry: Fields, files: Mapping[str, FileSpec], shape: ModelShape) -> SegmentSpec:
    entry.only("file", "layers", "inputs", "outputs")
    return SegmentSpec(**_graph(entry, files), layers=_layers(entry, shape))


def _fused(entry: Fields, files: Mapping[str, FileSpec], shape: ModelShape) -> FusedSpec:
    entry.only("file", "layers", "inputs", "outputs", "gate")
    return FusedSpec(**_graph(entry, files), layers=_layers(entry, shape), gate=entry.text("gate"))


def _graph(entry: Fields, files: Mapping[str, FileSpec]) -> dict[str, Any]:
    file = entry.text("file")
    if file not in files:
        raise entry.wrong("file", "not among the manifest's files", found=file)
    return {
        "file": file,
        "inputs": tuple(_tensor(spec) for spec in entry.objects("inputs")),
        "outputs": tuple(_tensor(spec) for spec in entry.objects("outputs")),
    }


def _layers(entry: Fields, shape: ModelShape) -> tuple[int, ...]:
    return tuple(entry.integers("layers", 0, shape.num_layers - 1))


def _tensor(entry: Fields) -> TensorSpec:
    entry.only("name", "dtype", "shape")
    dimensions = entry.raw("shape")
    if not isinstance(dimensions, list) or not all(_is_dimension(d) for d in dimensions):
        raise entry.wrong(
            "shape", "malformed", expected="a list of numbers and names", found=dimensions
        )
    return TensorSpec(entry.text("name"), entry.text("dtype", choices=DTYPES), tuple(dimensions))


def _is_dimension(found: Any) -> bool:
    if isinstance(found, str):
        return 0 < len(found) <= 100
    return type(found) is int and 0 <= found <= MAX_DIMENSION


def _file_spec(entry: Fields) -> FileSpec:
    entry.only("sha256", "size")
    return FileSpec(
        entry.text("sha256", pattern=r"[0-9a-f]{64}"), entry.integer("size", 0, 1 << 50)
    )


def _file_name(top: Fields, name: str) -> str:
    """A relative path with forward slashes that stays inside the directory."""
    parts = name.split("/")
    unsafe = any(part in ("", ".", "..") for part in parts) or "\\" in name or ":" in name
    if unsafe or "\0" in name or len(name) > 255 or name == MANIFEST:
        raise top.wrong(
            "files",
            "a path that may leave the bundle",
            expected="a relative path inside it",
            found=repr(name[:100]),
        )
    return name


def _refuse_links(root: Path) -> None:
    count = 0
    for directory, folders, files in os.walk(root):
        for name in (*folders, *files):
            count += 1
            path = Path(directory, name)
            if path.is_symlink():
                raise BundleError(
                    path,
                    "is a symbolic link",
                    expected="plain files only",
                    fix="Copy the bundle with its links resolved (cp -rL).",
                )
        if count > MAX_DIRECTORY_ENTRIES:
            raise BundleError(root, "holds too many files", fix=EXPORT_AGAIN)


def _fix(manifest: Manifest, name: str) -> str:
    return LINKED if name in (manifest.linked or ()) else EXPORT_AGAIN


def _check_size(root: Path, name: str, stated: FileSpec, fix: str) -> None:
    path = root / name
    if not path.is_file():
        raise BundleError(path, "is missing", fix=EXPORT_AGAIN)
    size = path.stat().st_size
    if size != stated.size:
        raise BundleError(
            path,
            "has another size than the manifest states",
            expected=f"{stated.size} bytes",
            found=f"{size} bytes",
            fix=fix,
        )


def _check_hash(
    root: Path, name: str, stated: FileSpec, fix: str, progress: Progress | None
) -> None:
    path = root / name
    digest = hashlib.sha256()
    try:
        with path.open("rb") as stream:
            while block := stream.read(_BLOCK):
                digest.update(block)
                if progress is not None:
                    progress(len(block))
    except OSError as error:
        raise BundleError(path, f"cannot be read ({error.strerror})", fix=EXPORT_AGAIN) from error
    if digest.hexdigest() != stated.sha256:
        raise BundleError(
            path,
            "has been changed: its sha256 is not the manifest's",
            expected=stated.sha256,
            found=digest.hexdigest(),
            fix=fix,
        )
