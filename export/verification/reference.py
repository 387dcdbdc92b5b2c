"""transformers as the reference, over the weights that a bundle stands for."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from knnmoe.export.families import FAMILIES
from knnmoe.export.storage import EXPERT_PARTS, FIELD_PARTS, Storage
from knnmoe.export.torch_frontend.names import is_traced
from knnmoe.runtime.bundle import Bundle
from knnmoe.runtime.errors import BackendError
from knnmoe.runtime.selection_bias import read_selection_biases

from .cases import Outputs, Tokens


def require_reference() -> None:
    """Raise `BackendError` unless torch and transformers are installed; imports neither."""
    for package in ("torch", "transformers"):
        if find_spec(package) is None:
            raise BackendError(
                "verification",
                f"needs the package {package}, which is not installed",
                fix="Run `pip install 'knnmoe[train]'`.",
            )


def reference(
    checkpoint: str | Path,
    tokens: Sequence[Sequence[Tokens]],
    bundle: Bundle,
    step: Callable[[], None],
) -> list[list[Outputs]]:
    """transformers in fp32 over the weights as they were stored, each sequence alone.

    Args:
        checkpoint: Its directory.
        tokens: The sequences of each case.
        bundle: The bundle whose weights are meant, and its routing rule.
        step: Called after each sequence.

    The model is freed on return.

    Raises:
        BackendError: If torch or transformers is not installed, or this version of transformers
            keeps weights under other names.
        CheckpointError: If transformers cannot load the checkpoint.
    """
    require_reference()
    import torch

    from knnmoe.export.torch_frontend.loading import load_fp32

    model = load_fp32(Path(checkpoint))
    _restore(model, bundle)
    run = _recording(model, bundle)
    rule, biases = bundle.manifest.routing, read_selection_biases(bundle)
    expected = []
    for sequences in tokens:
        row = []
        for sequence in sequences:
            with torch.inference_mode():
                router_logits, logits = run(torch.from_numpy(sequence)[None])
            gates = np.stack([gate.float().numpy() for gate in router_logits])
            ids = np.stack([rule.apply(*pair)[0] for pair in zip(gates, biases, strict=True)])
            row.append(Outputs(gates, ids, logits[0].float().numpy()))
            step()
        expected.append(row)
    return expected


def _recording(model: Any, bundle: Bundle) -> Callable[[Any], tuple[Sequence[Any], Any]]:
    """What runs a model of transformers: ids [1, S] → (router logits of each gate, logits)."""
    if is_traced(bundle.manifest):
        from knnmoe.export.torch_frontend.reference import watched_routers

        watched = watched_routers(model, bundle)

        def run_watched(ids: Any) -> tuple[Sequence[Any], Any]:
            with watched:
                logits = model(ids, use_cache=False).logits
            return watched.found, logits

        return run_watched

    def run(ids: Any) -> tuple[Sequence[Any], Any]:
        output = model(ids, output_router_logits=True)
        return output.router_logits, output.logits

    return run


def _restore(model: Any, bundle: Bundle) -> None:
    """Give a model of transformers the weights that those stored in the bundle stand for."""
    manifest = bundle.manifest
    if manifest.precision == "fp32":
        return
    if is_traced(manifest):
        from knnmoe.export.torch_frontend.reference import round_weights

        round_weights(model, bundle)
        return
    import torch

    parameters: dict[str, Any] = dict(model.named_parameters())
    names = FAMILIES[manifest.model_type].tensors
    tied = names.head not in parameters
    storage = Storage(manifest.precision, manifest.quantization, tied)
    if tied and storage.scheme("head") is not None:
        # The head is stored apart from the embedding that it is.
        head = model.get_output_embeddings()
        rows = storage.restored("head", head.weight.detach().numpy())
        head.weight = torch.nn.Parameter(torch.from_numpy(rows))

    def restore(name: str, part: str, *, turned: bool = False) -> None:
        with torch.no_grad():
            weight = parameters[name]
            if turned:  # transformers has [in, out] where the checkpoint does
                weight = weight.transpose(-1, -2)
            for rows in weight if weight.ndim > 2 else (weight,):  # one expert at a time
                # As they lay in memory when they were stored: the order decides how sums round.
                stored = np.ascontiguousarray(rows.numpy())
                rows.copy_(torch.from_numpy(storage.restored(part, stored)))

    restored = 0
    stacked = names.stacked_down is not None
    for field, part in FIELD_PARTS.items():
        template = getattr(names, field, None)
        if template is None:
            continue
        for layer in range(manifest.architecture.num_layers if "{layer}" in template else 1):
            name = template.format(layer=layer)
            if name in parameters:
                restore(name, part)
    for name in parameters:
        # transformers stacks the experts of a layer, whatever the checkpoint does.
        module, _, stack = name.rpartition(".experts.")
        if module and stack in EXPERT_PARTS:
            restore(name, EXPERT_PARTS[stack], turned=stacked)
            restored += 1
    if restored != manifest.architecture.num_gates * len(EXPERT_PARTS):
        raise BackendError(
            "verification",
            "this version of transformers keeps experts under other names",
            expected=f"{' and '.join(EXPERT_PARTS)} of {manifest.architecture.num_gates} layers",
            found=f"{restored} of them",
            fix="Install another version of transformers, or export without --verify.",
        )
