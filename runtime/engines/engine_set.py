"""Engine sets: the engines of one bundle for one device, as a directory with `engines.json`.

Written by `knnmoe engines build`; never part of a bundle, never shipped with one.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from ..bundle import MANIFEST, Bundle, FileSpec, describe_file
from ..errors import EngineError
from ..manifest import Fields, ManifestKind

SCHEMA = "knnmoe.engines/1"
ENGINES = "engines.json"
LARGEST = 1 << 31

Backend = Literal["tensorrt", "tensorrt_rtx", "onnxruntime"]
BACKENDS: tuple[Backend, ...] = get_args(Backend)
PRECISIONS = ("float32", "float16")
KEYS = ("float32", "float16", "int8")
LAYOUTS = ("split", "fused")
PHASES = ("decode", "prefill")
BUILD_AGAIN = "Build the engines again with `knnmoe engines build`."
KIND = ManifestKind("an engine set", ENGINES, SCHEMA, EngineError, BUILD_AGAIN, BUILD_AGAIN)


@dataclass(frozen=True)
class Limits:
    """The largest shapes that the engines take.

    Attributes:
        batch: Sequences B.
        context: Tokens of a sequence, the capacity of its key-value cache.
        prefill: Tokens of a sequence in one pass of the prefill engines.
        entries: Of a gate's memory, where a gate is part of an engine.
    """

    batch: int
    context: int
    prefill: int
    entries: int


@dataclass(frozen=True)
class EngineSet:
    """An opened engine set, checked; field by field as in docs/formats.md.

    Attributes:
        path: Its directory.
        key: sha256 of all that the engines depend on; what has the same key need not be built.
        backend, backend_version: What built the engines and can run them.
        bundle: sha256 of the bundle's manifest.
        layout: `split` or `fused`.
        precision: Of matrix products and of the key-value cache.
        keys: dtype of the memories' keys where a gate is part of an engine.
        neighbors: K of gates inside engines without the plugin, None where K is free.
        operators: `primitive` or `modern`, which says how the cache is written.
        capabilities: Compute capabilities the engines run on, as `86`; empty: any.
        driver: That the engines were built with, for engines of one device; empty: any.
        plugin: sha256 of the plugin library whose nodes are in the engines, or None.
        limits: The largest shapes.
        phases: By phase, the files of segments 0..G, or of the one fused engine.
        gates: By gate graph, its file (split).
        plugin_layers: By file, how many of its layers are the plugin.
        files: What every file must be.
        producer: Versions of what built it.
    """

    path: Path
    key: str
    backend: Backend
    backend_version: str
    bundle: str
    layout: str
    precision: str
    keys: str
    neighbors: int | None
    operators: str
    capabilities: tuple[str, ...]
    driver: str
    plugin: str | None
    limits: Limits
    phases: Mapping[str, tuple[str, ...]]
    gates: Mapping[str, str]
    plugin_layers: Mapping[str, int]
    files: Mapping[str, FileSpec]
    producer: Mapping[str, str]

    @staticmethod
    def open(path: str | Path, bundle: Bundle) -> EngineSet:
        """Check an engine set and open it.

        Raises:
            EngineError: If the directory is no engine set, is damaged, or is of another bundle.
        """
        root = Path(path)
        engines = _read(root)
        expected = bundle_hash(bundle)
        if engines.bundle != expected:
            raise EngineError(
                root, "belongs to another bundle", expected=f"engines of {bundle.path}",
                found=f"bundle {engines.bundle[:12]}, not {expected[:12]}", fix=BUILD_AGAIN,
            )  # fmt: skip
        for name, stated in engines.files.items():
            file = root / name
            if not file.is_file() or file.is_symlink() or file.stat().st_size != stated.size:
                raise EngineError(file, "missing, or of another size than built", fix=BUILD_AGAIN)
            if describe_file(file) != stated:
                raise EngineError(file, "has been changed since it was built", fix=BUILD_AGAIN)
        return engines

    def file(self, name: str) -> Path:
        """Where a file of the set is."""
        return self.path / name

    @property
    def total_bytes(self) -> int:
        """Bytes of all engines."""
        return sum(spec.size for spec in self.files.values())

    def write(self) -> None:
        """Write `engines.json` into the set's directory; the engines are there already."""
        content = {"schema": SCHEMA, **asdict(self)}
        del content["path"]
        text = json.dumps(content, indent=1, allow_nan=False)
        (self.path / ENGINES).write_text(text + "\n", encoding="utf-8")


def bundle_hash(bundle: Bundle) -> str:
    """sha256 of the manifest, which holds that of every other file."""
    return hashlib.sha256((bundle.path / MANIFEST).read_bytes()).hexdigest()


def cache_folder() -> Path:
    """Where engine sets are kept unless told otherwise."""
    root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return root / "knnmoe" / "engines"


