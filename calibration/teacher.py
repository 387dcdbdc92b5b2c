"""The frozen model with its routing opened.

Nothing here knows a family: transformers itself says which modules are routers (what it records
as `router_logits`), and the one linear map inside a router's forward is where its logits are born.
What follows in that forward, scores, selection and weights, is the family's own code, gradients
included.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module
from torch.nn import functional as F  # noqa: N812 - the name everybody knows it by
from torch.overrides import TorchFunctionMode

from knnmoe.pretrained import first_line, load_pretrained
from knnmoe.runtime.errors import BackendError, CheckpointError

from .credit import pass_over_choice, register_next_attention
from .settings import Compute, Gradient, Objective

DTYPES: dict[Compute, torch.dtype] = {
    "fp32": torch.float32,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
}

# gate, router input [T, D], router logits [T, E] → router logits [T, E] to go on with.
Correction = Callable[[int, Tensor, Tensor], Tensor]


class Teacher:
    """A frozen causal language model from transformers whose router logits can be changed.

    Use `Teacher.load`, or wrap a model that is already there.

    Args:
        model: The model; it is put into evaluation mode and its weights are frozen.
        objective: `future`, or `next`: gradients do not go from a position to earlier ones.
        gradient: `plain`, or `straight-through`: all experts are run while gradients are wanted.

    Attributes:
        num_gates: Gates, numbered in the order in which a forward pass meets them.
        hidden_size: Width D of the router input.
        num_experts: Experts E.

    Raises:
        CheckpointError: If the model has no routers that can be opened.
    """

    def __init__(
        self, model: Any, *, objective: Objective = "future", gradient: Gradient = "plain"
    ) -> None:
        self.model = model.eval().requires_grad_(False)
        self.device = next(model.parameters()).device
        self.passes_over_choice = gradient == "straight-through"
        if objective == "next":
            self.model.set_attn_implementation(register_next_attention())
        self._correct: Correction | None = None
        self._numbers: dict[Module, int] = {}
        self._routers = _find_routers(model)
        for name, router in self._routers.items():
            router.forward = _opened(self, name, router, router.forward)
        widths = self._meet_gates()
        self.num_gates = len(self._numbers)
        self.hidden_size, self.num_experts = widths
        if objective == "next":
            self._check_own_positions()

    @staticmethod
    def load(
        path: str | Path,
        *,
        device: str = "cpu",
        dtype: Compute = "fp32",
        objective: Objective = "future",
        gradient: Gradient = "plain",
    ) -> Teacher:
        """Load a checkpoint directory, from disk only and without running its code.

        Args:
            path: The directory.
            device: As torch names it.
            dtype: To compute in.
            objective: See `Teacher`.
            gradient: See `Teacher`.

        Raises:
            CheckpointError: If transformers cannot load it whole, its routers cannot be opened, or
                it is not made for the objective or the gradient.
            BackendError: If the device is not there, or too small.
            DeviceError: If there is not enough memory for it.
        """
        model = load_pretrained(Path(path), DTYPES[dtype])
        _choose_experts(model, device, DTYPES[dtype])
        try:
            model = model.to(device)
        except (RuntimeError, AssertionError) as error:
            raise BackendError(
                f"device {device}", f"cannot hold the model ({first_line(error)})",
                fix="Choose another --device, or --dtype bf16.",
            ) from error  # fmt: skip
        return Teacher(model, objective=objective, gradient=gradient)

    @property
    def vocab_size(self) -> int:
        """Tokens the model has embeddings for."""
        return int(self.model.get_input_embeddings().num_embeddings)

    @property
    def routers(self) -> tuple[Module, ...]:
        """The modules whose logits can be changed."""
        return tuple(self._routers.values())

    def logits(self, token_ids: Tensor, correct: Correction | None = None) -> Tensor:
        """Logits [B, S, V] for token ids [B, S], each router's logits passed through `correct`.

        Sequences start at the left. What comes after a sequence's end does not reach back to it, so
        padding needs no mask here, only to be left out of what is made of the result.
        """
        with self._corrected(correct):
            logits: Tensor = self.model(input_ids=token_ids, use_cache=False).logits
        return logits

    @contextlib.contextmanager
    def _corrected(self, correct: Correction | None) -> Iterator[None]:
        self._correct = correct
        try:
            yield
        finally:
            self._correct = None

    def _meet_gates(self) -> tuple[int, int]:
        """Number the gates by a pass over one token; D and E, which all gates must share."""
        widths: set[tuple[int, int]] = set()

        def note(gate: int, x: Tensor, logits: Tensor) -> Tensor:
            widths.add((x.shape[-1], logits.shape[-1]))
            return logits

        with torch.no_grad():
            self.logits(torch.zeros(1, 1, dtype=torch.long, device=self.device), note)
        if len(widths) != 1:
            raise CheckpointError(
                type(self.model).__name__,
                "its gates differ in width",
                expected="one hidden size and one number of experts",
                found=sorted(widths),
            )
        return widths.pop()

    def _check_own_positions(self) -> None:
        """Whether no gradient goes from one position to another, on five tokens."""
        deltas: list[Tensor] = []

        def record(gate: int, x: Tensor, logits: Tensor) -> Tensor:
            deltas.append(torch.zeros_like(logits).requires_grad_())
            return logits + deltas[-1]

        tokens = torch.arange(5, device=self.device)[None] % self.vocab_size
        last = self.logits(tokens, record)[0, -1].float().log_softmax(-1)[0]
        if any(bool(slope[:-1].any()) for slope in torch.autograd.grad(last, deltas)):
            raise CheckpointError(
                type(self.model).__name__,
                "its layers pass gradients between positions in a way that cannot be opened",
                expected="attention as transformers makes it exchangeable",
                fix="Build with --objective future.",
            )

    def _number(self, router: Module) -> int:
        return self._numbers.setdefault(router, len(self._numbers))


@dataclass(frozen=True)
class _Call:
    """One pass of one gate."""

    gate: int
    router_input: Tensor
    correct: Correction


class _OpenedLinear(TorchFunctionMode):
    """Passes the result of the linear map inside a router's forward through a correction."""

    def __init__(self, call: _Call) -> None:
        super().__init__()
        self.call = call
        self.seen = 0
        self.logits: Tensor | None = None

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if func is not F.linear:
            return result
        self.seen += 1
        rows = result.reshape(-1, result.shape[-1])
        self.logits = self.call.correct(self.call.gate, self.call.router_input, rows)
        return self.logits.view_as(result)


