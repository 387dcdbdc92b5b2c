"""What the experts of a traced gate compute, and where their weights are."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from knnmoe.export.architecture import Swiglu
from knnmoe.export.weights import PlannedTensor, row_chunks
from knnmoe.pretrained import first_line
from knnmoe.runtime.errors import CheckpointError

from .loading import OTHER_FAMILY
from .names import EXPERTS


@dataclass(frozen=True)
class Experts:
    """The experts behind one gate, as transformers stacks them.

    Attributes:
        module: Their module.
        number: Of the gate.
        swiglu: What they make of gate and up.
    """

    module: Any
    number: int
    swiglu: Swiglu

    @property
    def count(self) -> int:
        """How many there are."""
        return int(self.module.gate_up_proj.shape[0])

    def name(self, part: str) -> str:
        """Of one of their weights in a bundle: `gate_up`, `down`, and with `_bias`."""
        return f"gates.{self.number}{EXPERTS}{part}"

    @property
    def biases(self) -> bool:
        """Whether their linear maps have biases."""
        return bool(self.module.has_bias)

    def weights(self) -> list[PlannedTensor]:
        """As com.microsoft.MoE reads them: gate and up rows interleaved, and down; biases."""
        up, down = self._stack("gate_up_proj"), self._stack("down_proj")
        planned = [
            PlannedTensor(self.name("gate_up"), tuple(up.shape), partial(self._rows, up, True)),
            PlannedTensor(self.name("down"), tuple(down.shape), partial(self._rows, down, False)),
        ]
        if self.biases:
            for part, whole in (("gate_up", True), ("down", False)):
                bias = getattr(self.module, f"{part}_proj_bias")
                rows = partial(self._rows, bias, whole)
                planned.append(PlannedTensor(self.name(f"{part}_bias"), tuple(bias.shape), rows))
        return planned

    def _stack(self, name: str) -> Tensor:
        """A stack of linear layers [E, out, in]."""
        stack: Tensor = getattr(self.module, name)
        return stack.transpose(1, 2) if self.module.is_transposed else stack

    def _rows(self, stack: Tensor, gate_up: bool) -> Iterator[NDArray[np.float32]]:
        """The experts one after another; gate and up in turn, however the stack has them."""
        for expert in stack.detach():
            rows = expert
            if gate_up and self.module.is_concatenated:
                gate, up = rows.chunk(2)
                rows = torch.stack((gate, up), 1).flatten(0, 1)
            yield from row_chunks(rows.float().contiguous().numpy())


def describe_experts(module: Any, number: int) -> Experts:
    """What the experts of a gate are.

    Raises:
        CheckpointError: If they are no gated linear layers, or their activation is another one than
            the runtime's operator has.
    """
    where = f"experts of gate {number}"
    if not module.has_gate or getattr(module, "has_post_expert_norm", False):
        raise CheckpointError(
            where,
            "are not made of gate, up and down"
            if not module.has_gate
            else "have norms of their own",
            expected="down(act(gate) · up)",
            found=type(module).__name__,
            fix=OTHER_FAMILY,
        )
    found = _swiglu(module)
    if found is None:
        raise CheckpointError(
            where,
            "have an activation that the runtime's operator has not",
            expected="gate · σ(alpha · gate) · (up + shift), cut off at a limit or not",
            found=type(getattr(module, "act_fn", module)).__name__,
            fix=OTHER_FAMILY,
        )
    return Experts(module, number, found)


def _swiglu(module: Any) -> Swiglu | None:
    """The numbers of an activation, from what it makes of a few; None if it is another one."""

    def apply(gate: NDArray[np.float64], up: NDArray[np.float64]) -> NDArray[np.float64]:
        parts = [torch.from_numpy(part)[None] for part in (gate, up)]
        together = torch.cat(parts, 1)
        if not module.is_concatenated:
            together = torch.stack(parts, 2).flatten(1)
        with torch.no_grad():
            result: NDArray[np.float64] = module._apply_gate(together).double().numpy()[0]
        return result

    ones, zeros = np.full(3, 0.5), np.zeros(3)
    try:
        slope = float((apply(ones, ones) - apply(ones, zeros))[0] / 0.5)  # 0.5 · σ(alpha / 2)
        if not 0 < slope < 0.5:
            return None
        alpha = round(float(-2 * np.log(0.5 / slope - 1)), 5)
        shift = round(float(apply(ones, zeros)[0] / slope), 5)
        far = float(apply(ones, np.full(3, 1e6))[0] / slope) - shift
        limit = None if far > 1e5 else round(far, 4)
        rng = np.random.default_rng(0)
        spread = 4.0 if limit is None else 2 * limit
        gate, up = rng.normal(0, spread, (2, 2000))
        found = apply(gate, up)
    except (RuntimeError, TypeError, ValueError) as error:
        raise CheckpointError(
            type(module).__name__,
            f"has an activation that cannot be tried ({first_line(error)})",
            fix=OTHER_FAMILY,
        ) from error
    if limit is not None:
        gate, up = np.minimum(gate, limit), np.clip(up, -limit, limit)
    expected = gate / (1 + np.exp(-alpha * gate)) * (up + shift)
    if not np.allclose(found, expected, rtol=1e-4, atol=1e-4):
        return None
    return Swiglu(alpha, shift, limit)
