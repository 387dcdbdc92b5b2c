"""The gate with faiss as its search: for memories too large to scan at every token.

Up to `EXACT_ENTRIES` the index is flat and the result that of the NumPy reference, ties included.
Above, an inverted file is scanned in part: an approximation, chosen by size and stated by
`FaissGate.exact`. A faiss built for GPUs can search the same index on one, whose answers
come back to the host at every call, so it serves offline and as a second opinion of the kernels.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..blend import GateMemory, prepare_queries, search
from ..errors import BackendError
from .numpy import NumpyGate

EXACT_ENTRIES = 131_072
PROBED_SHARE = 16  # an inverted file scans one list in so many
TIE_MARGIN = 16  # candidates beyond K, so that ties at the border are seen
GPU_SCRATCH_BYTES = 256 << 20  # faiss takes 1.5 GB if not told


def load_faiss() -> Any:
    """The faiss module, or `BackendError` with how to get it."""
    try:
        import faiss
    except ImportError as error:
        raise BackendError(
            "gate 'faiss'", "faiss is not installed", fix="Run `pip install 'knnmoe[faiss]'`."
        ) from error
    return faiss


@dataclass(frozen=True)
class FaissGate(NumpyGate):
    """`NumpyGate` with its search done by a faiss index over the valid keys."""

    index: Any = field(default=None, repr=False)

    backend = "faiss"

    @property
    def exact(self) -> bool:
        """Whether every valid entry is scanned."""
        return self.index is None or not hasattr(self.index, "nprobe")

    def find(
        self, memory: GateMemory, x: NDArray[Any]
    ) -> tuple[NDArray[np.int64], NDArray[Any], NDArray[np.bool_]]:
        """See `NumpyGate.find`."""
        width = min(memory.k, len(memory.keys))
        wanted = min(memory.k + TIE_MARGIN, memory.n_valid)
        if wanted == 0:
            return search(x, memory, self.dtype)
        queries = np.ascontiguousarray(prepare_queries(x, memory), dtype=np.float32)
        scores, ids = self.index.search(queries, wanted)
        self.lap("scan")
        if memory.similarity == "rbf":  # squared distances, nearest first
            scores = np.exp(-np.float32(memory.calibration.gamma) * np.maximum(scores, 0))
        scores = np.where(ids >= 0, scores, -np.inf)
        order = np.lexsort((ids, -scores), axis=1)[:, :width]
        neighbors = _widen(np.take_along_axis(ids, order, axis=1), width, 0)
        ranked = _widen(np.take_along_axis(scores, order, axis=1), width, -np.inf)
        # Ties that reach beyond the candidates can only be broken by looking at every entry.
        open_ties = (scores[:, -1] == ranked[:, width - 1]) & (wanted < memory.n_valid)
        found = np.isfinite(ranked)
        # What was not found gets ids beyond the valid entries, as in the other backends.
        beyond = np.minimum(memory.n_valid + np.cumsum(~found, axis=1) - 1, len(memory.keys) - 1)
        neighbors = np.where(found, neighbors, beyond)
        similarities = np.where(found, np.clip(ranked, 0, 1), 0).astype(self.dtype)
        if self.exact and open_ties.any():
            rest = search(x[open_ties], memory, self.dtype)
            neighbors[open_ties], similarities[open_ties], found[open_ties] = rest
        self.lap("select")
        return neighbors, similarities, found


@dataclass(frozen=True)
class FaissGpuGate(FaissGate):
    """`FaissGate` over an index on the GPU."""

    backend = "faiss-gpu"


def build_index(
    memory: GateMemory, *, exact_entries: int = EXACT_ENTRIES, gpu: bool = False
) -> Any:
    """A faiss index over the valid keys of a memory; flat up to `exact_entries` entries.

    Args:
        memory: What is searched.
        exact_entries: The most entries that are scanned whole at every call.
        gpu: Search on the first GPU that faiss sees.

    Raises:
        BackendError: If faiss is missing, or the GPU asked for.
    """
    faiss = load_faiss()
    if gpu:
        check_gpu(faiss)
    keys = np.ascontiguousarray(memory.keys[: memory.n_valid])
    metric = faiss.METRIC_INNER_PRODUCT if memory.similarity == "cosine" else faiss.METRIC_L2
    if len(keys) <= exact_entries:
        index = faiss.IndexFlat(keys.shape[1], metric)
    else:
        lists = round(4 * math.sqrt(len(keys)))
        coarse = faiss.IndexFlat(keys.shape[1], metric)
        index = faiss.IndexIVFFlat(coarse, keys.shape[1], lists, metric)
        coarse.this.disown()
        index.own_fields = True
        index.train(keys)
        index.nprobe = max(1, lists // PROBED_SHARE)
    index.add(keys)
    return faiss.index_cpu_to_gpu(_gpu_resources(faiss), 0, index) if gpu else index


def check_gpu(faiss: Any) -> None:
    """That this faiss can search on a GPU.

    Raises:
        BackendError: If it was built without GPU support, or there is no device.
    """
    if not hasattr(faiss, "StandardGpuResources"):
        raise BackendError(
            "gate 'faiss-gpu'",
            "this faiss was built without GPU support",
            found=f"faiss {getattr(faiss, '__version__', 'of unknown version')}",
            fix="Install a faiss built with CUDA in place of faiss-cpu, or take the gate 'faiss'.",
        )
    if faiss.get_num_gpus() < 1:
        raise BackendError(
            "gate 'faiss-gpu'",
            "faiss sees no GPU",
            fix="Check the driver with `knnmoe doctor`, or take the gate 'faiss'.",
        )


@cache
def _gpu_resources(faiss: Any) -> Any:
    """Streams and scratch memory, one for all indices of the process."""
    resources = faiss.StandardGpuResources()
    resources.setTempMemory(GPU_SCRATCH_BYTES)
    return resources


def _widen(rows: NDArray[Any], width: int, filler: float) -> NDArray[Any]:
    missing = width - rows.shape[1]
    return np.pad(rows, ((0, 0), (0, missing)), constant_values=filler) if missing > 0 else rows