def _opened(
    teacher: Teacher, name: str, router: Module, forward: Callable[..., Any]
) -> Callable[..., Any]:
    """A router's forward that passes its logits through the teacher's correction, if it has one."""

    def corrected(hidden: Tensor, *args: Any, **kwargs: Any) -> Any:
        correct = teacher._correct
        if correct is None:
            return forward(hidden, *args, **kwargs)
        x = hidden.reshape(-1, hidden.shape[-1])
        mode = _OpenedLinear(_Call(teacher._number(router), x, correct))
        with mode:
            result = forward(hidden, *args, **kwargs)
        if mode.seen != 1 or mode.logits is None:
            raise CheckpointError(
                f"{type(router).__name__} at {name}",
                "this router's logits cannot be opened",
                expected="one linear map in its forward",
                found=mode.seen,
                fix="This architecture needs support of its own.",
            )
        if teacher.passes_over_choice and torch.is_grad_enabled():
            return pass_over_choice(mode.logits, result)
        return result

    return corrected


def _find_routers(model: Any) -> dict[str, Module]:
    """The modules that transformers records as `router_logits`, by name."""
    classes: tuple[type[Module], ...] = ()
    for module in model.modules():
        recorded = (getattr(module, "_can_record_outputs", None) or {}).get("router_logits", [])
        for recorder in recorded if isinstance(recorded, list | tuple) else [recorded]:
            target = getattr(recorder, "target_class", recorder)
            classes += (target,) if isinstance(target, type) else ()
    routers = {
        name: module for name, module in model.named_modules() if isinstance(module, classes)
    }
    if not routers:
        raise CheckpointError(
            type(model).__name__,
            "has no routers that transformers can record",
            expected="a Mixture-of-Experts model",
            fix="Name the checkpoint of a model with experts.",
        )
    return routers


def _choose_experts(model: Any, device: str, dtype: torch.dtype) -> None:
    """Of the implementations that transformers offers, eager experts are the fastest on a CPU.

    A GPU keeps the grouped products, which are made for bf16.
    """
    grouped = device.startswith("cuda") and dtype == torch.bfloat16
    if not grouped and model._can_set_experts_implementation():
        model.set_experts_implementation("eager")