def find_engines(bundle: Bundle, *, layout: str | None = None) -> Path:
    """The newest engine set of a bundle in the cache.

    Raises:
        EngineError: If there is none.
    """
    wanted, found = bundle_hash(bundle), []
    for file in cache_folder().glob(f"*/{ENGINES}"):
        try:
            engines = _read(file.parent)
        except EngineError:  # of another version; the user did not name it
            continue
        if engines.bundle == wanted and layout in (None, engines.layout):
            found.append((file.stat().st_mtime, file.parent))
    if not found:
        raise EngineError(
            cache_folder(), "no engines of this bundle",
            fix=f"Build them with `knnmoe engines build {bundle.path}`, or name their directory.",
        )  # fmt: skip
    return max(found)[1]


def _read(root: Path) -> EngineSet:
    return _parse(root, KIND.read(root))


def _parse(root: Path, top: Fields) -> EngineSet:
    top.only("schema", *(name for name in EngineSet.__dataclass_fields__ if name != "path"))
    files = {}
    for name, entry in top.object("files").items():
        if "/" in name or "\\" in name or name in (".", "..", ENGINES):
            raise top.wrong("files", "not a plain file name", found=repr(name[:100]))
        entry.only("sha256", "size")
        files[name] = FileSpec(
            entry.text("sha256", pattern=r"[0-9a-f]{64}"), entry.integer("size", 0, 1 << 50)
        )

    def listed(owner: Fields, name: str) -> str:
        file = owner.text(name)
        if file not in files:
            raise owner.wrong(name, "not among the files", found=file)
        return file

    limits = top.object("limits")
    limits.only(*Limits.__dataclass_fields__)
    phases = {}
    for name in top.object("phases").names:
        if name not in PHASES:
            raise top.wrong("phases", "unknown phase", expected=PHASES, found=name)
        entries = top.object("phases").texts(name)
        for file in entries:
            if file not in files:
                raise top.wrong("phases", "names a file that is not there", found=file)
        phases[name] = entries
    if "decode" not in phases:
        raise top.wrong("phases", "lacks the phase decode", expected="engines of one token")
    gates, layers = top.object("gates"), top.object("plugin_layers")
    plugin = top.raw("plugin")
    return EngineSet(
        path=root,
        key=top.text("key", pattern=r"[0-9a-f]{64}"),
        backend=top.text("backend", choices=BACKENDS),  # type: ignore[arg-type] # is one of them
        backend_version=top.text("backend_version"),
        bundle=top.text("bundle", pattern=r"[0-9a-f]{64}"),
        layout=top.text("layout", choices=LAYOUTS),
        precision=top.text("precision", choices=PRECISIONS),
        keys=top.text("keys", choices=KEYS),
        neighbors=top.integer("neighbors", 1, LARGEST) if top.has("neighbors") else None,
        operators=top.text("operators", choices=("primitive", "modern")),
        capabilities=top.texts("capabilities"),
        driver=top.text("driver"),
        plugin=None if plugin is None else top.text("plugin", pattern=r"[0-9a-f]{64}"),
        limits=Limits(
            **{name: limits.integer(name, 1, LARGEST) for name in Limits.__dataclass_fields__}
        ),
        phases=phases,
        gates={name: listed(gates, name) for name in gates.names},
        plugin_layers={name: layers.integer(name, 0, LARGEST) for name in layers.names},
        files=files,
        producer={name: top.object("producer").text(name) for name in top.object("producer").names},
    )


def check_producer(engines: EngineSet, found: Mapping[str, Any]) -> None:
    """Refuse engines that this machine cannot run.

    Args:
        found: `backend_version`, `capability` (as `86`), `driver` and `plugin` of this machine.

    Raises:
        EngineError: Naming what differs.
    """
    version = found["backend_version"]
    if engines.backend != "onnxruntime" and engines.backend_version != version:
        raise EngineError(
            engines.path, f"was built by another version of {engines.backend}",
            expected=version, found=engines.backend_version, fix=BUILD_AGAIN,
        )  # fmt: skip
    if engines.capabilities and found["capability"] not in engines.capabilities:
        raise EngineError(
            engines.path, "was built for another device",
            expected=f"compute capability {found['capability']}",
            found=", ".join(engines.capabilities), fix=BUILD_AGAIN,
        )  # fmt: skip
    if engines.driver and engines.driver != found["driver"]:
        raise EngineError(
            engines.path, "was built with another driver",
            expected=found["driver"], found=engines.driver, fix=BUILD_AGAIN,
        )  # fmt: skip
    if engines.plugin is not None and engines.plugin != found["plugin"]:
        raise EngineError(
            engines.path, "was built with another plugin library",
            expected=f"sha256 {engines.plugin[:12]}", found=str(found["plugin"])[:12],
            fix="Build the engines again, or set KNNMOE_PLUGIN to the library of then.",
        )  # fmt: skip
