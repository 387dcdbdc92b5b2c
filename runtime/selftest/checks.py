"""What the self-test looks at: one function a check, which returns what it saw or raises."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..blend import knn_blend
from ..bundle import Bundle
from ..calibration import Similarity, Variant, preset
from ..errors import BundleError, KnnMoeError, MemoryPackError, VerificationError
from ..gates.select import Backend
from ..memory import MemoryPack
from ..model import Model
from ..pack_parts import GateEntries
from ..pack_writing import write_pack
from .vectors import BLEND, ROUTING

HERE = Path(__file__).parent
ENTRIES = 150
TOLERANCE = 1e-4  # of logits, relative to the largest; of expert weights
# Gate graphs, and the memories that they run.
KINDS: tuple[tuple[str, Similarity, Variant], ...] = (
    ("cosine", "cosine", "residual"),
    ("rbf", "rbf", "residual"),
    ("cosine-assignment", "cosine", "assignment"),
    ("rbf-assignment", "rbf", "assignment"),
)
GATES: tuple[Backend, ...] = ("onnx", "numpy", "two-stage", "faiss")


class NotHere(Exception):  # noqa: N818 - no error: what the check needs is not on this machine
    """A check that cannot be made on this machine, and why."""


@dataclass(frozen=True)
class Bench:
    """What checks work with.

    Attributes:
        bundle: The bundle.
        shipped: Whether it is the one that belongs to the self-test.
        folder: An empty directory.
        given: A pack to be checked with it, if there is one.
    """

    bundle: Path
    shipped: bool
    folder: Path
    given: Path | None

    @cached_property
    def opened(self) -> Bundle:
        """The bundle, its hashes checked once."""
        return Bundle.open(self.bundle)

    @cached_property
    def ids(self) -> NDArray[np.int64]:
        """Tokens to run, [12]."""
        shape = self.opened.manifest.architecture
        return np.random.default_rng(0).integers(0, min(shape.vocab_size, 256), 12)

    def model(self, **options: Any) -> Model:
        """The bundle with the memory for it, or as asked for."""
        return Model.load(self.opened, **({"memory": self.memory} | options))

    @cached_property
    def memory(self) -> MemoryPack:
        """The pack given, or a random one."""
        return MemoryPack.open(self.given) if self.given else self.random_pack()

    def random_pack(self, similarity: Similarity = "cosine", variant: Variant = "residual",
                    seed: int = 1) -> MemoryPack:  # fmt: skip
        """A memory of random entries around what the gates see."""
        path = self.folder / f"{similarity}-{variant}-{seed}"
        if path.is_dir():
            return MemoryPack.open(path)
        identity = Model.load(self.opened).identity
        rng = np.random.default_rng(seed)
        sizes = (identity.hidden_size, identity.num_experts, identity.num_experts)

        def entries() -> GateEntries:
            drawn = (rng.normal(size=(ENTRIES, size)).astype(np.float32) for size in sizes)
            keys, logits, residuals = drawn
            return GateEntries(keys, logits, residuals, keys.mean(axis=0))

        gamma = 1 / (2 * identity.hidden_size)
        return write_pack(
            path,
            model=identity,
            gates={gate: entries() for gate in range(identity.num_gates)},
            variant=variant,
            neighbors=8,
            similarity=similarity,
            calibration=replace(preset(variant, weighting="softmax"), scale=1.0, gamma=gamma),
            origins=None,
            provenance={"made": "at random, by the self-test"},
        )


def routing_rules(_: Bench) -> str:
    """Routing rules give the experts and weights that they were worked out to give."""
    for case in ROUTING:
        bias = None if case.bias is None else np.array(case.bias, np.float32)
        ids, weights = case.rule.apply(np.array([case.logits], np.float32), bias)
        _equal(f"{case.name}: experts", ids[0], case.expert_ids)
        _near(f"{case.name}: weights", weights[0], case.expert_weights, 1e-6)
    return f"{len(ROUTING)} rules"


def blends(_: Bench) -> str:
    """The blend gives the numbers that it was worked out to give."""
    for case in BLEND:
        found = knn_blend(
            np.array([case.x], np.float32), np.array([case.rows], np.float32), case.memory,
            np.zeros((1, 2), np.float32), np.array([1]),
        )  # fmt: skip
        _equal(f"{case.name}: neighbours", found.neighbors[0], case.neighbors)
        _near(f"{case.name}: similarities", found.similarities[0], case.similarities, 1e-6)
        _near(f"{case.name}: λ", found.confidence, [case.confidence], 1e-6)
        _near(f"{case.name}: rows", found.rows[0], case.blended, 1e-6)
    return f"{len(BLEND)} blends"


def known_logits(bench: Bench) -> str:
    """The bundle gives the logits that transformers gives."""
    if not bench.shipped:
        raise NotHere("known of the self-test's own bundle alone")
    known = json.loads((HERE / "known.json").read_text(encoding="utf-8"))
    worst = 0.0
    for layout in ("split", "fused"):
        logits = bench.model(memory=None, layout=layout).logits(known["tokens"])[-1]
        worst = max(worst, _near(layout, logits, known["last_logits"], TOLERANCE))
    return f"split and fused, off by {worst:.1e}"


def gate(backend: Backend) -> Callable[[Bench], str]:
    """A check of one backend: its logits are those of NumPy in float64."""

    def check(bench: Bench) -> str:
        if backend == "faiss" and find_spec("faiss") is None:
            raise NotHere("faiss is not installed")
        worst, kinds = 0.0, list(_packs(bench))
        for name, pack in kinds:
            found, expected = (
                _logits(bench.model(memory=pack, gate=one), bench.ids)
                for one in (backend, "numpy-float64")
            )
            worst = max(worst, _near(name, found, expected, TOLERANCE * np.abs(expected).max()))
        return f"kinds of memory: {len(kinds)}, off by {worst:.1e}"

    return check


def fused(bench: Bench) -> str:
    """The fused layout gives the logits of the split one."""
    if bench.opened.manifest.fused is None:
        raise NotHere("the bundle has no fused graph")
    pack = bench.random_pack()
    found = _logits(bench.model(memory=pack, layout="fused"), bench.ids)
    expected = _logits(bench.model(memory=pack, gate="numpy-float64"), bench.ids)
    worst = _near("fused", found, expected, TOLERANCE * np.abs(expected).max())
    return f"off by {worst:.1e}"


def bundle_hashes(bench: Bench) -> str:
    """A changed file is noticed: in the bundle where that can be tried, and in a pack."""
    count = 0
    if bench.shipped:
        copy = bench.folder / "changed"
        shutil.copytree(bench.bundle, copy)
        for name in bench.opened.manifest.files:
            with _changed(copy / name):
                _refused(name, BundleError, lambda: Bundle.open(copy))
                count += 1
    path = bench.random_pack(seed=3).path
    for name in ("gate-00.safetensors", "memory.json"):
        with _changed(path / name):
            _refused(name, MemoryPackError, lambda: MemoryPack.open(path))
            count += 1
    return f"{count} changed files refused, {len(bench.opened.manifest.files)} hashes right"


def sampling(bench: Bench) -> str:
    """The same seed gives the same text, another one another; greedy is the likeliest token."""
    model = bench.model()
    ids = bench.ids.tolist()

    def write(seed: int) -> tuple[int, ...]:
        options: dict[str, Any] = {"do_sample": True, "temperature": 2.0, "top_k": 0, "top_p": 1.0}
        text = model.generate(ids, max_new_tokens=8, eos_token_ids=(), seed=seed, **options)
        return text.token_ids

    first = write(7)
    _equal("the same seed", write(7), first)
    if all(write(seed) == first for seed in (8, 9, 10)):
        raise VerificationError("other seeds", "give the same text")
    greedy = model.generate(ids, max_new_tokens=1, do_sample=False).token_ids
    _equal("greedy", greedy, [int(model.logits(ids)[-1].argmax())])
    return f"{len(first)} tokens"


def sessions(bench: Bench) -> str:
    """A session that runs only what is new writes what a new one writes."""
    model, ids = bench.model(), bench.ids.tolist()
    options: dict[str, Any] = {"max_new_tokens": 4, "do_sample": False, "eos_token_ids": ()}
    session = model.session()
    first = session.generate(ids, **options).token_ids
    longer = [*ids, *first, ids[0]]
    before = model.metrics.reused_tokens
    second = session.generate(longer, **options).token_ids
    reused = model.metrics.reused_tokens - before
    _equal("tokens not run again", [reused], [len(ids) + len(first) - 1])
    _equal("the text", second, model.generate(longer, **options).token_ids)
    return f"{reused} of {len(longer)} tokens not run again"


def swaps(bench: Bench) -> str:
    """A swap and added entries count from the next step on; a damaged pack changes nothing."""
    model, other = bench.model(memory=None), bench.random_pack(seed=2)
    frozen = model.logits(bench.ids)
    model.swap_memory(other)
    expected = bench.model(memory=other).logits(bench.ids)
    _near("after the swap", model.logits(bench.ids), expected, 0.0)
    if not np.abs(expected - frozen).max() > 0:
        raise VerificationError("after the swap", "nothing changed")
    path = bench.random_pack(seed=4).path
    with _changed(path / "gate-00.safetensors"):
        _refused("a damaged pack", MemoryPackError, lambda: model.swap_memory(path))
    _near("after a damaged pack", model.logits(bench.ids), expected, 0.0)
    model.disable_memory()
    _near("without a memory", model.logits(bench.ids), frozen, 0.0)
    return "put in place, refused, taken away"


CHECKS: dict[str, Callable[[Bench], str]] = {
    "routing rules": routing_rules,
    "blend": blends,
    "known logits": known_logits,
    **{f"gate {name}": gate(name) for name in GATES},
    "fused layout": fused,
    "hashes": bundle_hashes,
    "sampling": sampling,
    "sessions": sessions,
    "swap": swaps,
}


def _packs(bench: Bench) -> Iterator[tuple[str, MemoryPack]]:
    if bench.given:
        yield "the pack given", bench.memory
    for name, similarity, variant in KINDS:
        if name in bench.opened.manifest.gates:
            yield name, bench.random_pack(similarity, variant)


def _logits(model: Model, ids: NDArray[np.int64]) -> NDArray[np.float32]:
    """Logits after each token: the first half read at once, the rest token by token."""
    half = len(ids) // 2
    cache = model.pipeline.new_cache(capacity=len(ids))
    rows = [model.pipeline.step(cache, ids[None, :half], rows="all").copy()]
    rows += [model.pipeline.step(cache, np.array([[token]])).copy() for token in ids[half:]]
    return np.concatenate(rows)


def _equal(where: str, found: Any, expected: Any) -> None:
    one, other = (np.asarray(numbers).tolist() for numbers in (found, expected))
    if one != other:
        raise VerificationError(where, "differ", expected=other, found=one)


def _near(where: str, found: Any, expected: Any, tolerance: float) -> float:
    """The largest difference, no more than the tolerance."""
    one, other = np.asarray(found, np.float64), np.asarray(expected, np.float64)
    worst = float(np.abs(one - other).max())
    if not worst <= tolerance:
        raise VerificationError(
            where, "differ", expected=f"at most {tolerance:.1e} apart", found=f"{worst:.1e}"
        )
    return worst


def _refused(where: str, kind: type[KnnMoeError], act: Callable[[], object]) -> None:
    try:
        act()
    except kind:
        return
    raise VerificationError(where, "was changed, and nothing noticed", expected=kind.__name__)


class _changed:  # noqa: N801 - reads as a verb
    """A file with one bit of its last byte turned, until the block ends."""

    def __init__(self, path: Path) -> None:
        self._path, self._content = path, path.read_bytes()

    def __enter__(self) -> None:
        self._path.write_bytes(self._content[:-1] + bytes([self._content[-1] ^ 1]))

    def __exit__(self, *_: object) -> None:
        self._path.write_bytes(self._content)
