"""The selection biases of a bundle: one vector a gate, for routing rules that have one.

They are a tensor and not numbers of the rule, so they lie in a file of their own, whose values are
bound to the gates as inputs (docs/formats.md).
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open

from .bundle import EXPORT_AGAIN, SELECTION_BIAS, Bundle
from .errors import BundleError

TENSOR = "selection_bias"


def read_selection_biases(bundle: Bundle) -> tuple[NDArray[np.float32] | None, ...]:
    """The bias [E] of each gate, fp32; None for each where the routing rule has none.

    Raises:
        BundleError: If the file is not one tensor [G, E] of finite fp32 numbers.
    """
    manifest = bundle.manifest
    gates, experts = manifest.architecture.num_gates, manifest.architecture.num_experts
    if not manifest.routing.selection_bias:
        return (None,) * gates
    path = bundle.file(SELECTION_BIAS)
    try:
        with safe_open(path, framework="numpy") as file:
            found = {
                name: (tuple(view.get_shape()), view.get_dtype())
                for name in file.keys()  # noqa: SIM118 - not a mapping
                for view in (file.get_slice(name),)
            }
            if found != {TENSOR: ((gates, experts), "F32")}:
                raise BundleError(
                    path,
                    "holds other tensors",
                    expected=f"{TENSOR} [{gates}, {experts}] F32",
                    found=str(found)[:200],
                    fix=EXPORT_AGAIN,
                )
            biases: NDArray[np.float32] = file.get_tensor(TENSOR)
    except (SafetensorError, OSError) as error:
        raise BundleError(
            path, "not a readable safetensors file", found=error, fix=EXPORT_AGAIN
        ) from error
    if not np.isfinite(biases).all():
        raise BundleError(path, "has NaN or infinite numbers", fix=EXPORT_AGAIN)
    return tuple(np.ascontiguousarray(bias) for bias in biases)
