"""A comparison: every row on the same texts, then what explains the memory's."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

import knnmoe
from knnmoe.runtime.errors import KnnMoeError
from knnmoe.runtime.texts import TokenText

from .bench import DEFAULT_MAX_TOKENS, Bench, Inputs, open_bench
from .explain import Explanation, explain
from .measured import Base, Change, Measured, change, clusters
from .rows import ROWS, Row

Say = Callable[[str], None]


@dataclass(frozen=True)
class RowResult:
    """A row that was measured, or why it was not.

    Attributes:
        row: Which one.
        changes: By text, change of NLL against the frozen router; empty if it failed.
        measured: What it said, if it did not fail.
        failed: Why it was not measured.
        seconds: Wall time.
    """

    row: Row
    changes: Mapping[str, Change]
    measured: Measured | None
    failed: str | None
    seconds: float

    def to_json(self) -> dict[str, Any]:
        """The figures by name."""
        found = self.measured
        return {
            "row": self.row.name,
            "label": self.row.label,
            "group": self.row.group,
            "trained": self.row.trained,
            "source": self.row.source or None,
            "changes": {name: one.to_json() for name, one in self.changes.items()},
            "extra_bytes": None if found is None else found.extra_bytes,
            "compared_with": None if found is None else found.base,
            "chosen": {} if found is None else dict(found.chosen),
            "facts": {} if found is None else dict(found.facts),
            "failed": self.failed,
            "seconds": self.seconds,
        }


@dataclass(frozen=True)
class Comparison:
    """What `compare` found.

    Attributes:
        rows: In the order of the table.
        frozen: By text, the frozen router's NLL on the runtime, nats a token.
        texts: By text, what it is.
        clusters: By text, what the bootstrap resampled.
        explanation: What explains the memory's row; None if that failed, with why.
        not_explained: Why there is no explanation.
        memory: How the memory is used, for the reader.
        model: Model type and sizes.
    """

    rows: Sequence[RowResult]
    frozen: Mapping[str, float]
    texts: Mapping[str, Mapping[str, Any]]
    clusters: Mapping[str, str]
    explanation: Explanation | None
    not_explained: str | None
    memory: Mapping[str, Any]
    model: Mapping[str, Any]

    def to_json(self) -> dict[str, Any]:
        """All of it as one JSON object."""
        return {
            "knnmoe": knnmoe.__version__,
            "model": dict(self.model),
            "memory": dict(self.memory),
            "texts": {name: dict(text) for name, text in self.texts.items()},
            "frozen_nll": dict(self.frozen),
            "resampled": dict(self.clusters),
            "rows": [row.to_json() for row in self.rows],
            "explanation": None if self.explanation is None else _explained(self.explanation),
            "not_explained": self.not_explained,
        }


def compare(
    inputs: Inputs,
    *,
    rows: Sequence[Row] = ROWS,
    context: int | None = None,
    max_tokens: int | None = DEFAULT_MAX_TOKENS,
    threads: int | None = None,
    explained: bool = True,
    say: Say = lambda text: None,
) -> Comparison:
    """Measure a memory beside the alternatives, all on the same reference and test texts.

    Changes are against the frozen router, with the 95 % interval of a paired bootstrap over whole
    documents. Rows that have settings choose them on validation text; the tests choose nothing. A
    row that fails says why, and the others go on.

    Args:
        inputs: Model, memory and texts.
        rows: Which.
        context: Tokens a sequence; None takes 256, or all positions of a model with fewer.
        max_tokens: Predicted tokens of each test text at most.
        threads: Of the runtime and of torch.
        explained: Whether to take the memory's gain apart.
        say: Called with what is being done.

    Raises:
        As `open_bench`; nothing has been measured then.
    """
    with tempfile.TemporaryDirectory(prefix="knnmoe-compare-") as scratch:
        bench = open_bench(
            inputs,
            Path(scratch),
            context=context,
            max_tokens=max_tokens,
            threads=threads,
            say=say,
        )
        bases = _Bases(bench)
        results = []
        for number, row in enumerate(rows, start=1):
            prefix = f"{number}/{len(rows)} {row.label}"
            say(prefix)
            here = replace(bench, say=_prefixed(prefix, say))
            results.append(_measure(row, here, bases))
        explanation, why_not = _explain(bench) if explained else (None, "not asked for")
    return Comparison(
        rows=results,
        frozen={
            name: float(bases.of("runtime")[name].sum() / text.targets)
            for name, text in bench.tests.items()
        },
        texts={
            name: _described(text)
            for name, text in {
                "reference": bench.reference,
                "validation": bench.validation,
                **bench.tests,
            }.items()
        },
        clusters={name: clusters(text)[1] for name, text in bench.tests.items()},
        explanation=explanation,
        not_explained=why_not,
        memory={
            "entries": bench.pack.entries,
            "bytes": bench.pack.bytes,
            "variant": bench.pack.variant,
            "neighbors": bench.pack.neighbors,
            "similarity": bench.pack.similarity,
            "gates": [gate.gate for gate in bench.pack.gates],
            "calibrated": bench.pack.provenance.get("calibration") is not None,
        },
        model={**asdict(bench.model.identity), "top_k": bench.model.bundle.manifest.routing.top_k},
    )


def _prefixed(prefix: str, say: Say) -> Say:
    return lambda text: say(f"{prefix}: {text}")


class _Bases:
    """What rows are compared with: the frozen router, measured once on each side."""

    def __init__(self, bench: Bench) -> None:
        self._bench = bench
        self._found: dict[Base, dict[str, NDArray[np.float64]]] = {}

    def of(self, base: Base) -> dict[str, NDArray[np.float64]]:
        """By text, summed NLL of each sequence."""
        if base not in self._found:
            runtime = base == "runtime"
            self._found[base] = (
                self._bench.runtime_nll(None) if runtime else _torch_nll(self._bench)
            )
        return self._found[base]


def _torch_nll(bench: Bench) -> dict[str, NDArray[np.float64]]:
    from ..teacher import Teacher
    from .torch_model import sequence_nll

    teacher = Teacher.load(bench.checkpoint)
    return {name: sequence_nll(teacher, text) for name, text in bench.tests.items()}


def _measure(row: Row, bench: Bench, bases: _Bases) -> RowResult:
    started = time.monotonic()
    try:
        measured = row.measure(bench)
        base = bases.of(measured.base)
        changes = {
            name: change(measured.nll[name], base[name], text) for name, text in bench.tests.items()
        }
    except Exception as error:  # whatever one method does, the others are still worth knowing
        return RowResult(row, {}, None, _reason(error), time.monotonic() - started)
    return RowResult(row, changes, measured, None, time.monotonic() - started)


def _explain(bench: Bench) -> tuple[Explanation | None, str | None]:
    try:
        return explain(bench), None
    except Exception as error:  # the table is worth having without it
        return None, _reason(error)


def _reason(error: Exception) -> str:
    text = str(error).strip() or "no message"
    return text if isinstance(error, KnnMoeError) else f"{type(error).__name__}: {text}"


def _described(text: TokenText) -> dict[str, Any]:
    return {
        "files": list(text.names),
        "documents": text.documents,
        "sequences": len(text.sequences),
        "tokens": text.targets,
        "sha256": text.sha256,
    }


def _explained(found: Explanation) -> dict[str, Any]:
    return {
        "gates": [
            {
                "gate": one.gate,
                "alone": {name: c.to_json() for name, c in one.alone.items()},
                "without": {name: c.to_json() for name, c in one.without.items()},
            }
            for one in found.gates
        ],
        "texts": {name: asdict(text) for name, text in found.texts.items()},
    }
