"""A bundle run with plain NumPy feeds: simple, not fast."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
from numpy.typing import NDArray

from knnmoe.runtime.bundle import FROZEN, Bundle
from knnmoe.runtime.selection_bias import read_selection_biases

from .cases import Case, Floats, Outputs, Tokens, joined

# Where ONNX Runtime looks for the arithmetic of quantised experts, before the node's attribute.
_QMOE_ARITHMETIC = "ORT_QMOE_CPU_QNBIT_GEMM"

Decision = tuple[NDArray[np.int32], Floats]


class SplitRunner:
    """Runs a bundle's segments and frozen gate graph with plain NumPy feeds.

    Args:
        bundle: What to run.
        exact: Whether operators over quantised weights keep activations in fp32, whatever the
            bundle's graphs say.
        decisions: Expert ids and weights to use in place of the gates' own, in order.

    Attributes:
        decisions: (expert ids, expert weights) of each gate that ran, in order.
    """

    def __init__(
        self,
        bundle: Bundle,
        *,
        exact: bool = False,
        decisions: Sequence[Decision] | None = None,
    ) -> None:
        self._manifest = bundle.manifest
        load = _exact_session if exact and bundle.manifest.quantization else _session
        self._segments = [load(bundle, segment.file) for segment in bundle.manifest.segments]
        self._gate = _session(bundle, bundle.manifest.gates[FROZEN].file)
        self._selection_biases = read_selection_biases(bundle)
        self._given = None if decisions is None else iter(decisions)
        self.decisions: list[Decision] = []

    def run(self, case: Case, sequences: Sequence[Tokens]) -> list[Outputs]:
        """Feed the sequences [past + new] in the pieces of the case."""
        batch = len(sequences)
        shape = self._manifest.architecture
        size = (batch, shape.num_kv_heads, max(map(len, sequences)) + 1, shape.head_size)
        cache = {
            f"past_{part}_{layer}": np.zeros(size, np.float32)
            for part in ("key", "value")
            for layer in range(shape.num_layers)
        }
        parts: list[list[Outputs]] = [[] for _ in sequences]
        position = np.zeros(batch, np.int64)
        for counts in self._pieces(case):
            width = int(counts.max())
            ids = np.zeros((batch, width), np.int64)
            for row, sequence in enumerate(sequences):
                start = position[row]
                ids[row, : counts[row]] = sequence[start : start + counts[row]]
            outputs = self._step(ids, np.maximum(position + counts, position + 1), cache)
            for row, output in enumerate(outputs):
                count = counts[row]
                parts[row].append(
                    Outputs(
                        output.router_logits[:, :count],
                        output.expert_ids[:, :count],
                        output.logits[:count],
                    )
                )
            position += counts
        return [joined(pieces) for pieces in parts]

    @staticmethod
    def _pieces(case: Case) -> list[NDArray[np.int64]]:
        """Tokens a sequence of each call. GroupQueryAttention takes several tokens of several
        sequences only where no past is: such a piece is fed token by token."""
        past, new = np.array(case.past), np.array(case.new)
        if not past.any():
            return [new]
        if len(new) == 1:
            return [past, new]
        steps = [np.minimum(np.maximum(new - index, 0), 1) for index in range(new.max())]
        return [past, *steps]

    def _step(
        self, ids: Tokens, totals: NDArray[np.int64], cache: dict[str, Floats]
    ) -> list[Outputs]:
        """One call over ids [B, S] with the total lengths [B] after it; the cache is updated.

        A sequence without a token in this call writes one that the next call overwrites.
        """
        batch, width = ids.shape
        values: dict[str, Any] = {
            "input_ids": ids,
            "seqlens_k": (totals - 1).astype(np.int32),
            "total_sequence_length": np.array(totals.max(), np.int32),
            "logit_rows": np.arange(ids.size, dtype=np.int64),
        }
        router_logits, expert_ids = [], []
        for index, segment in enumerate(self._segments):
            feeds = {
                spec.name: values[spec.name] if spec.name in values else cache[spec.name]
                for spec in segment.get_inputs()
            }
            names = [spec.name for spec in segment.get_outputs()]
            for name, output in zip(names, segment.run(names, feeds), strict=True):
                if name.startswith("present_"):
                    cache[name.replace("present", "past", 1)] = output
                else:
                    values[name.removesuffix("_out")] = output
            if segment is not self._segments[-1]:
                values["selection_bias"] = self._selection_biases[index]
                gate_feeds = {spec.name: values[spec.name] for spec in self._gate.get_inputs()}
                ids_, weights = self._gate.run(["expert_ids", "expert_weights"], gate_feeds)
                if self._given is not None:
                    ids_, weights = next(self._given)
                self.decisions.append((ids_, weights))
                values["expert_ids"], values["expert_weights"] = ids_, weights
                router_logits.append(values["router_logits"].reshape(batch, width, -1))
                expert_ids.append(values["expert_ids"].reshape(batch, width, -1))
        logits = values["logits"].reshape(batch, width, -1)
        gates, experts = np.stack(router_logits), np.stack(expert_ids)
        return [Outputs(gates[:, row], experts[:, row], logits[row]) for row in range(batch)]


def _session(bundle: Bundle, file: str) -> Any:
    import onnxruntime

    return onnxruntime.InferenceSession(bundle.file(file), _session_options(bundle))


def _exact_session(bundle: Bundle, file: str) -> Any:
    """A segment whose operators keep activations in fp32."""
    import onnx
    import onnxruntime

    model = onnx.load(bundle.file(file), load_external_data=False)
    for node in model.graph.node:
        for attribute in node.attribute:
            if attribute.name == "accuracy_level":
                attribute.i = 0
    with _environment(_QMOE_ARITHMETIC, "fp32"):  # 8-bit experts know no other way
        return onnxruntime.InferenceSession(model.SerializeToString(), _session_options(bundle))


def _session_options(bundle: Bundle) -> Any:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    # Threads that spin while they wait would take the cores from the next session.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    # For graphs from memory: where their weights lie.
    options.add_session_config_entry(
        "session.model_external_initializers_file_folder_path", str(bundle.path / "segments")
    )
    return options


@contextmanager
def _environment(name: str, value: str) -> Iterator[None]:
    before = os.environ.get(name)
    os.environ[name] = value
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before
