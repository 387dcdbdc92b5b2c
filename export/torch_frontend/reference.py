"""transformers beside a traced bundle: its routers' logits, and its weights as they were stored."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor
from torch.nn import functional as F  # noqa: N812 - the name everybody knows it by
from torch.overrides import TorchFunctionMode

from knnmoe.runtime.bundle import Bundle
from knnmoe.runtime.errors import BackendError

from .names import EXPERTS, router_names, stored_names


class RouterLogits(TorchFunctionMode):
    """Within it, the results of some linear maps are kept.

    Args:
        weights: Of these maps.

    Attributes:
        found: The results [T, E], in the order of the weights.
    """

    def __init__(self, weights: Sequence[Tensor]) -> None:
        super().__init__()
        self._places = {weight.data_ptr(): place for place, weight in enumerate(weights)}
        self._found: dict[int, Tensor] = {}

    @property
    def found(self) -> list[Tensor]:
        """The results [T, E], in the order of the weights."""
        if len(self._found) != len(self._places):
            raise BackendError(
                "verification",
                "a pass of transformers did not meet every router",
                expected=f"{len(self._places)} routers",
                found=len(self._found),
                fix="Install the version of transformers that the bundle was exported with.",
            )
        return [self._found[place].flatten(0, -2) for place in range(len(self._places))]

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if func is F.linear:
            place = self._places.get(args[1].data_ptr())
            if place is not None:
                self._found[place] = result
        return result


def watched_routers(model: Any, bundle: Bundle) -> RouterLogits:
    """What keeps the logits of every gate of a bundle in passes of a model."""
    parameters = dict(model.named_parameters())
    return RouterLogits([parameters[name] for name in router_names(bundle)])


def round_weights(model: Any, bundle: Bundle) -> None:
    """Round the weights that a bundle stores as fp16 to those."""
    halves = {name for name, dtype in stored_names(bundle) if dtype == "F16"}
    stacks = any(EXPERTS in name for name in halves)
    for name, parameter in model.named_parameters():
        stack = parameter.ndim == 3 and name.endswith(("gate_up_proj", "down_proj"))
        if name in halves or (stack and stacks):
            for rows in parameter.data if stack else (parameter.data,):
                rows.copy_(rows.half().float())
